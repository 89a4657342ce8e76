"""Superclasses of ImageNet's classes, in the class hierarchy of BREEDS.

    python -m src.data.imagenet get [DIR]          # downloads the three files (112 kB) to DIR or the cache folder

Source: Santurkar, Tsipras and Madry, "BREEDS: Benchmarks for Subpopulation Shift", arXiv:2008.04859. The hierarchy is a
revision of WordNet by hand and contains 890 of the 1,000 classes. Here a superclass holds all of its classes, as in
Self-Classifier, arXiv:2103.10994v3. BREEDS instead draws the same number of classes for each superclass.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import downloads
from ..config import OneLineParser
from ..errors import InputError, printable, run_script

SOURCE = "https://raw.githubusercontent.com/MadryLab/BREEDS-Benchmarks/master/imagenet_class_hierarchy/modified/"
FILES = {  # file name: SHA-256
    "class_hierarchy.txt": "039cfaddf9732855b93f7899ba4b5ba6d80f8dbe15cfaad566f575b6c8ce0216",
    "dataset_class_info.json": "be90503d57a001f95e094a81dc4de90772bfc58546ca58061d6474799829afd0",
    "node_names.txt": "322af45711ed69a7b199f11225bd964c7dae71df3c586498bef2f7c9e031dedb",
}
ROOT, LIVING, NON_LIVING = "n00001740", "n00004258", "n00021939"
SETS = {  # name: level, ancestor of the nodes, smallest number of classes
    "entity13": (3, ROOT, 20),
    "entity30": (4, ROOT, 8),
    "living17": (5, LIVING, 4),
    "nonliving26": (5, NON_LIVING, 4),
}


@dataclass(frozen=True)
class Superclasses:
    """Superclasses and the classes that belong to them.

    Attributes:
        names: the English name of each superclass.
        of_class: {WordNet id of a class: position of its superclass in `names`}, only for classes with a superclass.
    """

    names: list[str]
    of_class: dict[str, int]


def superclasses(choice: str, folder: str | Path = "") -> Superclasses:
    """Return the superclasses of one level of the hierarchy, or of one of BREEDS' sets.

    The level of a node is the length of the longest path from the root to it. Each node of the chosen level is a superclass
    of all classes below it. A node that is itself a class is its own superclass. A set of BREEDS keeps only the nodes of its
    level that lie below a given ancestor and have a minimum number of classes. The superclasses are numbered in the order
    of their WordNet ids.

    Args:
        choice: a level from "2" to "6", or "entity13", "entity30", "living17", "nonliving26".
        folder: folder of the three files; "": the folder to which `get` downloads by default.

    Raises:
        InputError: if a file is missing, cannot be read or is not the published file.
    """
    level, ancestor, at_least = SETS[choice] if choice in SETS else (int(choice), ROOT, 1)
    place = check(folder)
    classes = {wnid for _, wnid, _ in json.loads((place / "dataset_class_info.json").read_text())}
    name_of = dict(line.split("\t") for line in (place / "node_names.txt").read_text().splitlines() if line)
    parents: defaultdict[str, list[str]] = defaultdict(list)
    children: defaultdict[str, list[str]] = defaultdict(list)
    for line in (place / "class_hierarchy.txt").read_text().splitlines():
        parent, child = line.split()
        parents[child].append(parent)
        children[parent].append(child)

    @cache
    def depth(node: str) -> int:
        return 1 + max(map(depth, parents[node])) if parents[node] else 0

    nodes = [node for node in sorted(_descendants({ancestor}, children)) if depth(node) == level]
    members = {node: classes & _descendants({node}, children) for node in nodes}
    chosen = {node: below for node, below in members.items() if len(below) >= at_least}
    return Superclasses(
        [name_of.get(node, node) for node in chosen],
        {wnid: position for position, below in enumerate(chosen.values()) for wnid in below},
    )


def _descendants(start: set[str], children: dict[str, list[str]]) -> set[str]:
    """Return the given nodes and all nodes below them."""
    found, new = set(start), list(start)
    while new:
        more = [node for node in children.get(new.pop(), ()) if node not in found]
        found.update(more)
        new += more
    return found


def class_to_superclass(
    choice: str, class_names: list[str], folder: str | Path = ""
) -> tuple[dict[int, int], list[str]]:
    """Map the classes of a data set to superclasses.

    Args:
        choice, folder: as for `superclasses`.
        class_names: WordNet id of each class.

    Returns:
        {position of a class: position of its superclass}, only for classes with a superclass; the names of the superclasses.

    Raises:
        InputError: if a class name is not a WordNet id, if no class has a superclass, or as in `superclasses`.
    """
    other = [name for name in class_names if not re.fullmatch(r"n\d{8}", name)]
    if other or not class_names:
        problem = "the data set has no classes"
        if other:
            problem = f"{len(other)} of the {len(class_names)} class names are not WordNet ids, such as {other[0]}"
        raise InputError(
            f"--superclass {choice}: {problem}, expected ImageNet's class names such as n01440764: drop the flag"
        )
    found = superclasses(choice, folder)
    mapping = {i: found.of_class[name] for i, name in enumerate(class_names) if name in found.of_class}
    if not mapping:
        raise InputError(
            f"--superclass {choice}: none of the {len(class_names)} classes belongs to one of its superclasses: drop the flag"
        )
    return mapping, found.names


# --------------------------------------------------------------------------------------------------------------------
# files of the hierarchy


def default_folder() -> Path:
    """Return the folder to which `get` downloads by default."""
    return downloads.cache_folder() / "imagenet_info"


def check(folder: str | Path = "") -> Path:
    """Check that the three files are the published ones, and return their folder.

    Args:
        folder: folder of the files; "": the folder to which `get` downloads by default.

    Raises:
        InputError: if a file is missing, cannot be read or has another SHA-256.
    """
    place = Path(folder) if folder else default_folder()
    command = f"python -m src.data.imagenet get{f' {folder}' if folder else ''}"
    for name, expected in FILES.items():
        path = place / name
        if not path.is_file():
            raise InputError(
                f"--hierarchy: {path} is missing: run {command} to download it, or pass the folder that holds it"
            )
        try:
            found = downloads.digest(path)
        except OSError as error:
            raise InputError(f"--hierarchy: {path}: {error.strerror}") from None
        if found != expected:
            raise InputError(
                f"--hierarchy: {path} is not the published file: its SHA-256 is {found[:12]}..., expected "
                f"{expected[:12]}...: remove it and run {command} to download it again"
            )
    return place


def get(folder: str | Path = "") -> list[Path]:
    """Download the missing files, check all files, and return their paths.

    Raises:
        RunError: if a download fails, or if a downloaded file is not the published one.
        InputError: if a file that already exists is not the published one.
    """
    place = Path(folder) if folder else default_folder()
    with downloads.locked(place):
        for name, sha256 in FILES.items():
            if not (place / name).exists():
                downloads.download(SOURCE + name, place / name, sha256=sha256)
    check(folder)
    return [place / name for name in FILES]


def main() -> None:
    parser = OneLineParser(
        prog="python -m src.data.imagenet", description="Download the hierarchy of ImageNet's classes."
    )
    getter = parser.add_subparsers(dest="command", required=True).add_parser(
        "get", help="download the three files of the hierarchy"
    )
    getter.add_argument(
        "folder", nargs="?", default="", metavar="DIR", help=f"folder for the files (default: {default_folder()})"
    )
    for path in get(parser.parse_args().folder):
        print(printable(path))


if __name__ == "__main__":
    run_script(main)

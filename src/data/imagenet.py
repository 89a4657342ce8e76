"""ImageNet's classes in the hierarchy of BREEDS: which superclass a class belongs to.

    python -m src.data.imagenet get [DIR]          # the three files, 112 kB, into the cache folder or DIR

Santurkar, Tsipras and Madry, "BREEDS: Benchmarks for Subpopulation Shift", arXiv:2008.04859. The hierarchy is WordNet's,
revised by hand; 890 of the 1,000 classes are in it. A superclass here holds all of its classes: BREEDS draws equally many
of each, Self-Classifier, arXiv:2103.10994v3, does not.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import downloads
from ..config import OneLineParser
from ..errors import InputError, run_script

SOURCE = "https://raw.githubusercontent.com/MadryLab/BREEDS-Benchmarks/master/imagenet_class_hierarchy/modified/"
FILES = {  # and what their SHA-256 is
    "class_hierarchy.txt": "039cfaddf9732855b93f7899ba4b5ba6d80f8dbe15cfaad566f575b6c8ce0216",
    "dataset_class_info.json": "be90503d57a001f95e094a81dc4de90772bfc58546ca58061d6474799829afd0",
    "node_names.txt": "322af45711ed69a7b199f11225bd964c7dae71df3c586498bef2f7c9e031dedb",
}
ROOT, LIVING, NON_LIVING = "n00001740", "n00004258", "n00021939"
SETS = {  # name: level, below which node, with how many classes at least
    "entity13": (3, ROOT, 20),
    "entity30": (4, ROOT, 8),
    "living17": (5, LIVING, 4),
    "nonliving26": (5, NON_LIVING, 4),
}


@dataclass(frozen=True)
class Superclasses:
    """Groups of classes.

    Attributes:
        names: what people call each superclass.
        of_class: {WordNet id of a class: position in `names`}; classes that belong to none are not there.
    """

    names: list[str]
    of_class: dict[str, int]


def superclasses(choice: str, folder: str | Path = "") -> Superclasses:
    """The superclasses of a level of the hierarchy, or of one of BREEDS' sets.

    A node's level is the length of the longest way to it from the root, which is level 0. The superclasses of a level are
    all of its nodes with the classes below them; a node that is itself a class is its own superclass. A set has those nodes of a
    level that are below a certain node and have a certain number of classes. They are numbered in the order of their ids.

    Args:
        choice: "2" to "6", or "entity13", "entity30", "living17", "nonliving26".
        folder: where the files are; "": where `get` leaves them.

    Raises:
        InputError: if a file is missing, cannot be read or is another one.
    """
    level, ancestor, at_least = SETS[choice] if choice in SETS else (int(choice), ROOT, 1)
    place = check(folder)
    classes = {wnid for _, wnid, _ in json.loads((place / "dataset_class_info.json").read_text())}
    name_of = dict(line.split("\t") for line in (place / "node_names.txt").read_text().splitlines() if line)
    parents, children = defaultdict(list), defaultdict(list)
    for line in (place / "class_hierarchy.txt").read_text().splitlines():
        parent, child = line.split()
        parents[child].append(parent)
        children[parent].append(child)

    @cache
    def depth(node: str) -> int:
        return 1 + max(map(depth, parents[node])) if parents[node] else 0

    nodes = [node for node in sorted(_reached({ancestor}, children)) if depth(node) == level]
    members = {node: classes & _reached({node}, children) for node in nodes}
    chosen = {node: below for node, below in members.items() if len(below) >= at_least}
    return Superclasses(
        [name_of.get(node, node) for node in chosen],
        {wnid: position for position, below in enumerate(chosen.values()) for wnid in below},
    )


def _reached(start: set[str], children: dict[str, list[str]]) -> set[str]:
    """All nodes below these, themselves included."""
    found, new = set(start), list(start)
    while new:
        more = [node for node in children.get(new.pop(), ()) if node not in found]
        found.update(more)
        new += more
    return found


def class_to_superclass(
    choice: str, class_names: list[str], folder: str | Path = ""
) -> tuple[dict[int, int], list[str]]:
    """{position of a class: position of its superclass}, for classes that have one, and the names of the superclasses.

    Raises:
        InputError: as `superclasses`, if a class is not named by its WordNet id, or if none of them has a superclass.
    """
    other = [name for name in class_names if not re.fullmatch(r"n\d{8}", name)]
    if other or not class_names:
        raise InputError(
            f"--superclass {choice} is for ImageNet, whose classes are called by their WordNet ids, as n01440764; "
            + (f"{len(other)} of the {len(class_names)} here are not, such as {other[0]}" if other else "here are none")
            + ": drop it"
        )
    found = superclasses(choice, folder)
    mapping = {i: found.of_class[name] for i, name in enumerate(class_names) if name in found.of_class}
    if not mapping:
        raise InputError(
            f"--superclass {choice}: none of the {len(class_names)} classes belongs to one of its superclasses"
        )
    return mapping, found.names


# --------------------------------------------------------------------------------------------------------------------
# the files


def default_folder() -> Path:
    return downloads.cache_folder() / "imagenet_info"


def check(folder: str | Path = "") -> Path:
    """The folder of the three files, each of which is the published one.

    Raises:
        InputError: if one is missing, cannot be read or is another one.
    """
    place = Path(folder) if folder else default_folder()
    command = f"python -m src.data.imagenet get{f' {folder}' if folder else ''}"
    for name, expected in FILES.items():
        path = place / name
        if not path.is_file():
            raise InputError(f"--hierarchy: {path} is missing; {command} fetches it, or name the folder it is in")
        try:
            found = downloads.digest(path)
        except OSError as error:
            raise InputError(f"--hierarchy: {path}: {error.strerror}") from None
        if found != expected:
            raise InputError(
                f"--hierarchy: {path} is not the published file: its SHA-256 is {found[:12]}..., expected "
                f"{expected[:12]}...; remove it, and {command} fetches it again"
            )
    return place


def get(folder: str | Path = "") -> list[Path]:
    """Fetch the files that are not there, and check all of them.

    Raises:
        RunError: if a file cannot be had, or is not the expected one.
        InputError: if one that was there is not.
    """
    place = Path(folder) if folder else default_folder()
    with downloads.locked(place):
        for name, sha256 in FILES.items():
            if not (place / name).exists():
                downloads.download(SOURCE + name, place / name, sha256=sha256)
    check(folder)
    return [place / name for name in FILES]


def main() -> None:
    parser = OneLineParser(prog="python -m src.data.imagenet", description="The hierarchy of ImageNet's classes.")
    getter = parser.add_subparsers(dest="command", required=True).add_parser("get", help="download its three files")
    getter.add_argument("folder", nargs="?", default="", metavar="DIR", help=f"where to (default: {default_folder()})")
    for path in get(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    run_script(main)

"""Names of clusters, merged, rejected and split ones, as the atlas saves them in names.json."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..inspection import read_json

FORMAT = "self-classifier names"
VERSION = 1
LONGEST = 1 << 26  # bytes of the file
LONGEST_NAME = 200  # characters
REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the user calls the clusters.

    Attributes:
        clusters: C, the number of clusters.
        names: {cluster: name}.
        into: {cluster: cluster with which it is merged}.
        rejected: clusters that mean nothing.
        split: {path of an image, as in assignments.csv: name of the part that was split off}.
    """

    clusters: int
    names: dict[int, str] = field(default_factory=dict)
    into: dict[int, int] = field(default_factory=dict)
    rejected: frozenset[int] = frozenset()
    split: dict[str, str] = field(default_factory=dict)

    def name_of(self, cluster: int, path: str) -> str:
        """Return the name of the cluster of an image.

        Args:
            path: relative to --data.
        """
        if (part := self._part(path)) is not None:
            return part
        cluster = self.into.get(cluster, cluster)
        return REJECTED if cluster in self.rejected else self.names.get(cluster, f"cluster {cluster}")

    def folder_of(self, cluster: int, path: str) -> str:
        """Return the name of the folder for an image: the number of the cluster, and its name if it has one."""
        if (part := self._part(path)) is not None:
            return f"split {as_file_name(part)}"
        cluster = self.into.get(cluster, cluster)
        if cluster in self.rejected:
            return REJECTED
        number = f"{cluster:0{len(str(self.clusters - 1))}}"
        return f"{number} {as_file_name(self.names[cluster])}" if cluster in self.names else number

    def _part(self, path: str) -> str | None:
        return self.split.get(printable(path, reversible=True)) if self.split else None


def as_file_name(name: str) -> str:
    """Return a name without what a file name cannot hold, at most 100 bytes long."""
    kept = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
    short = kept.encode(errors="replace")[:100].decode(errors="ignore")
    return short.strip(" .") or "_"


def read_names(file: str, *, model: str, classifier: int, clusters: int) -> tuple[Names, dict[str, Any]]:
    """Read names.json, and return the names and the content of the file.

    Args:
        model: fingerprint of the weights.
        clusters: C, the number of clusters of the classifier.

    Raises:
        InputError: if the file cannot be read, belongs to another model or classifier, or holds something else.
    """
    try:
        content = read_json(Path(file), most=LONGEST)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--names {file}: {reason}, expected the file that the atlas saves") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise InputError(f"--names {file}: not a file of names, expected the file that the atlas saves")
    if content.get("model") != model:
        raise InputError(
            f"--names {file}: the names belong to another model, expected the fingerprint {model[:12]}...: give the file that "
            "was saved for this checkpoint"
        )
    if content.get("classifier") != classifier:
        raise InputError(
            f"--names {file}: the names belong to classifier {printable(content.get('classifier'))}, but this is classifier "
            f"{classifier}: give that --classifier"
        )
    try:
        return names_in(content, clusters), content
    except _Wrong as error:
        raise InputError(f"--names {file}: {error}; save the file again in the atlas") from None


class _Wrong(ValueError):
    """Raised if a value is not as expected. The message does not name the file."""


def names_in(content: dict[str, Any], clusters: int) -> Names:
    """Return the names that the content of a file of names holds.

    Raises:
        ValueError: if the content is not as expected. The message does not name the file.
    """
    names: dict[int, str] = {}
    into: dict[int, int] = {}
    rejected = set()
    given = content.get("clusters", {})
    for key, entry in (given if isinstance(given, dict) else {"": None}).items():
        number = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else clusters
        if number >= clusters or not isinstance(entry, dict):
            raise _Wrong(f"clusters holds {printable(key)[:40]!r}, expected the numbers 0 to {clusters - 1}")
        if "name" in entry:
            names[number] = _name(entry["name"])
        if entry.get("rejected") is True:
            rejected.add(number)
        target = entry.get("into")
        if target is not None:
            if type(target) is not int or not 0 <= target < clusters or target == number:
                raise _Wrong(f"cluster {number} is merged into {printable(target)[:40]}, expected another cluster")
            into[number] = target
    for number, target in into.items():
        if target in into:
            raise _Wrong(f"cluster {number} is merged into {target}, which is itself merged into {into[target]}")
    split: dict[str, str] = {}
    parts = content.get("split", [])
    for part in parts if isinstance(parts, list) else [None]:
        part = part if isinstance(part, dict) else {}
        images = part.get("images")
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise _Wrong("split holds something else than parts with a name and a list of images")
        split |= dict.fromkeys(images, _name(part.get("name")))
    return Names(clusters=clusters, names=names, into=into, rejected=frozenset(rejected), split=split)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_NAME:
        raise _Wrong(f"a name is {printable(value)[:40]!r}, expected text of 1 to {LONGEST_NAME} characters")
    return value

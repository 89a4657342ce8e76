"""Files of pseudo-labels: the labels of every image for each of H heads, by the path of the image.

`write_labels` writes CSV with the header `path,head,label` and one row per image and head. `read_labels` reads this layout
and tables with one row per image and one column per head, with or without a column of paths. SeLa's authors published
files of the second kind, whose columns they do not describe.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import replacing
from .datasets import Images, MemoryImages

HEADER = ["path", "head", "label"]
LARGEST_LABEL = 2**31 - 1


def names_of(data: Images) -> list[str]:
    """Return the names of the images: paths relative to their common folder, or positions of images without a file."""
    paths = data.names if isinstance(data, MemoryImages) else data.paths
    if not paths:
        return [str(i) for i in range(len(data))]
    top = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    return [path[len(top) :].lstrip(os.sep) for path in paths]


def write_labels(path: Path, names: Sequence[str], labels: np.ndarray) -> None:
    """Write the labels of all images, (H, N), as CSV. The file appears when it is complete.

    Args:
        names: N names of the images.
    """
    with replacing(path) as file:
        file.write((",".join(HEADER) + "\n").encode())
        for name, column in zip(names, labels.T.tolist(), strict=True):
            quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name
            rows = "".join(f"{quoted},{head},{label}\n" for head, label in enumerate(column))
            file.write(rows.encode(errors="surrogateescape"))


def read_labels(path: str) -> tuple[list[str], np.ndarray]:
    """Read a file of labels.

    Returns:
        The names of the M images, [] if the file does not name them, and their labels, (M, H) int64.

    Raises:
        InputError: if the file cannot be read, is no such table, or an image lacks a label.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file)
            first = next(rows, [])
            if [cell.strip() for cell in first] == HEADER:
                return _long(path, rows)
            return _wide(path, first, rows)
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--labels {path}: cannot be read ({reason}): expected a CSV file of labels") from None


def _long(path: str, rows: Iterator[list[str]]) -> tuple[list[str], np.ndarray]:
    """Read rows of path, head and label."""
    positions: dict[str, int] = {}
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows, start=2):
        if len(row) != 3:
            raise InputError(
                f"--labels {path}: line {number} has {len(row)} columns, expected path, head and label: use another file"
            )
        head, label = (_whole(path, number, cell) for cell in row[1:])
        found.append((positions.setdefault(row[0], len(positions)), head, label))
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    heads = int(table[:, 1].max()) + 1 if len(table) else 0
    if not len(table) or len(table) != len(positions) * heads:
        raise InputError(
            f"--labels {path}: {len(table)} labels of {len(positions)} images and {heads} heads: expected one label for each "
            "image and head"
        )
    labels = np.full((len(positions), heads), -1)
    labels[table[:, 0], table[:, 1]] = table[:, 2]
    if labels.min() < 0:
        raise InputError(
            f"--labels {path}: a label appears twice, and another one is missing: expected one for each image and head"
        )
    return list(positions), labels


def _wide(path: str, first: list[str], rows: Iterator[list[str]]) -> tuple[list[str], np.ndarray]:
    """Read a table with one row per image: perhaps the name of the image, then a label for each head."""
    names: list[str] = []
    labels: list[list[int]] = []
    columns = 0
    named = bool(first) and not _is_whole(first[0])
    has_header = bool(first) and not any(_is_whole(cell) for cell in first)
    body = rows if has_header else (row for part in ([first], rows) for row in part)
    for number, row in enumerate((row for row in body if row), start=2 if has_header else 1):
        if not names and not labels:
            named, columns = not _is_whole(row[0]), len(row)
        if len(row) != columns or columns == named:
            raise InputError(f"--labels {path}: line {number} has {len(row)} columns, expected one label for each head")
        names += row[:1] if named else []
        labels.append([_whole(path, number, cell) for cell in row[named:]])
    if not labels:
        raise InputError(f"--labels {path}: the file holds no labels: use another file")
    table = np.array(labels, dtype=np.int64)
    if not named and table.shape[1] > 1 and np.array_equal(table[:, 0], np.arange(len(table))):
        table = table[:, 1:]  # the first column numbers the images
    return names, table


def _is_whole(cell: str) -> bool:
    """Return whether a cell is a whole number, perhaps written as 3.0."""
    whole, _, rest = cell.strip().partition(".")
    return whole.isdecimal() and not rest.strip("0")


def _whole(path: str, line: int, cell: str) -> int:
    if not _is_whole(cell) or int(cell.partition(".")[0]) > LARGEST_LABEL:
        raise InputError(
            f"--labels {path}: line {line} has {cell[:40]!r}, expected a whole number from 0 to {LARGEST_LABEL}"
        )
    return int(cell.partition(".")[0])


def arrange(path: str, names: list[str], labels: np.ndarray, *, images: Sequence[str]) -> np.ndarray:
    """Bring labels into the order of a data set.

    If the paths of the file do not match, the names of the files without their folders are compared, so that a data set in
    another folder is found. A file without names has the labels in the order of the images, which is sorted by path.

    Args:
        path: the file of the labels, for the message.
        names, labels: what `read_labels` returned.
        images: names of the N images.

    Returns:
        (H, N) int64.

    Raises:
        InputError: if the file does not hold the labels of exactly these images.
    """
    if len(labels) != len(images):
        raise InputError(
            f"--labels {path}: labels of {len(labels):,} images, but the data set has {len(images):,}: use the file of this data "
            "set"
        )
    if not names:
        return labels.T
    position = {name: i for i, name in enumerate(names)}
    wanted: Sequence[str] = images
    if not all(name in position for name in wanted):
        position = {os.path.basename(name): i for i, name in enumerate(names)}
        wanted = [os.path.basename(name) for name in images]
    missing = [name for name in wanted if name not in position]
    if missing or len({position[name] for name in wanted}) != len(wanted):
        which = f"no labels of {missing[0][:200]}" if missing else "several images with one name"
        raise InputError(f"--labels {path}: {which}: use the file of this data set")
    return labels[[position[name] for name in wanted]].T

"""Subsets of a data set: a random share of every class, or the images that a file lists."""

import os
from collections import defaultdict

import numpy as np

from ..errors import InputError
from ..inspection import read_lines
from .datasets import ImageFiles, Images


def keep_rows(data: Images, rows: np.ndarray) -> Images:
    """Return the data set of the images at positions `rows`, with the same classes."""
    if len(rows) == len(data) and (rows == np.arange(len(data))).all():
        return data
    return data.keep(rows, data.labels.numpy()[rows], data.classes)


def draw_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw a share of the images of each class.

    With the same seed, a smaller share is a subset of a larger one. The images drawn from a class do not depend on the
    other classes.

    Args:
        labels: (N,) class of each image, -1 where unknown. Images of unknown class are never drawn.
        share: fraction of the images of each class, above 0 and at most 1.

    Returns:
        (M,) positions of the images, ascending. Each class has at least one image; its share is rounded to whole images.
    """
    drawn = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, label]).permutation(len(rows))
        drawn.append(rows[order[: max(round(share * len(rows)), 1)]])
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)


def read_list(data: Images, file: str, flag: str) -> np.ndarray:
    """Read a text file that lists images, one per line, such as the 1 % and 10 % lists of SimCLR.

    A line names an image file by its name. If several files have this name, the line also holds enough of the folders to
    identify the file, as in `dog/1.png`. An image in memory has no name, so the line is its position in the split.

    Args:
        flag: name of the flag that passed the file, for error messages.

    Returns:
        (M,) positions of the listed images, ascending.

    Raises:
        InputError: if the file cannot be read or is empty, if it lists an image twice or an image that does not exist, or
            if a line matches several images.
    """
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or f"{error}, expected one image per line"
        raise InputError(f"{flag} {file}: {problem}") from None
    if not lines:
        raise InputError(f"{flag} {file}: the file lists no image, expected one image per line")
    rows = _by_name(data, lines) if isinstance(data, ImageFiles) else _by_position(data, lines)
    missing = [line for line, found in zip(lines, rows, strict=True) if not found]
    if missing:
        raise InputError(
            f"{flag} {file}: {len(missing)} of the {len(lines)} listed images, such as {missing[0]}, are not among the "
            f"{len(data)} images of the training split: correct the list or --data"
        )
    for line, found in zip(lines, rows, strict=True):
        if len(found) > 1 and isinstance(data, ImageFiles):
            raise InputError(
                f"{flag} {file}: {line} is the name of {len(found)} images: add the folder to the name, as in "
                f"{os.path.basename(os.path.dirname(data.paths[found[0]]))}/{line}"
            )
    chosen = np.sort(np.array([found[0] for found in rows]))
    if (twice := chosen[1:] == chosen[:-1]).any():
        line = lines[[found[0] for found in rows].index(chosen[1:][twice][0])]
        raise InputError(f"{flag} {file}: {line} is listed twice: remove one of the lines")
    return chosen


def _by_name(data: ImageFiles, lines: list[str]) -> list[list[int]]:
    """Return, for each line, the rows of the files whose path ends in it."""
    by_name = defaultdict(list)
    for row, path in enumerate(data.paths):
        by_name[os.path.basename(path)].append(row)
    return [
        [
            row
            for row in by_name.get(os.path.basename(line), [])
            if f"/{data.paths[row]}".endswith("/" + line.lstrip("./"))
        ]
        for line in lines
    ]


def _by_position(data: Images, lines: list[str]) -> list[list[int]]:
    """Return, for each line, the row that it names, or no row if it is not a position in the data set."""
    return [[int(line)] if line.isdecimal() and int(line) < len(data) else [] for line in lines]

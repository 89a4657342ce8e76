"""A part of a data set's labelled images: a share of every class drawn by a seed, or those that a file lists."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..errors import InputError
from .datasets import ImageFiles, Images


def keep_rows(data: Images, rows: np.ndarray) -> Images:
    """Return the images at these positions, with the same classes."""
    if len(rows) == len(data) and (rows == np.arange(len(data))).all():
        return data
    return data.keep(rows, data.labels.numpy()[rows], data.classes)


def draw_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of a share of each class's images, ascending: rounded to whole images, at least one.

    With one seed a smaller share is part of a larger one. A class's draw does not depend on the other classes.

    Args:
        labels: (N,) class of every image, -1 where unknown; those are never drawn.
        share: fraction above 0, up to 1.
    """
    drawn = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, label]).permutation(len(rows))
        drawn.append(rows[order[: max(round(share * len(rows)), 1)]])
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)


def read_list(data: Images, file: str, flag: str) -> np.ndarray:
    """Positions of the images that a file lists, ascending; one a line, as the 1 % and 10 % lists of SimCLR have them.

    An image file is listed by its name, or by as many of its folders as it takes to tell it from others, as in
    `dog/1.png`; an image in memory, which has no name, by its position in the split.

    Args:
        flag: the flag that named the file, for messages.

    Raises:
        InputError: if the file cannot be read, is empty, or lists an image that is not there, or not just once.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {file}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise InputError(f"{flag} {file}: no image listed")
    rows = _by_name(data, lines) if isinstance(data, ImageFiles) else _by_position(data, lines)
    missing = [line for line, found in zip(lines, rows, strict=True) if not found]
    if missing:
        raise InputError(
            f"{flag} {file}: {len(missing)} of {len(lines)} images listed are not among the {len(data)} of the "
            f"training split, such as {missing[0]}"
        )
    for line, found in zip(lines, rows, strict=True):
        if len(found) > 1:
            raise InputError(
                f"{flag} {file}: {line} is the name of {len(found)} images: write its folder too, as in "
                f"{os.path.basename(os.path.dirname(data.paths[found[0]]))}/{line}"
            )
    chosen = np.sort([found[0] for found in rows])
    if (twice := chosen[1:] == chosen[:-1]).any():
        line = lines[[found[0] for found in rows].index(chosen[1:][twice][0])]
        raise InputError(f"{flag} {file}: {line} is listed twice")
    return chosen


def _by_name(data: ImageFiles, lines: list[str]) -> list[list[int]]:
    """Rows of the files whose path ends in each line."""
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
    return [[int(line)] if line.isdecimal() and int(line) < len(data) else [] for line in lines]

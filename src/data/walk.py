"""Walk through a folder of arbitrary files, one folder after the other, so that memory does not grow with the number of files."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .formats import IMAGE_SUFFIXES

Identity = tuple[int, int]  # device and number of a folder


class Entry(NamedTuple):
    """A file below the folder.

    Attributes:
        path: relative to the folder.
        size: bytes.
        changed: time of the last change in nanoseconds.
        refused: why this is no image; "": it may be one.
    """

    path: str
    size: int
    changed: int
    refused: str = ""


def walk(top: Path, *, without: Identity | None = None) -> Iterator[Entry]:
    """Yield the files below a folder at any depth, sorted within each folder. Hidden files and folders are left out.

    Links are followed. A folder that was visited already is not visited again, because following a link to it may never end.
    Folders and files that cannot be read are yielded with the reason.

    Args:
        top: a folder, or one file.
        without: a folder that is not visited.
    """
    if not top.is_dir():
        yield _entry(str(top), top.name)
        return
    visited = {without} if without else set()
    waiting = [""]  # relative paths of folders, the next one last
    while waiting:
        parent = waiting.pop()
        place = os.path.join(top, parent)
        try:
            status = os.stat(place)
            names = sorted(name for name in os.listdir(place) if not name.startswith("."))
        except OSError as error:
            yield Entry(parent, 0, 0, f"the folder cannot be read ({error.strerror})")
            continue
        identity = status.st_dev, status.st_ino
        if identity in visited:
            continue
        visited.add(identity)
        below = []
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isdir(os.path.join(top, path)):
                below.append(path)
            else:
                yield _entry(os.path.join(top, path), path)
        waiting.extend(reversed(below))


def _entry(place: str, path: str) -> Entry:
    try:
        status = os.stat(place)
    except OSError as error:
        return Entry(path, 0, 0, f"cannot be read ({error.strerror})")
    size, changed = status.st_size, status.st_mtime_ns
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        return Entry(path, size, changed, f"no image: expected a name that ends in {' '.join(sorted(IMAGE_SUFFIXES))}")
    if not stat.S_ISREG(status.st_mode):
        return Entry(path, size, changed, "no regular file")
    return Entry(path, size, changed)


def identity_of(folder: Path) -> Identity:
    """Return device and number of a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino

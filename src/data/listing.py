"""List the image files below a folder.

The list of a large folder is cached, because listing a large folder on a network disk takes minutes.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import distributed, files
from ..downloads import cache_folder
from ..errors import InputError, printable
from ..inspection import read_json
from .formats import IMAGE_SUFFIXES

WORTH_KEEPING = 20_000  # smallest number of images whose list is cached
# A list is cached only if no folder has changed in this many seconds before the listing began. Otherwise a folder could
# change once more without a new modification time.
SETTLED = 2.0
LONGEST = 1 << 28  # bytes of a cached list; a longer one is made again
SECONDS_BETWEEN_LINES = 10.0  # of the progress report


def list_images(top: Path, names: list[str], *, others: Counter[str] | None = None) -> list[list[str]]:
    """List the images below each folder `top / name`, at any depth.

    The function follows links and skips hidden files and folders. It caches long lists, and uses a cached list as long as
    no folder in it has changed.

    Args:
        top: folder that holds all others.
        names: names of folders in `top`; "" is `top` itself.
        others: the function adds the visible files that are no images, counted by their suffixes in lower case.

    Returns:
        The sorted paths for each name.

    Raises:
        InputError: if a folder cannot be read.
    """
    described = [os.path.abspath(top), names, sorted(IMAGE_SUFFIXES)]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]
    file = cache_folder() / "listings" / f"{key}.json"
    known = _read(file, top, names)
    if known is None:
        began, count = time.time(), _Count(top)
        folders: dict[str, int] = {}  # path: modification time in nanoseconds
        found: Counter[str] = Counter()
        kept = [[os.path.relpath(path, top) for path in count(_walk(top / name, folders, found))] for name in names]
        kept = [sorted(paths) for paths in kept]
        newest = max(folders.values(), default=0) / 1e9
        if count.images >= WORTH_KEEPING and newest < began - SETTLED and distributed.is_main():
            _write(file, {"folders": folders, "images": kept, "others": found})
    else:
        kept, found = known
    if others is not None:
        others.update(found)
    return [[os.path.join(top, path) for path in paths] for paths in kept]


def _walk(folder: Path, folders: dict[str, int], others: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images below a folder.

    The function records the modification time of each folder in `folders`, and counts the other files in `others`.
    """
    visited = set()
    for parent, inside, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        status = os.stat(parent)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:  # a link to a folder that was visited already: following it may never end
            inside.clear()
            continue
        visited.add(identity)
        folders[os.path.abspath(parent)] = status.st_mtime_ns
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        others.update(_suffix(name) for name in names if not name.startswith(".") and not _is_image(name))
        yield from (os.path.join(parent, name) for name in names if _is_image(name))


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}): check its permissions")


def _is_image(name: str) -> bool:
    return not os.path.basename(name).startswith(".") and _suffix(name) in IMAGE_SUFFIXES


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class _Count:
    """Count the paths that pass through, and print the count every ten seconds."""

    def __init__(self, top: Path):
        self.top, self.images, self.printed = top, 0, time.monotonic()

    def __call__(self, paths: Iterator[str]) -> Iterator[str]:
        for path in paths:
            self.images += 1
            if self.images % 1000 == 0 and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
                self.printed = time.monotonic()
                if distributed.is_main():
                    print(f"listing {printable(self.top)}: {self.images:,} images so far", flush=True)
            yield path


def _read(file: Path, top: Path, names: list[str]) -> tuple[list[list[str]], Counter[str]] | None:
    """Return the cached lists and the other files, or None if there are none or if a folder has changed."""
    try:
        content = read_json(file, most=LONGEST)
        folders, images, others = content["folders"], content["images"], Counter(dict(content["others"].items()))
        if len(images) != len(names) or not all(_is_list_below(paths) for paths in images):
            return None
        inside = os.path.abspath(top)
        if not all(type(number) is int for number in others.values()):
            return None
        if not folders or any(os.path.commonpath([inside, folder]) != inside for folder in folders):
            return None
        current = all(os.stat(folder).st_mtime_ns == changed for folder, changed in folders.items())
        return (images, others) if current else None
    # There is no file, or it is damaged, or a folder no longer exists.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_list_below(paths: object) -> bool:
    """Return whether a value is a list of relative paths of images that do not leave their folder."""
    return isinstance(paths, list) and all(
        isinstance(path, str) and not path.startswith("/") and ".." not in path.split("/") and _is_image(path)
        for path in paths
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write the lists to the cache. If this fails, there is no cached list and the next run lists the folder again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, json.dumps(content))

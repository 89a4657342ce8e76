"""Which image files lie below a folder. For a large folder the answer is kept: on a network disk it takes minutes."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .. import distributed
from ..downloads import cache_folder
from ..errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
WORTH_KEEPING = 20_000  # images
SETTLED = (
    2.0  # seconds that a folder must not have changed for, or a change after it might leave the same time of change
)
SECONDS_BETWEEN_LINES = 10.0


def list_images(top: Path, names: list[str]) -> list[list[str]]:
    """The paths of all images below each folder `top / name`, sorted; links are followed, what is hidden is left out.

    A list of many images is kept in the cache, and taken from there as long as no folder in it has changed.

    Raises:
        InputError: if a folder cannot be read.
    """
    key = hashlib.sha256(json.dumps([os.path.abspath(top), names]).encode()).hexdigest()[:20]
    file = cache_folder() / "listings" / f"{key}.json"
    kept = _read(file)
    if kept is None:
        began, folders, count = time.time(), {}, _Count(top)
        kept = [[os.path.relpath(path, top) for path in count(_walk(top / name, folders))] for name in names]
        kept = [sorted(paths) for paths in kept]
        newest = max(folders.values(), default=0) / 1e9
        if count.images >= WORTH_KEEPING and newest < began - SETTLED and distributed.is_main():
            _write(file, {"folders": folders, "images": kept})
    return [[os.path.join(top, path) for path in paths] for paths in kept]


def _walk(folder: Path, folders: dict[str, int]) -> Iterator[str]:
    """Paths of images below a folder; notes the time of change of each folder in it."""
    visited = set()
    for parent, inside, names in os.walk(folder, followlinks=True, onerror=_refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link to where we have been: it may go round in circles
            inside.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[os.path.abspath(parent)] = status.st_mtime_ns
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in names if _is_image(name))


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


class _Count:
    """Passes paths on, and says now and then how many."""

    def __init__(self, top: Path):
        self.top, self.images, self.printed = top, 0, time.monotonic()

    def __call__(self, paths: Iterator[str]) -> Iterator[str]:
        for path in paths:
            self.images += 1
            if self.images % 1000 == 0 and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
                self.printed = time.monotonic()
                if distributed.is_main():
                    print(f"listing {self.top}: {self.images:,} images so far", flush=True)
            yield path


def _read(file: Path) -> list[list[str]] | None:
    """What was kept, unless there is nothing, or a folder has changed since."""
    try:
        content = json.loads(file.read_text())
        current = all(os.stat(folder).st_mtime_ns == changed for folder, changed in content["folders"].items())
        return content["images"] if current else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, damaged, or a folder that is gone
        return None


def _write(file: Path, content: dict) -> None:
    """Write aside, then rename. Where that cannot be done, the folder is listed again next time."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content))
        os.replace(aside, file)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)

"""Write files so that a crash, a full disk or a kill leaves either the whole old file or the whole new one."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# A folder cannot be synchronised on some file systems, or without permission to read it. Its files are complete anyway.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends without an error.

    The content goes to a temporary file in the same folder. It is on the disk before the file is renamed, and the new name is
    on the disk when the function returns. If anything fails, the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: if the file cannot be written; its `filename` is the path.
    """
    aside = temporary(path)
    try:
        aside.unlink(missing_ok=True)  # of a process with the same number that was killed
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, aside, str(aside)) and error.errno:
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def temporary(path: Path) -> Path:
    """Return the name under which this process writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_text(path: Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def copy(source: Path, target: Path) -> None:
    """Copy a file as `replacing` does."""
    with open(source, "rb") as content, replacing(target) as file:
        shutil.copyfileobj(content, file, 1 << 20)


def move(source: Path, target: Path) -> None:
    """Move a finished file to another folder on the same disk as `replacing` does."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(source, target)
    sync_folder(target.parent)


def second_name(source: Path, target: Path) -> None:
    """Give a file a second name, in place of the file that has this name. Where there are no links, copy it."""
    aside = temporary(target)
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:  # this file system has no links
            copy(source, target)
            return
        os.replace(aside, target)
        sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # it is still there if both names were one file before


def first_free(path: Path) -> Path:
    """Return the path, or if it is taken the first free one of path-2, path-3, ..."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files that killed processes left of the files whose names begin with `name`."""
    for aside in folder.glob(f".{name}*.part"):
        with contextlib.suppress(OSError):
            aside.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise

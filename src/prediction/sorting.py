"""Sort images into one folder per cluster, by links or copies.

Everything is written below the folder `sorted`, through descriptors of folders that are opened without following links. So neither
a name nor a link leads outside, and no original can be overwritten.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError, RunError
from .names import Names
from .store import PIECE, Store

FOLDER = "sorted"
LONGEST_NAME = 200  # bytes of a file name
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def sort(store: Store, folder: Path, *, top: Path, kind: str, names: Names, count: Callable[[int], None]) -> None:
    """Bring the sorted folders up to date with the predictions and the names.

    Args:
        folder: output folder.
        top: folder of the originals.
        kind: "links" or "copies".
        count: called with the number of images that were sorted.

    Raises:
        InputError: if something in the way is a link or a file.
        RunError: if the file system has no links, or an original is gone.
    """
    with Target(folder) as target:
        for number, place in store.places_of_the_gone():
            target.remove(place)
            store.forget_place(number)
        results = store.results()
        while piece := [result for _, result in zip(range(PIECE), results, strict=False)]:
            with store.transaction():
                for result in piece:
                    place = f"{names.folder_of(result.cluster, result.path)}/{file_name(result.path, top)}"
                    before = store.place_of(result.number)
                    if before == (kind, place) and target.holds(place):
                        continue
                    if before is None or before[0] != kind or not target.move(before[1], place):
                        if before is not None:
                            target.remove(before[1])
                        target.put(os.path.abspath(top / result.path), place, kind=kind)
                    store.set_place(result.number, kind, place)
            count(len(piece))


def file_name(path: str, top: Path) -> str:
    """Return the name of an image in the folder of its cluster. Different images have different names.

    The parts of the path are joined by two underscores. Where that could give the name of another image, or a name that is too
    long, a hash of the path is added.

    Args:
        path: relative to `top`.
    """
    if os.sep not in path:
        return path
    name = path.replace(os.sep, "__")
    ambiguous = any(each in path for each in ("__", f"_{os.sep}", f"{os.sep}_")) or os.path.lexists(top / name)
    if not ambiguous and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    stem, suffix = os.path.splitext(name)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return f"{os.fsdecode(os.fsencode(stem)[: LONGEST_NAME - 20])}-{digest}{suffix}"


class Target:
    """The folder `sorted` in the output folder, and its folders of clusters."""

    def __init__(self, folder: Path):
        self.path = folder / FOLDER
        outside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._root = _folder(FOLDER, outside, self.path)
        finally:
            os.close(outside)

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def put(self, source: str, place: str, *, kind: str) -> None:
        """Make a link to a file, or a copy of it, in place of what is there.

        Args:
            source: absolute path of an original.
            place: FOLDER/NAME.
        """
        with self._inside(place, create=True) as (inside, name):
            aside = f".{os.getpid()}.part"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside, dir_fd=inside)  # of a process with the same number that was killed
            try:
                if kind == "links":
                    os.symlink(source, aside, dir_fd=inside)
                else:
                    _copy(source, aside, inside)
                os.replace(aside, name, src_dir_fd=inside, dst_dir_fd=inside)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=inside)
                if kind == "links" and error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise RunError(f"{self.path}: this file system has no links: use --sort copies") from None
                if error.errno == errno.ENOENT:
                    raise RunError(f"{source} is gone: run the command again with --update") from None
                raise

    def move(self, before: str, after: str) -> bool:
        """Move a link or a copy, as after a cluster was renamed. Return whether there was something to move."""
        if before == after or not self.holds(before):
            return False
        with self._inside(before) as (old, name), self._inside(after, create=True) as (new, new_name):
            os.replace(name, new_name, src_dir_fd=old, dst_dir_fd=new)
        self.remove(before)
        return True

    def holds(self, place: str) -> bool:
        """Return whether there is something at a place."""
        with self._inside(place) as (inside, name):
            if inside < 0:
                return False
            try:
                os.stat(name, dir_fd=inside, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return True

    def remove(self, place: str) -> None:
        """Remove what is at a place, and its folder if that is empty then."""
        with self._inside(place) as (inside, name):
            if inside < 0:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=inside)
        with contextlib.suppress(OSError):
            os.rmdir(place.partition("/")[0], dir_fd=self._root)

    @contextlib.contextmanager
    def _inside(self, place: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """Yield the descriptor of the folder of a place, or -1 if there is none, and the name in it."""
        group, _, name = place.partition("/")
        if group in ("", ".", "..") or name in ("", ".", "..") or "/" in name:
            raise RunError(f"{self.path}: {place!r} is no place in a folder of a cluster: give another --output-dir")
        try:
            descriptor = _folder(group, self._root, self.path / group, create=create)
        except FileNotFoundError:
            yield -1, name
            return
        try:
            yield descriptor, name
        finally:
            os.close(descriptor)


def _folder(name: str, parent: int, path: Path, *, create: bool = True) -> int:
    """Open a folder without following a link, after it was created if it does not exist."""
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
    try:
        return os.open(name, OPEN_FOLDER, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise InputError(f"{path} is a link or a file, expected a folder: remove it") from None
        raise


def _copy(source: str, name: str, inside: int) -> None:
    """Copy a file with its time of change to a new file in a folder."""
    with open(source, "rb") as content:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o666, dir_fd=inside), "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            status = os.fstat(content.fileno())
            os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))

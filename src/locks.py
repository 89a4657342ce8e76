"""The lock of a folder: one program at a time writes into it."""

import atexit
import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path

from .errors import InputError, printable

SECONDS_TO_LEAVE = 100.0  # when a host dies, a network disk releases its locks after about 90 seconds
# what file systems without locks answer, such as Lustre without the option flock and NFS without its lock daemon
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: dict[Path, int] = {}  # the descriptors of the lock files that this process holds
_created: list[Path] = []  # folders that this process has created, each after its parent


def create(folder: Path, *, new: bool = False) -> None:
    """Create a folder and its parents. They are removed when this process ends if nothing but a lock is in them.

    Args:
        new: refuse a folder that exists.

    Raises:
        FileExistsError: if `new` and it exists.
        OSError: if it cannot be created.
    """
    if not folder.parent.is_dir():
        create(folder.parent)
    try:
        folder.mkdir()
        _created.append(folder.absolute())
    except FileExistsError:
        if new or not folder.is_dir():
            raise


def hold(folder: Path, name: str = "checkpoint") -> None:
    """Lock a folder for as long as this process lives. The folder is created if it does not exist.

    If another run holds the lock, wait up to `SECONDS_TO_LEAVE` seconds: when the host of an earlier job dies, its lock
    stays for a while. If the file system has no locks, print a line and continue.

    Args:
        name: name of the checkpoint file that the lock protects. A probe may run at the same time as training.

    Raises:
        InputError: if the other run keeps the lock (the message names its process, host and job), if the lock file is a link
            or no file, or if the folder cannot be written.
    """
    lock = folder.absolute() / (".lock" if name == "checkpoint" else f".{name}.lock")
    if lock in _held:
        return
    began, told, vanished = time.monotonic(), False, 0
    while True:
        try:
            create(folder)
            descriptor = open_file(lock)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and vanished < 3:  # the other run has removed its empty folder
                vanished += 1
                continue
            raise InputError(
                f"--output-dir {folder}: cannot be written ({error.strerror}); give another folder"
            ) from None
        locked = take(descriptor, folder)
        if locked and _is_current(lock, descriptor):
            break
        other = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if locked:
            continue  # the other run has removed the file meanwhile
        if time.monotonic() - began >= SECONDS_TO_LEAVE:
            raise InputError(
                f"--output-dir {folder}: another run is writing there ({other}); give another folder, or end that run"
            )
        if not told:
            print(f"{printable(folder)}: waiting for another run to end ({printable(other)})", flush=True)
        told = True
        time.sleep(1)
    job = os.environ.get("SLURM_JOB_ID")
    owner = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
    with contextlib.suppress(OSError):  # the disk may be full; the lock holds without a name in it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
    _held[lock] = descriptor


def open_file(lock: Path) -> int:
    """Open a lock file and return its descriptor. A link is not followed, because the file behind it would be overwritten.

    Raises:
        InputError: if it is a link or not a regular file.
        OSError: if it cannot be opened.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{lock} is a link, expected a file: remove it") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        what = "has a second name" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise InputError(f"{lock} {what}, expected a file of its own: remove it")
    return descriptor


def take(descriptor: int, folder: Path) -> bool:
    """Lock an open file without waiting. Return False if another process holds the lock.

    If the file system has no locks, print a line and return True.

    Args:
        folder: the folder that the lock protects, for messages.

    Raises:
        InputError: if the file cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{folder}: cannot be locked ({error.strerror}); give another folder") from None
        print(
            f"{printable(folder)}: this file system has no locks ({error.strerror}); do not start a second program that writes "
            "in this folder",
            flush=True,
        )
    return True


def _is_current(lock: Path, descriptor: int) -> bool:
    """Return True if the open file still has this name."""
    try:
        return os.path.samestat(os.lstat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def release() -> None:
    """Release all locks, and remove the folders that this process has created and in which it has written nothing."""
    while _created:
        folder = _created.pop()
        locks = [lock for lock in _held if lock.parent == folder]
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} == {lock.name for lock in locks}:
                for lock in locks:
                    lock.unlink()
                folder.rmdir()
    while _held:
        os.close(_held.popitem()[1])


atexit.register(release)
os.register_at_fork(after_in_child=_created.clear)

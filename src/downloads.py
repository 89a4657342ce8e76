"""Download files over HTTP, and manage the cache folder.

A download goes to a temporary file and can be resumed. The file gets its final name only after it is complete and checked.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from . import files, locks
from .errors import InputError, RunError
from .inspection import read_json

ATTEMPTS = 3  # number of attempts if the connection breaks; each attempt resumes the previous one
CHUNK = 1 << 20  # bytes


class Interrupted(Exception):
    """The connection broke. The download can be resumed."""


def download(url: str, target: Path, *, size: int = 0, md5: str = "", sha256: str = "") -> None:
    """Download `url` to `target`. An earlier, interrupted download is resumed if the server supports it.

    Args:
        size: expected size in bytes; 0: unknown.
        md5, sha256: expected digest or its first digits, in hexadecimal; "": unknown.

    Raises:
        RunError: if the download fails, or if the file is not the expected one. A failed download keeps the part that has
            arrived; a wrong file is removed.
    """
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part, size)
            break
        except Interrupted as broken:
            if attempt == ATTEMPTS:
                message = f"{url}: {broken}: run the same command again to resume from {_size(part):,} bytes"
                raise RunError(message) from None
            time.sleep(attempt)
    if difference := _difference(part, size, {"md5": md5, "sha256": sha256}):
        part.unlink()
        _tag_file(part).unlink(missing_ok=True)
        raise RunError(f"{url}: {difference}: the file was removed; it may be damaged or replaced on the server")
    files.move(part, target)
    _tag_file(part).unlink(missing_ok=True)


def _difference(part: Path, size: int, digests: dict[str, str]) -> str:
    """Return how a file differs from the expected size and digests, or ""."""
    if size and _size(part) != size:
        return f"the size is {_size(part):,} bytes, expected {size:,}"
    for kind, expected in digests.items():
        if expected and not (found := digest(part, kind)).startswith(expected):
            return f"the {kind} is {found}, expected {expected}"
    return ""


def check_published(path: Path, *, size: int, md5: str, sha256: str) -> None:
    """Compare a file with what its publishers state; see `download` for the arguments. A file may have come by hand.

    Raises:
        RunError: if it differs.
    """
    if difference := _difference(path, size, {"md5": md5, "sha256": sha256}):
        raise RunError(f"{path}: {difference} as published: remove the file and download it again")


def _transfer(url: str, part: Path, size: int) -> None:
    """Make one request.

    It appends the missing bytes to `part`, or writes the whole file if the server sends the whole file.

    Raises:
        Interrupted: if another attempt may succeed.
        RunError: if the server or the network refuses the request.
    """
    have, tag = _size(part), _tag_file(part)
    headers = {"User-Agent": "self-classifier"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()  # if the file has changed, the server sends all of it
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            start = have if response.status == 206 else 0
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise RunError(
                    f"{url}: the server sent {response.headers.get('Content-Range')}, expected the bytes from {start}"
                )
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else size
            if size and total != size:
                raise RunError(
                    f"{url}: the file has {total:,} bytes, expected {size:,}: it may have been replaced on the server"
                )
            _write(response, part, start=start, total=total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the server has no more bytes: `part` is complete, or does not belong to this file
            if error.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()
                raise Interrupted("the partial file does not belong to this download") from None
        elif error.code >= 500:
            raise Interrupted(f"the server answered {error.code} {error.reason}") from None
        else:
            raise RunError(
                f"{url}: the server answered {error.code} {error.reason}: check that the file still exists"
            ) from None
    except urllib.error.URLError as error:
        raise RunError(f"{url}: no connection ({error.reason}): check the network access of this machine") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke ({error})") from None


def _write(response: http.client.HTTPResponse, part: Path, *, start: int, total: int) -> None:
    """Write the body of a response to `part`: append to its first `start` bytes, or replace it if `start` is 0."""
    from tqdm import tqdm

    # The tag identifies this version of the file on the server. A weak tag (W/) must not be used to resume.
    tags = [response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")]
    tag = next((tag for tag in tags if tag and not tag.startswith("W/")), "")
    bar = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=part.name[1:-5], disable=None)
    with bar, _disk_errors(part, total):
        _tag_file(part).write_text(tag) if tag else _tag_file(part).unlink(missing_ok=True)
        with open(part, "ab" if start else "wb") as file:
            while chunk := _receive(response):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total and _size(part) < total:
        raise Interrupted(f"the connection broke at {_size(part):,} of {total:,} bytes")


def _receive(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke ({error or type(error).__name__})") from None


@contextlib.contextmanager
def _disk_errors(part: Path, total: int) -> Iterator[None]:
    """Turn a full disk or missing permission to write into a RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{part.parent}: {error.strerror}: set SELF_CLASSIFIER_CACHE to another folder") from None
        raise RunError(
            f"{part.parent}: the disk is full after {_size(part):,} of {total:,} bytes: free some space and run the same "
            "command again to resume, or set SELF_CLASSIFIER_CACHE to another folder"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def digest(path: Path, kind: str = "sha256") -> str:
    """Return the digest of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# the cache folder


def cache_folder() -> Path:
    """Return $SELF_CLASSIFIER_CACHE if it is set, else self-classifier/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SELF_CLASSIFIER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "self-classifier"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder while the block runs: a second process gets an error instead of writing the same files.

    Raises:
        RunError: if another process holds the lock.
        InputError: if the folder cannot be written, or if its lock file is a link.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = locks.open_file(folder / ".lock")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: {error.strerror}: set SELF_CLASSIFIER_CACHE to another folder") from None
    try:
        if not locks.take(descriptor, folder):
            raise RunError(f"another process is downloading to {folder}: wait until it has finished")
        yield
    finally:
        os.close(descriptor)


def recorded(folder: Path) -> dict[str, dict]:
    """Return {file: size and SHA-256 at its first download} for the files of a cache folder.

    Raises:
        InputError: if the record is damaged.
    """
    path = folder / "checksums.json"
    try:
        notes = read_json(path) if path.exists() else {}
        entries = notes.values() if isinstance(notes, dict) else [None]
        if not all(isinstance(note, dict) and {"size": int, "sha256": str} == _types(note) for note in entries):
            raise ValueError("other entries than sizes and digests")
        return notes
    except ValueError:
        raise InputError(f"{path}: the file is damaged: remove it, and the next downloads write a new one") from None


def _types(note: dict[str, object]) -> dict[str, type]:
    return {name: type(value) for name, value in note.items()}


def check_or_record(folder: Path, path: Path) -> None:
    """Compare a file in the cache with the record of its first download. Without a record, write one.

    Raises:
        RunError: if the file has changed.
    """
    notes, name = recorded(folder), str(path.relative_to(folder))
    found = {"size": _size(path), "sha256": digest(path)}
    if notes.setdefault(name, found) != found:
        raise RunError(
            f"{path}: the sha256 is {found['sha256']}, expected {notes[name]['sha256']} as at the first download: remove the "
            f"file and download it again, or remove its entry in {folder / 'checksums.json'}"
        )
    files.write_text(folder / "checksums.json", json.dumps(notes, indent=1, sort_keys=True) + "\n")

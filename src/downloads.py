"""Fetch a file over HTTP so that what lies under its final name is whole: resumed, checked, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, RunError

ATTEMPTS = 3  # of one command, as long as the connection only breaks; what arrived is kept in between
CHUNK = 1 << 20


class Interrupted(Exception):
    """The connection broke; what arrived can be continued."""


def download(url: str, target: Path, *, size: int = 0, md5: str = "", sha256: str = "") -> None:
    """Fetch `url` to `target`. What is there of an earlier, interrupted transfer is continued if the server allows it.

    Args:
        size: in bytes, if known.
        md5, sha256: what the digest must begin with, if known.

    Raises:
        RunError: if it cannot be had (the part that arrived is kept), or is not the expected file (it is not kept).
    """
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part, size)
            break
        except Interrupted as broken:
            if attempt == ATTEMPTS:
                message = f"{url}: {broken}; the same command goes on from {_size(part):,} bytes"
                raise RunError(message) from None
            time.sleep(attempt)
    if difference := _difference(part, size, {"md5": md5, "sha256": sha256}):
        part.unlink()
        _tag_of(part).unlink(missing_ok=True)
        raise RunError(f"{url}: {difference}: not kept; was it damaged or replaced there?")
    os.replace(part, target)
    _tag_of(part).unlink(missing_ok=True)


def _difference(part: Path, size: int, digests: dict[str, str]) -> str:
    if size and _size(part) != size:
        return f"size is {_size(part):,} bytes, expected {size:,}"
    for kind, expected in digests.items():
        if expected and not (found := digest(part, kind)).startswith(expected):
            return f"{kind} is {found}, expected {expected}"
    return ""


def _transfer(url: str, part: Path, size: int) -> None:
    """One request: append to `part` what is missing, or write all of it if the server sends all of it."""
    have, tag = _size(part), _tag_of(part)
    headers = {"User-Agent": "self-classifier"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()  # if the file has changed there, it is sent from the start
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            start = have if response.status == 206 else 0
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise RunError(f"{url}: asked for the bytes from {start}, got {response.headers.get('Content-Range')}")
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else size
            if size and total != size:
                raise RunError(f"{url}: it has {total:,} bytes there, expected {size:,}; was it replaced?")
            _write(response, part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is here: it is complete, or no part of this file
            if error.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()
                raise Interrupted("what was here before is no part of it") from None
        elif error.code >= 500:
            raise Interrupted(f"the server answered {error.code} {error.reason}") from None
        else:
            raise RunError(f"{url}: the server answered {error.code} {error.reason}; is it still there?") from None
    except urllib.error.URLError as error:
        raise RunError(f"{url}: no connection ({error.reason}); is there a way to the network from here?") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke ({error})") from None


def _write(response: http.client.HTTPResponse, part: Path, start: int, total: int) -> None:
    from tqdm import tqdm

    # what the server calls this version of the file; a weak tag (W/) must not be used to continue
    tags = [response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")]
    tag = next((tag for tag in tags if tag and not tag.startswith("W/")), "")
    bar = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=part.name[1:-5], disable=None)
    with bar, _room_for(part, total):
        _tag_of(part).write_text(tag) if tag else _tag_of(part).unlink(missing_ok=True)
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
def _room_for(part: Path, total: int) -> Iterator[None]:
    """Say in one line that a disk is full or must not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{part.parent}: {error.strerror}; name another folder in SELF_CLASSIFIER_CACHE") from None
        raise RunError(
            f"{part.parent}: the disk is full ({_size(part):,} of {total:,} bytes are here); make room, and the same "
            "command goes on from there, or name another folder in SELF_CLASSIFIER_CACHE"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def digest(path: Path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# the cache folder


def cache_folder() -> Path:
    """$SELF_CLASSIFIER_CACHE, else self-classifier/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SELF_CLASSIFIER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "self-classifier"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from writing the same files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise RunError(f"another process is downloading into {folder}: wait until it has finished") from None
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: {error.strerror}; name another folder in SELF_CLASSIFIER_CACHE") from None


def recorded(folder: Path) -> dict[str, dict]:
    """File in the cache → its size and sha256 when it was first downloaded."""
    path = folder / "checksums.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path}: damaged; remove it, and the files are recorded anew") from None


def check_or_record(folder: Path, path: Path) -> None:
    """Compare a file in the cache with what was noted at its first download; note it if nothing was.

    Raises:
        RunError: if it has changed since.
    """
    notes, name = recorded(folder), str(path.relative_to(folder))
    found = {"size": _size(path), "sha256": digest(path)}
    if notes.setdefault(name, found) != found:
        raise RunError(
            f"{path}: sha256 is {found['sha256']}, at the first download it was {notes[name]['sha256']}; remove it and get "
            f"it again, or forget the old one in {folder / 'checksums.json'}"
        )
    aside = folder / ".checksums.json.part"
    aside.write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")
    os.replace(aside, folder / "checksums.json")

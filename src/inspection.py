"""Check untrusted files before their contents are unpickled, decompressed or allocated.

A few hundred bytes can ask for terabytes, or for more stack than a process has. So a file is first compared with itself:
everything that reading it would take must be in the file. `pickles.py` checks the pickle in a checkpoint.

Reading a file that passes takes at most twice its size plus `ROOM` bytes for each copy of its numbers.
"""

import io
import json
import os
import stat
import struct
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import InputError, printable
from .pickles import DAMAGED, MOST_BYTES, Walk

ROOM = 1 << 28  # bytes that the contents of a compressed archive may have beyond the size of the file
MOST_ENTRIES = 100_000  # in an archive; torch.save writes one for each tensor
MOST_TEXT = 1 << 26  # bytes of a text file: lists of classes and images, results
MOST_LINES = 4_000_000
ENDS_OF_LINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # those of str.splitlines
FIRST_LOOK = 1 << 20  # bytes
ZIP_START = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C  # first object in a file of torch before 1.6
CHECKPOINTS = (".pth", ".pt", ".tar")  # endings of a checkpoint inside an archive

# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def checked_checkpoint(file: BinaryIO, *, inside_archive: bool = False, verify: bool = True) -> BinaryIO:
    """Check a file that torch.load is to read, without loading it.

    Args:
        file: at its beginning.
        inside_archive: the file comes from another archive. Then it may not be an archive of files itself.
        verify: also compare the contents with their checksums, which torch does not do.

    Returns:
        The file at its beginning. If the file is a zip archive that contains one checkpoint, as OBoW's file is: this
        checkpoint.

    Raises:
        InputError: if the file names code, asks for more memory than its size explains, is nested too deeply, or is no
            checkpoint. The message does not name the file.
    """
    if file.read(4) == ZIP_START:
        with open_zip(file) as archive:
            names = archive.namelist()
            if not any(name.endswith("data.pkl") for name in names):  # torch.save also writes a zip archive
                inside = [name for name in names if name.endswith(CHECKPOINTS)]
                if len(inside) != 1 or inside_archive:
                    raise InputError(
                        f"an archive of {len(inside)} checkpoints, expected one: unpack it and name a file"
                    )
                _verify(archive)
                return checked_checkpoint(io.BytesIO(archive.read(inside[0])), inside_archive=True)
            _check_torch_archive(file, archive)
            if verify:
                _verify(archive)
    else:
        _check_legacy(file)
    file.seek(0)
    return file


def _check_legacy(file: BinaryIO) -> None:
    """Check a file of torch before 1.6, or any other file that is not an archive."""
    size = file.seek(0, os.SEEK_END)
    for length in (FIRST_LOOK, MOST_BYTES):  # the pickles are rarely long, but the storages behind them are
        file.seek(0)
        start = file.read(length)
        if start[257:262] == b"ustar":
            raise InputError("a tar archive, expected a file of torch.save: unpack it, or save it with a later torch")
        try:
            return _follow_legacy(start, size)
        except InputError:
            if length == MOST_BYTES or length >= size:
                raise


def _follow_legacy(start: bytes, size: int) -> None:
    """Follow the pickles of a file of torch before 1.6: five, then the storages. Any other pickle is refused.

    Args:
        start: the beginning of the file, with all pickles.
        size: number of bytes of the file.

    Raises:
        InputError: see `Walk.run`.
    """
    first = Walk(start, available=None, total=size)
    if first.run() != MAGIC:
        first.check_protocol()
        raise InputError(DAMAGED)
    walks = [first]
    for _ in range(4):  # protocol, sizes of C's numbers, the object, the keys of the storages
        walks.append(Walk(start, walks[-1].at, available=None, total=size))
        walks[-1].run()
    for walk in walks:
        walk.check_protocol()


def _check_torch_archive(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Check an archive that torch.save wrote.

    torch has its own reader of archives. So anything that it might understand differently from Python's is refused.
    """
    infos = archive.infolist()
    directory = _find_directory(file)
    # torch compares names without regard to case, and ends a name at a NUL byte
    names = {info.orig_filename.lower() for info in infos}
    if not directory.is_plain or directory.entries != len(infos) or len(names) < len(infos):
        raise InputError("damaged: its list of contents is ambiguous: use another copy")
    if any(info.orig_filename != info.filename or not info.filename.isascii() for info in infos):
        raise InputError("damaged: its list of contents has names that torch.save does not write: use another copy")
    root = infos[0].filename.partition("/")[0]
    sizes = {info.filename: info.file_size for info in infos}
    if sizes.get(f"{root}/data.pkl", MOST_BYTES + 1) > MOST_BYTES:
        raise InputError(DAMAGED)
    total = sum(size for name, size in sizes.items() if name.startswith(f"{root}/data/"))
    try:
        data = archive.read(f"{root}/data.pkl")
    except Exception:  # Python's reader can fail in many ways on arbitrary bytes
        raise InputError(DAMAGED) from None
    walk = Walk(data, available=lambda key: sizes.get(f"{root}/data/{key}", -1), total=total)
    walk.run()
    walk.check_protocol()


# --------------------------------------------------------------------------------------------------------------------
# archives


class _Directory(NamedTuple):
    """The list of contents of a zip archive: its size in bytes, the number of entries, and whether it is where torch looks."""

    size: int
    entries: int
    is_plain: bool


def _find_directory(file: BinaryIO) -> _Directory:
    """Read the record at the end of a zip archive.

    Raises:
        InputError: if there is none.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - (1 << 16) - 22, 0))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise InputError("truncated or damaged: use another copy")
    disk, first, here, entries, length, offset, comment = struct.unpack("<4H2LH", tail[at + 4 : at + 22])
    is_plain = comment == 0 and at + 22 == len(tail) and not disk and not first and here == entries
    end = size - len(tail) + at  # where the list ends
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # the record for large archives
        signature, *_, entries, length, offset = struct.unpack("<4sQ2H2L4Q", tail[at - 76 : at - 20])
        end -= 76
        is_plain &= signature == b"PK\x06\x06" and struct.unpack("<Q", tail[at - 12 : at - 4])[0] == end
    return _Directory(length, entries, is_plain and offset + length == end)


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive whose contents take at most `ROOM` bytes more than the file.

    Raises:
        InputError: if they take more, if the archive has too many entries, or if it is damaged.
    """
    size = file.seek(0, os.SEEK_END)
    if _find_directory(file).size > 300 * MOST_ENTRIES:
        raise InputError(
            f"an archive with a list of contents of more than {300 * MOST_ENTRIES:,} bytes: use another file"
        )
    try:
        archive = zipfile.ZipFile(file)
    except Exception:  # Python's reader can fail in many ways on arbitrary bytes
        raise InputError("truncated or damaged: use another copy") from None
    infos = archive.infolist()
    if len(infos) > MOST_ENTRIES:
        raise InputError(f"an archive of {len(infos):,} entries, expected at most {MOST_ENTRIES:,}: use another file")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise InputError("an archive of an unknown compression, expected none or deflate: write it again")
    if (contents := sum(info.file_size for info in infos)) > size + ROOM:
        raise InputError(
            f"an archive of {size:,} bytes whose contents take {contents:,}: write it again without compression"
        )
    places = sorted((info.header_offset, info.compress_size) for info in infos)
    if any(at + length > following for (at, length), (following, _) in pairwise([*places, (size, 0)])):
        raise InputError("damaged: parts of the archive overlap: use another copy")
    return archive


def _verify(archive: zipfile.ZipFile) -> None:
    """Raise InputError if a checksum is wrong."""
    try:
        damaged = archive.testzip()
    except Exception as error:  # Python's reader can fail in many ways on arbitrary bytes
        raise InputError(f"truncated or damaged ({first_line(error)}): use another copy") from None
    if damaged:
        raise InputError(f"damaged: the checksum of {printable(damaged)} is wrong: use another copy")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return printable((str(error).splitlines() or [type(error).__name__])[0][:100])


# --------------------------------------------------------------------------------------------------------------------
# text files


def read_text(path: str | Path, *, most: int = MOST_TEXT) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no ordinary file or no text, or longer than `most` bytes. The message does not name the file.
            A text with letters that are not ASCII takes more memory, and may have at most `MOST_TEXT` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not an ordinary file")
        content = file.read(most + 1)
    if len(content) > (most if content.isascii() else MOST_TEXT):
        raise ValueError("too long")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not a text file") from None


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file that are not empty, without the spaces around them.

    Raises:
        OSError, ValueError: see `read_text`; also if there are more than `MOST_LINES` lines.
    """
    text = read_text(path)
    if sum(map(text.count, ENDS_OF_LINES)) > MOST_LINES:
        raise ValueError(f"more than {MOST_LINES:,} lines")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_json(path: str | Path, *, most: int = MOST_TEXT) -> Any:
    """Read a JSON file.

    Raises:
        OSError, ValueError: see `read_text`; also if the text is no JSON, or is nested too deeply.
    """
    text = read_text(path, most=most)
    # A value takes up to 72 bytes of memory, and between two values there is one of these letters.
    if 72 * sum(map(text.count, ",[{")) > 2 * len(text) + ROOM:
        raise ValueError("too many values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None

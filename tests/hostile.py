"""Small files that ask for too much: pickles and archives made byte by byte."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from src import checkpoint

STORAGE = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    """Return the operation that pushes a text."""
    code = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(code)) + code


def number(value: int) -> bytes:
    """Return the operation that pushes a whole number."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(*values: int) -> bytes:
    """Return the operations that push a tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2,), stride=(1,), *, offset=0, storage=4, key="0", kind=STORAGE, rebuild=REBUILD) -> bytes:
    """Return the operations that push a tensor with any shape in a storage of any declared length."""
    described = b"(" + text("storage") + kind + text(key) + text("cpu") + number(storage) + b"tQ"
    return rebuild + b"(" + described + number(offset) + numbers(*shape) + numbers(*stride) + b"\x89}tR"


def entries(**values: bytes) -> bytes:
    """Return the operations that push a dictionary."""
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def ours(**values: bytes) -> bytes:
    """Return the operations that push the contents of a checkpoint of this project."""
    return entries(format=text(checkpoint.FORMAT), version=number(checkpoint.VERSION), **values)


def write_zip(path: Path, operations: bytes, *, storages=(("0", bytes(16)),), deflated: bool = False) -> Path:
    """Write operations as the pickle of an archive such as torch.save writes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02" + operations + b".")
        archive.writestr("c/byteorder", "little")
        for key, content in storages:
            archive.writestr(f"c/data/{key}", content)
        archive.writestr("c/version", "3\n")
    return path


def write_legacy(path: Path, operations: bytes, *, keys=("0",), storages=bytes(16)) -> Path:
    """Write operations as the pickle of a file of torch before 1.6."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    lengths = struct.pack("<q", len(storages) // 4) + storages
    path.write_bytes(
        magic + b"\x80\x02" + operations.replace(b"tQ", b"NtQ") + b"." + pickle.dumps(list(keys), 2) + lengths
    )
    return path


def changed(path: Path, change: Callable[[dict], object]) -> Path:
    """Write a checkpoint again after a function has changed its contents."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def bomb(size: int) -> bytes:
    """Return an archive of torch with one compressed storage of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("c/data.pkl", b"\x80\x02" + entries(w=tensor((size // 4,), storage=size // 4)) + b".")
        archive.writestr("c/data/0", bytes(size))
    return file.getvalue()

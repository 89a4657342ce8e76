"""Read .npz files of numpy that nobody vouches for, piece by piece and only what is needed."""

import math
import zipfile
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from ..errors import InputError, printable
from ..inspection import ZIP_START, first_line, open_zip

PIECE = 1 << 24  # bytes of an array that are converted at once


class Damaged(InputError):
    """Raised if a file is no archive of arrays of numbers and texts. The message does not name the file."""


class Arrays:
    """The arrays of an .npz file. Their shapes are known at once; their contents are read when they are asked for.

    Attributes:
        shapes: {name of an array: its shape}.

    Raises:
        Damaged: if the file is no such archive, or if its contents take more than `inspection.ROOM` bytes beyond its size.
    """

    def __init__(self, file: BinaryIO):
        if file.read(2) != ZIP_START[:2]:
            raise Damaged("no zip archive")
        try:
            self._archive = open_zip(file)
        except InputError as error:
            raise Damaged(str(error)) from None
        self._headers: dict[str, tuple[tuple[int, ...], bool, Any, int]] = {}
        for info in self._archive.infolist():
            if info.filename.endswith(".npy"):
                self._headers[info.filename.removesuffix(".npy")] = _read_header(self._archive, info)
        self.shapes = {name: shape for name, (shape, *_) in self._headers.items()}

    def kind(self, name: str) -> str:
        """Return numpy's letter for the kind of numbers of an array."""
        return self.dtype(name).kind

    def dtype(self, name: str) -> Any:
        """Return numpy's type of the elements of an array."""
        return self._headers[name][2]

    def read(self, name: str, dtype: Any = None) -> Any:
        """Return an array, converted to a number type piece by piece, so that it is never in memory twice.

        Raises:
            Damaged: if the contents are damaged.
        """
        shape, is_fortran, stored, start = self._headers[name]
        array = np.empty(math.prod(shape), dtype=dtype or stored)
        rows = max(PIECE // max(stored.itemsize, 1), 1)
        try:
            with self._archive.open(f"{name}.npy") as member, np.errstate(over="ignore", invalid="ignore"):
                member.read(start)
                for first in range(0, len(array), rows):
                    part = array[first : first + rows]
                    part[:] = np.frombuffer(member.read(len(part) * stored.itemsize), dtype=stored)
                if member.read(1):
                    raise ValueError("more numbers than its shape")
        except Exception as error:  # Python's reader can fail in many ways on arbitrary bytes
            raise Damaged(f"{printable(name)} is truncated or damaged ({first_line(error)})") from None
        return array.reshape(shape, order="F" if is_fortran else "C")


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, Any, int]:
    """Return shape, order and type of an array, and the length of the header, after comparing them with the contents."""
    name = printable(info.filename.removesuffix(".npy"))
    try:
        with archive.open(info) as member:
            version = npy.read_magic(member)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, is_fortran, dtype = read(member)
            start = member.tell()
    except Exception as error:  # numpy can fail in many ways on arbitrary bytes
        raise Damaged(f"{name} has no header of an array ({first_line(error)})") from None
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise Damaged(f"{name} holds {'objects' if dtype.hasobject else dtype}, expected numbers or texts")
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != info.file_size - start:
        raise Damaged(
            f"{name} is declared with the shape {str(shape)[:100]} of {dtype}, but the file has "
            f"{info.file_size - start:,} bytes for it"
        )
    return shape, is_fortran, dtype, start

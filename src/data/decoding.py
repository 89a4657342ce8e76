"""Decode image files to pixels.

If torchcodec is installed, it decodes JPEG files in two thirds of Pillow's time and returns the same pixels. Pillow decodes
all other files, and the JPEG files that torchcodec refuses. Pillow's error messages report what is wrong with a file.
"""

import contextlib
import io
import logging
import math
import mmap
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from . import formats  # noqa: F401  teaches Pillow to read HEIC, if pillow-heif is installed

decode_jpeg: Callable[..., Any] | None = None
try:
    from torchcodec import decoders
except (ImportError, OSError, RuntimeError):  # not installed, or built for another version of torch
    pass
else:
    decode_jpeg = getattr(decoders, "decode_jpeg", None)  # older versions do not have it

# Pillow warns about unusual headers, in every worker and every epoch. Files that it cannot decode raise errors.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

ORIENTATION = 0x0112  # EXIF tag; the value 1 means upright
END_OF_IMAGE = b"\xff\xd9"  # JPEG marker; these two bytes cannot occur in the code of the pixels


def decode(path: str, *, upright: bool = False) -> Tensor:
    """Decode an image file to (3, H, W) uint8 RGB with the channels last in memory.

    As in torchvision's loader, the result is the first frame of the file, without its transparency.

    Args:
        upright: rotate the image as its EXIF orientation says; False: show it as stored, as in torchvision's loader.

    Raises:
        OSError: if the file is damaged. Pillow also raises other errors on damaged files.
    """
    with opened(path) as file, Image.open(file) as image:
        if decode_jpeg is not None and _is_plain_jpeg(image):
            file.seek(0)
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(file.read())
            file.seek(0)
        pixels: Image.Image = image
        if image.mode == "P" and "transparency" in image.info:
            pixels = image.convert("RGBA")  # same colours; Pillow warns if it converts such an image to RGB directly
        if pixels.mode != "RGB":
            pixels = (_eight_bits(pixels) if pixels.mode[0] in "IF" else pixels).convert("RGB")
        if upright and image.getexif().get(ORIENTATION, 1) != 1:
            pixels = _rotated(pixels, image.getexif()[ORIENTATION])
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _rotated(pixels: Image.Image, orientation: int) -> Image.Image:
    """Return an image turned or mirrored as a value of EXIF's orientation says. Unknown values change nothing."""
    pixels.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(pixels)


def encoded(path: str, *, upright: bool = False) -> Tensor:
    """Read an image file for `decode_on`.

    Args:
        upright: see `decode`.

    Returns:
        For a JPEG file that torchcodec decodes like Pillow: its bytes, (L,) uint8. For any other file: its pixels,
        (3, H, W) uint8.
    """
    with opened(path) as file, Image.open(file) as image:
        if _is_plain_jpeg(image):
            file.seek(0)
            code = file.read()
            if END_OF_IMAGE in code[-4096:]:  # a GPU may decode a truncated file without an error
                return torch.frombuffer(bytearray(code), dtype=torch.uint8)
    return decode(path, upright=upright)


def packed(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Join the results of `encoded` into one flat tensor, and return it with the shapes of its parts.

    A worker sends one tensor instead of many, because each tensor from a worker takes a file descriptor.
    """
    flat = [image if image.ndim == 1 else image.permute(1, 2, 0).reshape(-1) for image in images]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8), [tuple(image.shape) for image in images]


def unpacked(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Split the result of `packed` into the tensors that it was made of."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [
        part if len(shape) == 1 else part.view(*shape[1:], 3).permute(2, 0, 1)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def decode_on(device: torch.device, images: list[Tensor]) -> list[Tensor]:
    """Decode the results of `encoded` on a device, each to (3, H, W) uint8.

    A GPU decodes all files in one call. Its pixels may differ by some grey levels from those of `decode`.

    Raises:
        RuntimeError: if a file is damaged. The error does not identify the file.
    """
    files = [image for image in images if image.ndim == 1]
    decoded: Iterator[Tensor] = iter(())
    if files:
        assert decode_jpeg is not None, "check_decoding_on must be called first"
        decoded = iter(decode_jpeg(files, device=device))
    return [next(decoded) if image.ndim == 1 else image.to(device, non_blocking=True) for image in images]


def check_decoding_on(device: torch.device) -> None:
    """Raise InputError if torchcodec cannot decode JPEG files on this device."""
    if device.type != "cuda":
        raise InputError("--decode-on-gpu needs a GPU, but this process uses the CPU: drop the flag")
    if decode_jpeg is None:
        raise InputError(
            "--decode-on-gpu needs a torchcodec that fits this version of torch: install it, or drop the flag"
        )
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpeg(file.getvalue(), device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--decode-on-gpu: torchcodec cannot decode on this GPU ({reason}): drop the flag") from None


def opened(path: str | Path) -> BinaryIO:
    """Open a file for reading in binary mode, without blocking.

    A named pipe without a writer reads as empty instead of blocking for ever.
    """
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether torchcodec decodes a file to the same pixels as Pillow.

    It does so for JPEG files in RGB or grayscale that are upright. torchcodec applies EXIF's orientation, Pillow does not.
    """
    upright = "exif" not in image.info or image.getexif().get(ORIENTATION, 1) == 1
    return upright and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image with pixels of more than eight bits to eight bits.

    A 16-bit image keeps its high bytes. Pillow's own conversion clips at 255, which turns nearly all pixels white. Integer
    pixels of 32 bits whose values fit into eight bits keep their values.

    Raises:
        OSError: if the pixels are floating-point numbers or do not fit into 16 bits. The file does not tell which of these
            values are black and white.
    """
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        kind = "floating-point pixels" if image.mode == "F" else "pixels with values outside 16 bits"
        raise OSError(f"{kind}, expected 8 or 16 bits: convert the image")
    wide = image.mode == "I" and grey.max() < 256
    return Image.fromarray((grey if wide else grey >> 8).astype(np.uint8))


class Kept:
    """Keep decoded images in memory that all worker processes share, so that each file is decoded only once.

    The images are stored one after the other, in the order in which the workers decode them. An image that does not fit
    into the remaining memory is not kept.

    Args:
        images: N, the number of images in the data set.
        room: size of the memory in bytes. The system allocates it gradually, as it fills.

    Raises:
        InputError: if the system cannot reserve the memory.
    """

    # A forked worker inherits the memory. Other start methods would have to copy it.
    fork = multiprocessing.get_context("fork")

    def __init__(self, images: int, room: int):
        try:
            self.pixels = np.frombuffer(mmap.mmap(-1, max(room, 1)), dtype=np.uint8)
        except (OSError, OverflowError):
            raise InputError(
                f"--keep-decoded: the system cannot reserve {room / 2**30:g} GiB of memory: lower the value"
            ) from None
        places = np.frombuffer(mmap.mmap(-1, 24 * images), dtype=np.int64)
        self.places = places.reshape(images, 3)  # start, height, width
        self.used = self.fork.Value("q", 0)

    def get(self, index: int) -> Tensor | None:
        """Return the pixels of an image, (3, H, W) uint8, or None if it is not kept."""
        start, height, width = self.places[index].tolist()
        if not width:
            return None
        pixels = self.pixels[start : start + height * width * 3]
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        """Keep the pixels of an image if they fit into the remaining memory."""
        with self.used.get_lock():
            start = self.used.value
            if start + image.numel() > len(self.pixels):
                return
            self.used.value += image.numel()
        self.pixels[start : start + image.numel()] = image.permute(1, 2, 0).reshape(-1).numpy()
        self.places[index, :2] = start, image.shape[1]
        # The width is written last: `get` takes a width above 0 as the sign that the image is complete.
        self.places[index, 2] = image.shape[2]

"""Image files → pixels.

JPEG files are decoded by torchcodec where it is installed, in two thirds of Pillow's time and to the same pixels; all else, and
what it refuses, by Pillow, whose messages say what is wrong with a file.
"""

import contextlib
import io
import math
import mmap
import multiprocessing
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or not for this version of torch
    decode_jpeg = None

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
END_OF_IMAGE = b"\xff\xd9"  # JPEG's marker, which cannot be part of the pixels' code


def decode(path: str) -> Tensor:
    """(3, H, W) uint8 RGB, laid out in memory with the channels last: an image's first frame, transparency dropped, as it is
    stored and not as EXIF would have it turned, all as torchvision's loader.

    Raises:
        OSError, and what else Pillow raises on a damaged file.
    """
    with opened(path) as file, Image.open(file) as image:
        if decode_jpeg and _is_plain_jpeg(image):
            file.seek(0)
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(file.read())
            file.seek(0)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours; straight to RGB Pillow warns
        if image.mode != "RGB":
            image = (_eight_bits(image) if image.mode[0] in "IF" else image).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encoded(path: str) -> Tensor:
    """What `decode_on` takes: the bytes of a JPEG file, (L,) uint8; of any other, and of what `decode` leaves to Pillow, its pixels."""
    with opened(path) as file, Image.open(file) as image:
        if _is_plain_jpeg(image):
            file.seek(0)
            code = file.read()
            if END_OF_IMAGE in code[-4096:]:  # of what was cut off, a GPU may make an image in silence
                return torch.frombuffer(bytearray(code), dtype=torch.uint8)
    return decode(path)


def packed(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """What `encoded` gave, as one tensor and the shapes in it: each tensor from a worker takes a file descriptor."""
    flat = [image if image.ndim == 1 else image.permute(1, 2, 0).reshape(-1) for image in images]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8), [tuple(image.shape) for image in images]


def unpacked(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [
        part if len(shape) == 1 else part.view(*shape[1:], 3).permute(2, 0, 1)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def decode_on(device: torch.device, images: list[Tensor]) -> list[Tensor]:
    """(3, H, W) uint8 on a device, of what `encoded` gave. A GPU decodes all files in one call, to pixels that may differ by some
    grey levels from those of `decode`.

    Raises:
        RuntimeError: if a file is damaged. Which one is not known.
    """
    files = [image for image in images if image.ndim == 1]
    decoded = iter(decode_jpeg(files, device=device) if files else ())
    return [next(decoded) if image.ndim == 1 else image.to(device, non_blocking=True) for image in images]


def check_decoding_on(device: torch.device) -> None:
    """Raise InputError if JPEG files cannot be decoded on this device."""
    if device.type != "cuda":
        raise InputError("--decode-on-gpu: no GPU is here: drop the flag")
    if decode_jpeg is None:
        raise InputError("--decode-on-gpu needs torchcodec, for this version of torch: install it, or drop the flag")
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpeg(file.getvalue(), device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--decode-on-gpu: torchcodec cannot decode here ({reason}): drop the flag") from None


def opened(path: str | Path) -> BinaryIO:
    """A file to be read; of a pipe, which nobody may ever write to, nothing is read instead of waiting."""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))


def _is_plain_jpeg(image: Image.Image) -> bool:
    """What torchcodec decodes to Pillow's pixels: RGB or grayscale, and upright, since it turns what EXIF says is turned."""
    upright = "exif" not in image.info or image.getexif().get(ORIENTATION, 1) == 1
    return upright and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The high bytes of a 16-bit image; Pillow itself clips at 255, which leaves nearly all of it white. Wider pixels that need
    no more than eight bits are taken as they are.

    Raises:
        OSError: if the pixels are wider, and what is black and white therefore unknown.
    """
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        kind = "floating-point pixels" if image.mode == "F" else "pixels with values outside 16 bits"
        raise OSError(f"{kind}, of which black and white are unknown: convert the image to 8 or 16 bits")
    wide = image.mode == "I" and grey.max() < 256
    return Image.fromarray((grey if wide else grey >> 8).astype(np.uint8))


class Kept:
    """Decoded images in memory that worker processes share, so that each is decoded once and not in every epoch.

    They lie side by side in the order in which workers came to them; those for which no room is left are not kept.

    Args:
        images: N of the data set.
        room: bytes. Memory is taken as it fills.

    Raises:
        InputError: if the system cannot promise that much.
    """

    # What inherits the memory; other ways to start a worker would have to copy it.
    fork = multiprocessing.get_context("fork")

    def __init__(self, images: int, room: int):
        try:
            self.pixels = np.frombuffer(mmap.mmap(-1, max(room, 1)), dtype=np.uint8)
        except (OSError, OverflowError):
            raise InputError(f"--keep-decoded: {room / 2**30:g} GiB of memory are not to be had: lower it") from None
        places = np.frombuffer(mmap.mmap(-1, 24 * images), dtype=np.int64)
        self.places = places.reshape(images, 3)  # start, height, width
        self.used = self.fork.Value("q", 0)

    def get(self, index: int) -> Tensor | None:
        start, height, width = self.places[index].tolist()
        if not width:
            return None
        pixels = self.pixels[start : start + height * width * 3]
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)

    def put(self, index: int, image: Tensor) -> None:
        with self.used.get_lock():
            start = self.used.value
            if start + image.numel() > len(self.pixels):
                return
            self.used.value += image.numel()
        self.pixels[start : start + image.numel()] = image.permute(1, 2, 0).reshape(-1).numpy()
        self.places[index, :2] = start, image.shape[1]
        self.places[index, 2] = image.shape[2]  # last of all: by it another worker knows that the image is there

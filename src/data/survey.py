"""Look at a data set before training: how many images it has, and how large they are."""

import statistics

import numpy as np
from PIL import Image

from ..config import SMALL_SIDE, Survey
from ..errors import InputError
from .datasets import ImageFiles, Images
from .decoding import opened

SAMPLE = 100  # number of images whose size is read first
MOST_IN_MEMORY = 200_000  # small images; their pixels take at most 2.5 GB


def survey(data: Images, *, gpu: bool) -> Survey:
    """Return the number of images, the median of their shorter sides, and whether they have one size.

    The sizes are read from the headers of a sample that is spread evenly over the files. If the sample has one small size, the
    headers of all files are read.

    Raises:
        InputError: if no file of the sample is an image.
    """
    if not isinstance(data, ImageFiles):
        side = 0 if data.images.ndim == 2 else min(data.images.shape[-2:])
        return Survey(images=len(data), side=side, gpu=gpu, uniform=True)
    rows = np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int)
    sizes = [_size(data.paths[row]) for row in rows]
    known = [min(size) for size in sizes if size]
    if not known:
        raise InputError(f"{data.paths[0]}: not a readable image, and neither are the others: check --data")
    side = round(statistics.median(known))
    uniform = len(set(sizes)) == 1 and side <= SMALL_SIDE and len(data) <= MOST_IN_MEMORY
    uniform = uniform and all(_size(path) == sizes[0] for path in data.paths)
    return Survey(images=len(data), side=side, gpu=gpu, uniform=uniform)


def _size(path: str) -> tuple[int, int] | None:
    """Return width and height of an image file, or None if its header cannot be read."""
    try:
        with opened(path) as file, Image.open(file) as image:
            return image.size
    except Exception:  # Pillow raises errors of many kinds on damaged files; training reports and replaces them
        return None

"""Look at a data set before training: how many images it has, and how large they are."""

import statistics

import numpy as np
from PIL import Image

from ..config import Survey
from ..errors import InputError
from .datasets import ImageFiles, Images
from .decoding import opened

SAMPLE = 100  # number of images whose size is read


def survey(data: Images, *, gpu: bool) -> Survey:
    """Return the number of images and the median of their shorter sides.

    The size is read from the headers of files that are spread evenly over the data set.

    Raises:
        InputError: if none of these files is an image.
    """
    if not isinstance(data, ImageFiles):
        side = 0 if data.images.ndim == 2 else min(data.images.shape[-2:])
        return Survey(images=len(data), side=side, gpu=gpu)
    sides = []
    for row in np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int):
        try:
            with opened(data.paths[row]) as file, Image.open(file) as image:
                sides.append(min(image.size))
        except Exception:  # Pillow raises many kinds of errors on damaged files; training reports and replaces them
            continue
    if not sides:
        raise InputError(f"{data.paths[0]}: not a readable image, and neither are the others: check --data")
    return Survey(images=len(data), side=round(statistics.median(sides)), gpu=gpu)

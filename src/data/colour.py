"""Colour and blur operations on batches of images, with separate parameters for each image.

All images are (B, 3, s, s) floats with grey levels from 0 to 255.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .randomness import beside

GREY = (0.299, 0.587, 0.114)  # weights of RGB, ITU-R 601-2 as in Pillow
ORDERS = np.array(list(itertools.permutations(range(4))))  # all orders of the four `ADJUSTMENTS`


def change(
    x: Tensor, which: np.ndarray, operation: Callable[..., Tensor], *, parameters: np.ndarray | None = None
) -> None:
    """Apply an operation to some images in place.

    Args:
        which: (B,) bool, the images to change.
        operation: takes the images, and their parameters if there are any.
        parameters: (B,) one number for each image.
    """
    rows = np.flatnonzero(which)
    if len(rows):
        at = beside(x, rows)
        x[at] = operation(x[at]) if parameters is None else operation(x[at], beside(x, parameters[rows]))


def jitter(x: Tensor, order: np.ndarray, factors: np.ndarray) -> None:
    """Adjust the colours of each image in place, with its own order and factors.

    Args:
        x: the images.
        order: (B, 4) positions in `ADJUSTMENTS`, from first to last, or `NONE` for no adjustment.
        factors: (B, 4) parameters, in the order of `ADJUSTMENTS`.
    """
    for place in range(4):
        for k, adjust in enumerate(ADJUSTMENTS):
            change(x, order[:, place] == k, adjust, parameters=factors[:, k])


def jitter_at_once(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Return the result of `jitter` as one expression, which can be compiled.

    At each of the four places, the expression applies all adjustments to every image and keeps the one that the image drew.
    This takes four times the arithmetic, but it reads and writes the pixels only once for each place.
    """
    for place in range(4):
        kept = x
        for k, adjust in enumerate(ADJUSTMENTS):
            kept = torch.where(_per_image(order[:, place] == k), adjust(x, factors[:, k]), kept)
        x = kept
    return x


def _per_image(values: Tensor) -> Tensor:
    """Shape (B,) numbers so that they broadcast over images (B, C, s, s)."""
    return values.view(-1, 1, 1, 1)


def grey(x: Tensor) -> Tensor:
    """Return the luminance, (B, 1, s, s)."""
    r, g, b = x.split(1, dim=1)
    return (GREY[0] * r).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor (B,)."""
    return (x * _per_image(factor)).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each image from its mean luminance, which is rounded to a grey level as in Pillow."""
    mean = grey(x).mean(dim=(1, 2, 3), keepdim=True).round_()
    return (x * _per_image(factor)).add_(mean * (1 - _per_image(factor))).clamp_(0, 255)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its luminance."""
    return (x * _per_image(factor)).add_(grey(x).mul_(1 - _per_image(factor))).clamp_(0, 255)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue in HSV by `shift`, a share of the full circle between -1/2 and 1/2.

    Choices for each pixel use sign and lerp. On a CPU, torch.where and the remainder take ten times as long.
    """
    r, g, b = x.split(1, dim=1)
    warm = torch.maximum(r, g)
    high, low = torch.maximum(warm, b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    sector = torch.lerp(g - b, 2 * chroma + b - r, (warm - r).sign_())  # if red or green is the highest channel
    sector = torch.lerp(sector, 4 * chroma + r - g, (high - warm).sign_())  # if blue is the highest channel
    turned = sector.div_((6 * chroma).clamp_(min=1e-6)).add_(_per_image(shift))
    # Convert (hue, chroma, value) to RGB: each channel is the value minus a share of the chroma that depends on the hue.
    offsets = torch.arange(11, 5, -2, device=x.device).view(1, 3, 1, 1) / 6
    place = (turned + offsets).frac_()
    return torch.minimum(place, 4 / 6 - place).mul_(6).clamp_(0, 1).mul_(chroma).neg_().add_(high)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
NONE = len(ADJUSTMENTS)


def gaussian_blur(x: Tensor, radius: Tensor, largest: float) -> Tensor:
    """Blur each image with a Gaussian of its own standard deviation.

    The pixels at the edge are repeated outwards. Blurring is linear: it multiplies each image by its own band matrix from the
    left and from the right.

    Args:
        x: (B, C, s, s).
        radius: (B,) standard deviations in pixels.
        largest: largest possible radius in pixels. All kernels reach three times as far, so that the result for an image
            does not depend on the rest of the batch.
    """
    side, reach = x.shape[-1], max(1, math.ceil(3 * largest))
    taps = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / radius[:, None]).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    reached = (torch.arange(side, device=x.device)[:, None] + taps).clamp_(0, side - 1)  # (s, taps)
    band = x.new_zeros(len(x), side, side)
    band.scatter_add_(2, reached.expand(len(x), -1, -1), kernel[:, None].expand(-1, side, -1))
    with torch.autocast(x.device.type, enabled=False):
        return _band_product(band, _band_product(band, x, reach).mT, reach).mT


def _band_product(band: Tensor, x: Tensor, reach: int, *, block: int = 64) -> Tensor:
    """Multiply band matrices (B, s, s) by images (B, C, s, s).

    The product goes through blocks of rows and skips the columns in which the band of a block is zero.
    """
    products = []
    for row in range(0, x.shape[-2], block):
        near = slice(max(row - reach, 0), row + block + reach)
        products.append(band[:, None, row : row + block, near] @ x[..., near, :])
    return torch.cat(products, dim=-2)


def solarize(x: Tensor) -> Tensor:
    """Invert the grey levels from 128 up: the result is the darker of a level and its inverse."""
    return torch.minimum(x, 255 - x)


def rgb(x: Tensor) -> Tensor:
    """Expand (B, 1, H, W) to three channels, and return images of three channels unchanged."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise (B, 3, H, W) grey levels from 0 to 255 by mean and standard deviation of RGB in [0, 1]."""
    means, deviations = (np.array(values).reshape(1, 3, 1, 1) for values in (mean, std))
    return (x * beside(x, 1 / (255 * deviations))).sub_(beside(x, means / deviations))

"""Strong augmentation of SCAN: operations of RandAugment, and Cutout.

Source: arXiv:2005.12320; in the authors' code it is the strategy `ours`.

Every operation takes images, (B, 3, s, s) floats with whole grey levels from 0 to 255, and a magnitude for each image, (B,)
float64. It returns images of the same kind. The grey levels are those that Pillow computes, except for rare ties. The result
for an image does not depend on the other images in the batch.

The authors also flip the sign of a geometric magnitude in half of the cases. This changes nothing, because the ranges of
these magnitudes are symmetric.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .randomness import beside


class Operation(NamedTuple):
    """An operation and the range of its magnitude, which is uniform."""

    apply: Callable[[Tensor, np.ndarray], Tensor]
    low: float = 0.0
    high: float = 0.0


def strengthen(x: Tensor, names: tuple[str, ...], u: np.ndarray) -> Tensor:
    """Apply n random operations to each image, drawn from `names` with replacement.

    Args:
        x: (B, 3, s, s) grey levels; changed in place.
        u: (B, 2n) uniform numbers in [0, 1).

    Returns:
        `x`.
    """
    which, magnitudes = draw(names, u)
    for place in range(which.shape[1]):
        for k, name in enumerate(names):
            rows = np.flatnonzero(which[:, place] == k)
            if len(rows):
                at = beside(x, rows)
                x[at] = OPERATIONS[name].apply(x[at], magnitudes[rows, place])
    return x


def draw(names: tuple[str, ...], u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn (B, 2n) uniform numbers into (B, n) positions in `names` and (B, n) magnitudes."""
    which, share = np.split(u, 2, axis=1)
    which = (which * len(names)).astype(int)
    low, high = np.array([(OPERATIONS[name].low, OPERATIONS[name].high) for name in names]).T
    return which, low[which] + (high - low)[which] * share


def _per_image(values: np.ndarray, x: Tensor) -> Tensor:
    """Shape (B,) numbers so that they broadcast over the images `x`, on the device of `x`."""
    return beside(x, values).view(-1, 1, 1, 1)


# --------------------------------------------------------------------------------------------------------------------
# grey levels


def identity(x: Tensor, _: np.ndarray) -> Tensor:
    return x


def autocontrast(x: Tensor, _: np.ndarray) -> Tensor:
    """Stretch each channel to 0 … 255. A channel with a single grey level does not change."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    stretched = (x - low).mul_(255).div_((high - low).clamp_(min=1)).floor_()
    return stretched.add_(low * (low == high))


def equalize(x: Tensor, _: np.ndarray) -> Tensor:
    """Equalise the histogram of each channel.

    As in Pillow, one step is a 255th of the number of pixels that are darker than the highest level of the channel.
    """
    levels = x.flatten(2).long()
    counts = levels.new_zeros(*x.shape[:2], 256).scatter_add_(
        2, levels, torch.ones_like(levels[:1, :1]).expand_as(levels)
    )
    step = (levels.shape[2] - counts.gather(2, levels.amax(dim=2, keepdim=True))) // 255
    below = counts.cumsum(dim=2) - counts
    table = (step // 2 + below) // step.clamp(min=1)
    unchanged = torch.arange(256, device=x.device).expand_as(table)
    table = torch.where(step > 0, table.clamp_(max=255), unchanged).to(x.dtype)
    return table.gather(2, levels).view_as(x)


def solarize(x: Tensor, threshold: np.ndarray) -> Tensor:
    """Invert the grey levels that are at or above the threshold."""
    # The absolute value of x - 255 is 255 - x; the other levels do not change.
    return x.sub((x >= _per_image(threshold, x)).to(x.dtype), alpha=255).abs_()


def posterize(x: Tensor, bits: np.ndarray) -> Tensor:
    """Keep the highest bits of each grey level. A fractional number of bits is rounded down."""
    step = _per_image(2.0 ** (8 - bits.astype(int)), x)
    return (x / step).floor_().mul_(step)


def color(x: Tensor, factor: np.ndarray) -> Tensor:
    """Blend each image with its luminance."""
    return _blend(_grey(x), x, factor)


def contrast(x: Tensor, factor: np.ndarray) -> Tensor:
    """Blend each image with the mean of its luminance."""
    # The float32 sum of the whole grey levels is exact up to 2^24, which is enough for a view of 256 × 256 pixels.
    return _blend(_grey(x).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_(), x, factor)


def brightness(x: Tensor, factor: np.ndarray) -> Tensor:
    """Multiply each image by its factor."""
    return (x * _per_image(factor, x)).floor_()


def sharpness(x: Tensor, factor: np.ndarray) -> Tensor:
    """Blend each image with a smoothed copy.

    The smoothed copy is the mean of 3 × 3 pixels in which the middle pixel counts five times. Pixels at the edge do not
    change.
    """
    rows = (x[:, :, :-2] + x[:, :, 1:-1]).add_(x[:, :, 2:])
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = around.add_(x[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return _blend(smooth, x, factor)


def _grey(x: Tensor) -> Tensor:
    """Return the luminance (B, 1, s, s) in Pillow's fixed-point numbers, which float32 represents exactly."""
    r, g, b = x.split(1, dim=1)
    return (19595 * r).add_(g, alpha=38470).add_(b, alpha=7471).add_(2**15).mul_(2**-16).floor_()


def _blend(start: Tensor, x: Tensor, factor: np.ndarray) -> Tensor:
    """Interpolate from `start` (factor 0) to the image (factor 1). Like Pillow, round down."""
    return (x - start).mul_(_per_image(factor, x)).add_(start).floor_()


# --------------------------------------------------------------------------------------------------------------------
# geometry: the pixel at (x, y) takes its value from (ax + by + c, dx + ey + f); outside the image this value is black


def rotate(x: Tensor, degrees: np.ndarray) -> Tensor:
    """Rotate each image counter-clockwise about its centre."""
    cos, sin, middle = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), x.shape[-1] / 2
    return _affine(x, a=cos, b=-sin, c=(1 - cos + sin) * middle, d=sin, e=cos, f=(1 - cos - sin) * middle)


def shear_x(x: Tensor, share: np.ndarray) -> Tensor:
    """Shift each row to the left by a share of its distance from the top."""
    return _affine(x, b=share)


def shear_y(x: Tensor, share: np.ndarray) -> Tensor:
    """Shift each column upwards by a share of its distance from the left."""
    return _affine(x, d=share)


def translate_x(x: Tensor, share: np.ndarray) -> Tensor:
    """Shift each image to the left by a share of its width."""
    return _affine(x, c=share * x.shape[-1])


def translate_y(x: Tensor, share: np.ndarray) -> Tensor:
    """Shift each image upwards by a share of its height."""
    return _affine(x, f=share * x.shape[-2])


def _affine(
    x: Tensor,
    *,
    a: float | np.ndarray = 1.0,
    b: float | np.ndarray = 0.0,
    c: float | np.ndarray = 0.0,
    d: float | np.ndarray = 0.0,
    e: float | np.ndarray = 1.0,
    f: float | np.ndarray = 0.0,
) -> Tensor:
    """Apply an affine transformation. Each pixel takes the value of the input pixel that contains its source point.

    As in Pillow, the coordinates are fixed-point numbers with 16 fractional bits, so every device selects the same pixels.
    """
    side = x.shape[-1]
    coefficients = np.broadcast_arrays(a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)
    fixed = np.floor(np.stack(coefficients) * 2**16 + 0.5).astype(np.int32).reshape(6, -1, 1, 1)
    column_x, column_y, column_start, row_x, row_y, row_start = beside(x, fixed)
    across = torch.arange(side, dtype=torch.int32, device=x.device)
    down = across[:, None]
    column = (column_x * across + column_y * down).add_(column_start) >> 16  # (B, s, s)
    row = (row_x * across + row_y * down).add_(row_start) >> 16
    at = column.clamp(-1, side).add_(1).add_(row.clamp(-1, side).add_(1), alpha=side + 2)
    framed = F.pad(x, (1, 1, 1, 1)).flatten(2)
    return framed.gather(2, at.flatten(1)[:, None].long().expand(-1, 3, -1)).view_as(x)


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(identity),
    "autocontrast": Operation(autocontrast),
    "equalize": Operation(equalize),
    "rotate": Operation(rotate, -30, 30),  # degrees
    "solarize": Operation(solarize, 0, 256),
    "color": Operation(color, 0.05, 0.95),
    "contrast": Operation(contrast, 0.05, 0.95),
    "brightness": Operation(brightness, 0.05, 0.95),
    "sharpness": Operation(sharpness, 0.05, 0.95),
    "shear_x": Operation(shear_x, -0.1, 0.1),
    "translate_x": Operation(translate_x, -0.1, 0.1),
    "translate_y": Operation(translate_y, -0.1, 0.1),
    "posterize": Operation(posterize, 4, 8),  # bits, rounded down: four to seven
    "shear_y": Operation(shear_y, -0.1, 0.1),
}

# --------------------------------------------------------------------------------------------------------------------
# Cutout


def holes(u: np.ndarray, size: int, longest: int) -> np.ndarray:
    """Turn (B, 3) uniform numbers into the holes of Cutout, (B, 4) int: top, bottom, left, right.

    The centre of a hole is uniform over the view of `size` × `size` pixels. Its side is uniform from 1 to `longest` pixels. The
    hole reaches half of its side, rounded down, in each direction from the centre. Parts outside the view are cut off.
    """
    reach = (1 + np.floor(u[:, :1] * longest)) // 2
    centre = np.floor(u[:, 1:] * size)
    return np.stack([centre - reach, centre + reach], axis=2).clip(0, size).astype(int).reshape(-1, 4)


def cutout(x: Tensor, holes: np.ndarray) -> Tensor:
    """Set the hole of each normalised image to zero, which is the mean of the data set."""
    top, bottom, left, right = beside(x, holes).T[..., None]
    pixel = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (pixel >= top) & (pixel < bottom), (pixel >= left) & (pixel < right)  # (B, s)
    return x * ~(rows[:, :, None] & columns[:, None])[:, None]

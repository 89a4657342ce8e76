"""The views of photographs as they were published: one after the other, by Pillow. Slow; the yardstick for `photographs`.

Boxes and parameters are those that `photographs` draws, so that the two can be compared picture by picture. Hue is turned
in Pillow's HSV of 8 bits, as torchvision does.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from .photographs import (
    BLUR,
    FACTORS,
    FLIP,
    GRAYSCALE,
    JITTER,
    ORDER,
    ORDERS,
    PHOTOMETRIC,
    RADIUS,
    SOLARIZE,
    PhotoRecipe,
    PhotoViews,
    crop_boxes,
    normalise,
    rgb,
)
from .randomness import uniforms


class ReferenceViews(PhotoViews):
    """As `PhotoViews`, with the whole view made where the image is decoded; the device only normalises."""

    def __call__(self, images: Tensor, indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        return self.finish(self.cut(rgb(images), indices, seed, epoch), indices, seed, epoch)

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        """The views of B decoded images, each (3, H, W), as V × (B, 3, size, size) uint8."""
        rows = [self._views(image, index, seed, epoch) for image, index in zip(images, indices, strict=True)]
        return [torch.from_numpy(np.stack(view)).to(images[0].device) for view in zip(*rows, strict=True)]

    def _views(self, pixels: Tensor, index: int, seed: int, epoch: int) -> list[np.ndarray]:
        image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        each, index = np.arange(len(self.recipes)), np.full(len(self.recipes), index)
        boxes = crop_boxes(self.recipes, seed, epoch, index, each, image.height, image.width)
        draws = uniforms(seed, epoch, index, each, PHOTOMETRIC)
        views = []
        for recipe, (top, left, height, width), u in zip(self.recipes, boxes.tolist(), draws, strict=True):
            filter = Image.Resampling.BICUBIC if recipe.bicubic else Image.Resampling.BILINEAR
            crop = image.crop((left, top, left + width, top + height)).resize((recipe.size, recipe.size), filter)
            views.append(np.asarray(photometric(crop, recipe, u)).transpose(2, 0, 1))
        return views

    def finish(self, crops: list[Tensor], indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        """Normalised, ready for a network."""
        return [normalise(crop.float(), self.mean, self.std) for crop in crops]


def photometric(image: Image.Image, recipe: PhotoRecipe, u: np.ndarray) -> Image.Image:
    """Flip, colour jitter, grayscale, blur and solarise an RGB image by (PHOTOMETRIC,) numbers in [0, 1)."""
    if u[FLIP] < recipe.flip:
        image = ImageOps.mirror(image)
    if u[JITTER] < recipe.jitter:
        strength = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
        factors = np.array([1.0, 1.0, 1.0, 0.0]) + strength * (2 * u[FACTORS] - 1)
        operations = (brightness, contrast, saturation, hue)
        for k in ORDERS[int(u[ORDER] * len(ORDERS))]:
            image = operations[k](image, float(factors[k]))
    if u[GRAYSCALE] < recipe.grayscale:
        image = ImageOps.grayscale(image).convert("RGB")
    if u[BLUR] < recipe.blur:
        low, high = recipe.blur_radius
        image = image.filter(ImageFilter.GaussianBlur(float(low + (high - low) * u[RADIUS])))
    return ImageOps.solarize(image, threshold=128) if u[SOLARIZE] < recipe.solarize else image


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by a share of the circle, in 256 steps."""
    h, s, v = image.convert("HSV").split()
    turned = np.asarray(h).astype(np.int16) + int(shift * 255)
    return Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), s, v)).convert("RGB")

"""Reference implementation of the views of photographs: one image after the other, with Pillow, as published.

It is slow and serves to check `photographs`. It uses the boxes and parameters that `photographs` and `strong` draw, so that
each image can be compared. As in torchvision, the hue is rotated in Pillow's HSV, which has 8 bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from .colour import ORDERS, normalise, rgb
from .photographs import (
    BLUR,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HOLE,
    JITTER,
    ORDER,
    RADIUS,
    SOLARIZE,
    STRONG,
    PhotoRecipe,
    PhotoViews,
    crop_boxes,
    resized_sides,
)
from .randomness import uniforms
from .strong import draw, holes


class ReferenceViews(PhotoViews):
    """Make the same views as `PhotoViews` with Pillow.

    The worker that decodes an image makes all of the view except normalisation and Cutout, which run on the device.
    """

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return self.finish(
            self.cut(list(rgb(images)), indices, seed=seed, epoch=epoch), indices, seed=seed, epoch=epoch
        )

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Make the views of B decoded images, each (3, H, W), before normalisation: V × (B, 3, size, size) uint8."""
        rows = [self._views(image, index, seed=seed, epoch=epoch) for image, index in zip(images, indices, strict=True)]
        return [torch.from_numpy(np.stack(view)).to(images[0].device) for view in zip(*rows, strict=True)]

    def _views(self, pixels: Tensor, index: int, *, seed: int, epoch: int) -> list[np.ndarray]:
        """Make the views of one image, each (3, size, size) uint8."""
        image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        if self.resize_first:
            height, width = resized_sides((image.height, image.width), self.resize)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        numbers, indices = np.arange(len(self.recipes)), np.full(len(self.recipes), index)
        boxes = crop_boxes(
            self.recipes, seed=seed, epoch=epoch, indices=indices, view=numbers, height=image.height, width=image.width
        )
        draws = uniforms(
            seed=seed, epoch=epoch, indices=indices, view=numbers, count=max(recipe.draws for recipe in self.recipes)
        )
        views = []
        for recipe, (top, left, height, width), u in zip(self.recipes, boxes.tolist(), draws, strict=True):
            interpolation = Image.Resampling.BICUBIC if recipe.bicubic else Image.Resampling.BILINEAR
            crop = image.crop((left, top, left + width, top + height)).resize((recipe.size, recipe.size), interpolation)
            crop = photometric(crop, recipe, u)
            if recipe.drawn:
                crop = strengthen(crop, recipe.operations, u[STRONG : recipe.draws])
            views.append(np.asarray(crop).transpose(2, 0, 1))
        return views

    def finish(self, crops: list[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Normalise the views and cut the holes of Cutout, if the recipe has them."""
        views = [normalise(crop.float(), self.mean, self.std) for crop in crops]
        for number, (view, recipe) in enumerate(zip(views, self.recipes, strict=True)):
            if recipe.cutout:
                u = uniforms(seed=seed, epoch=epoch, indices=indices, view=number, count=recipe.draws)[:, HOLE]
                for row, (top, bottom, left, right) in enumerate(holes(u, recipe.size, recipe.cutout).tolist()):
                    view[row, :, top:bottom, left:right] = 0
        return views


def photometric(image: Image.Image, recipe: PhotoRecipe, u: np.ndarray) -> Image.Image:
    """Apply flip, colour jitter, grayscale, blur and solarise to an RGB image.

    Args:
        u: (at least PHOTOMETRIC,) uniform numbers in [0, 1), the first numbers of the view.
    """
    if u[FLIP] < recipe.flip:
        image = ImageOps.mirror(image)
    greyed = u[GRAYSCALE] < recipe.grayscale
    if greyed and recipe.grayscale_first:
        image = ImageOps.grayscale(image).convert("RGB")
    if u[JITTER] < recipe.jitter:
        strength = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
        factors = np.array([1.0, 1.0, 1.0, 0.0]) + strength * (2 * u[FACTORS] - 1)
        operations = (brightness, contrast, saturation, hue)
        for k in ORDERS[int(u[ORDER] * len(ORDERS))]:
            image = operations[k](image, float(factors[k]))
    if greyed and not recipe.grayscale_first:
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
    """Rotate the hue by a share of the full circle, in steps of 1/256."""
    h, s, v = image.convert("HSV").split()
    turned = np.asarray(h).astype(np.int16) + int(shift * 255)
    return Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), s, v)).convert("RGB")


def strengthen(image: Image.Image, names: tuple[str, ...], u: np.ndarray) -> Image.Image:
    """Apply the n operations of `strong` that the (2n,) uniform numbers draw."""
    for k, magnitude in zip(*(values[0].tolist() for values in draw(names, u[None])), strict=True):
        image = OPERATIONS[names[k]](image, magnitude)
    return image


def affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """Transform an image: the pixel at (x, y) takes its value from (ax + by + c, dx + ey + f).

    Args:
        coefficients: a, b, c, d, e, f.
    """
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, degrees: image.rotate(degrees),
    "solarize": lambda image, threshold: ImageOps.solarize(image, threshold),  # type: ignore[arg-type]  # floats work too
    "color": saturation,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, share: affine(image, (1, share, 0, 0, 1, 0)),
    "translate_x": lambda image, share: affine(image, (1, 0, share * image.width, 0, 1, 0)),
    "translate_y": lambda image, share: affine(image, (1, 0, 0, 0, 1, share * image.height)),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "shear_y": lambda image, share: affine(image, (1, 0, 0, share, 1, 0)),
}

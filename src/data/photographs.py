"""Views of colour photographs.

The default parameters are those of Self-Classifier (arXiv:2103.10994v3, after DINO). Other recipes are those of its first
generation (v1, after MoCo v2), SwAV, SeLa and SCAN.

A view is made in two parts. First, the crop cuts a box from the image and resizes it with antialiasing. For image files
this happens in worker processes and gives uint8. Second, the photometric operations process whole batches on the training
device, with separate random numbers for each image. Their order is flip, colour jitter in random order, grayscale, Gaussian
blur, solarise, strong operations, normalise, Cutout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import ViewSettings
from ..preprocessing import IMAGENET_MEAN, IMAGENET_STD
from .base import Views
from .colour import (
    NONE,
    ORDERS,
    change,
    gaussian_blur,
    grey,
    jitter,
    jitter_at_once,
    normalise,
    rgb,
    solarize,
)
from .randomness import beside, uniforms
from .strong import OPERATIONS, cutout, holes, strengthen

# arXiv:2006.09882v5, A.2: the colour jitter of SimCLR with strength 1
SWAV: dict[str, Any] = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
PLAIN: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0}  # only crop and flip
SIMCLR: dict[str, Any] = {"blur": 0.0}  # as in SCAN's first stage (arXiv:2005.12320): strength 1/2 and no blur
SELA: tuple[dict[str, Any], ...] = (  # levels 0 to 3 of the authors' code of arXiv:1911.05371
    {**PLAIN, "crop": "central", "resize_first": True, "flip": 0.0},
    {**PLAIN, "crop": "central", "resize_first": True},
    {**PLAIN, "resize_first": True},
    {"jitter": 1.0, "hue": 0.4, "blur": 0.0, "grayscale_first": True},
)
CUDA_SHRINKS = 32  # largest factor by which CUDA shrinks; torch's antialiased kernel does not support wider windows
TRIES = 10  # random boxes per image before the central crop is used, as in torchvision

# Positions of a view's random numbers: photometric operations, four numbers for each try of a box, the hole of Cutout, strong
# operations.
FLIP, JITTER, ORDER, FACTORS, GRAYSCALE, BLUR, RADIUS, SOLARIZE = 0, 1, 2, slice(3, 7), 7, 8, 9, 10
PHOTOMETRIC = 11
BOX = slice(PHOTOMETRIC, PHOTOMETRIC + 4 * TRIES)
HOLE = slice(BOX.stop, BOX.stop + 3)
STRONG = HOLE.stop


@dataclass(frozen=True, kw_only=True)
class PhotoRecipe:
    """Parameters of one view. A value without a comment is the probability of its operation."""

    size: int  # output pixels
    scale: tuple[float, float]  # smallest and largest share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest ratio of width to height
    bicubic: bool = True  # interpolation of the box; False: bilinear
    crop: Literal["resized", "random", "central"] = "resized"  # random and central: a window of `size` pixels
    resize_first: bool = False  # resize the image as for evaluation before cutting
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4  # factor 1 ± x
    contrast: float = 0.4  # factor 1 ± x
    saturation: float = 0.2  # factor 1 ± x
    hue: float = 0.1  # ± x of the colour circle
    grayscale: float = 0.2
    grayscale_first: bool = False  # before the jitter instead of after it
    blur: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)  # standard deviation in pixels of the view
    solarize: float = 0.0  # inverts the grey levels from 128 up
    operations: tuple[str, ...] = ()  # names from `strong.OPERATIONS` to draw from
    drawn: int = 0  # number of operations that each view draws, with replacement
    cutout: int = 0  # longest side of the hole in pixels; 0: no hole

    @property
    def draws(self) -> int:
        """Number of random numbers that a view takes."""
        return STRONG + 2 * self.drawn


def published_views(settings: ViewSettings) -> list[PhotoRecipe]:
    """Return the published recipes of Self-Classifier.

    The probability of blur is 0.1 for the first global view, 1 for the other global views and 0.5 for the local views. The
    published blur radius is in pixels, for views of 224 pixels. For views of up to 64 pixels it shrinks with the side.
    """

    def radius(size: int) -> tuple[float, float]:
        return (0.1, 2.0) if size > 64 else (0.1, max(2.0 * size / 64, 0.2))

    large, small = settings.global_crops_size, settings.local_crops_size
    first = PhotoRecipe(size=large, scale=settings.global_crops_scale, blur=0.1, blur_radius=radius(large))
    other = replace(first, blur=1.0, solarize=0.2)
    local = PhotoRecipe(size=small, scale=settings.local_crops_scale, blur=0.5, blur_radius=radius(small))
    return [first, *[other] * (settings.global_crops_number - 1), *[local] * settings.local_crops_number]


def uniform_views(settings: ViewSettings, /, **changes: Any) -> list[PhotoRecipe]:
    """Return one recipe for all views: that of the first generation, which is MoCo v2's, with `changes`.

    The authors flip last. This makes no difference, because every other operation treats left and right alike. The blur
    radius does not shrink for small views; the authors also keep it for images of 32 pixels.
    """
    changes = {"saturation": 0.4, "bicubic": False, **changes}
    large = PhotoRecipe(size=settings.global_crops_size, scale=settings.global_crops_scale, **changes)
    small = PhotoRecipe(size=settings.local_crops_size, scale=settings.local_crops_scale, **changes)
    return [large] * settings.global_crops_number + [small] * settings.local_crops_number


def scan_views(settings: ViewSettings, *, central: int = 0) -> list[PhotoRecipe]:
    """Return SCAN's recipes (arXiv:2005.12320): no augmentation for the first `central` views, strong for the others.

    The crops are windows without resizing, so the scales have no effect. As in the authors' settings, the longest side of
    the hole is 16 pixels in a view of 32 pixels, 32 in a view of 96, and 75 in a view of 224.
    """
    strong: dict[str, Any] = {"crop": "random", "resize_first": True, "operations": tuple(OPERATIONS), "drawn": 4}
    views = uniform_views(settings, **PLAIN, **strong)
    views = [replace(view, cutout=round(view.size / (2 if view.size <= 64 else 3))) for view in views]
    return [replace(view, crop="central", flip=0.0, drawn=0, cutout=0) for view in views[:central]] + views[central:]


class PhotoViews(Views):
    """Make augmented views and evaluation views of photographs in memory or in files.

    The evaluation view is the central crop of the resized image.

    Args:
        recipes: one for each view.
        resize: length in pixels to which recipes with `resize_first` resize the shorter side.
        mean, std: normalisation of RGB values in [0, 1].
        eval_size: side of the evaluation view in pixels (0: the size of the first recipe).
        eval_resize: length in pixels to which evaluation resizes the shorter side before the central crop (0: `resize`).
        compiled: run the colour jitter as one compiled pass over the pixels. Compilation takes half a minute once and needs
            a C++ compiler.

    Raises:
        ValueError: if some recipes resize the image first and others do not.
    """

    def __init__(
        self,
        recipes: list[PhotoRecipe],
        resize: int,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        eval_size: int = 0,
        eval_resize: int = 0,
        compiled: bool = False,
    ):
        self.recipes, self.resize = recipes, resize
        self.compiled = compiled
        self.eval_size, self.eval_resize = eval_size or recipes[0].size, eval_resize or resize
        self.mean, self.std = mean, std
        self.resize_first = recipes[0].resize_first
        if any(recipe.resize_first != self.resize_first for recipe in recipes):
            raise ValueError("some recipes have resize_first and others do not, expected all or none")

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        if self.resize_first:
            images = _resized(images.float(), self.resize).round().clamp(0, 255)
        height, width = images.shape[-2:]
        crops = []
        for view, recipe in enumerate(self.recipes):
            boxes = crop_boxes([recipe], seed=seed, epoch=epoch, indices=indices, view=view, height=height, width=width)
            crops.append(crop_resize(images, boxes, recipe.size, bicubic=recipe.bicubic))
        return self.finish(crops, indices, seed=seed, epoch=epoch)

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Cut the crops of B decoded images, each (3, H, W) uint8, to V × (B, 3, size, size).

        The crops are uint8 on a CPU, and floats with whole numbers on a GPU.
        """
        if self.resize_first:
            images = [resize_whole(image, self.resize) for image in images]
        count, views = len(images), len(self.recipes)
        height, width = (np.repeat([image.shape[side] for image in images], views) for side in (1, 2))
        boxes = crop_boxes(
            self.recipes * count,
            seed=seed,
            epoch=epoch,
            indices=np.repeat(indices, views),
            view=np.tile(np.arange(views), count),
            height=height,
            width=width,
        ).reshape(count, views, 4)
        crops = []
        for recipe, of_images in zip(self.recipes, boxes.swapaxes(0, 1).tolist(), strict=True):
            size, mode = (recipe.size, recipe.size), "bicubic" if recipe.bicubic else "bilinear"
            cut = [image[:, y : y + h, x : x + w] for image, (y, x, h, w) in zip(images, of_images, strict=True)]
            crop = torch.stack([_resize(box, size, mode) for box in cut])
            crops.append(crop.round_().clamp_(0, 255) if crop.is_floating_point() else crop)
        return crops

    def finish(self, crops: list[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Apply everything after the crop to V × (B, 1 or 3, size, size) grey levels from 0 to 255."""
        views = []
        for view, (crop, recipe) in enumerate(zip(crops, self.recipes, strict=True)):
            u = uniforms(seed=seed, epoch=epoch, indices=indices, view=view, count=recipe.draws)
            x = photometric(crop, recipe, u, compiled=self.compiled)
            if recipe.drawn:
                x = strengthen(x, recipe.operations, u[:, STRONG:])
            x = normalise(x, self.mean, self.std)
            views.append(cutout(x, holes(u[:, HOLE], recipe.size, recipe.cutout)) if recipe.cutout else x)
        return views

    def single(self, images: Tensor) -> Tensor:
        """Return the evaluation view of images in memory: resized, central crop, normalised."""
        return normalise(self._centre(_resized(rgb(images.float()), self.eval_resize)), self.mean, self.std)

    def single_cut(self, image: Tensor) -> Tensor:
        """Return the evaluation crop of one decoded image, (3, size, size) uint8."""
        return self._centre(resize_whole(image, self.eval_resize))

    def single_finish(self, crops: Tensor) -> Tensor:
        """Normalise evaluation crops, (B, 3, size, size)."""
        return normalise(crops.float(), self.mean, self.std)

    def _centre(self, images: Tensor) -> Tensor:
        top, left = (round((side - self.eval_size) / 2) for side in images.shape[-2:])  # rounded as in torchvision
        return images[..., top : top + self.eval_size, left : left + self.eval_size]


class TenCrops(Views):
    """Evaluation views of ten crops: the corners and the centre of the resized image, and their mirror images.

    `single` and `single_finish` return (B, 10, 3, size, size).

    Args:
        views: their evaluation view has the size, the resize rule and the normalisation.
    """

    def __init__(self, views: PhotoViews):
        self.views = views

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return self.views(images, indices, seed=seed, epoch=epoch)

    def single(self, images: Tensor) -> Tensor:
        views = self.views
        crops = self._crops(_resized(rgb(images.float()), views.eval_resize))
        return self.single_finish(crops)

    def single_cut(self, image: Tensor) -> Tensor:
        return self._crops(resize_whole(image, self.views.eval_resize)[None])[0]

    def single_finish(self, crops: Tensor) -> Tensor:
        return self.views.single_finish(crops.flatten(0, 1)).unflatten(0, (-1, 10))

    def _crops(self, images: Tensor) -> Tensor:
        """Cut ten crops from (B, 3, H, W) images, (B, 10, 3, size, size)."""
        size = self.views.eval_size
        low, right = (side - size for side in images.shape[-2:])
        corners = [images[..., y : y + size, x : x + size] for y in (0, low) for x in (0, right)]
        five = torch.stack([*corners, self.views._centre(images)], dim=1)
        return torch.cat([five, five.flip(-1)], dim=1)


def resized_sides(sides: Sequence[int], shorter: int) -> tuple[int, int]:
    """Return height and width of an image after its shorter side is resized to a given length.

    The longer side keeps the proportion and is rounded down, as in torchvision.

    Args:
        sides: height and width of the image in pixels.
        shorter: length of the shorter side in pixels.
    """
    height, width = sides
    return shorter * height // min(sides), shorter * width // min(sides)


def resize_whole(image: Tensor, shorter: int) -> Tensor:
    """Resize one decoded image, (3, H, W) uint8, so that its shorter side has a given length.

    On a CPU Pillow resizes, as in the published evaluations. torch is faster, but its pixels differ from Pillow's by one grey
    level in places, and then the outputs of a network differ in the fourth digit.
    """
    height, width = resized_sides(image.shape[1:], shorter)
    if (height, width) == image.shape[1:]:
        return image
    if image.is_cuda:
        return _resize(image, (height, width), "bilinear").round().clamp(0, 255)
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _resized(images: Tensor, shorter: int) -> Tensor:
    """Resize images in memory, (B, C, H, W), so that their shorter side has a given length."""
    sides = resized_sides(images.shape[-2:], shorter)
    if sides == images.shape[-2:]:
        return images
    return F.interpolate(images, size=sides, mode="bilinear", antialias=True)


# --------------------------------------------------------------------------------------------------------------------
# crops


def _resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (3, H, W) uint8 pixels to (3, *size) as Pillow does.

    On a CPU the result is uint8. As in Pillow, the resizing is antialiased, uses fixed-point numbers and rounds between its
    two passes. For uint8 pixels with the channels last, torch uses vector instructions and takes a fifth of Pillow's time.
    The pixels differ from Pillow's by up to 0.02 grey levels on average, and by up to 0.3 where a box grows in one direction
    and shrinks in the other. On a GPU the result is floats without rounding.
    """
    if pixels.is_cuda:
        largest = max(have / wanted for have, wanted in zip(pixels.shape[1:], size, strict=True))
        if largest > CUDA_SHRINKS:
            return _resize(pixels.cpu(), size, mode).to(pixels.device, torch.float32)
        return F.interpolate(pixels[None].float(), size=size, mode=mode, antialias=True)[0]
    return F.interpolate(pixels[None], size=size, mode=mode, antialias=True)[0]


def crop_boxes(
    recipes: Sequence[PhotoRecipe],
    *,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    view: int | np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
) -> np.ndarray:
    """Draw the boxes of crops, (B, 4) int: top, left, height, width.

    For a recipe with `crop="resized"`, the share of the area is uniform in `scale` and the aspect ratio is log-uniform in
    `ratio`. As in torchvision, the function draws ten boxes and takes the first that fits into the image; if none fits, it
    takes the central box with the nearest allowed ratio. For other recipes the box is a square window of the view's size,
    or the largest square in the image if that is smaller.

    Args:
        recipes: one for all rows, or one for each row.
        indices, view: as for `uniforms`.
        height, width: size of the images in pixels, one number for all or (B,).
    """
    height, width = (np.broadcast_to(side, len(indices))[:, None] for side in (height, width))
    u = uniforms(seed=seed, epoch=epoch, indices=indices, view=view, count=BOX.stop)[:, BOX].reshape(-1, TRIES, 4)
    smallest, largest = np.array([recipe.scale for recipe in recipes]).T[..., None]
    low, high = np.log([recipe.ratio for recipe in recipes]).T[..., None]
    area = height * width * (smallest + (largest - smallest) * u[..., 0])
    ratio = np.exp(low + (high - low) * u[..., 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)[:, None]
    w, h, y, x = (np.take_along_axis(values, first, axis=1)[:, 0] for values in (w, h, u[..., 2], u[..., 3]))
    crop, size = np.array([recipe.crop for recipe in recipes]), [recipe.size for recipe in recipes]
    height, width, fitting = height[:, 0], width[:, 0], fits.any(axis=1) | (crop != "resized")
    w, h = (np.where(crop == "resized", side, np.minimum(size, np.minimum(height, width))) for side in (w, h))
    places = (
        np.where(crop == "central", room // 2, np.floor(share * (room + 1)))
        for share, room in ((y, height - h), (x, width - w))
    )
    boxes = np.stack([*places, h, w], axis=1).astype(int)
    for row in np.flatnonzero(~fitting).tolist():
        boxes[row] = _central_box(recipes[row % len(recipes)].ratio, int(height[row]), int(width[row]))
    return boxes


def _central_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest central box of an image with an aspect ratio in the allowed range."""
    w, h = width, height
    if width / height < ratio[0]:
        h = min(round(w / ratio[0]), height)
    elif width / height > ratio[1]:
        w = min(round(h * ratio[1]), width)
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(images: Tensor, boxes: np.ndarray, size: int, *, bicubic: bool = True) -> Tensor:
    """Cut one box from each image and resize it, (B, C, H, W) → (B, C, size, size).

    The result is floats with whole grey levels, rounded as in Pillow. Resizing is linear: it multiplies each image by its own
    weights, from the left for the rows and from the right for the columns.

    Args:
        images: grey levels from 0 to 255.
        boxes: (B, 4) int, top, left, height, width.
        bicubic: interpolation; False: bilinear.
    """
    top, left, height, width = beside(images, boxes).T
    rows = _resize_weights(top, height, side=images.shape[-2], size=size, bicubic=bicubic)  # (B, size, H)
    columns = _resize_weights(left, width, side=images.shape[-1], size=size, bicubic=bicubic)  # (B, size, W)
    with torch.autocast(images.device.type, enabled=False):
        across = (images.float() @ columns[:, None].mT).round_().clamp_(0, 255)  # Pillow rounds between the passes
        return (rows[:, None] @ across).round_().clamp_(0, 255)


def _resize_weights(first: Tensor, length: Tensor, *, side: int, size: int, bicubic: bool) -> Tensor:
    """Return the (B, size, side) weights of bicubic (a = -1/2) or bilinear interpolation along one side.

    The kernel is wider for a box that shrinks. Pixels outside the box have weight 0.

    Args:
        first: (B,) first pixel of each box.
        length: (B,) number of pixels in each box.
        side: number of pixels in the image.
        size: number of pixels in the view.
    """
    scale = (length / size).float()[:, None, None]
    support = scale.clamp(min=1.0)
    centre = (torch.arange(size, device=first.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(side, device=first.device)[None, None, :] - first[:, None, None]  # position in the box
    x = ((pixel + 0.5 - centre) / support).abs()
    if bicubic:
        far = torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0)
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far)
    else:
        weights = (1 - x).clamp(min=0)
    weights = torch.where((pixel >= 0) & (pixel < length[:, None, None]), weights, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


# --------------------------------------------------------------------------------------------------------------------
# photometric operations


def photometric(crops: Tensor, recipe: PhotoRecipe, u: np.ndarray, *, compiled: bool = False) -> Tensor:
    """Apply flip, colour jitter, grayscale, blur and solarise.

    Args:
        crops: (B, 1 or 3, s, s) grey levels from 0 to 255.
        u: (B, at least PHOTOMETRIC) uniform numbers in [0, 1), one row for each image.
        compiled: compile the colour jitter.

    Returns:
        (B, 3, s, s) float grey levels.
    """
    x = torch.empty(len(crops), 3, *crops.shape[2:], device=crops.device).copy_(crops)
    change(x, u[:, FLIP] < recipe.flip, lambda x: x.flip(-1))
    greyed = u[:, GRAYSCALE] < recipe.grayscale
    if recipe.grayscale_first:
        change(x, greyed, grey)
    strength = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    factors = np.array([1.0, 1.0, 1.0, 0.0]) + strength * (2 * u[:, FACTORS] - 1)
    order = ORDERS[(u[:, ORDER] * len(ORDERS)).astype(int)]
    order[u[:, JITTER] >= recipe.jitter] = NONE
    if compiled and recipe.jitter:
        x = _compiled(jitter_at_once)(x, beside(x, order), beside(x, factors))
    else:
        jitter(x, order, factors)
    if not recipe.grayscale_first:
        change(x, greyed, grey)
    low, high = recipe.blur_radius
    change(
        x, u[:, BLUR] < recipe.blur, partial(gaussian_blur, largest=high), parameters=low + (high - low) * u[:, RADIUS]
    )
    change(x, u[:, SOLARIZE] < recipe.solarize, solarize)
    return x


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # dynamic: one compilation for all sizes of views and batches

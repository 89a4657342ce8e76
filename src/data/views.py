"""Choose the views for a data set."""

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from ..config import ViewSettings
from .base import Views
from .datasets import FeatureRows, Images, MemoryImages
from .digits import DigitRecipe, DigitViews
from .photographs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PLAIN,
    SELA,
    SIMCLR,
    SWAV,
    SWAV_STD,
    PhotoRecipe,
    PhotoViews,
    published_views,
    scan_views,
    uniform_views,
)
from .reference import ReferenceViews

CIFAR_STATISTICS = {  # mean and standard deviation of RGB, from the training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100-20": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class IdentityViews(Views):
    """Make views of frozen features: every view is the unchanged features.

    Args:
        number: V, the number of views.
    """

    def __init__(self, number: int):
        self.number = number

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [images] * self.number

    def single(self, images: Tensor) -> Tensor:
        return images


def build_views(
    name: str, data: Images, settings: ViewSettings, *, reference: bool = False, compiled: bool = False
) -> Views:
    """Build the views of a data set.

    The digits have a recipe of their own. For photographs, `--augment` names the recipe. The evaluation view of a large
    image is the central 224 of 256 pixels, in proportion to the size of the views. For a small image it is the whole image.

    Args:
        name: value of `--data`.
        reference: make the views one by one with Pillow, as published.
        compiled: compile the colour jitter.
    """
    large, small = settings.global_crops_number, settings.local_crops_number
    if isinstance(data, FeatureRows):
        return IdentityViews(large + small)
    if name == "digits":
        sizes = [settings.global_crops_size] * large + [settings.local_crops_size] * small
        return DigitViews([DigitRecipe(size=size) for size in sizes])
    size = settings.global_crops_size
    recipes = photo_recipes(settings)
    is_small = isinstance(data, MemoryImages) or size <= 64
    mean, std = CIFAR_STATISTICS.get(name, (IMAGENET_MEAN, SWAV_STD if settings.augment == "swav" else IMAGENET_STD))
    eval_resize = size if is_small else round(size * 256 / 224)
    if reference:
        return ReferenceViews(recipes, eval_resize, mean=mean, std=std)
    return PhotoViews(recipes, eval_resize, mean=mean, std=std, compiled=compiled)


def photo_recipes(settings: ViewSettings) -> list[PhotoRecipe]:
    """Return the recipes of all views for the augmentation that `settings.augment` names."""
    recipes: dict[str, Callable[[ViewSettings], list[PhotoRecipe]]] = {
        "dino": published_views,
        "moco_v2": uniform_views,
        "swav": partial(uniform_views, **SWAV),
        "simclr": partial(uniform_views, **SIMCLR),
        "crop_flip": partial(uniform_views, **PLAIN),
        "scan_strong": scan_views,
        "scan_self_label": partial(scan_views, central=1),
        **{f"sela_{level}": partial(uniform_views, **changes) for level, changes in enumerate(SELA)},
    }
    return recipes[settings.augment](settings)

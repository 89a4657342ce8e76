"""Choose the views for a data set."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ..config import ViewSettings
from ..preprocessing import Preprocessing, of_training, resize_first
from .base import Views
from .datasets import FeatureRows, Images, MemoryImages
from .digits import PLAIN_DIGIT, DigitRecipe, DigitViews
from .photographs import (
    PLAIN,
    SELA,
    SIMCLR,
    SWAV,
    PhotoRecipe,
    PhotoViews,
    published_views,
    scan_views,
    uniform_views,
)
from .reference import ReferenceViews


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
    name: str,
    data: Images,
    settings: ViewSettings,
    *,
    evaluation: Preprocessing | None = None,
    reference: bool = False,
    compiled: bool = False,
) -> Views:
    """Build the views of a data set.

    The digits have a recipe of their own, and no augmentation in the first view of `scan_self_label`.
    For photographs, `--augment` names the recipe.

    Args:
        name: value of `--data`.
        evaluation: the evaluation view of photographs, and the normalisation of all views; None: those of a network that is
            trained with these settings, see `preprocessing.of_training`.
        reference: make the views one by one with Pillow, as published.
        compiled: compile the colour jitter.
    """
    large, small = settings.global_crops_number, settings.local_crops_number
    if isinstance(data, FeatureRows):
        return IdentityViews(large + small)
    if name == "digits":
        sizes = [settings.global_crops_size] * large + [settings.local_crops_size] * small
        digit_recipes = [DigitRecipe(size=each) for each in sizes]
        if settings.augment == "scan_self_label":
            digit_recipes[0] = replace(PLAIN_DIGIT, size=sizes[0])
        return DigitViews(digit_recipes)
    size = settings.global_crops_size
    recipes = photo_recipes(settings)
    evaluation = evaluation or of_training(name, crop_size=size, augment=settings.augment)
    resize = size if isinstance(data, MemoryImages) else resize_first(name, size)
    shown: dict[str, Any] = {
        "eval_size": evaluation.size,
        "eval_resize": evaluation.resize,
        "mean": evaluation.mean,
        "std": evaluation.std,
    }
    if reference:
        return ReferenceViews(recipes, resize, **shown)
    return PhotoViews(recipes, resize, compiled=compiled, **shown)


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

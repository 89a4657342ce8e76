"""Which recipe of views goes with which data."""

from collections.abc import Callable
from functools import partial

from .datasets import Images, MemoryImages
from .digits import DigitRecipe, DigitViews
from .loaders import Views
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


def build_views(
    name: str,
    data: Images,
    num_global: int,
    num_local: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    augment: str = "dino",
    reference: bool = False,
    compiled: bool = False,
) -> Views:
    """The views of a data set: the digits' own recipe, or for photographs the one named by `augment`, made as published if
    `reference`, or with their colours compiled.

    Evaluation takes the central 224 of 256 pixels of a large image, and the whole of a small one.
    """
    if name == "digits":
        return DigitViews([DigitRecipe(size=global_size)] * num_global + [DigitRecipe(size=local_size)] * num_local)
    recipes = photo_recipes(augment)(num_global, num_local, global_size, local_size, global_scale, local_scale)
    small = isinstance(data, MemoryImages) or global_size <= 64
    statistics = CIFAR_STATISTICS.get(name, (IMAGENET_MEAN, SWAV_STD if augment == "swav" else IMAGENET_STD))
    eval_resize = global_size if small else round(global_size * 256 / 224)
    if reference:
        return ReferenceViews(recipes, eval_resize, *statistics)
    return PhotoViews(recipes, eval_resize, *statistics, compiled)


def photo_recipes(augment: str) -> Callable[..., list[PhotoRecipe]]:
    """Number, size and scale of global and local views → a recipe for each, by the name that `--augment` gives."""
    recipes = {
        "dino": published_views,
        "moco_v2": uniform_views,
        "swav": partial(uniform_views, **SWAV),
        "simclr": partial(uniform_views, **SIMCLR),
        "crop_flip": partial(uniform_views, **PLAIN),
        "scan_strong": scan_views,
        "scan_self_label": partial(scan_views, central=1),
        **{f"sela_{level}": partial(uniform_views, **changes) for level, changes in enumerate(SELA)},
    }
    return recipes[augment]

"""Choose settings that fit a data set, and adapt the settings of a preset to what the command line changes.

A preset is written for one batch size, one number of epochs and one number of images. `adapt` changes the settings that the
preset set and the user did not, and returns one line per change with the reason.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from .flags import SAME_BATCH, flag

SMALLEST_FOR_CIFAR = 16  # pixels; cifar_convnet halves its maps three times
LARGE = 200_000  # number of images from which on the published recipe is used on a GPU
SMALL_SIDE = 64  # largest shorter side in pixels of small images
REFERENCE = 50_000  # number of training images for which the presets for own pictures state their epochs
MOST_EPOCHS = {"small_images": 60, "photographs": 30}  # for few images
RATES = ("lr", "warmup_start", "final_lr")
FEWEST = 8  # images; fewer cannot be clustered


# What all methods share in their presets for own images and for small data sets. A method adds the settings of its own.
OWN_IMAGES: dict[str, dict[str, Any]] = {
    "small_images": {
        # Three blocks of convolutions on two views of 32 pixels. 13 epochs of 50,000 images take 0.34 PFLOP.
        "arch": "cifar_convnet",
        "global_crops_size": 32,
        "global_crops_scale": (0.2, 1.0),
        "local_crops_number": 0,
        "augment": "simclr",
        "epochs": 13,
        "batch_size": 512,
        "optimizer": "adamw",
        "lr": 0.003,
        "warmup_epochs": 1,
        "warmup_start": 0.0003,
        "final_lr": 0.000003,
        "weight_decay": 0.0001,
        "precision": "auto",
        "channels_last": True,
        "in_memory": True,
        "upright": True,
    },
    "photographs": {  # on top of small_images
        "arch": "resnet18",
        "global_crops_size": 96,
        "epochs": 20,
        "batch_size": 128,
        "lr": 0.0015,
        "warmup_start": 0.00015,
        "final_lr": 0.0000015,
        "in_memory": False,
    },
    # CIFAR-10 and CIFAR-100-20, on top of small_images. Views of 24 pixels take half the operations of views of 32, and gave a
    # higher ACC at equal PFLOP (docs/results/cifar10). 25 epochs of 50,000 images take 0.35 PFLOP.
    "cifar10": {
        "global_crops_size": 24,
        "eval_size": 24,
        "eval_resize": 24,
        "epochs": 25,
        "batch_size": 256,
        "lr": 0.006,
        "warmup_start": 0.0006,
        "final_lr": 0.000006,
    },
    "stl10": {"epochs": 10},  # on top of photographs; there are 105,000 images
}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The result of a look at a data set.

    Attributes:
        images: number of training images.
        side: median of the shorter sides of a sample of the images, in pixels; 0: the data are features.
        gpu: whether a GPU is used.
        uniform: whether all images have one size, so that they can be held in memory as one tensor.
    """

    images: int
    side: int
    gpu: bool
    uniform: bool = False


SurveyFunction = Callable[[str], Survey]


def choose_preset(survey: Survey, presets: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any], str]:
    """Choose the preset for a folder of images.

    Args:
        presets: the presets of the method.

    Returns:
        The name of the preset, changes of its values that depend on the size of the images and the device, and the reason.
    """
    device = "a GPU" if survey.gpu else "a CPU"
    if survey.images >= LARGE and survey.gpu and survey.side > SMALL_SIDE:
        return "published", {}, f"at least {LARGE:,} images on a GPU"
    if survey.side <= SMALL_SIDE:
        size = max(round(survey.side / 8) * 8, 8)
        changes: dict[str, Any] = {"global_crops_size": size, "in_memory": survey.uniform}
        if size < SMALLEST_FOR_CIFAR:
            changes["arch"] = "small_convnet"
        return "small_images", changes, f"images of at most {SMALL_SIDE} pixels"
    size = presets["photographs"]["global_crops_size"]
    changes = {}
    if survey.gpu:
        size = min(survey.side // 32 * 32, 224)
        changes = {"arch": "resnet50" if size > 128 else "resnet18", "global_crops_size": size}
    changes |= {"eval_size": size, "eval_resize": size * 256 // 224}
    return "photographs", changes, f"photographs on {device}"


def adapt(
    values: argparse.Namespace, preset: dict[str, Any], *, given: set[str], survey: Survey | None = None
) -> list[str]:
    """Adapt the settings that a preset set and the command line did not.

    Without a survey, only the learning rate and the warm-up change: the learning rate follows the batch size, and the
    warm-up is never longer than training.

    Args:
        values: the parsed flags, which are changed in place.
        preset: all values of the preset.
        given: the flags on the command line.
        survey: the data set for which the recipe is chosen; None: the preset was named, so its values are kept.

    Returns:
        One line per setting that was changed, with the reason.

    Raises:
        InputError: if the data set has too few images.
    """
    settings = _Settings(values, given)
    if survey is not None:
        _fit_images(settings, preset, images=survey.images, side=survey.side)
    _fit_learning_rate(settings, preset)
    if values.warmup_epochs >= values.epochs:
        settings.set("warmup_epochs", max(values.epochs // 10, min(values.epochs - 1, 1)), "a tenth of the epochs")
    if values.lr_drops and values.lr_drops[-1] >= values.epochs:
        shares = (drop * values.epochs // preset["epochs"] for drop in values.lr_drops)
        settings.set("lr_drops", tuple(sorted({drop for drop in shares if drop})), "the same shares of the epochs")
    return settings.lines


def fit_steps(knobs: Any, *, steps: int, given: set[str], notes: list[str]) -> Any:
    """Return the options of a method, with fewer frozen steps if the preset's number does not fit a short run.

    The number of steps is known only when the data are open, which is after `adapt`.

    Args:
        knobs: the method's own config.
        steps: number of steps of the run.
        given: the flags on the command line; what they set is kept.
        notes: list to which the function appends what it changed.
    """
    if getattr(knobs, "freeze_prototypes", 0) < steps or "--freeze-prototypes" in given:
        return knobs
    fewer = steps // 50
    notes.append(f"--freeze-prototypes {fewer}: a fiftieth of the {steps:,} steps")
    return replace(knobs, freeze_prototypes=fewer)


class _Settings:
    """Parsed flags of which some may be changed, with a line per change."""

    def __init__(self, values: argparse.Namespace, given: set[str]):
        self.values, self.given = values, given
        self.lines: list[str] = []

    def is_free(self, name: str) -> bool:
        """Return whether the method has this setting and the command line did not set it."""
        return hasattr(self.values, name) and flag(name) not in self.given

    def set(self, name: str, value: Any, reason: str) -> None:
        """Change a setting that is free, and note the reason."""
        if self.is_free(name) and getattr(self.values, name) != value:
            setattr(self.values, name, value)
            shown = (" ".join(map(str, value)) or "none") if isinstance(value, tuple | list) else f"{value:g}"
            self.lines.append(f"{flag(name)} {shown}: {reason}")

    def limit(self, name: str, largest: Any, reason: str) -> None:
        """Lower a number to `largest`."""
        if self.is_free(name):
            self.set(name, min(getattr(self.values, name), largest), reason)


def _fit_images(settings: _Settings, preset: dict[str, Any], *, images: int, side: int) -> None:
    """Fit batch size, epochs, numbers of clusters and the queue to the number of images."""
    values = settings.values
    if images < FEWEST:
        found = "1 image" if images == 1 else f"{images} images"
        raise InputError(f"--data {values.data}: {found}, expected at least {FEWEST}: add images")
    settings.limit("batch_size", max(2 ** int(math.log2(images / 4)), 2), f"at most a quarter of {images:,} images")
    most_epochs = max(preset["epochs"], MOST_EPOCHS["small_images" if side <= SMALL_SIDE else "photographs"])
    epochs = min(max(round(preset["epochs"] * REFERENCE / images), preset["epochs"]), most_epochs)
    settings.set("epochs", epochs, f"{images:,} images need more epochs than {REFERENCE:,}")
    steps = values.epochs * (images // values.batch_size)
    for name in ("classes", "prototypes", "num_classes"):
        if settings.is_free(name):
            sizes = getattr(values, name)
            most = max(images // 8, 2)
            fewer = (
                type(sizes)(min(size, most) for size in sizes) if isinstance(sizes, tuple | list) else min(sizes, most)
            )
            settings.set(name, fewer, "at least eight images per cluster")
    if settings.is_free("queue_length") and values.queue_length:
        length = min(values.queue_length, images // 4)
        long_enough = length >= values.batch_size
        settings.set("queue_length", length if long_enough else 0, f"at most a quarter of {images:,} images")
    settings.limit("neighbors", max(images // 4, 1), f"at most a quarter of {images:,} images")
    settings.limit("freeze_prototypes", steps // 50, "a fiftieth of the steps")


def _fit_learning_rate(settings: _Settings, preset: dict[str, Any]) -> None:
    """Let the learning rate follow the batch size, unless the command line sets it.

    lars and sgd scale the peak and the final rate linearly, as published; the warm-up starts at the published rate. adamw and
    adam scale all rates with the square root of the batch size (Malladi et al., arXiv:2205.10287).
    """
    values = settings.values
    share = values.batch_size / preset["batch_size"]
    if not settings.is_free("lr") or values.base_lr is not None or abs(share - 1) <= SAME_BATCH:
        return
    if values.optimizer in ("adamw", "adam"):
        factors, reason = dict.fromkeys(RATES, math.sqrt(share)), "follows the square root of the batch size"
    else:
        factors, reason = {"lr": share, "final_lr": share}, "follows the batch size"
    for name, factor in factors.items():
        settings.set(name, float(f"{preset[name] * factor:.4g}"), reason)

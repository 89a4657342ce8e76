"""Options of train.py: groups of flags, the checks of their values, and the command line."""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import InputError
from . import flags
from .flags import SAME_BATCH, Options, flag, require_at_least, require_momentum, require_positive
from .methods import MethodSource, method_names, read_method

BUILT_IN_DATA = ("digits", "cifar10", "cifar100-20", "stl10")
SUBSETS = ("imagenet-50", "imagenet-100", "imagenet-200")
DEFAULT_METHOD = "self_classifier"
Pair = tuple[float, float]

# --------------------------------------------------------------------------------------------------------------------
# groups of flags; the evaluations share the groups of data and device


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """data"""

    data: str = "digits"  # data set: digits, cifar10, cifar100-20, stl10, a folder of images, or an .npz file of features; see docs/data.md
    data_root: str = ""  # folder that holds the files of cifar10, cifar100-20 or stl10
    download: bool = False  # download the files of cifar10, cifar100-20 or stl10 into --data-root first
    subset: str = (
        ""  # published subset of ImageNet's classes: imagenet-50, imagenet-100 or imagenet-200 (default: all classes)
    )
    subset_file: str = (
        ""  # file that lists the classes to keep, one per line; they are numbered in this order (default: all classes)
    )
    workers: int = -1  # number of processes per rank that decode image files (-1: one per available core)

    def check(self) -> None:
        require_at_least(self, workers=-1)
        if self.subset and self.subset not in SUBSETS:
            raise InputError(f"--subset {self.subset}: expected one of {', '.join(SUBSETS)}")
        if self.subset and self.subset_file:
            raise InputError("--subset and --subset-file both choose the classes to keep: drop one of them")
        downloadable = BUILT_IN_DATA[1:]
        if not self.data:  # an evaluation uses the data of its checkpoint
            return
        if self.data not in downloadable and self.download:
            raise InputError(f"--download fetches {', '.join(downloadable)}, but --data is {self.data}: drop one")
        if self.data in downloadable and not self.data_root:
            raise InputError(
                f"--data {self.data} needs --data-root: give the folder of its files, or the folder to --download them into"
            )
        if self.data not in downloadable and self.data_root:
            raise InputError(
                f"--data-root is for {', '.join(downloadable)}, but --data is {self.data}: drop --data-root"
            )


@dataclass(frozen=True, kw_only=True)
class ViewSettings(Options):
    """views"""

    global_crops_number: int = 2  # number of large views per image
    global_crops_size: int = 224  # side of a large view in pixels
    global_crops_scale: Pair = (0.4, 1.0)  # smallest and largest share of the image's area; 0.14 1 without local views
    local_crops_number: int = 6  # number of small views per image
    local_crops_size: int = 96  # side of a small view in pixels
    local_crops_scale: Pair = (0.05, 0.4)  # smallest and largest share of the image's area
    augment: Literal[
        "dino",
        "moco_v2",
        "swav",
        "simclr",
        "crop_flip",
        "scan_strong",
        "scan_self_label",
        "sela_0",
        "sela_1",
        "sela_2",
        "sela_3",
    ] = "dino"  # augmentation recipe for photographs, see docs/training.md; scan_*, sela_0 and sela_1 ignore the scales

    def check(self) -> None:
        require_at_least(self, global_crops_number=1, local_crops_number=0, global_crops_size=1, local_crops_size=1)
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"{flag(name)} is {low} {high}: expected 0 < low <= high <= 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ViewSettings":
        """Return the view settings that the configuration of a run contains."""
        known: dict[str, Any] = {field.name: settings[field.name] for field in fields(ViewSettings)}
        return flags.build(ViewSettings, known)


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """backbone"""

    arch: str = "resnet50"  # torchvision's with .fc, resnet50w2/4/5, cifar_resnet18/34, vit_tiny/small/base, small/cifar_convnet, identity
    patch_size: int = 16  # side of the patches of a ViT in pixels

    def check(self) -> None:
        require_at_least(self, patch_size=1)


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Options):
    """optimisation"""

    epochs: int = 800  # number of passes over the training images
    batch_size: int = 4092  # number of images per step over all ranks
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # optimizer; lars is SGD with layer-wise learning rates
    lr: float = (
        3.2  # peak learning rate, not scaled by the batch size; the paper uses 0.2 per 256 images for 800 epochs
    )
    warmup_epochs: int = 10  # number of epochs of linear warm-up
    warmup_start: float = 0.2  # learning rate at the first step
    final_lr: float = 0.0032  # learning rate at the end of the cosine schedule
    momentum: float = 0.9  # momentum of lars and sgd
    weight_decay: float = 1e-6  # weight decay of the parameters
    bias_decay: bool = True  # also apply weight decay to biases and to the scales of normalisation layers
    backbone_weight_decay: float | None = None  # weight decay of the backbone (default: the value of --weight-decay)
    clip_grad: float = 0.0  # largest norm of the gradient of each tensor (0: no clipping)
    freeze: tuple[str, ...] = ()  # prefixes of parameters that are not trained, such as backbone.conv1 (default: none)

    def check(self) -> None:
        require_at_least(self, epochs=1, batch_size=2, warmup_epochs=0, warmup_start=0, final_lr=0, weight_decay=0)
        require_at_least(self, clip_grad=0)
        if self.backbone_weight_decay is not None:
            require_at_least(self, backbone_weight_decay=0)
        require_positive(self, "lr")
        require_momentum(self)
        if self.warmup_epochs > self.epochs:
            raise InputError(f"--warmup-epochs {self.warmup_epochs} exceeds --epochs {self.epochs}: lower one of them")
        if self.warmup_epochs and self.warmup_start > self.lr:
            raise InputError(
                f"--warmup-start {self.warmup_start:g} is above --lr {self.lr:g}, but a warm-up raises the learning rate: "
                "lower it, or give --warmup-epochs 0"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """device"""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # device to run on; auto uses a GPU if there is one
    precision: Literal["float32", "bfloat16", "float16", "auto"] = (
        "float32"  # precision of the networks; the losses are computed in float32; auto is bfloat16 where it is fast
    )
    channels_last: bool = (
        False  # use the memory layout channels_last, with which convolutions are faster on most hardware
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Options):
    """speed and memory"""

    compile: bool = False  # compile the backbone and the colour jitter; the first steps then take minutes
    checkpoint_activations: bool = False  # recompute the activations of the backbone during backward to save memory
    accumulate: int = (
        1  # number of parts in which a rank processes its batch to save memory; the loss stays that of the whole batch
    )
    sync_bn_group: int = 0  # number of consecutive ranks that share batch-norm statistics (0: all ranks)
    keep_decoded: float = 0.0  # memory per rank for decoded image files in GiB (0: decode every file in every epoch)
    decode_on_gpu: bool = False  # decode and crop JPEG files on the GPU, for machines with few cores per GPU
    in_memory: bool = False  # decode all files once and hold the pixels in memory; for image files of one small size
    reference_views: bool = False  # compute the views of photographs one by one with Pillow; slow, for comparison

    def check(self) -> None:
        compilers = (os.environ.get("CXX") or "g++", os.environ.get("CC") or "gcc")
        if self.compile and not any(shutil.which(name) for name in compilers):
            raise InputError(
                f"--compile: no compiler was found ({' or '.join(compilers)}): install one, or drop the flag"
            )
        require_at_least(self, accumulate=1, sync_bn_group=0, keep_decoded=0)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """run"""

    seed: int = 0  # seed of the weights, the order of the images and the views
    output_dir: str = ""  # folder of the run; a run in this folder is continued (default: a new dated folder in runs/)
    fresh: bool = False  # start over in a new folder beside --output-dir instead of continuing
    pretrained: str = (
        ""  # initial weights: a file, a run folder, or a name from `python -m src.pretrained list` (default: random)
    )
    save_every: int = (
        25  # number of epochs between the checkpoints that are kept; the last checkpoint is always written
    )
    eval_every: int = 0  # number of epochs between scores on the test split, if it has labels (0: no scores)
    log_every: int = 16  # number of steps between two readings of the loss on a GPU; on a CPU every step reads it

    def check(self) -> None:
        require_at_least(self, seed=0, save_every=1, eval_every=0, log_every=1)
        if self.fresh and not self.output_dir:
            raise InputError("--fresh starts over beside --output-dir, but --output-dir is not given: drop --fresh")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RunOptions, SpeedOptions, DeviceOptions, OptimizationOptions, BackboneOptions, ViewSettings, DataOptions
):
    """The flags of train.py that all methods share. The defaults are those of Self-Classifier, 800 epochs on ImageNet."""

    def check(self) -> None:
        if self.num_views < 2:
            raise InputError(
                "--global-crops-number 1 and --local-crops-number 0 make one view, but training needs two: raise one of them"
            )
        sizes = {"global_crops_size": self.global_crops_size}
        if self.local_crops_number:
            sizes["local_crops_size"] = self.local_crops_size
        for name, size in sizes.items():
            if self.arch.startswith("vit_") and size % self.patch_size:
                raise InputError(
                    f"--patch-size {self.patch_size} does not divide {flag(name)} {size}: change one of them"
                )
        has_features = self.data.endswith(".npz")
        if has_features and self.arch != "identity":
            raise InputError(
                f"--data {self.data} holds features, but --arch {self.arch} takes images: give --arch identity"
            )
        if self.arch == "identity" and not has_features:
            raise InputError(
                f"--arch identity takes features, but --data {self.data} is not an .npz file: change one of them"
            )
        if self.reference_views and (self.data == "digits" or has_features):
            raise InputError(
                f"--reference-views is for photographs, but --data {self.data} has its own views: drop one of them"
            )
        in_memory = self.data in BUILT_IN_DATA or has_features
        if self.keep_decoded and in_memory:
            raise InputError(
                f"--keep-decoded is for image files, but --data {self.data} is in memory: drop one of them"
            )
        if self.in_memory and (self.keep_decoded or self.decode_on_gpu):
            other = "--keep-decoded" if self.keep_decoded else "--decode-on-gpu"
            raise InputError(f"--in-memory decodes every file once, so {other} has nothing to do: drop one of them")
        if self.decode_on_gpu:
            for wrong, why in (
                (in_memory, f"is for image files, but --data {self.data} is in memory"),
                (self.device == "cpu", "needs a GPU, but --device is cpu"),
                (self.reference_views, "does not go with --reference-views, which the workers compute"),
                (self.keep_decoded, "does not go with --keep-decoded, which keeps images that workers have decoded"),
            ):
                if wrong:
                    raise InputError(f"--decode-on-gpu {why}: drop one of them")

    @property
    def views(self) -> ViewSettings:
        return ViewSettings.of(vars(self))

    @property
    def num_views(self) -> int:
        return self.global_crops_number + self.local_crops_number

    def unused(self) -> dict[str, str]:
        """Return {flag that has no effect with the other options: the reason}."""
        reasons = {}
        if not self.arch.startswith("vit_"):
            reasons["--patch-size"] = f"--arch {self.arch} is not a ViT"
        if self.optimizer == "adamw":
            reasons["--momentum"] = "--optimizer adamw has no momentum"
        if self.data in BUILT_IN_DATA or self.data.endswith(".npz"):
            reasons["--in-memory"] = f"--data {self.data} is in memory anyway"
        return reasons


# These options do not change what a run learns. A run may continue with other values.
FREE_TO_CHANGE = {
    "workers",
    "keep_decoded",
    "in_memory",
    "decode_on_gpu",
    "download",
    "data_root",
    "device",
    "channels_last",
    "compile",
    "checkpoint_activations",
    "output_dir",
    "fresh",
    "save_every",
    "eval_every",
    "log_every",
}


# --------------------------------------------------------------------------------------------------------------------
# the command line


def parse_train(argv: Sequence[str] | None = None) -> tuple[TrainOptions, str, Any]:
    """Parse the command line of train.py: shared options, the method's name, and the method's own config.

    The function first reads `--method`, and then parses the flags of that method. So a flag of another method is an error.
    A preset changes defaults. A flag on the command line overrides the preset.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = flags.OneLineParser(add_help=False, allow_abbrev=False, prog="train.py")
    first.add_argument(
        "--method", choices=method_names(), default=DEFAULT_METHOD, help=f"method to train (default: {DEFAULT_METHOD})"
    )
    first.add_argument(
        "--preset",
        help="named set of defaults, see docs/recipes.md (default: the preset with the name of --data, otherwise published)",
    )
    first.add_argument("--data", default=TrainOptions.data)
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    method = read_method(known.method)
    preset = known.preset or (known.data if known.data in method.presets else "published")
    if preset not in method.presets:
        raise InputError(f"--preset {preset}: {known.method} has {', '.join(method.presets)}; choose one of them")

    changed = method.presets[preset]
    parser = _parser(first, known.method, method=method, preset=preset)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_explain_unknown(unknown, known.method))
    published = {**flags.as_plain(TrainOptions(data="somewhere")), **changed}
    given = flags.flags_in(argv)
    if values.base_lr is not None:
        _apply_base_lr(values, published, given)
    elif known.preset and "--lr" not in given:
        _check_lr_fits(values.batch_size, published, known.preset)
    if 0 < values.lr < values.warmup_start and "--warmup-start" not in given:
        # the ratio that the preset has, but at most 1: a warm-up does not lower the rate
        values.warmup_start = values.lr * min(published["warmup_start"] / published["lr"], 1.0)
    options, knobs = flags.collect(TrainOptions, values), flags.collect(method.config, values)
    flags.refuse_unused(given, options.unused())
    flags.end_dry_run(values, {"method": known.method, **flags.as_plain(options), **flags.as_plain(knobs)})
    return options, known.method, knobs


def _parser(first: argparse.ArgumentParser, name: str, *, method: MethodSource, preset: str) -> flags.OneLineParser:
    """Return the parser of all flags of train.py with one method. Its preset gives the defaults."""
    parser = flags.OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description=f"Train a network without labels. The flags below are those of method {name} with preset {preset}.",
    )
    for action in first._actions[:2]:
        parser._add_action(action)
    parser.add_argument(
        "--base-lr",
        type=float,
        help="learning rate per 256 images. It sets --lr to BASE_LR × batch size / 256, --warmup-start to BASE_LR or to the "
        "preset's share of it, and --final-lr to the preset's share of --lr (default: use --lr)",
    )
    flags.add_dry_run(parser)
    for group in reversed(TrainOptions.__mro__[1:-2]):
        flags.add_flags(parser, group, flags.comments_of(group), **method.presets[preset])
    flags.add_flags(parser, method.config, method.comments, title=f"method {name}", **method.presets[preset])
    return parser


def _apply_base_lr(values: argparse.Namespace, published: dict, given: set[str]) -> None:
    """Apply the rule of the published learning rates.

    The peak rate is base × batch / 256. The warm-up starts at the base, and the final rate is a fixed share of the peak rate.
    A preset whose warm-up starts at another share of its own base keeps that share.
    """
    if "--lr" in given:
        raise InputError("--base-lr and --lr both name the learning rate: drop one")
    require_positive(values, "base_lr")
    values.lr = values.base_lr * values.batch_size / 256
    if "--warmup-start" not in given:
        share = published["warmup_start"] / (published["lr"] * 256 / published["batch_size"])
        values.warmup_start = values.base_lr * (
            1 if abs(share - 1) < SAME_BATCH else share
        )  # published: 4092 or 4096 images
    if "--final-lr" not in given:
        values.final_lr = values.lr * published["final_lr"] / published["lr"]


def _check_lr_fits(batch_size: int, published: dict, preset: str) -> None:
    """Raise InputError if the batch size differs from that of the preset, whose learning rate is for its own batch size.

    A difference of up to 1 % is accepted: the published rates are for 4096 images, and the authors' batch was
    66 × 62 = 4092.
    """
    lr, batch = published["lr"], published["batch_size"]
    if abs(batch_size / batch - 1) > SAME_BATCH:
        base = f"{lr * 256 / batch:.2g}"
        raise InputError(
            f"--batch-size {batch_size}: the learning rate {lr} of --preset {preset} is for {batch} images; "
            f"--base-lr {base} scales it with the batch size, --lr sets it"
        )


def _explain_unknown(words: list[str], method: str) -> str:
    """Return the message about words that the parser did not take. It names the method that has such a flag."""
    for word in words:
        name = word.split("=")[0].replace("--no-", "--")
        owners = [
            other for other in method_names() if name in {flag(f.name) for f in fields(read_method(other).config)}
        ]
        if owners:
            return f"{word} belongs to {' and '.join(owners)}, not to {method}"
    return f"unknown flag or value: {' '.join(words)}"

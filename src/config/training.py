"""Options of train.py: groups of flags, the checks of their values, and the command line."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import InputError
from ..preprocessing import Preprocessing, of_training
from . import flags
from .flags import Options, flag, require_at_least, require_at_most, require_momentum, require_positive

BUILT_IN_DATA = ("digits", "cifar10", "cifar100-20", "stl10", "stl10-labelled")
SUBSETS = ("imagenet-50", "imagenet-100", "imagenet-200")
DEFAULT_METHOD = "self_classifier"
Pair = tuple[float, float]

# --------------------------------------------------------------------------------------------------------------------
# groups of flags; the evaluations share the groups of data and device


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """data"""

    data: str = "digits"  # data set: digits, cifar10, cifar100-20, stl10, stl10-labelled, a folder of images, or an .npz file of features
    data_root: str = ""  # folder that holds the files of cifar10, cifar100-20, stl10 or stl10-labelled
    download: bool = False  # download the files of these data sets into --data-root first
    subset: str = (
        ""  # published subset of ImageNet's classes: imagenet-50, imagenet-100 or imagenet-200 (default: all classes)
    )
    subset_file: str = (
        ""  # file that lists the classes to keep, one per line; they are numbered in this order (default: all classes)
    )
    unlabelled: bool = (
        False  # ignore the class folders of a folder of images (default: they are labels, which only monitor)
    )
    val_share: float = 0.0  # share of the images of a folder without train/ and val/ that is held out for scores
    workers: int = -1  # number of processes per rank that decode image files (-1: one per available core)

    def check(self) -> None:
        require_at_least(self, workers=-1, val_share=0)
        require_at_most(self, workers=1024)
        if self.val_share >= 1:
            raise InputError(f"--val-share is {self.val_share}: expected a fraction below 1")
        for name in ("unlabelled", "val_share"):
            if getattr(self, name) and (self.data in BUILT_IN_DATA or self.data.endswith(".npz")):
                raise InputError(f"{flag(name)} is for folders of images, but --data is {self.data}: drop one")
        if self.unlabelled and (self.subset or self.subset_file):
            raise InputError("--unlabelled ignores the classes, but --subset chooses among them: drop one")
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
    upright: bool = (
        False  # rotate image files as their EXIF orientation says; the published recipes show them as stored
    )

    def check(self) -> None:
        require_at_least(self, global_crops_number=1, local_crops_number=0, global_crops_size=1, local_crops_size=1)
        require_at_most(self, global_crops_number=1024, local_crops_number=1024)
        require_at_most(self, global_crops_size=2**15, local_crops_size=2**15)
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
class EvalViewOptions(Options):
    """evaluation view"""

    eval_size: int = (
        0  # side in pixels of the central view of photographs in evaluations (0: as published, see docs/data.md)
    )
    eval_resize: int = 0  # length in pixels to which the shorter side is resized first (0: in the published proportion)

    def check(self) -> None:
        require_at_least(self, eval_size=0, eval_resize=0)
        if self.eval_size and self.eval_resize:
            Preprocessing(size=self.eval_size, resize=self.eval_resize)  # raises if the view does not fit


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """backbone"""

    arch: str = "resnet50"  # torchvision's with .fc, resnet50w2/4/5, cifar_resnet18/34, stl_resnet18, vit_*, small/cifar_convnet, identity
    patch_size: int = 16  # side of the patches of a ViT in pixels

    def check(self) -> None:
        require_at_least(self, patch_size=1)


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Options):
    """optimisation"""

    epochs: int = 800  # number of passes over the training images
    batch_size: int = 4092  # number of images per step over all ranks
    optimizer: Literal["lars", "sgd", "adamw", "adam"] = (
        "lars"  # optimizer; lars is SGD with layer-wise learning rates; adam adds the weight decay to the gradient
    )
    lr: float = (
        3.2  # peak learning rate, not scaled by the batch size; the paper uses 0.2 per 256 images for 800 epochs
    )
    warmup_epochs: int = 10  # number of epochs of linear warm-up
    warmup_start: float = 0.2  # learning rate at the first step
    final_lr: float = 0.0032  # learning rate at the end of the cosine schedule
    lr_drops: tuple[int, ...] = ()  # epochs after which the learning rate falls to a tenth (default: a cosine)
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
        drops = " ".join(map(str, self.lr_drops))
        if list(self.lr_drops) != sorted({*self.lr_drops}) or any(epoch < 1 for epoch in self.lr_drops):
            raise InputError(f"--lr-drops {drops}: expected ascending numbers of epochs, from 1")
        if self.lr_drops and self.lr_drops[-1] >= self.epochs:
            raise InputError(
                f"--lr-drops {drops} are not all below --epochs {self.epochs}: give other --lr-drops, or more epochs"
            )
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
    RunOptions,
    SpeedOptions,
    DeviceOptions,
    OptimizationOptions,
    BackboneOptions,
    EvalViewOptions,
    ViewSettings,
    DataOptions,
):
    """The flags of train.py that all methods share. The defaults are those of Self-Classifier, 800 epochs on ImageNet."""

    def check(self) -> None:
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
        if self.data == "digits" or has_features:
            for name in ("eval_size", "eval_resize"):
                if getattr(self, name):
                    raise InputError(
                        f"{flag(name)} is for photographs, but --data {self.data} has its own views: drop one of them"
                    )
        elif self.eval_every or self.eval_size or self.eval_resize:
            check_patches(self.arch, self.evaluation_view.size, patch_size=self.patch_size)
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
    def evaluation_view(self) -> Preprocessing:
        """The evaluation view of photographs."""
        view = of_training(self.data, crop_size=self.global_crops_size, augment=self.augment)
        return view.changed(size=self.eval_size, resize=self.eval_resize)

    @property
    def num_views(self) -> int:
        return self.global_crops_number + self.local_crops_number

    def free_to_change(self) -> set[str]:
        """Return the options that a run may change when it continues, beside `FREE_TO_CHANGE`."""
        return EVAL_VIEW | ({"precision"} if self.precision == "auto" else set())

    def unused(self) -> dict[str, str]:
        """Return {flag that has no effect with the other options: the reason}."""
        reasons = {}
        if not self.arch.startswith("vit_"):
            reasons["--patch-size"] = f"--arch {self.arch} is not a ViT"
        if self.lr_drops:
            reasons["--final-lr"] = "--lr-drops takes the place of the cosine"
        if self.optimizer in ("adamw", "adam"):
            reasons["--momentum"] = f"--optimizer {self.optimizer} has no momentum"
        if self.data in BUILT_IN_DATA or self.data.endswith(".npz"):
            reasons["--in-memory"] = f"--data {self.data} is in memory anyway"
            reasons["--upright"] = f"--data {self.data} holds no image files"
        return reasons


def stored_path(data: str) -> str:
    """Return the value of --data that a run stores: the absolute path of a folder or a file, or the name of a data set."""
    return data if data in BUILT_IN_DATA else os.path.abspath(data)


def check_patches(arch: str, size: int, *, patch_size: int) -> None:
    """Raise InputError if the patches of a ViT do not divide the evaluation view of `size` pixels."""
    if arch.startswith("vit_") and size % patch_size:
        raise InputError(
            f"--eval-size {size} is no multiple of the {patch_size} pixels of a patch of {arch}: give --eval-size "
            f"{size - size % patch_size or patch_size}"
        )


LARGEST_VIEW = 8192  # side in pixels, in the configuration of a file
MOST_VIEWS = 1000


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the part of a file's configuration from which an evaluation builds the network and the views.

    Raises:
        InputError: naming the value that is missing, has a wrong type or is out of bounds.
    """
    flags.check_types(TrainOptions, settings, ("arch", "patch_size", "data", *(f.name for f in fields(ViewSettings))))
    optional = [name for name in ("data_root", "subset", "subset_file") if name in settings or settings["data"]]
    flags.check_types(TrainOptions, settings, optional)
    if settings.get("subset", "") not in ("", *SUBSETS):
        raise InputError(f"subset is {settings['subset'][:100]}, expected one of {', '.join(SUBSETS)}")
    for name, most in (
        ("channels", flags.LARGEST),
        ("patch_size", LARGEST_VIEW),
        ("global_crops_size", LARGEST_VIEW),
        ("local_crops_size", LARGEST_VIEW),
        ("global_crops_number", MOST_VIEWS),
        ("local_crops_number", MOST_VIEWS),
    ):
        least = 0 if name == "local_crops_number" else 1
        if type(settings.get(name)) is not int or not least <= settings[name] <= most:
            found = str(settings.get(name))[:100]
            raise InputError(f"{name} is {found}, expected {least} to {most}")
    if type(settings.get("seed")) not in (int, type(None)):
        raise InputError("seed is no whole number")
    ViewSettings.of(settings)


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
EVAL_VIEW = {"eval_size", "eval_resize"}  # free to change in a run of train.py, but not in a linear probe

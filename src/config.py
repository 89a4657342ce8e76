"""Flags: declared once as fields of a dataclass, with the comment behind the field as their help.

Nothing here imports torch, so `--help` and a wrong flag are answered at once. For the same reason a method's knobs
are read from its file without importing it: the dataclass `Config` and the literal `PRESETS` of `src/methods/<name>.py`
stand on their own, next to the code that uses them.
"""

import argparse
import ast
import errno
import json
import math
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

METHODS_FOLDER = Path(__file__).parent / "methods"
BUILT_IN_DATA = ("digits", "cifar10", "cifar100-20", "stl10")
SUPERCLASSES = ("2", "3", "4", "5", "6", "entity13", "entity30", "living17", "nonliving26")


class InputError(ValueError):
    """What the user gave is wrong. One line: what was found, what was expected, what to do. Exit status 2."""


class RunError(RuntimeError):
    """A failure after work started; shown as one line, exit status 1. All ranks fail alike and rank 0 says it, unless this
    one has to speak for them."""

    def __init__(self, message: str, speaks: bool = False):
        super().__init__(message)
        self.speaks = speaks


# --------------------------------------------------------------------------------------------------------------------
# flags shared by more than one script


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data"""

    data: str = "digits"  # digits, cifar10, cifar100-20, stl10, or a folder: with train/ and val/ of class folders, or unlabelled images
    data_root: str = ""  # where the files of cifar10, cifar100-20 and stl10 are
    download: bool = False  # fetch them there first
    subset_file: str = ""  # keep the classes listed in this file, one a line, in its order
    workers: int = -1  # processes per rank that decode image files; -1: as many as there are cores for it

    def __post_init__(self):
        if self.data not in BUILT_IN_DATA[1:] and self.download:
            raise InputError(f"--download fetches {', '.join(BUILT_IN_DATA[1:])}, but --data is {self.data}: drop one")
        if self.data in BUILT_IN_DATA[1:] and not self.data_root:
            raise InputError(f"--data {self.data} needs --data-root, the folder of its files (--download fetches them)")
        if self.data not in BUILT_IN_DATA[1:] and self.data_root:
            raise InputError(f"--data-root is for {', '.join(BUILT_IN_DATA[1:])}, but --data is {self.data}: drop it")
        require_at_least(self, workers=-1)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """views"""

    global_crops_number: int = 2  # large views of every image
    global_crops_size: int = 224  # side in pixels
    global_crops_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area; 0.14 1 without local views
    local_crops_number: int = 6  # small views of every image
    local_crops_size: int = 96  # side in pixels
    local_crops_scale: tuple[float, float] = (0.05, 0.4)  # share of the image's area
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
    ] = "dino"  # recipe for photographs, see docs/training.md; scan_*, sela_0 and sela_1 cut windows, whatever the scales
    reference_views: bool = False  # make the views of photographs one by one with Pillow: slow, a yardstick

    def __post_init__(self):
        super().__post_init__()
        if self.reference_views and self.data == "digits":
            raise InputError("--reference-views is for photographs, --data digits has views of its own: drop it")
        require_at_least(self, global_crops_number=1, local_crops_number=0, global_crops_size=1, local_crops_size=1)
        if self.global_crops_number + self.local_crops_number < 2:
            raise InputError("--global-crops-number 1 and --local-crops-number 0 make one view, two are needed")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"{flag(name)} is {low} {high}: expected 0 < low <= high <= 1")


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """backbone"""

    arch: str = "resnet50"  # torchvision network with .fc, resnet50w2/4/5 (wide), cifar_resnet18/34, vit_tiny/small/base, small_convnet
    patch_size: int = 16  # of a ViT, in pixels

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, patch_size=1)


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """optimisation"""

    epochs: int = 800  # passes over the training images
    batch_size: int = 4092  # images per step over all ranks
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # lars is SGD with layer-wise rates
    lr: float = 3.2  # peak learning rate, absolute; the paper's rule is 0.2 per 256 images for 800 epochs
    warmup_epochs: int = 10  # linear warm-up
    warmup_start: float = 0.2  # learning rate of the first step
    final_lr: float = 0.0032  # learning rate at the end of the cosine
    momentum: float = 0.9  # of lars and sgd
    weight_decay: float = 1e-6  # on every parameter
    bias_decay: bool = True  # also on biases and the scales of normalisation layers
    backbone_weight_decay: float | None = None  # on the backbone's parameters, where it differs
    clip_grad: float = 0.0  # largest norm of each tensor's gradient; 0: not clipped
    freeze: tuple[str, ...] = ()  # parts that keep their start, by how their names begin: backbone, backbone.conv1

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, epochs=1, batch_size=2, warmup_epochs=0, warmup_start=0, final_lr=0, weight_decay=0)
        require_at_least(self, clip_grad=0)
        if self.backbone_weight_decay is not None:
            require_at_least(self, backbone_weight_decay=0)
        require_positive(self, "lr")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum is {self.momentum}: expected 0 <= momentum < 1")
        if self.warmup_epochs > self.epochs:
            raise InputError(f"--warmup-epochs {self.warmup_epochs} exceeds --epochs {self.epochs}: lower one of them")
        if self.warmup_epochs and self.warmup_start > self.lr:
            raise InputError(
                f"--warmup-start {self.warmup_start:g} is above --lr {self.lr:g}, but a warm-up goes up: lower it, or --warmup-epochs 0"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """device"""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the networks; losses always run in float32
    channels_last: bool = False  # memory layout of images; faster convolutions on most hardware


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """speed and memory"""

    compile: bool = False  # compile the backbone and the colour jitter; the first steps take minutes
    checkpoint_activations: bool = False  # run the backbone's blocks again during backward instead of remembering them
    accumulate: int = 1  # parts a rank's batch is taken in, for less memory; the loss stays that of the whole batch
    sync_bn_group: int = 0  # consecutive ranks that share batch-norm statistics; 0: all of them
    keep_decoded: float = 0.0  # GiB of memory per rank for decoded files, each then decoded once; 0: in every epoch
    decode_on_gpu: bool = False  # JPEG files are decoded and cut on the GPU, for machines with few cores for each

    def __post_init__(self):
        super().__post_init__()
        compilers = (os.environ.get("CXX") or "g++", os.environ.get("CC") or "gcc")
        if self.compile and not any(shutil.which(name) for name in compilers):
            raise InputError(
                f"--compile: no compiler was found ({' or '.join(compilers)}): install one, or drop the flag"
            )
        require_at_least(self, accumulate=1, sync_bn_group=0, keep_decoded=0)
        if self.keep_decoded and self.data in BUILT_IN_DATA:
            raise InputError(f"--keep-decoded is for image files, --data {self.data} is in memory: drop it")
        if self.decode_on_gpu:
            for wrong, why in (
                (self.data in BUILT_IN_DATA, f"is for image files, --data {self.data} is in memory"),
                (self.device == "cpu", "needs a GPU, but --device is cpu"),
                (self.reference_views, "does not go with --reference-views, which workers make"),
                (self.keep_decoded, "does not go with --keep-decoded, whose images are decoded already"),
            ):
                if wrong:
                    raise InputError(f"--decode-on-gpu {why}: drop one of them")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """run"""

    seed: int = 0  # of weights, order and views
    output_dir: str = ""  # a run found there is continued; default: a new dated folder under runs/
    fresh: bool = False  # start over in a new folder beside --output-dir instead of continuing
    pretrained: str = ""  # weights to start from: a file, or a name of `python -m src.pretrained list`
    save_every: int = 25  # epochs between the checkpoints that are kept; the last one is always written
    eval_every: int = 0  # epochs between scores on the test split, where it has labels; 0: never
    log_every: int = 16  # steps between looks at the loss

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, seed=0, save_every=1, eval_every=0, log_every=1)
        if self.fresh and not self.output_dir:
            raise InputError("--fresh starts over beside --output-dir, but --output-dir is not given: drop --fresh")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RunOptions, SpeedOptions, DeviceOptions, OptimizationOptions, BackboneOptions, ViewOptions, DataOptions
):
    """Every flag of train.py that does not belong to one method. Defaults: Self-Classifier, 800 epochs on ImageNet."""

    def __post_init__(self):
        super().__post_init__()
        sizes = {"global_crops_size": self.global_crops_size}
        if self.local_crops_number:
            sizes["local_crops_size"] = self.local_crops_size
        for name, size in sizes.items():
            if self.arch.startswith("vit_") and size % self.patch_size:
                raise InputError(f"--patch-size {self.patch_size} does not divide {flag(name)} {size}")


# What the views of a run were made with, in the order that `build_views` takes them.
VIEW_SETTINGS = (
    "global_crops_number",
    "local_crops_number",
    "global_crops_size",
    "local_crops_size",
    "global_crops_scale",
    "local_crops_scale",
    "augment",
)

# Changing one of these does not change what is learned: a run may be continued with another value.
FREE_TO_CHANGE = {
    "workers",
    "keep_decoded",
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


@dataclass(frozen=True, kw_only=True)
class KMeansOptions:
    """k-means on features"""

    kmeans: int = 0  # clusters of k-means on features, which are scored instead of the classifiers'; 0: none
    layer: Literal["backbone", "head"] = "backbone"  # whose output is clustered; head: the embedding behind it
    normalize: bool = False  # bring features to unit length first
    fit_share: float = 1.0  # of each class's training images that it is fitted on: 0.1 as published, drawn by --seed
    fit_list: str = ""  # file of those images instead, one a line: CLASS/NAME or NAME, or positions in memory
    init: Literal["k-means++", "random"] = "k-means++"  # where it begins; random: at images drawn by --seed
    restarts: int = 10  # how often it begins; the fit with the smallest squared distances counts
    seed: int = 0  # of the draws


@dataclass(frozen=True, kw_only=True)
class ClsEvalOptions(KMeansOptions, DeviceOptions, DataOptions):
    """evaluation"""

    checkpoint: str = ""  # file of train.py or of others, or a name of `python -m src.pretrained list`
    arch: str = ""  # of a released network, where its file does not say; default: resnet50
    split: Literal["train", "test"] = "test"  # of the data
    classifier: int | None = None  # which one to score; default: the one that training named
    ensemble: bool = False  # also score the mean prediction of all classifiers with as many classes; another pass
    feature_quality: bool = False  # also RankMe of the backbone's features, silhouette of the clusters; another pass
    compare: tuple[str, ...] = ()  # other checkpoints, to say how far their clusters of the same images agree (AMI)
    batch_size: int = 256  # images per forward pass and rank
    features_cache: str = ""  # folder of features; those found there are taken, others left there
    superclass: tuple[
        str, ...
    ] = ()  # of ImageNet, to score against as well: levels 2 to 6, entity13, entity30, living17, nonliving26
    hierarchy: str = ""  # folder of their three files; default: where `python -m src.data.imagenet get` leaves them
    pixel_kmeans: bool = False  # also score k-means on raw pixels; for small images held in memory
    grids: int = 0  # figures of the clusters of the highest accuracy, each nine of its images drawn at random
    pca: bool = False  # a figure of the backbone's features by the two directions in which they vary most
    tsne: int = 0  # figures of the backbone's features by t-SNE, each of other classes, drawn at random
    tsne_classes: int = 10  # classes in each of them; 0: all
    figures: Literal["png", "pdf"] = "png"  # how figures are written
    output_dir: str = ""  # for cls_eval.json, clusters.csv and the figures; default: beside the checkpoint, of --kmeans its folder kmeans/

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: name a file written by train.py, or a released model")
        if self.data:
            super().__post_init__()
        require_at_least(self, batch_size=1, grids=0, tsne=0, tsne_classes=0, kmeans=0, restarts=1, seed=0)
        require_positive(self, "fit_share")
        for field in fields(KMeansOptions):
            if not self.kmeans and getattr(self, field.name) != field.default:
                raise InputError(f"{flag(field.name)} is for k-means, which --kmeans asks for: give that, or drop this")
        for choice in self.superclass:
            if choice not in SUPERCLASSES:
                raise InputError(f"--superclass {choice}: expected some of {', '.join(SUPERCLASSES)}")
        if self.hierarchy and not self.superclass:
            raise InputError("--hierarchy is for superclasses, which --superclass asks for: give that, or drop this")
        if self.kmeans and self.classifier is not None:
            raise InputError("--kmeans and --classifier both name the clusters to score: drop one")
        if self.kmeans and self.ensemble:
            raise InputError("--ensemble puts classifiers together, --kmeans does without them: drop one")
        if self.fit_share > 1:
            raise InputError(f"--fit-share is {self.fit_share}: expected a fraction, 0.1 for 10 %")
        if self.fit_share < 1 and self.fit_list:
            raise InputError("--fit-share and --fit-list both choose the images to fit on: drop one")


@dataclass(frozen=True, kw_only=True)
class LinclsEvalOptions(DeviceOptions, DataOptions):
    """linear classifier"""

    checkpoint: str = ""  # file of train.py or of the authors, or a name of `python -m src.pretrained list`
    preset: Literal["self_classifier", "swav", "swav_2x2", "swav_semi_10", "swav_semi_1", "digits"] = (
        "self_classifier"  # named set of defaults, listed in docs/recipes.md; of digits it is digits
    )
    arch: str = ""  # of a released backbone, where its file does not say; default: resnet50
    epochs: int = 100  # passes over the labelled training images
    batch_size: int = 4096  # images per step over all ranks; the last batch of an epoch is smaller
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # lars is SGD with layer-wise rates
    lr: float = 0.8  # learning rate of the linear layer, absolute
    backbone_lr: float | None = None  # learning rate of the backbone with --finetune; default: --lr
    schedule: Literal["cosine", "step", "constant"] = "cosine"  # of the learning rates, set at the start of each epoch
    decay_epochs: tuple[int, ...] = (60, 80)  # of the step schedule
    gamma: float = 0.1  # what the rates are multiplied with there
    momentum: float = 0.9  # of lars and sgd
    nesterov: bool = False  # Nesterov's momentum; of sgd
    weight_decay: float = 0.0  # on every trained parameter
    pool_window: int = 0  # side of the windows of the last map that are averaged, one step apart; 0: all of it
    feature_bn: bool = False  # batch normalisation of the backbone's channels before the linear layer
    crop_flip: bool = True  # train on random resized crops and flips (digits: their own views), or on the central view
    finetune: bool = False  # train the backbone too
    train_bn: bool = False  # with --finetune, batch normalisation takes the batch's statistics, not the learned ones
    train_share: float = 1.0  # of each class's training images that are labelled: 0.01 or 0.1, drawn by --seed
    train_list: str = ""  # file of the labelled training images, one a line: CLASS/NAME or NAME, or positions in memory
    fast: bool = False  # fit on features computed once: several rates and decays together, the best on held-out images
    fast_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates that it tries
    fast_weight_decays: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3)  # weight decays that it tries with each
    held_out: float = 0.2  # share of the training images that it chooses on
    features_cache: str = ""  # folder of features, for --fast; those found there are taken, others left there
    val_batch_size: int = 256  # images per forward pass and rank when scoring
    seed: int = 0  # of the linear layer, the order, the views and the draws
    fresh: bool = False  # drop an unfinished probe that is in the folder
    log_every: int = 16  # steps between looks at the loss on a GPU
    output_dir: str = ""  # for lincls_eval.json and the probe's weights; default: beside the checkpoint

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: name a file written by train.py, or a released model")
        if self.data:
            super().__post_init__()
        require_at_least(self, epochs=1, batch_size=1, val_batch_size=1, weight_decay=0, gamma=0, seed=0, log_every=1)
        require_at_least(self, pool_window=0)
        require_positive(self, "lr", "train_share", "held_out")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum is {self.momentum}: expected 0 <= momentum < 1")
        if self.train_share > 1:
            raise InputError(f"--train-share is {self.train_share}: expected a fraction, 0.01 for 1 %")
        if self.train_share < 1 and self.train_list:
            raise InputError("--train-share and --train-list both choose the labelled images: drop one")
        if self.held_out >= 1:
            raise InputError(f"--held-out is {self.held_out}: expected a fraction below 1")
        if self.fast and self.finetune:
            raise InputError("--fast fits on features of a frozen backbone, --finetune trains it: drop one")
        if self.fast and self.feature_bn:
            raise InputError("--fast standardises every feature already, in the place of --feature-bn: drop one")
        if self.fast and self.feature_bn:
            raise InputError("--fast standardises every feature already, in the place of --feature-bn: drop one")
        if not self.finetune:
            for name in ("backbone_lr", "train_bn"):
                if getattr(self, name):
                    raise InputError(
                        f"{flag(name)} is for --finetune; without it the backbone stays as it is: drop one"
                    )
        if self.backbone_lr is not None:
            require_positive(self, "backbone_lr")
        if not self.fast_lrs or min(self.fast_lrs) <= 0:
            raise InputError(f"--fast-lrs is {' '.join(map(str, self.fast_lrs))}: expected numbers above 0")
        if not self.fast_weight_decays or min(self.fast_weight_decays) < 0:
            found = " ".join(map(str, self.fast_weight_decays))
            raise InputError(f"--fast-weight-decays is {found}: expected numbers of at least 0")


@dataclass(frozen=True, kw_only=True)
class KnnEvalOptions(DeviceOptions, DataOptions):
    """nearest neighbours"""

    checkpoint: str = ""  # file of train.py or of others, or a name of `python -m src.pretrained list`
    arch: str = ""  # of a released backbone, where its file does not say; default: resnet50
    layer: Literal["backbone", "head"] = "backbone"  # whose output is compared; head: the embedding behind it
    k: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours; all of them from one search
    tau: float = 0.1  # temperature: a neighbour's vote weighs exp(similarity / tau); 0.07 is also common
    bank_share: float = 1.0  # of each class's training images that are searched: 0.01 or 0.1, drawn by --seed
    bank_list: str = ""  # file of those images instead, one a line: CLASS/NAME or NAME, or positions in memory
    features_cache: str = ""  # folder of features; those found there are taken, others left there
    batch_size: int = 256  # images per forward pass and rank
    seed: int = 0  # of the draw
    output_dir: str = ""  # for knn_eval.json; default: beside the checkpoint

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: name a file written by train.py, or a released model")
        if self.data:
            super().__post_init__()
        require_at_least(self, batch_size=1, seed=0)
        require_positive(self, "tau", "bank_share")
        if min(self.k) < 1:
            raise InputError(f"--k is {' '.join(map(str, self.k))}: expected numbers of neighbours of at least 1")
        if self.bank_share > 1:
            raise InputError(f"--bank-share is {self.bank_share}: expected a fraction, 0.01 for 1 %")
        if self.bank_share < 1 and self.bank_list:
            raise InputError("--bank-share and --bank-list both choose the labelled images: drop one")


# Named sets of defaults of lincls_eval.py.
LINCLS_PRESETS = {
    # Self-Classifier, arXiv:2103.10994v3: the authors' scripts/lincls_eval.sh
    "self_classifier": {},
    # SwAV, arXiv:2006.09882: linear classification on ImageNet, and semi-supervised learning with 1 % and 10 % of the labels
    "swav": {"optimizer": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 1e-6},
    # their other pooling, of a ResNet-50's map of 7 × 7; without published numbers
    "swav_2x2": {"base": "swav", "pool_window": 6},
    "swav_semi_10": {
        "optimizer": "sgd",
        "batch_size": 256,
        "epochs": 20,
        "lr": 0.2,
        "backbone_lr": 0.01,
        "schedule": "step",
        "decay_epochs": (12, 16),
        "gamma": 0.2,
        "finetune": True,
        "train_bn": True,
        "train_share": 0.1,
    },
    "swav_semi_1": {"base": "swav_semi_10", "lr": 5.0, "backbone_lr": 0.02, "train_share": 0.01},
    # ours, for seconds on a CPU
    "digits": {"optimizer": "sgd", "batch_size": 128, "epochs": 30, "lr": 1.0, "crop_flip": False},
}


# --------------------------------------------------------------------------------------------------------------------
# checks


def flag(name: str) -> str:
    """The flag of a field: col_tau -> --col-tau."""
    return "--" + name.replace("_", "-")


def require_positive(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            found = getattr(config, name)
            raise InputError(
                f"{flag(name)} is {found}: expected a number above 0" + ", a finite one" * (found == math.inf)
            )


def require_at_least(config: object, **bounds: float) -> None:
    for name, bound in bounds.items():
        if not bound <= getattr(config, name) < math.inf:
            raise InputError(f"{flag(name)} is {getattr(config, name)}: expected at least {bound}")


def require_sizes(config: object, name: str) -> None:
    """Numbers of classes or clusters, one for each classifier."""
    sizes = getattr(config, name)
    if not sizes or min(sizes) < 2:
        raise InputError(f"{flag(name)} is {' '.join(map(str, sizes))}: expected sizes of at least 2")


def require_views(config: object, name: str) -> None:
    """Positions of views, each once."""
    views = getattr(config, name)
    if not views or min(views) < 0 or len(set(views)) < len(views):
        raise InputError(
            f"{flag(name)} is {' '.join(map(str, views))}: expected positions of views from 0 on, each once"
        )


# --------------------------------------------------------------------------------------------------------------------
# methods, without importing them


@dataclass(frozen=True)
class MethodSource:
    """What a method's file says about its flags: the dataclass, the comments behind its fields, and its presets."""

    config: type
    comments: dict[str, str]
    presets: dict[str, dict]


def method_names() -> list[str]:
    """The methods are the files of `src/methods`; `METHODS` maps these names to the classes."""
    return sorted(path.stem for path in METHODS_FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))


def read_method(name: str) -> MethodSource:
    """Read `Config` and `PRESETS` from a method's file, executing nothing else of it."""
    path = METHODS_FOLDER / f"{name}.py"
    source = path.read_text()
    statements = _statements(source)
    is_config = [node for node in statements if isinstance(node, ast.ClassDef) and node.name == "Config"]
    namespace = dict(globals(), __name__=f"src.methods.{name}")
    exec(compile(ast.Module(body=is_config, type_ignores=[]), str(path), "exec"), namespace)
    presets = [node.value for node in statements if isinstance(node, ast.Assign) and node.targets[0].id == "PRESETS"]
    return MethodSource(
        namespace["Config"], field_comments(source, "Config"), expand_presets(ast.literal_eval(presets[0]))
    )


def expand_presets(presets: dict[str, dict]) -> dict[str, dict]:
    """Each preset with what it changes against its `base`, an earlier one: {"a": {...}, "b": {"base": "a", "lr": 0.1}}."""
    expanded: dict[str, dict] = {}
    for name, preset in presets.items():
        changes = dict(preset)
        base = changes.pop("base", None)
        expanded[name] = {**(expanded[base] if base else {}), **changes}
    return expanded


@cache
def _statements(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def field_comments(source: str, class_name: str) -> dict[str, str]:
    """The comment behind each field of a class: {"col_tau": "temperature of ..."}."""
    lines = source.splitlines()
    found = {}
    for node in _statements(source):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    # behind the value itself: the formatter may put it, and the comment, in brackets
                    end = field.value or field
                    _, _, comment = lines[end.end_lineno - 1][end.end_col_offset :].partition("#")
                    found[field.target.id] = comment.strip()
    return found


# --------------------------------------------------------------------------------------------------------------------
# command lines


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage of forty flags would bury the message."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_flags(parser: argparse.ArgumentParser, config: type, comments: dict[str, str], title: str, **defaults) -> None:
    """One flag for each field that `config` itself declares."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in fields(config):
        if field.name not in config.__annotations__:
            continue
        default = defaults.get(field.name, field.default)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = comments[field.name].replace("%", "%%")
        settings = {"dest": field.name, "default": default, "help": f"{text} (default: {shown})"}
        group.add_argument(flag(field.name), **settings, **_how_to_parse(hints[field.name]))


def _how_to_parse(hint: type) -> dict:
    """argparse's settings for a field's type: bool, int, float, str, a choice, a pair or a list of numbers."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is types.UnionType:  # int | None
        return {"type": typing.get_args(hint)[0]}
    if typing.get_origin(hint) is tuple:
        element, second = typing.get_args(hint)
        return {"type": element, "nargs": "+" if second is Ellipsis else 2}
    return {"type": hint}


def collect(config: type, values: argparse.Namespace) -> object:
    """The dataclass made of parsed values; its own checks run here."""
    as_tuple = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}
    return config(**{field.name: as_tuple[field.name] for field in fields(config)})


def parse_train(argv: Sequence[str] | None = None) -> tuple[TrainOptions, str, object]:
    """The command line of train.py: shared options, the method's name, and the method's own config.

    Two steps: `--method` first, then the flags of that method, so that a knob of another method is an error. A preset
    changes defaults; what is given on the command line wins.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = OneLineParser(add_help=False, allow_abbrev=False, prog="train.py")
    first.add_argument(
        "--method", choices=method_names(), default="self_classifier", help="what to train (default: self_classifier)"
    )
    first.add_argument(
        "--preset",
        help="named set of defaults, listed in docs/recipes.md (default: that of --data where there is one, else published)",
    )
    first.add_argument("--data", default=TrainOptions.data)
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    method = read_method(known.method)
    preset = known.preset or (known.data if known.data in method.presets else "published")
    if preset not in method.presets:
        raise InputError(f"--preset {preset}: {known.method} has {', '.join(method.presets)}")

    parser = OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description=f"Pre-train a network without labels. Shown: method {known.method}, preset {preset}.",
    )
    for action in first._actions[:2]:
        parser._add_action(action)
    parser.add_argument(
        "--base-lr",
        type=float,
        help="learning rate per 256 images instead of --lr, which becomes this × batch size / 256; --warmup-start "
        "becomes this, or the preset's share of it, --final-lr keeps the preset's share of --lr (default: --lr as it is)",
    )
    _add_dry_run(parser)
    changed = method.presets[preset]
    source = Path(__file__).read_text()
    for group in reversed(TrainOptions.__mro__[1:-1]):
        add_flags(parser, group, field_comments(source, group.__name__), group.__doc__, **changed)
    add_flags(parser, method.config, method.comments, f"method {known.method}", **changed)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_explain_unknown(unknown, known.method))
    published = {**as_plain(TrainOptions(data="somewhere")), **changed}
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    if values.base_lr is not None:
        _apply_base_lr(values, published, given)
    elif known.preset and "--lr" not in given:
        _check_lr_fits(values.batch_size, published, known.preset)
    if 0 < values.lr < values.warmup_start and "--warmup-start" not in given:
        values.warmup_start = values.lr * min(published["warmup_start"] / published["lr"], 1.0)  # a warm-up goes up
    options, knobs = collect(TrainOptions, values), collect(method.config, values)
    _end_dry_run(values, {"method": known.method, **as_plain(options), **as_plain(knobs)})
    return options, known.method, knobs


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration as JSON and exit, checking flags only"
    )


def _end_dry_run(values: argparse.Namespace, settings: dict) -> None:
    """With --dry-run, print the settings, one a line, and end."""
    if values.dry_run:
        print("{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(settings[name])}" for name in settings) + "\n}")
        raise SystemExit(0)


def _apply_base_lr(values: argparse.Namespace, published: dict, given: set[str]) -> None:
    """The rule behind the published rates: lr = base × batch / 256, warmed up from base, down to a fixed share of lr. A preset that
    starts at another share of its own base keeps that share."""
    if "--lr" in given:
        raise InputError("--base-lr and --lr both name the learning rate: drop one")
    require_positive(values, "base_lr")
    values.lr = values.base_lr * values.batch_size / 256
    if "--warmup-start" not in given:
        share = published["warmup_start"] / (published["lr"] * 256 / published["batch_size"])
        values.warmup_start = values.base_lr * (1 if abs(share - 1) < 0.01 else share)  # theirs is 4092 or 4096 images
    if "--final-lr" not in given:
        values.final_lr = values.lr * published["final_lr"] / published["lr"]


def _check_lr_fits(batch_size: int, published: dict, preset: str) -> None:
    """A preset's learning rate is that of its batch: with another one it would be silently wrong.

    Up to 1 % apart passes: the published rates are those of 4096 images, their batch was 66 × 62 = 4092.
    """
    lr, batch = published["lr"], published["batch_size"]
    if abs(batch_size / batch - 1) > 0.01:
        base = f"{lr * 256 / batch:.2g}"
        raise InputError(
            f"--batch-size {batch_size}: the learning rate {lr} of --preset {preset} is for {batch} images; "
            f"--base-lr {base} scales it with the batch, --lr sets it"
        )


def parse_cls_eval(argv: Sequence[str] | None = None) -> ClsEvalOptions:
    """The command line of cls_eval.py."""
    parser = OneLineParser(prog="cls_eval.py", allow_abbrev=False, description="Score clusters against labels.")
    source = Path(__file__).read_text()
    for group in (ClsEvalOptions, KMeansOptions, DataOptions, DeviceOptions):
        defaults = {"data": ""} if group is DataOptions else {}  # that of the checkpoint
        add_flags(parser, group, field_comments(source, group.__name__), group.__doc__, **defaults)
    _add_dry_run(parser)
    values = parser.parse_args(argv)
    options = collect(ClsEvalOptions, values)
    _end_dry_run(values, as_plain(options))
    return options


def parse_knn_eval(argv: Sequence[str] | None = None) -> KnnEvalOptions:
    """The command line of knn_eval.py."""
    parser = OneLineParser(
        prog="knn_eval.py", allow_abbrev=False, description="Score features by the votes of their nearest neighbours."
    )
    source = Path(__file__).read_text()
    for group in (KnnEvalOptions, DataOptions, DeviceOptions):
        defaults = {"data": ""} if group is DataOptions else {}  # that of the checkpoint
        add_flags(parser, group, field_comments(source, group.__name__), group.__doc__, **defaults)
    _add_dry_run(parser)
    values = parser.parse_args(argv)
    options = collect(KnnEvalOptions, values)
    _end_dry_run(values, as_plain(options))
    return options


def parse_lincls_eval(argv: Sequence[str] | None = None, trained: dict | None = None) -> LinclsEvalOptions:
    """The command line of lincls_eval.py.

    Args:
        trained: the configuration of the checkpoint, once it is known; its data are the default, and the default preset
            follows the data.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = OneLineParser(add_help=False, allow_abbrev=False, prog="lincls_eval.py")
    first.add_argument("--preset", choices=LINCLS_PRESETS)
    first.add_argument("--data", default="")
    first.add_argument("--train-list", default="")
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    data = {"data": ""}
    if trained and not known.data:
        if not trained["data"]:
            raise InputError("--data is missing: the checkpoint does not say what it was trained on")
        data = {name: trained[name] for name in ("data", "data_root", "subset_file")}
    preset = known.preset or ("digits" if (known.data or data["data"]) == "digits" else "self_classifier")

    parser = OneLineParser(
        prog="lincls_eval.py",
        allow_abbrev=False,
        description="Score a backbone by a linear classifier on its features.",
    )
    source = Path(__file__).read_text()
    defaults = {**expand_presets(LINCLS_PRESETS)[preset], **data, "preset": preset}
    if known.train_list:
        defaults["train_share"] = 1.0  # a list takes the place of a preset's draw
    for group in (LinclsEvalOptions, DataOptions, DeviceOptions):
        add_flags(parser, group, field_comments(source, group.__name__), group.__doc__, **defaults)
    _add_dry_run(parser)
    values = parser.parse_args(argv)
    options = collect(LinclsEvalOptions, values)
    if known.preset and not options.fast:
        _check_probe_lr_fits(options, defaults, {word.split("=")[0] for word in argv})
    _end_dry_run(values, as_plain(options))
    return options


def _check_probe_lr_fits(options: LinclsEvalOptions, preset: dict, given: set[str]) -> None:
    """As for a training: the rates of a preset are those of its batch, and with another one they are to be given."""
    batch = preset.get("batch_size", LinclsEvalOptions.batch_size)
    if abs(options.batch_size / batch - 1) <= 0.01:
        return
    for name in ("lr", "backbone_lr"):
        rate = preset.get(name, getattr(LinclsEvalOptions, name))
        if rate is not None and flag(name) not in given:
            raise InputError(
                f"--batch-size {options.batch_size}: {flag(name)} {rate} of --preset {options.preset} is for {batch} images; "
                f"{flag(name)} {rate * options.batch_size / batch:.2g} scales it with the batch"
            )


def data_of(trained: dict, given: DataOptions) -> DataOptions:
    """The data a run was trained on; its folder may have moved since."""
    return DataOptions(
        data=trained["data"],
        data_root=given.data_root or trained["data_root"],
        download=given.download,
        subset_file=given.subset_file or trained["subset_file"],
    )


def _explain_unknown(words: list[str], method: str) -> str:
    for word in words:
        name = word.split("=")[0].replace("--no-", "--")
        owners = [
            other for other in method_names() if name in {flag(f.name) for f in fields(read_method(other).config)}
        ]
        if owners:
            return f"{word} belongs to {' and '.join(owners)}, not to {method}"
    return f"unknown: {' '.join(words)}"


def run_script(main: Callable[[], None]) -> None:
    """Run an entry script: what was expected to go wrong becomes one line and exit status 2 (input) or 1 (later)."""
    try:
        try:
            main()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RunError(f"no space left on the disk, writing {error.filename or 'a file'}") from None
        except RuntimeError as error:
            distributed = sys.modules.get("src.distributed")  # loaded by now if ranks have met
            explained = distributed.explain(error) if distributed else error
            if explained is error:
                raise
            raise explained from None
    except (InputError, RunError) as error:
        where = _place_of_speaker(error)
        if where is not None:
            message = re.sub(r"\s+", " ", str(error))
            print(f"{Path(sys.argv[0]).name}: error{where}: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None


def _place_of_speaker(error: InputError | RunError) -> str | None:
    """Where this process is among the ranks, if it is the one to say what is wrong; None if another one is.

    Most often all fail alike and rank 0 says it. Another speaks if it fails alone: of a file, say, that its host lacks.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if ranks == "1" or not rank.isdecimal() or getattr(error, "speaks", False):
        return ""
    distributed = sys.modules.get("src.distributed")
    met = distributed is not None and distributed.world_size() > 1
    if rank == "0":
        if met:
            distributed.speaks_first()
        return ""
    return f" on rank {rank}" if met and isinstance(error, InputError) and distributed.speaks_first() else None


def as_plain(options: object) -> dict:
    """A dataclass as JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}

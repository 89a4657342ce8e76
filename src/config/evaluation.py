"""Options of cls_eval.py, lincls_eval.py and knn_eval.py."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import InputError
from . import flags
from .flags import SAME_BATCH, Options, flag, require_at_least, require_momentum, require_positive
from .training import DataOptions, DeviceOptions, EvalViewOptions

DEFAULT_KS = (10, 20, 100, 200)  # numbers of neighbours in the published protocol
SUPERCLASSES = ("2", "3", "4", "5", "6", "entity13", "entity30", "living17", "nonliving26")


class EvaluationOptions(DeviceOptions, EvalViewOptions, DataOptions):
    """Options that all evaluations share. Each subclass declares the flags `checkpoint`, `arch` and `output_dir`."""

    checkpoint: str
    arch: str
    output_dir: str

    def check(self) -> None:
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: name a file written by train.py, or a released model")


@dataclass(frozen=True, kw_only=True)
class KMeansOptions(Options):
    """k-means on features"""

    kmeans: int = (
        0  # number of clusters for k-means on features, which replaces the clusters of the classifiers (0: no k-means)
    )
    layer: Literal["backbone", "head"] = "backbone"  # layer whose output is clustered; head is the embedding
    normalize: bool = False  # scale the features to unit length before k-means
    fit_share: float = (
        1.0  # fraction of each class's training images on which k-means is fitted, drawn with --seed; published: 0.1
    )
    fit_list: str = ""  # file that lists the images for the fit, one per line: CLASS/NAME, NAME or a position in memory
    init: Literal["k-means++", "random"] = "k-means++"  # choice of the initial centroids; random draws images
    restarts: int = 10  # number of starts; the fit with the smallest sum of squared distances is used
    early_stop: bool = (
        False  # end a start when an iteration lowers the sum of squared distances by less than 0.02 %; published: no
    )
    seed: int = 0  # seed of all draws


@dataclass(frozen=True, kw_only=True)
class ClsEvalOptions(KMeansOptions, EvaluationOptions):
    """evaluation"""

    checkpoint: str = ""  # run folder or file of train.py, file of another project, or name in `python -m src.pretrained list` (required)
    arch: str = ""  # architecture of a released network if its file does not name it (default: resnet50)
    split: Literal["train", "test"] = "test"  # split whose images are clustered
    classifier: int | None = None  # number of the classifier to score (default: the one that training chose)
    ensemble: bool = False  # also score the mean prediction of all classifiers of the same size; needs a second pass
    feature_quality: bool = (
        False  # also compute RankMe of the features and the silhouette of the clusters; needs a second pass
    )
    compare: tuple[str, ...] = ()  # other checkpoints whose clusters of the same images are compared by AMI
    batch_size: int = 256  # number of images per forward pass and rank
    features_cache: str = ""  # folder from which features are read, and to which they are written (default: no cache)
    superclass: tuple[
        str, ...
    ] = ()  # also score against superclasses of ImageNet: levels 2 to 6, entity13, entity30, living17, nonliving26
    hierarchy: str = (
        ""  # folder with the three files of the hierarchy (default: that of `python -m src.data.imagenet get`)
    )
    pixel_kmeans: bool = False  # also score k-means on raw pixels; only for small images that are held in memory
    grids: int = 0  # number of figures with nine images of a cluster, the most accurate first; for self_classifier_v1 see docs/fidelity.md
    pca: bool = False  # plot the features of the backbone along their two principal directions
    tsne: int = 0  # number of t-SNE figures of the features of the backbone, each with other random classes
    tsne_classes: int = 10  # number of classes per t-SNE figure (0: all)
    atlas: bool = False  # also write atlas.html, a page to explore the clusters in a browser; at most 10,000 images, chosen evenly
    figures: Literal["png", "pdf", "svg"] = "png"  # file format of the figures
    dpi: int = 150  # resolution of the figures in dots per inch
    output_dir: str = (
        ""  # folder for the results (default: that of the checkpoint, with --kmeans its subfolder kmeans/)
    )

    def check(self) -> None:
        require_at_least(self, batch_size=1, grids=0, tsne=0, tsne_classes=0, kmeans=0, restarts=1, seed=0, dpi=10)
        require_positive(self, "fit_share")
        for field in fields(KMeansOptions):
            if not self.kmeans and getattr(self, field.name) != field.default:
                raise InputError(f"{flag(field.name)} is for k-means: give --kmeans, or drop {flag(field.name)}")
        for choice in self.superclass:
            if choice not in SUPERCLASSES:
                raise InputError(f"--superclass {choice}: expected some of {', '.join(SUPERCLASSES)}")
        if self.hierarchy and not self.superclass:
            raise InputError("--hierarchy is for superclasses: give --superclass, or drop --hierarchy")
        if self.kmeans and self.classifier is not None:
            raise InputError("--kmeans and --classifier both name the clusters to score: drop one of them")
        if self.kmeans and self.ensemble:
            raise InputError("--ensemble averages classifiers, but --kmeans uses no classifier: drop one of them")
        if self.fit_share > 1:
            raise InputError(f"--fit-share is {self.fit_share}: expected a fraction, for example 0.1 for 10 %")
        if self.fit_share < 1 and self.fit_list:
            raise InputError("--fit-share and --fit-list both choose the images to fit on: drop one of them")

    def unused(self) -> dict[str, str]:
        """Return {flag that has no effect with the other options: the reason}."""
        return {} if self.tsne else {"--tsne-classes": "--tsne is not given"}


@dataclass(frozen=True, kw_only=True)
class LinclsEvalOptions(EvaluationOptions):
    """linear classifier"""

    checkpoint: str = ""  # run folder or file of train.py, file of another project, or name in `python -m src.pretrained list` (required)
    preset: Literal[
        "self_classifier", "swav", "swav_2x2", "swav_semi_10", "swav_semi_1", "sela", "sela_alexnet", "digits"
    ] = "self_classifier"  # named set of defaults, see docs/recipes.md (default: digits for the digits, otherwise self_classifier)
    arch: str = ""  # architecture of a released backbone if its file does not name it (default: resnet50)
    epochs: int = 100  # number of passes over the labelled training images
    batch_size: int = 4096  # number of images per step over all ranks; the last batch of an epoch may be smaller
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # optimizer; lars is SGD with layer-wise learning rates
    lr: float = 0.8  # learning rate of the linear layer, not scaled by the batch size
    backbone_lr: float | None = None  # learning rate of the backbone with --finetune (default: the value of --lr)
    schedule: Literal["cosine", "step", "constant"] = (
        "cosine"  # schedule of the learning rates, which change at the start of an epoch
    )
    decay_epochs: tuple[int, ...] = (60, 80)  # epochs after which the step schedule lowers the rates
    gamma: float = 0.1  # factor by which the step schedule multiplies the rates
    momentum: float = 0.9  # momentum of lars and sgd
    nesterov: bool = False  # use Nesterov momentum with sgd
    weight_decay: float = 0.0  # weight decay of every trained parameter
    pool_window: int = 0  # side of the windows over which the last map is averaged, one step apart (0: the whole map)
    feature_bn: bool = False  # add batch normalisation between the backbone and the linear layer
    crop_flip: bool = (
        True  # train on random resized crops and flips (digits: on their own views), otherwise on the central view
    )
    layers: bool = False  # probe each of the five convolutions of an AlexNet instead of the last features
    ten_crops: bool = False  # score the mean of the logits of ten crops of each photograph: corners, centre, mirrored
    finetune: bool = False  # also train the backbone
    train_bn: bool = (
        False  # with --finetune, batch normalisation uses the statistics of the batch instead of the learned ones
    )
    train_share: float = (
        1.0  # fraction of the training images of each class that are labelled, drawn with --seed; for example 0.01
    )
    train_list: str = (
        ""  # file that lists the labelled training images, one per line: CLASS/NAME, NAME or a position in memory
    )
    fast: bool = (
        False  # compute the features once, fit with several rates and decays, choose the best on held-out images
    )
    fast_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates that --fast tries
    fast_weight_decays: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3)  # weight decays that --fast tries with each rate
    held_out: float = 0.2  # fraction of the training images that --fast holds out to choose the best fit
    features_cache: str = ""  # folder from which --fast reads features, and to which it writes them (default: no cache)
    val_batch_size: int = 256  # number of images per forward pass and rank for scores
    seed: int = 0  # seed of the linear layer, the order of the images, the views and all draws
    fresh: bool = False  # discard an unfinished probe in --output-dir instead of continuing it
    log_every: int = 16  # number of steps between two readings of the loss on a GPU; on a CPU every step reads it
    output_dir: str = ""  # folder for lincls_eval.json and the weights of the probe (default: that of the checkpoint)

    def check(self) -> None:
        require_at_least(self, epochs=1, batch_size=1, val_batch_size=1, weight_decay=0, gamma=0, seed=0, log_every=1)
        require_at_least(self, pool_window=0)
        require_positive(self, "lr", "train_share", "held_out")
        require_momentum(self)
        if self.train_share > 1:
            raise InputError(f"--train-share is {self.train_share}: expected a fraction, for example 0.01 for 1 %")
        if self.train_share < 1 and self.train_list:
            raise InputError("--train-share and --train-list both choose the labelled images: drop one of them")
        if self.held_out >= 1:
            raise InputError(f"--held-out is {self.held_out}: expected a fraction below 1")
        if self.fast and self.finetune:
            raise InputError(
                "--fast fits on features of a frozen backbone, but --finetune trains the backbone: drop one of them"
            )
        if self.fast and self.feature_bn:
            raise InputError("--fast standardises every feature already, instead of --feature-bn: drop one of them")
        if self.layers:
            for name in ("fast", "finetune", "pool_window", "feature_bn"):
                if getattr(self, name):
                    raise InputError(f"--layers has its own pooling and normalisation: drop it, or drop {flag(name)}")
        if self.ten_crops and self.fast:
            raise InputError("--fast computes features of the central view, not of --ten-crops: drop one of them")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise InputError(
                f"--nesterov is for --optimizer sgd with momentum, not for {self.optimizer} with --momentum {self.momentum}: "
                "drop --nesterov"
            )
        if not self.finetune:
            for name in ("backbone_lr", "train_bn"):
                if getattr(self, name):
                    raise InputError(f"{flag(name)} is for --finetune: give --finetune, or drop {flag(name)}")
        if self.backbone_lr is not None:
            require_positive(self, "backbone_lr")
        if not self.fast_lrs or not all(0 < lr < math.inf for lr in self.fast_lrs):
            raise InputError(f"--fast-lrs is {' '.join(map(str, self.fast_lrs))}: expected numbers above 0")
        if not self.fast_weight_decays or not all(0 <= decay < math.inf for decay in self.fast_weight_decays):
            found = " ".join(map(str, self.fast_weight_decays))
            raise InputError(f"--fast-weight-decays is {found}: expected numbers of at least 0")

    def unused(self) -> dict[str, str]:
        """Return {flag that has no effect with the other options: the reason}."""
        reasons = {}
        if self.optimizer == "adamw" and not self.fast:
            reasons["--momentum"] = "--optimizer adamw has no momentum"
        if self.schedule != "step":
            for name in ("--decay-epochs", "--gamma"):
                reasons[name] = f"--schedule is {self.schedule}, not step"
        if not self.fast:
            for name in ("--fast-lrs", "--fast-weight-decays", "--held-out", "--features-cache"):
                reasons[name] = "--fast is not given"
        return reasons


@dataclass(frozen=True, kw_only=True)
class KnnEvalOptions(EvaluationOptions):
    """nearest neighbours"""

    checkpoint: str = ""  # run folder or file of train.py, file of another project, or name in `python -m src.pretrained list` (required)
    arch: str = ""  # architecture of a released backbone if its file does not name it (default: resnet50)
    layer: Literal["backbone", "head"] = "backbone"  # layer whose output is compared; head is the embedding
    k: tuple[int, ...] = (
        DEFAULT_KS  # numbers of neighbours to score (default: of 10 20 100 200 those that fit the bank)
    )
    tau: float = 0.1  # temperature; the vote of a neighbour has the weight exp(similarity / tau); 0.07 is also common
    bank_share: float = (
        1.0  # fraction of the training images of each class that are searched, drawn with --seed; for example 0.1
    )
    bank_list: str = ""  # file that lists the images to search, one per line: CLASS/NAME, NAME or a position in memory
    features_cache: str = ""  # folder from which features are read, and to which they are written (default: no cache)
    batch_size: int = 256  # number of images per forward pass and rank
    seed: int = 0  # seed of the draw for --bank-share
    output_dir: str = ""  # folder for knn_eval.json (default: that of the checkpoint)

    def check(self) -> None:
        require_at_least(self, batch_size=1, seed=0)
        require_positive(self, "tau", "bank_share")
        if min(self.k) < 1:
            raise InputError(f"--k is {' '.join(map(str, self.k))}: expected numbers of at least 1")
        if self.bank_share > 1:
            raise InputError(f"--bank-share is {self.bank_share}: expected a fraction, for example 0.01 for 1 %")
        if self.bank_share < 1 and self.bank_list:
            raise InputError("--bank-share and --bank-list both choose the labelled images: drop one of them")


# Named sets of defaults of lincls_eval.py.
LINCLS_PRESETS = {
    # Self-Classifier, arXiv:2103.10994v3: the authors' scripts/lincls_eval.sh
    "self_classifier": {},
    # SwAV, arXiv:2006.09882: linear classification on ImageNet, and semi-supervised learning with 1 % and 10 % of the labels
    "swav": {"optimizer": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 1e-6},
    # SwAV's other pooling of the 7 × 7 map of a ResNet-50; there are no published numbers for it
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
    # SeLa, arXiv:1911.05371: a ResNet, and the five convolutions of an AlexNet
    "sela": {
        "optimizer": "sgd",
        "batch_size": 1024,
        "epochs": 146,
        "lr": 0.1,
        "schedule": "step",
        "decay_epochs": (85, 128),
        "ten_crops": True,
        "val_batch_size": 32,
    },
    "sela_alexnet": {
        "optimizer": "sgd",
        "batch_size": 192,
        "epochs": 36,
        "lr": 0.01,
        "weight_decay": 1e-5,
        "schedule": "step",
        "decay_epochs": (10, 20, 30),
        "layers": True,
        "ten_crops": True,
        "val_batch_size": 32,
    },
    # our own, which takes seconds on a CPU
    "digits": {"optimizer": "sgd", "batch_size": 128, "epochs": 30, "lr": 1.0, "crop_flip": False},
}


# --------------------------------------------------------------------------------------------------------------------
# command lines


def parse_cls_eval(argv: Sequence[str] | None = None) -> ClsEvalOptions:
    """Parse the command line of cls_eval.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser("cls_eval.py", "Score the clusters of a checkpoint against labels.")
    _add_groups(parser, (ClsEvalOptions, KMeansOptions), {"data": ""})
    values = parser.parse_args(argv)
    options = flags.collect(ClsEvalOptions, values)
    flags.refuse_unused(flags.flags_in(argv), options.unused())
    flags.end_dry_run(values, flags.as_plain(options))
    return options


def parse_knn_eval(argv: Sequence[str] | None = None) -> KnnEvalOptions:
    """Parse the command line of knn_eval.py."""
    parser = _parser("knn_eval.py", "Score the features of a checkpoint by the votes of nearest neighbours.")
    _add_groups(parser, (KnnEvalOptions,), {"data": ""})
    values = parser.parse_args(argv)
    options = flags.collect(KnnEvalOptions, values)
    flags.end_dry_run(values, flags.as_plain(options))
    return options


def parse_lincls_eval(argv: Sequence[str] | None = None, trained: dict[str, Any] | None = None) -> LinclsEvalOptions:
    """Parse the command line of lincls_eval.py.

    Args:
        trained: configuration of the checkpoint, or None if it is not known yet. It sets the default of --data, and the
            data set the default of --preset.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = flags.OneLineParser(add_help=False, allow_abbrev=False, prog="lincls_eval.py")
    first.add_argument("--preset", choices=LINCLS_PRESETS)
    first.add_argument("--data", default="")
    for name in ("--train-list", "--subset", "--subset-file"):
        first.add_argument(name, default="")
    known, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    data = {"data": ""}
    if trained and not known.data:
        data = {name: trained[name] for name in ("data", "data_root")}
        if not known.subset and not known.subset_file:  # one of these flags replaces the subset of the training
            data |= {name: trained[name] for name in ("subset", "subset_file")}
    preset = known.preset or ("digits" if (known.data or data["data"]) == "digits" else "self_classifier")
    defaults = {**flags.expand_presets(LINCLS_PRESETS)[preset], **data, "preset": preset}
    if known.train_list:
        defaults["train_share"] = 1.0  # the list replaces the share of the preset

    parser = _parser("lincls_eval.py", "Score the backbone of a checkpoint by a linear classifier on its features.")
    _add_groups(parser, (LinclsEvalOptions,), defaults)
    values = parser.parse_args(argv)
    options = flags.collect(LinclsEvalOptions, values)
    given = flags.flags_in(argv)
    flags.refuse_unused(given, options.unused())
    if known.preset and not options.fast:
        _check_probe_lr_fits(options, defaults, given)
    flags.end_dry_run(values, flags.as_plain(options))
    return options


def _parser(prog: str, description: str) -> flags.OneLineParser:
    return flags.OneLineParser(prog=prog, allow_abbrev=False, description=description)


def _add_groups(parser: argparse.ArgumentParser, groups: Sequence[type], defaults: dict[str, Any]) -> None:
    for group in (*groups, EvalViewOptions, DataOptions, DeviceOptions):
        comments = flags.comments_of(group)
        if group is DataOptions:
            comments["data"] += " (default: the data of the checkpoint)"
        flags.add_flags(parser, group, comments, **defaults)
    flags.add_dry_run(parser)


def _check_probe_lr_fits(options: LinclsEvalOptions, preset: dict[str, Any], given: set[str]) -> None:
    """Raise InputError if the batch size differs from that of the preset, whose learning rates are for its own batch size."""
    batch = preset.get("batch_size", LinclsEvalOptions.batch_size)
    if abs(options.batch_size / batch - 1) <= SAME_BATCH:
        return
    for name in ("lr", "backbone_lr"):
        rate = preset.get(name, getattr(LinclsEvalOptions, name))
        if rate is not None and flag(name) not in given:
            raise InputError(
                f"--batch-size {options.batch_size}: {flag(name)} {rate} of --preset {options.preset} is for {batch} images; "
                f"{flag(name)} {rate * options.batch_size / batch:.2g} scales it with the batch size"
            )

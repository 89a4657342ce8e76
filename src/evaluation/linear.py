"""The evaluation of lincls_eval.py: train a linear classifier with labels on the features of a backbone.

There are two protocols: that of Self-Classifier, arXiv:2103.10994v3 (LARS, batch 4096), and that of SwAV, arXiv:2006.09882
(SGD, batch 256). SwAV also has a semi-supervised protocol, which fine-tunes the whole network on few labels. In both, the
learning rate changes at the start of each epoch, and the batch normalisation of a frozen backbone keeps the statistics of
pre-training. Both papers report the best epoch on the test split.
"""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..config import LinclsEvalOptions, ViewSettings, as_plain, parse_lincls_eval, stored_path
from ..data.base import Views
from ..data.datasets import Images
from ..data.loaders import TrainLoader
from ..data.photographs import PhotoViews, TenCrops
from ..data.subsets import draw_share, keep_rows, read_list
from ..data.views import build_views
from ..errors import InputError, printable
from ..fingerprints import of_data
from ..logs import Progress, percent, table, write_json
from ..methods import feature_width
from ..models.backbones import pool_windows
from ..run import Run, continuing_command, find_checkpoint, make_folder
from ..trainer import Trainer
from .probe import LayerProbes, LinearProbe, build_probe_optimizer, rate_factor
from .search import search, top_hits
from .session import Session, open_session

NAME, BEST = "lincls_eval", "lincls_eval_best.pt"
CROP_SHARE = (0.08, 1.0)  # smallest and largest share of the image's area in a crop, in both protocols
# A probe may continue with other values of these options.
IRRELEVANT = {"checkpoint", "val_batch_size", "fast", "fast_lrs", "fast_weight_decays", "held_out"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A backbone with a new linear layer on the device, and the labelled images."""

    session: Session
    train: Images
    test: Images
    probe: LinearProbe


def run(options: LinclsEvalOptions) -> None:
    """Open the checkpoint and the data, fit a linear classifier by SGD or with --fast, write the result and print it."""
    job, options = open_job(options)
    protocol = describe(options)
    if options.fast:
        found = fit_fast(
            job,
            lrs=options.fast_lrs,
            weight_decays=options.fast_weight_decays,
            held_out=options.held_out,
            epochs=options.epochs,
            batch_size=options.batch_size,
            momentum=options.momentum,
            seed=options.seed,
        )
    else:
        optimizer = build_probe_optimizer(
            job.probe,
            options.optimizer,
            lr=options.lr,
            backbone_lr=options.backbone_lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
        factor = rate_factor(options.schedule, options.epochs, decay_epochs=options.decay_epochs, gamma=options.gamma)
        loader = build_loader(
            job, training_views(job, augment=options.crop_flip), batch_size=options.batch_size, seed=options.seed
        )
        trainer = build_trainer(job, optimizer, factor, loader=loader, log_every=options.log_every)
        found = train(job, trainer, as_plain(options), protocol=protocol, fresh=options.fresh)
    if distributed.is_main():
        write(job, found, protocol=protocol, options=as_plain(options))
    distributed.stop()


def open_job(options: LinclsEvalOptions) -> tuple[Job, LinclsEvalOptions]:
    """Open the checkpoint and the data. The function finds every mistake in the options before it reads an image.

    Returns:
        What is open, and the options with the defaults that depend on the checkpoint.

    Raises:
        InputError: if something is missing or does not fit together.
    """
    session = open_session(
        options,
        part="backbone",
        splits=("train", "test"),
        labelled=True,
        batch_size=options.val_batch_size,
        features_cache=options.features_cache,
        protocol="swav" if options.preset.startswith("swav") else "self_classifier",
    )
    options = parse_lincls_eval(trained=session.trained)  # the default of --preset depends on the data
    options = replace(options, precision=cast(Any, session.precision))
    if options.ten_crops:
        ten_crops(session)  # raises if the data are no photographs
    data, backbone = session.splits["train"], session.network.get_submodule("backbone")
    num_features = feature_width(backbone)
    if options.pool_window:
        num_features = pool_windows(
            backbone, options.pool_window, in_channels=data.channels, image_size=session.view_size
        )
    if options.train_list:
        data = keep_rows(data, read_list(data, options.train_list, "--train-list"))
    elif options.train_share < 1:
        data = keep_rows(data, draw_share(data.labels.numpy(), options.train_share, options.seed))
    torch.manual_seed(options.seed)
    probe: LinearProbe
    if options.layers:
        probe = LayerProbes(backbone, len(data.classes), data.labels)
    else:
        probe = LinearProbe(
            backbone,
            len(data.classes),
            data.labels,
            finetune=options.finetune,
            train_bn=options.train_bn,
            num_features=num_features,
            feature_bn=options.feature_bn,
        )
    probe = probe.to(session.device).to(memory_format=session.layout)
    return Job(session=session, train=data, test=session.splits["test"], probe=probe), options


# --------------------------------------------------------------------------------------------------------------------
# the two ways of fitting


def fit_fast(
    job: Job,
    *,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    held_out: float,
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> dict[str, Any]:
    """Compute the features once and fit many settings at once, on rank 0. The other ranks return an empty dictionary.

    Args:
        lrs, weight_decays, held_out, epochs, batch_size, momentum, seed: as for `search`.
    """
    session = job.session
    train, test = (
        session.features(data, split=split, layer="backbone", network=job.probe).to(session.device)
        for split, data in (("train", job.train), ("test", job.test))
    )
    if not distributed.is_main():
        return {}
    found = search(
        train,
        job.train.labels,
        test=test,
        test_labels=job.test.labels,
        num_classes=len(job.train.classes),
        lrs=lrs,
        weight_decays=weight_decays,
        held_out=held_out,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        seed=seed,
    )
    job.probe.check_unchanged()
    return found


def train(
    job: Job, trainer: Trainer, settings: dict[str, Any], *, protocol: str, fresh: bool = False
) -> dict[str, Any]:
    """Train as in the published protocols, and score the test split after every epoch.

    If the folder holds an unfinished probe, the training continues it.

    Args:
        settings: the options, by which an unfinished probe is recognised.
        protocol: the protocol in words, for the log.
        fresh: discard an unfinished probe.

    Returns:
        The accuracies of the epoch that is best on the test split, which the papers report, those of the last epoch, and the
        summaries of all epochs.

    Raises:
        SystemExit: 128 + the signal, after saving, if a signal asked the training to stop.
    """
    session, probe, epochs = job.session, job.probe, settings["epochs"]
    crops = ten_crops(session) if settings["ten_crops"] else None
    settings = recorded(job, settings)
    found = None
    if not fresh:
        found = find_checkpoint(session.folder, settings, name=NAME, irrelevant=IRRELEVANT, replace_finished=True)
    if found:
        trainer.load_state_dict(_migrated(found))
    again = continuing_command(session.folder, output_dir=str(session.folder), fresh=fresh)
    run = Run(session.folder, settings, found, name=NAME, log=False, continuation=again)
    if run.history and not trainer.done and best_epoch(run.history) is run.history[-1]:
        run.save(trainer, extra=BEST)  # the process may have ended after the last checkpoint and before this one

    total = epochs * trainer.loader.images
    progress = Progress(total, trainer.images, enabled=distributed.is_main())
    progress.say(f"command: {printable(shlex.join(sys.argv))}\nrevision: {run.revision}\n{protocol}")
    progress.say(
        f"{len(job.train):,} training images of {len(job.train.classes)} classes, {len(job.test):,} test images; "
        f"{len(trainer.loader)} steps per epoch on {distributed.world_size()} x {session.device.type}; writing to {printable(run.folder)}"
    )
    if found:
        where = f"resuming from epoch {trainer.epoch + 1}, step {trainer.done + 1}"
        progress.say(where if trainer.epoch < epochs else "the probe is already finished")

    def score_epoch(summary: dict[str, Any]) -> dict[str, float]:
        if trainer.epoch in (1, epochs):
            probe.check_unchanged()
        shares = accuracies(probe, session.batches(job.test, crops), job.test.labels, autocast=session.autocast)
        top1, top5 = max(shares)
        layers = {f"top1_{name}": first for name, (first, _) in zip(probe.layers, shares, strict=False)}
        return {"top1": top1, "top5": top5, **layers}

    def comment(summary: dict[str, Any]) -> Iterator[str]:
        if best_epoch(run.history) is summary:
            run.save(trainer, extra=BEST)
        if trainer.epoch % max(epochs // 10, 1) == 0:
            yield (
                f"epoch {trainer.epoch}  loss {summary['loss']:.4f}  top-1 {percent(summary['top1'])}  "
                f"top-5 {percent(summary['top5'])}"
            )

    run.train(trainer, epochs, progress, score=score_epoch, comment=comment)
    best, last = best_epoch(run.history), run.history[-1]
    return {
        "top1": best["top1"],
        "top5": best["top5"],
        "best_epoch": best["epoch"],
        "last_top1": last["top1"],
        "last_top5": last["top5"],
        **({"layers": {name: best[f"top1_{name}"] for name in probe.layers}} if probe.layers else {}),
        "history": run.history,
    }


def recorded(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a probe with what is known of its backbone and its data; they go into its checkpoint."""
    return settings | {
        **{name: job.session.trained[name] for name in ("arch", "patch_size", "channels", "global_crops_size")},
        "method": "linear",
        "eval_size": job.session.view and job.session.view.size,
        "eval_resize": job.session.view and job.session.view.resize,
        "backbone": job.probe.before,
        "train_images": len(job.train),
        "data": stored_path(job.session.source.data),
        "upright": job.session.trained["upright"],
        "data_fingerprint": distributed.on_main(lambda: of_data(job.train)),
    }


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first epoch with the highest top-1 accuracy on the test split."""
    return max(history, key=lambda epoch: epoch["top1"])


def build_loader(job: Job, views: Views, *, batch_size: int, seed: int) -> TrainLoader:
    """Build the batches of the labelled training images.

    Raises:
        InputError: if there are fewer images than ranks.
    """
    loader = TrainLoader(
        job.train,
        views,
        batch_size=batch_size,
        seed=seed,
        device=job.session.device,
        workers=job.session.workers,
        keep_last=True,
        equal_shares=job.probe.shares_statistics,
    )
    if not len(loader):
        raise InputError(
            f"{len(job.train)} labelled training images for {distributed.world_size()} ranks, expected at least one per rank: "
            "start fewer ranks"
        )
    return loader


def build_trainer(
    job: Job,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    *,
    loader: TrainLoader,
    log_every: int = 16,
) -> Trainer:
    """Build the trainer of the probe. The factor of an epoch multiplies the learning rates; see `rate_factor`."""
    return Trainer(
        job.probe,
        optimizer,
        lambda step: factor(step // len(loader)),
        loader=loader,
        device=job.session.device,
        autocast=job.session.autocast,
        sync_bn_group=0 if job.probe.shares_statistics else 1,
        log_every=log_every,
        cheaper="a smaller --batch-size, or --fast, which computes the features once",
    )


def ten_crops(session: Session) -> Views:
    """Return the evaluation views of ten crops.

    Raises:
        InputError: if the data are no photographs.
    """
    if not isinstance(session.views, PhotoViews):
        raise InputError(f"--ten-crops is for photographs, but --data is {session.source.data}: give --no-ten-crops")
    return TenCrops(session.views)


def training_views(job: Job, *, augment: bool = True) -> Views:
    """Return the training views: a random resized crop with a flip, as in both protocols, or the evaluation view.

    The crops have the size and the normalisation of the evaluation view.

    The protocols do not cover digits, which have their own augmented views.
    """
    session = job.session
    if not augment:
        return Unaugmented(session.views)
    size = session.view_size
    settings = ViewSettings(
        global_crops_number=1,
        local_crops_number=0,
        global_crops_size=size,
        local_crops_size=size,
        global_crops_scale=CROP_SHARE,
        local_crops_scale=CROP_SHARE,
        augment="crop_flip",
    )
    return build_views(session.source.data, job.train, settings, evaluation=session.view)


class Unaugmented(Views):
    """Views for training that consist of the evaluation view of other views."""

    def __init__(self, central: Views):
        self.central = central

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [self.central.single(images)]

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [torch.stack([self.central.single_cut(image) for image in images])]

    def finish(self, crops: list[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [self.central.single_finish(crop) for crop in crops]


def _migrated(state: dict[str, Any]) -> dict[str, Any]:
    """Convert the checkpoint of a probe to the current format. Until November 2026 a second trainer wrote another format."""
    if "totals" in state:
        return state
    loss, images = (state["total"] / distributed.world_size()).unbind()
    totals = {"loss_sum": loss, "images": images, "loss": loss / images.clamp(min=1) * state["done"]}
    moved = {"totals": totals if state["done"] else {}, "seconds": 0.0, "generator": torch.get_rng_state()}
    return {**state, **moved, "cuda_generator": None}


def score(
    probe: nn.Module,
    batches: Iterable[tuple[Tensor, np.ndarray]],
    labels: Tensor,
    *,
    autocast: torch.dtype | None = None,
) -> tuple[float, float]:
    """Return the top-1 and top-5 accuracy of one linear classifier; see `accuracies`."""
    ((top1, top5),) = accuracies(probe, batches, labels, autocast=autocast)
    return top1, top5


@torch.no_grad()
def accuracies(
    probe: nn.Module,
    batches: Iterable[tuple[Tensor, np.ndarray]],
    labels: Tensor,
    *,
    autocast: torch.dtype | None = None,
) -> list[tuple[float, float]]:
    """Return the top-1 and top-5 accuracy of each classifier in evaluation mode, as fractions of all N images.

    Args:
        probe: returns logits, (B, C), or those of several classifiers, (L, B, C).
        batches: this rank's share of the images and their indices; each image is on exactly one rank. An image is
            (3, H, W), or consists of several crops, (crops, 3, H, W), whose logits are averaged.
        labels: (N,) label of every image.
        autocast: dtype of the network in mixed precision, or None.
    """
    was_training = probe.training
    probe.eval()
    hits = torch.zeros(len(getattr(probe, "layers", ())) or 1, 2, dtype=torch.long)
    for images, indices in batches:
        crops = images.shape[1] if images.dim() == 5 else 1
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = probe(images.flatten(0, 1) if images.dim() == 5 else images)
        logits = (logits if logits.dim() == 3 else logits[None]).unflatten(1, (-1, crops)).mean(dim=2)
        wanted = labels[torch.from_numpy(indices)].to(logits.device)
        hits = hits + torch.stack([top_hits(each, wanted) for each in logits]).cpu()
    probe.train(was_training)
    return [(first, five) for first, five in (distributed.sum_over_ranks(hits) / len(labels)).tolist()]


# --------------------------------------------------------------------------------------------------------------------
# results


def write(job: Job, found: dict[str, Any], *, protocol: str, options: dict[str, Any]) -> None:
    """Write lincls_eval.json and print tables of it."""
    session, data = job.session, job.session.source.data
    result = {
        **session.facts(),
        "train_images": len(job.train),
        "test_images": len(job.test),
        "classes": len(job.train.classes),
        "backbone_sha256": job.probe.before,
        "features": job.probe.num_features,
        "protocol": protocol,
        "options": options,
        **found,
    }
    make_folder(session.folder)
    write_json(session.folder / "lincls_eval.json", result)
    if "settings" in found:
        rows = [
            [f"lr {row['lr']:g}, weight decay {row['weight_decay']:g}{' (chosen)' if row is found['chosen'] else ''}"]
            + [percent(row["top1"]), percent(row["top5"])]
            for row in found["settings"]
        ]
        print(f"{printable(data)}, {len(job.train):,} training images, {found['held_out_images']:,} of them held out")
        print(table(["held out", "TOP1", "TOP5"], rows))
        print(table(["test", "TOP1", "TOP5"], [["chosen", percent(found["top1"]), percent(found["top5"])]]))
        print(f"wrote lincls_eval.json to {printable(session.folder)}")
        return
    rows = [
        [f"best epoch, {found['best_epoch']}", percent(found["top1"]), percent(found["top5"])],
        [f"last epoch, {found['history'][-1]['epoch']}", percent(found["last_top1"]), percent(found["last_top5"])],
    ]
    print(f"{printable(data)}, test split, {len(job.test):,} images, {len(job.test.classes)} classes")
    print(table(["", "TOP1", "TOP5"], rows))
    if "layers" in found:
        print(table(["best epoch", "TOP1"], [[name, percent(top1)] for name, top1 in found["layers"].items()]))
    print(f"wrote lincls_eval.json, {NAME}.pt and {BEST} to {printable(session.folder)}")


def describe(options: LinclsEvalOptions) -> str:
    """Return a description of the protocol."""
    share = f"{100 * options.train_share:g} % of the labels, " if options.train_share < 1 else ""
    share = f"labels of {options.train_list}, " if options.train_list else share
    window = options.pool_window
    pooling = f"means over windows of {window} × {window} places, " if window else ""
    pooling += "batch-normalised, " if options.feature_bn else ""
    if options.fast:
        return (
            f"linear classifier on standardised features of the central view, {pooling}{share}{len(options.fast_lrs)} learning rates and "
            f"{len(options.fast_weight_decays)} weight decays, the best on {100 * options.held_out:g} % of the training images, "
            f"fitted again on all of them; sgd, batch {options.batch_size}, {options.epochs} epochs, cosine"
        )
    what = "linear classifier on the frozen backbone"
    if options.layers:
        what = "linear classifiers on the five convolutions of the frozen backbone, the best of them"
    if options.finetune:
        statistics = "the batch's" if options.train_bn else "the learned"
        rate = options.lr if options.backbone_lr is None else options.backbone_lr
        what = f"fine-tuning of the whole network (backbone lr {rate:g}, {statistics} batch-norm statistics)"
    return (
        f"{what}, {pooling}{share}preset {options.preset}: {options.optimizer}, batch {options.batch_size}, lr {options.lr:g}, "
        f"weight decay {options.weight_decay:g}, momentum {options.momentum:g}, {options.epochs} epochs, {options.schedule} "
        f"per epoch, {'augmented' if options.crop_flip else 'unaugmented'}; test: "
        f"{'mean logits of ten crops' if options.ten_crops else 'central view'}, best epoch on the test split"
    )

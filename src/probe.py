"""What lincls_eval.py does, piece by piece: open, fit a linear classifier in one of two ways, write. The protocols, and what
they are built of, are in src/evaluation/linear.py."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import checkpoint, distributed
from .config import VIEW_SETTINGS, LinclsEvalOptions, as_plain, parse_lincls_eval
from .data.datasets import Images, check_channels
from .data.loaders import TrainLoader, Views, single_views
from .data.subsets import draw_share, read_list
from .data.views import build_views
from .evaluation import linear
from .features import extract
from .logs import Progress, percent, table, write_json
from .models.backbones import pool_windows
from .pretrained import load_backbone
from .run import make_folder, results_folder
from .trainer import Interrupted, StopRequest


@dataclass(frozen=True)
class Job:
    """What was asked for, opened: a backbone with a fresh linear layer on its device, and labelled images.

    Attributes:
        trained: the configuration of the checkpoint.
        epoch: how many epochs it had, where it says so.
        before: fingerprint of the backbone.
        central: the evaluation view; views: what the layer is trained on.
    """

    options: LinclsEvalOptions
    trained: dict
    epoch: int | None
    train: Images
    test: Images
    probe: linear.LinearProbe
    before: str
    central: Views
    views: Views
    folder: Path
    device: torch.device
    autocast: torch.dtype | None


def open_job(options: LinclsEvalOptions) -> Job:
    """Open the checkpoint and the data. What can be wrong with them is found out here, before any image is read.

    Raises:
        InputError: if something is missing or does not fit together.
    """
    backbone, state = load_backbone(options.checkpoint, options.arch)
    trained = state["config"]
    options = parse_lincls_eval(trained=trained)  # with the data it was trained on, unless other data is given
    train, test = linear.open_labelled(options.data, options.data_root, options.download, options.subset_file)
    check_channels(train, options.data, trained["channels"])
    num_features = backbone.width
    if options.pool_window:
        num_features = pool_windows(backbone, options.pool_window, train.channels, trained["global_crops_size"])
    if options.train_list:
        train = linear.keep_rows(train, read_list(train, options.train_list, "--train-list"))
    elif options.train_share < 1:
        train = linear.keep_rows(train, draw_share(train.labels.numpy(), options.train_share, options.seed))
    folder = results_folder(options.checkpoint, options.output_dir)
    before = linear.fingerprint(backbone)

    device = distributed.start(options.device)
    torch.manual_seed(options.seed)
    central = build_views(options.data, test, *(trained[name] for name in VIEW_SETTINGS))
    views = linear.training_views(options.data, train, trained["global_crops_size"], central, options.crop_flip)
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    how = (options.finetune, options.train_bn, num_features, options.feature_bn)
    probe = linear.LinearProbe(backbone, len(train.classes), *how).to(device, memory_format=layout)
    return Job(
        *(options, trained, state.get("epoch"), train, test, probe, before, central, views, folder, device, autocast)
    )


def search(job: Job) -> dict | None:
    """The quick way: features once, then many settings at once. Returns what was found, on rank 0 alone."""
    options, probe = job.options, job.probe
    how = (options.val_batch_size, job.device, options.workers, job.autocast, options.features_cache)
    features = [
        extract(probe, data, split, job.central, "backbone", *how).to(job.device)
        for split, data in (("train", job.train), ("test", job.test))
    ]
    if not distributed.is_main():
        return None
    recipe = {name: getattr(options, name) for name in ("held_out", "epochs", "batch_size", "momentum", "seed")}
    found = linear.search(
        *(features[0], job.train.labels, features[1], job.test.labels, len(job.train.classes)),
        *(options.fast_lrs, options.fast_weight_decays),
        **recipe,
    )
    linear.check_unchanged(probe.backbone, job.before)
    return found


def build_trainer(job: Job, stop_request: StopRequest) -> linear.ProbeTrainer:
    """Optimiser, rates and batches as the options say, around the probe on all ranks."""
    options = job.options
    optimizer = linear.build_probe_optimizer(
        *(job.probe, options.optimizer, options.lr, options.backbone_lr),
        *(options.momentum, options.weight_decay, options.nesterov),
    )
    factor = linear.rate_factor(options.schedule, options.epochs, options.decay_epochs, options.gamma)
    loader = TrainLoader(
        *(job.train, job.views, options.batch_size, options.seed, job.device, options.workers), keep_last=True
    )
    wrapped = distributed.parallel(job.probe, job.device, sync_bn_group=0 if job.probe.shares_statistics else 1)
    how = (job.device, job.autocast, options.log_every, stop_request)
    return linear.ProbeTrainer(wrapped, optimizer, factor, loader, job.train.labels, *how)


def train(job: Job) -> dict:
    """The published way: an epoch, a look at the test split, the next epoch. Goes on with a probe found in the folder.

    Returns:
        Accuracies of the best epoch on the test split, which the papers report, and of the last; and the history.

    Raises:
        SystemExit: 128 + the signal, saved, when told to stop.
    """
    options, device, folder = job.options, job.device, job.folder
    settings = as_plain(options) | {
        **{name: job.trained[name] for name in ("arch", "patch_size", "channels", "global_crops_size")},
        "method": "linear",
        "backbone": job.before,
        "train_images": len(job.train),
    }
    found = linear.find_probe(folder, settings, options.fresh)
    stop_request = StopRequest()
    trainer = build_trainer(job, stop_request)
    loader = trainer.loader
    history, best = [], None
    if found:
        trainer.load_state_dict(found)
        history, best = found["history"], found["best"]
    if distributed.is_main():
        make_folder(folder)

    def save(name: str) -> None:
        content = {"config": settings, "history": history, "best": best, **trainer.state_dict()}
        if distributed.is_main():
            checkpoint.save(folder / name, content)
        distributed.barrier()

    total = options.epochs * loader.images
    seen = trainer.epoch * loader.images + trainer.done * loader.batch_size
    progress = Progress(total, seen, enabled=distributed.is_main())
    progress.say(describe(options))
    progress.say(
        f"{len(job.train):,} training images of {len(job.train.classes)} classes, {len(job.test):,} test images; {len(loader)} "
        f"steps per epoch on {distributed.world_size()} x {device.type}; writing to {folder}"
    )
    if found:
        progress.say(
            f"going on from epoch {trainer.epoch + 1}, step {trainer.done + 1}"
            if trainer.epoch < options.epochs
            else "finished before"
        )
    stop_request.listen()
    try:
        while trainer.epoch < options.epochs:
            summary = trainer.train_epoch(progress)
            if not options.finetune and trainer.epoch in (1, options.epochs):
                linear.check_unchanged(job.probe.backbone, job.before)
            batches = single_views(job.test, job.central, options.val_batch_size, device, options.workers)
            summary["top1"], summary["top5"] = linear.score(job.probe, batches, job.test.labels, job.autocast)
            history.append(summary)
            if best is None or summary["top1"] > best["top1"]:
                best = summary
                save(linear.BEST)
            save(linear.LAST)
            if trainer.epoch % max(options.epochs // 10, 1) == 0:
                progress.say(
                    f"epoch {trainer.epoch}  loss {summary['loss']:.4f}  top-1 {percent(summary['top1'])}  "
                    f"top-5 {percent(summary['top5'])}"
                )
    except Interrupted as stopped:
        save(linear.LAST)
        progress.say(f"{stopped}: saved {folder / linear.LAST}; the same command goes on from there")
        raise SystemExit(128 + stopped.signal) from None
    finally:
        loader.close()
        progress.close()
    last = history[-1]
    return {
        "top1": best["top1"],
        "top5": best["top5"],
        "best_epoch": best["epoch"],
        "last_top1": last["top1"],
        "last_top5": last["top5"],
        "history": history,
    }


def write(job: Job, found: dict) -> None:
    """Write lincls_eval.json and print its tables."""
    options, trained = job.options, job.trained
    result = {
        "checkpoint": str(options.checkpoint),
        "method": trained["method"],
        "arch": trained["arch"],
        "epochs": job.epoch,
        "seed": trained["seed"],
        "data": options.data,
        "subset_file": options.subset_file,
        "train_images": len(job.train),
        "test_images": len(job.test),
        "classes": len(job.train.classes),
        "backbone_sha256": job.before,
        "features": job.probe.fc.in_features,
        "protocol": describe(options),
        "options": as_plain(options),
        **found,
    }
    make_folder(job.folder)
    write_json(job.folder / "lincls_eval.json", result)
    if options.fast:
        rows = [
            [f"lr {row['lr']:g}, weight decay {row['weight_decay']:g}" + " (chosen)" * (row is found["chosen"])]
            + [percent(row["top1"]), percent(row["top5"])]
            for row in found["settings"]
        ]
        print(f"{options.data}, {len(job.train):,} training images, {found['held_out_images']:,} of them held out")
        print(table(["held out", "TOP1", "TOP5"], rows))
        print(table(["test", "TOP1", "TOP5"], [["chosen", percent(found["top1"]), percent(found["top5"])]]))
        print(f"wrote lincls_eval.json to {job.folder}")
        return
    rows = [
        [f"best epoch, {found['best_epoch']}", percent(found["top1"]), percent(found["top5"])],
        [f"last epoch, {found['history'][-1]['epoch']}", percent(found["last_top1"]), percent(found["last_top5"])],
    ]
    print(f"{options.data}, test split, {len(job.test):,} images, {len(job.test.classes)} classes")
    print(table(["", "TOP1", "TOP5"], rows))
    print(f"wrote lincls_eval.json, {linear.LAST} and {linear.BEST} to {job.folder}")


def describe(options: LinclsEvalOptions) -> str:
    """The protocol in one sentence."""
    share = f"{100 * options.train_share:g} % of the labels, " if options.train_share < 1 else ""
    share = f"labels of {options.train_list}, " if options.train_list else share
    window = options.pool_window
    pooling = f"means over windows of {window} × {window} places, " if window else ""
    pooling += "batch-normalised, " * options.feature_bn
    if options.fast:
        return (
            f"linear classifier on standardised features of the central view, {pooling}{share}{len(options.fast_lrs)} learning rates and "
            f"{len(options.fast_weight_decays)} weight decays, the best on {100 * options.held_out:g} % of the training images, "
            f"fitted again on all of them; sgd, batch {options.batch_size}, {options.epochs} epochs, cosine"
        )
    what = "linear classifier on the frozen backbone"
    if options.finetune:
        statistics = "the batch's" if options.train_bn else "the learned"
        rate = options.lr if options.backbone_lr is None else options.backbone_lr
        what = f"fine-tuning of the whole network (backbone lr {rate:g}, {statistics} batch-norm statistics)"
    return (
        f"{what}, {pooling}{share}preset {options.preset}: {options.optimizer}, batch {options.batch_size}, lr {options.lr:g}, "
        f"weight decay {options.weight_decay:g}, momentum {options.momentum:g}, {options.epochs} epochs, {options.schedule} "
        f"per epoch, {'augmented' if options.crop_flip else 'unaugmented'}; test: central view, best epoch on the test split"
    )

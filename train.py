"""Train a network without labels.

    python train.py                                                  # handwritten digits on a CPU, about a minute
    python train.py --data ~/pictures                                # any folder of images; the recipe follows the images
    torchrun --standalone --nproc_per_node=8 train.py --data "$IMAGENET" --preset published     # on one machine
    srun python train.py --data "$IMAGENET" --preset published       # on a Slurm cluster, one task per GPU

`python train.py --method NAME --help` lists all flags. A run that is stopped (Ctrl-C, SIGTERM) saves a checkpoint first.
The same command with the same --output-dir continues from that step. --epochs may be raised when a run is finished.
"""

from src.signals import end_with_one_line

if __name__ == "__main__":
    end_with_one_line()  # the imports below take a while

import os
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import config
from src.errors import InputError, printable, run_script

if TYPE_CHECKING:  # these modules import torch
    import torch
    from torch.optim import Optimizer

    from src.data.base import Views
    from src.data.datasets import Images
    from src.data.loaders import TrainLoader
    from src.logs import Progress
    from src.methods import Method
    from src.mining import Neighbors
    from src.run import Run
    from src.trainer import Trainer


def main() -> None:
    notes: list[str] = []  # what the recipe chose, and why
    options, name, knobs = config.parse_train(survey=look_at, notes=notes, estimate=estimate)

    # The import of torch takes seconds. It comes after the flags are checked, so that --help and errors appear at once.
    import torch

    from src import distributed
    from src.evaluation.clustering import evaluate, nearest_score
    from src.logs import Progress
    from src.machine import keep_freed_memory, resolve_precision
    from src.run import Run, choose_folder, continuing_command, find_checkpoint

    device = distributed.start(options.device)
    distributed.check_sync_bn_group(options.sync_bn_group)
    torch.manual_seed(options.seed)
    if device.type == "cpu":
        keep_freed_memory()

    # data: a method sees views and indices; labels are for monitoring
    data, held_out, fingerprint = open_images(options, notes)
    data, selection = hold_out(options, knobs, data)
    views = open_views(options, data)
    loader = build_loader(options, data, views, device=device)
    loader.held_out = selection
    knobs = config.fit_steps(knobs, steps=options.epochs * len(loader), given=config.flags_in(sys.argv), notes=notes)
    check_method(name, knobs, options, loader=loader)

    # the folder of this run, and the checkpoint that may be in it
    settings = {"method": name, **config.as_plain(options), **config.as_plain(knobs), "channels": data.channels}
    settings |= {"data": config.stored_path(options.data), "data_fingerprint": fingerprint}
    title = f"{name}_{Path(options.data).name}"
    folder = distributed.on_main(lambda: choose_folder(options.output_dir, fresh=options.fresh, name=title))
    found = find_checkpoint(folder, settings, irrelevant=options.free_to_change())
    mined = None if found else read_neighbors(options, knobs, loader=loader)
    settings["precision"] = resolve_precision(options.precision, device, found)

    # method: backbone, heads, objective, and its state between steps; optimisation
    trainer, started = build_trainer(options, knobs, settings, loader=loader, from_scratch=not found)
    autocast = trainer.autocast
    if mined:
        trainer.method.receive_neighbors(*mined)

    # run
    again = continuing_command(folder, output_dir=options.output_dir, fresh=options.fresh)
    run = Run(folder, settings, found, save_every=options.save_every, continuation=again)
    if found:
        trainer.load_state_dict(found)
    progress = Progress(options.epochs * loader.images, trainer.images, enabled=distributed.is_main())
    announce(progress, run, trainer, notes=[*notes, started])

    def score(summary: dict) -> dict:
        if held_out is None or (trainer.epoch % options.eval_every and trainer.epoch < options.epochs):
            return {}
        how: dict[str, Any] = {"batch_size": options.batch_size, "device": device, "autocast": autocast}
        if "classifier" not in summary:
            return nearest_score(trainer.method, data, held_out, views=views, **how)
        return evaluate(trainer.method, held_out, views, classifier=summary["classifier"], **how)

    run.train(trainer, options.epochs, progress, score=score)
    progress.say(trainer.method.report(run.history[-1]))
    progress.say("\n" + total_cost(name, run.history))
    checkpoint = printable(shlex.quote(str(run.last)))
    if run.best.exists():
        progress.say(
            f"{printable(run.best)} holds the epoch with the lowest loss without labels on {selected_on(knobs)}"
        )
    progress.say(f"\nsaved {printable(run.last)}; score it: python cls_eval.py --checkpoint {checkpoint}")
    distributed.stop()


def check_method(name: str, knobs: Any, options: config.TrainOptions, *, loader: "TrainLoader") -> None:
    """Raise InputError if the method does not fit the data, its files or the rest of the command line."""
    from src.data.training import TrainingData
    from src.methods import METHODS

    method = METHODS[name]
    if method.earlier_stage and not options.pretrained:
        advice = first_stage(options, method.earlier_stage)
        raise InputError(f"--method {name} continues a run of {method.earlier_stage}: {advice}")
    method.check_data(
        knobs,
        batch_size=options.batch_size,
        num_images=len(loader.data),
        num_views=options.num_views,
        steps=options.epochs * len(loader),
    )
    method.check_files(knobs, TrainingData(loader))


def build_loader(
    options: config.TrainOptions, data: "Images", views: "Views", *, device: "torch.device", batch_size: int = 0
) -> "TrainLoader":
    """Return the batches of training. `batch_size` replaces --batch-size."""
    from src.data.loaders import TrainLoader

    return TrainLoader(
        data,
        views,
        batch_size=batch_size or options.batch_size,
        seed=options.seed,
        device=device,
        workers=options.workers,
        decode_on_device=options.decode_on_gpu,
        epochs=options.epochs,
    )


def build_trainer(
    options: config.TrainOptions, knobs: Any, settings: dict[str, Any], *, loader: "TrainLoader", from_scratch: bool
) -> "tuple[Trainer, str]":
    """Return the trainer, and a line about the initial weights of --pretrained or "".

    Args:
        knobs: options of the method.
        settings: the configuration of the run, with the method, the channels and the precision.
        from_scratch: load the initial weights; False: a checkpoint replaces them.
    """
    import torch

    from src.loading import start_from
    from src.methods import build_method
    from src.models.memory import checkpoint_activations
    from src.optim import freeze
    from src.trainer import Trainer

    name = settings["method"]
    method = build_method(name, knobs, settings)
    started = ""
    if options.pretrained and from_scratch:
        started = start_from(method, name, options.pretrained, arch=options.arch)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    method = method.to(loader.device).to(memory_format=layout)
    freeze(method, options.freeze)
    if options.checkpoint_activations:
        checkpoint_activations(method.backbone)
    if options.compile:
        method.backbone.compile(dynamic=False)  # compiles one graph per size of the views
    torch.backends.cudnn.benchmark = True  # cuDNN searches its fastest kernels, as the sizes do not change

    optimizer, lr = build_optimization(method, options, steps_per_epoch=len(loader))
    trainer = Trainer(
        method,
        optimizer,
        lr,
        loader=loader,
        device=loader.device,
        labels=loader.data.labels,
        autocast=None if settings["precision"] == "float32" else getattr(torch, settings["precision"]),
        accumulate=options.accumulate,
        clip_grad=options.clip_grad,
        sync_bn_group=options.sync_bn_group,
        log_every=options.log_every,
        cheaper=cheaper_flags(settings),
    )
    return trainer, started


def build_optimization(
    method: "Method", options: config.TrainOptions, *, steps_per_epoch: int
) -> "tuple[Optimizer, Callable[[int], float]]":
    """Return the optimiser and the learning rate as a function of the step: linear warm-up, then a cosine or drops."""
    from src.optim import build_optimizer, parameter_groups, warmup_cosine, warmup_drops

    groups = parameter_groups(
        method, options.weight_decay, bias_decay=options.bias_decay, backbone_decay=options.backbone_weight_decay
    )
    optimizer = build_optimizer(options.optimizer, groups, lr=options.lr, momentum=options.momentum)
    warmup: dict[str, Any] = {"warmup_start": options.warmup_start, "warmup_epochs": options.warmup_epochs}
    if options.lr_drops:
        return optimizer, warmup_drops(options.lr, options.lr_drops, **warmup, steps_per_epoch=steps_per_epoch)
    lr = warmup_cosine(options.lr, options.final_lr, **warmup, epochs=options.epochs, steps_per_epoch=steps_per_epoch)
    return optimizer, lr


def cheaper_flags(settings: dict[str, Any]) -> str:
    """Return the flags that make a step cheaper, with their values."""
    names = ["batch_size", "global_crops_size", *["local_crops_number"] * bool(settings["local_crops_number"]), "arch"]
    listed = [f"{config.flag(name)} (now {settings[name]})" for name in names]
    line = f"smaller values of {', '.join(listed[:-1])}, or a smaller {listed[-1]}"
    return line + (", or --precision auto" if settings["precision"] == "float32" else "")


def estimate(options: config.TrainOptions, name: str, knobs: Any) -> str:
    """Return the operations and the time of the run in words, estimated from steps on some of its images."""
    if options.data not in config.BUILT_IN_DATA and not Path(options.data).exists():
        return f"none, because --data {options.data} does not exist"  # known without torch

    import numpy as np
    import torch

    from src.errors import RunError
    from src.estimate import estimate
    from src.machine import keep_freed_memory, resolve_precision

    if any(name in os.environ for name in ("WORLD_SIZE", "SLURM_STEP_ID")):
        return "none with a launcher: run the command without it"
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    options = replace(options, in_memory=False, keep_decoded=0.0, eval_every=0, log_every=1)
    try:
        data, *_ = open_images(options, [])
        views = open_views(options, data)
        settings = {"method": name, **config.as_plain(options), **config.as_plain(knobs), "channels": data.channels}
        settings["precision"] = resolve_precision(options.precision, device)

        def build(batch: int) -> "Trainer":
            rows = np.linspace(0, len(data) - 1, 2 * batch).astype(int)
            some = data.keep(rows, data.labels[torch.from_numpy(rows)].numpy(), data.classes)
            loader = build_loader(options, some, views, device=device, batch_size=batch)
            return build_trainer(options, knobs, settings, loader=loader, from_scratch=True)[0]

        return str(estimate(build, images=len(data), batch_size=options.batch_size, epochs=options.epochs))
    except (InputError, RunError) as error:
        return f"none, because a few images cannot be trained on: {error}"


def look_at(folder: str) -> config.Survey:
    """Return the number and the size of the images of a folder, and whether there is a GPU."""
    import torch

    from src.data.datasets import open_data
    from src.data.survey import survey

    return survey(open_data(folder, "train"), gpu=torch.cuda.is_available())


def open_images(options: config.TrainOptions, notes: list[str]) -> "tuple[Images, Images | None, str]":
    """Return the training images, with --eval-every also the images of the test split, and the fingerprint of the former.

    The function adds a line about files that are not read to `notes`.
    """
    from src import distributed, fingerprints
    from src.data.datasets import ImageFiles, open_split
    from src.data.formats import describe_others

    data = open_split(options, "train", upright=options.upright)
    held_out = open_split(options, "test", upright=options.upright) if options.eval_every else None
    fingerprint = distributed.on_main(lambda: fingerprints.of_data(data))
    if isinstance(data, ImageFiles):
        notes.append(describe_others(data.others))
    if options.keep_decoded and isinstance(data, ImageFiles):  # the flag is refused for other data
        data = data.keeping(int(options.keep_decoded * 2**30))
    if options.in_memory and isinstance(data, ImageFiles):
        try:
            held_out = held_out.in_memory() if isinstance(held_out, ImageFiles) else held_out
            return data.in_memory(), held_out, fingerprint
        except InputError as error:  # training from files replaces damaged ones
            if distributed.is_main():
                print(f"{printable(error)}; until then the files are decoded in every epoch", flush=True)
    return data, held_out, fingerprint


def hold_out(options: config.TrainOptions, knobs: Any, data: "Images") -> "tuple[Images, Images | None]":
    """Return the images to train on, and those on which the method selects its model, if it has the option `select_on`."""
    share = getattr(knobs, "select_share", 0.0)
    if not share:
        return data, None
    from src.data.datasets import ImageFiles, divide, open_split

    if knobs.select_on == "train":
        return divide(data, share)
    test = open_split(options, "test", upright=options.upright)
    return data, test.in_memory() if options.in_memory and isinstance(test, ImageFiles) else test


def read_neighbors(options: config.TrainOptions, knobs: Any, *, loader: "TrainLoader") -> "Neighbors | None":
    """Return neighbours from the file that `python -m src.mining` wrote; None: the method has no use for it, or there is none."""
    if not hasattr(knobs, "neighbors_file"):
        return None
    from src import mining

    file = Path(knobs.neighbors_file) if knobs.neighbors_file else mining.beside(options.pretrained)
    if not knobs.neighbors_file and not file.exists():
        return None
    wanted = mining.expected(options.pretrained, loader.data, loader.held_out, layer=knobs.mine_from)
    return mining.read(file, wanted, neighbors=knobs.neighbors, select_neighbors=knobs.select_neighbors)


def selected_on(knobs: Any) -> str:
    """Return on which images a method selects its model, for messages."""
    return "the test images" if knobs.select_on == "test" else "held-out training images"


def first_stage(options: config.TrainOptions, earlier: str) -> str:
    """Return the advice to run an earlier stage first, with its command."""
    words = ["python", "train.py", "--method", earlier, "--data", options.data]
    return f"run that step first, `{shlex.join(words)}`, and pass its folder with --pretrained"


def open_views(options: config.TrainOptions, data: "Images") -> "Views":
    """Return the views of training, and the evaluation view for --eval-every."""
    from src.data.views import build_views

    return build_views(
        options.data,
        data,
        options.views,
        evaluation=options.evaluation_view,
        reference=options.reference_views,
        compiled=options.compile,
    )


def total_cost(name: str, history: list[dict[str, Any]]) -> str:
    """Return a table of what the run has cost. Epochs of earlier versions of the code have no operations."""
    from src.logs import clock, table

    last = history[-1]
    pflop = f"{last['total_pflop']:.3g}" if "total_pflop" in last else ""
    per_epoch = f"{last['pflop']:.3g}" if "pflop" in last else ""
    hours = clock(sum(epoch.get("seconds", 0.0) for epoch in history))
    header = ["whole run", "epochs", "training time", "PFLOP", "PFLOP of the last epoch"]
    return table(header, [[name, str(len(history)), hours, pflop, per_epoch]])


def announce(progress: "Progress", run: "Run", trainer: "Trainer", *, notes: list[str]) -> None:
    """Log the command, the code revision, the configuration, the sizes of this run, and the notes; record its start."""
    from src import distributed
    from src.data.datasets import ImageFiles
    from src.models.backbones import count_parameters
    from src.provenance import record_start

    loader, device, settings = trainer.loader, trainer.device, run.config
    if trainer.epoch < settings["epochs"]:
        record_start(run.folder, loader.data, revision=run.revision, step=trainer.step, device=device)
    progress.say(f"command: {printable(shlex.join(sys.argv))}\nrevision: {run.revision}\n{describe(settings)}")
    progress.say(
        f"{len(loader.data):,} images, {len(loader)} steps per epoch of {loader.per_rank} images on each of "
        f"{distributed.world_size()} x {device.type}; {count_parameters(trainer.method):,} parameters; "
        f"writing to {printable(run.folder)}"
    )
    if isinstance(loader.data, ImageFiles) and loader.data.classes:
        progress.say(
            f"{len(loader.data.classes)} class folders give labels, which only monitor the training; --unlabelled ignores them"
        )
    for note in filter(None, notes):
        progress.say(printable(note))
    if trainer.epoch >= settings["epochs"]:
        progress.say(f"the run is finished; --epochs above {settings['epochs']} continues it")
    elif trainer.step:
        progress.say(f"resuming from step {trainer.step} (epoch {trainer.epoch + 1} of {settings['epochs']})")
    if run.extended and trainer.epoch == run.extended[-1] and not trainer.done:
        before, now = trainer.optimizer.param_groups[0]["lr"], trainer.lr(trainer.step)
        progress.say(
            f"the finished run of {run.extended[-1]} epochs gets {settings['epochs']}: the learning rate follows the schedule of "
            f"{settings['epochs']} epochs from here on and changes from {before:.3g} to {now:.3g}. The result is not that of "
            f"a run that began with --epochs {settings['epochs']}"
        )
    if device.type == "cpu" and settings["precision"] == "float16":
        progress.say("--precision float16 is emulated on a CPU, which makes it many times slower: use float32")


def describe(settings: dict) -> str:
    """Return the resolved configuration as text, several options per line."""
    words = [f"{name}={printable(value)}" for name, value in settings.items() if value != ""]
    return textwrap.fill("  ".join(words), width=118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    run_script(main)

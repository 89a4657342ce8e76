"""Train a network without labels.

    python train.py                                                  # handwritten digits on a CPU, about a minute
    torchrun --standalone --nproc_per_node=8 train.py --data "$IMAGENET"       # the published recipe on one machine
    srun python train.py --data "$IMAGENET"                          # on a Slurm cluster, one task per GPU

`python train.py --method NAME --help` lists all flags. A run that is stopped (Ctrl-C, SIGTERM) saves a checkpoint first.
The same command with the same --output-dir continues from that step.
"""

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from src import config
from src.errors import run_script

if TYPE_CHECKING:  # these modules import torch
    from src.data.datasets import Images
    from src.logs import Progress
    from src.run import Run
    from src.trainer import Trainer


def main() -> None:
    options, name, knobs = config.parse_train()

    # The import of torch takes seconds. It comes after the flags are checked, so that --help and errors appear at once.
    import torch

    from src import distributed
    from src.data.loaders import TrainLoader
    from src.data.views import build_views
    from src.evaluation.clustering import evaluate
    from src.loading import start_from
    from src.logs import Progress
    from src.machine import keep_freed_memory, resolve_precision
    from src.methods import METHODS, build_method
    from src.models.memory import checkpoint_activations
    from src.optim import build_optimizer, freeze, parameter_groups, warmup_cosine
    from src.run import Run, choose_folder, find_checkpoint
    from src.trainer import Trainer

    device = distributed.start(options.device)
    distributed.check_sync_bn_group(options.sync_bn_group)
    torch.manual_seed(options.seed)
    keep_freed_memory()

    # data: a method sees views and indices; labels are for monitoring
    data, held_out = open_images(options)
    views = build_views(options.data, data, options.views, reference=options.reference_views, compiled=options.compile)
    loader = TrainLoader(
        data,
        views,
        batch_size=options.batch_size,
        seed=options.seed,
        device=device,
        workers=options.workers,
        decode_on_device=options.decode_on_gpu,
    )
    METHODS[name].check_data(
        knobs,
        batch_size=options.batch_size,
        num_images=len(data),
        num_views=options.num_views,
        steps=options.epochs * len(loader),
    )

    # the folder of this run, and the checkpoint that may be in it
    settings = {"method": name, **config.as_plain(options), **config.as_plain(knobs), "channels": data.channels}
    title = f"{name}_{Path(options.data).name}"
    folder = distributed.from_main(choose_folder(options.output_dir, fresh=options.fresh, name=title))
    found = find_checkpoint(folder, settings, irrelevant=["precision"] if options.precision == "auto" else [])
    settings["precision"] = resolve_precision(options.precision, device, found)

    # method: backbone, heads, objective, and its state between steps
    method = build_method(name, knobs, settings)
    started = start_from(method, name, options.pretrained) if options.pretrained and not found else ""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    method = method.to(device).to(memory_format=layout)
    freeze(method, options.freeze)
    if options.checkpoint_activations:
        checkpoint_activations(method.backbone)
    if options.compile:
        method.backbone.compile(dynamic=False)  # compiles one graph per size of the views
    torch.backends.cudnn.benchmark = True  # cuDNN searches its fastest kernels, as the sizes do not change

    # optimisation
    groups = parameter_groups(
        method, options.weight_decay, bias_decay=options.bias_decay, backbone_decay=options.backbone_weight_decay
    )
    optimizer = build_optimizer(options.optimizer, groups, lr=options.lr, momentum=options.momentum)
    lr = warmup_cosine(
        options.lr,
        options.final_lr,
        warmup_start=options.warmup_start,
        warmup_epochs=options.warmup_epochs,
        epochs=options.epochs,
        steps_per_epoch=len(loader),
    )
    autocast = None if settings["precision"] == "float32" else getattr(torch, settings["precision"])
    trainer = Trainer(
        method,
        optimizer,
        lr,
        loader=loader,
        device=device,
        labels=data.labels,
        autocast=autocast,
        accumulate=options.accumulate,
        clip_grad=options.clip_grad,
        sync_bn_group=options.sync_bn_group,
        log_every=options.log_every,
    )

    # run
    run = Run(folder, settings, found, save_every=options.save_every)
    if found:
        trainer.load_state_dict(found)
    progress = Progress(options.epochs * loader.images, trainer.images, enabled=distributed.is_main())
    announce(progress, run, trainer, started=started)

    def score(summary: dict) -> dict:
        if held_out is None or (trainer.epoch % options.eval_every and trainer.epoch < options.epochs):
            return {}
        k = summary["classifier"]
        return evaluate(
            method, held_out, views, batch_size=options.batch_size, device=device, classifier=k, autocast=autocast
        )

    run.train(trainer, options.epochs, progress, score=score)
    progress.say(method.report(run.history[-1]))
    progress.say(f"\nsaved {run.last}; score it: python cls_eval.py --checkpoint {shlex.quote(str(run.last))}")
    distributed.stop()


def open_images(options: config.TrainOptions) -> "tuple[Images, Images | None]":
    """Return the training images, and with --eval-every also the images of the test split."""
    from src.data.datasets import ImageFiles, open_data

    def open_split(split: str) -> "Images":
        return open_data(
            options.data,
            split,
            root=options.data_root,
            download=options.download,
            subset=options.subset,
            subset_file=options.subset_file,
        )

    data = open_split("train")
    held_out = open_split("test") if options.eval_every else None
    if options.keep_decoded and isinstance(data, ImageFiles):  # the flag is refused for other data
        data = data.keeping(int(options.keep_decoded * 2**30))
    if options.in_memory and isinstance(data, ImageFiles):
        data = data.in_memory()
        held_out = held_out.in_memory() if isinstance(held_out, ImageFiles) else held_out
    return data, held_out


def announce(progress: "Progress", run: "Run", trainer: "Trainer", *, started: str) -> None:
    """Log the command, the code revision, the resolved configuration, and the sizes of this run.

    Args:
        started: line about the weights from which the run starts; "": none.
    """
    from src import distributed
    from src.models.backbones import count_parameters

    loader, device, settings = trainer.loader, trainer.device, run.config
    progress.say(f"command: {shlex.join(sys.argv)}\nrevision: {run.revision}\n{describe(settings)}")
    progress.say(
        f"{len(loader.data):,} images, {len(loader)} steps per epoch of {loader.per_rank} images on each of "
        f"{distributed.world_size()} x {device.type}; {count_parameters(trainer.method):,} parameters; "
        f"writing to {run.folder}"
    )
    if started:
        progress.say(started)
    if trainer.step:
        progress.say(f"resuming from step {trainer.step} (epoch {trainer.epoch + 1} of {settings['epochs']})")
    if device.type == "cpu" and settings["precision"] == "float16":
        progress.say("--precision float16 is emulated on a CPU, which makes it many times slower: use float32")


def describe(settings: dict) -> str:
    """Return the resolved configuration as text, several options per line."""
    words = [f"{name}={value}" for name, value in settings.items() if value != ""]
    return textwrap.fill("  ".join(words), width=118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    run_script(main)

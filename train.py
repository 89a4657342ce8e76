"""Pre-train a network without labels.

    python train.py                                                  # handwritten digits on a CPU, about a minute
    torchrun --standalone --nproc_per_node=8 train.py --data "$IMAGENET"       # the published recipe, on one machine
    srun python train.py --data "$IMAGENET"                          # on a Slurm cluster, one task per GPU

`python train.py --method NAME --help` shows every flag. A run that is stopped (Ctrl-C, SIGTERM) saves first; the same
command with the same --output-dir goes on from that very step.
"""

import textwrap
from pathlib import Path

from src import config


def main() -> None:
    options, name, knobs = config.parse_train()

    # torch takes seconds to import; --help and wrong flags have been answered by now
    import torch

    from src import distributed
    from src.data.datasets import open_data
    from src.data.decoding import check_decoding_on
    from src.data.loaders import TrainLoader
    from src.data.views import build_views
    from src.evaluation.clustering import evaluate
    from src.logs import Progress
    from src.methods import METHODS, build_method
    from src.models.backbones import count_parameters
    from src.models.memory import checkpoint_activations
    from src.optim import build_optimizer, freeze, parameter_groups, warmup_cosine
    from src.pretrained import start_from
    from src.run import Run, choose_folder, find_checkpoint
    from src.trainer import Interrupted, StopRequest, Trainer

    device = distributed.start(options.device)
    distributed.check_sync_bn_group(options.sync_bn_group)
    torch.manual_seed(options.seed)

    # data: a method sees views and indices; labels are for monitoring
    data = open_data(options.data, "train", options.data_root, options.download, options.subset_file)
    if options.keep_decoded:
        data = data.keeping(int(options.keep_decoded * 2**30))
    settings = (getattr(options, name) for name in config.VIEW_SETTINGS)
    views = build_views(options.data, data, *settings, options.reference_views, options.compile)
    if options.decode_on_gpu:
        check_decoding_on(device)
    loader = TrainLoader(
        *(data, views, options.batch_size, options.seed, device, options.workers),
        decode_on_device=options.decode_on_gpu,
    )
    if loader.per_rank % options.accumulate:
        raise config.InputError(
            f"--accumulate {options.accumulate} does not divide the {loader.per_rank} images per rank and step"
        )
    num_views = options.global_crops_number + options.local_crops_number
    METHODS[name].check_data(knobs, options.batch_size, len(data), num_views, options.epochs * len(loader))
    held_out = None
    if options.eval_every:
        held_out = open_data(options.data, "test", options.data_root, options.download, options.subset_file)

    # the folder of this run, and what it holds already
    settings = {"method": name, **config.as_plain(options), **config.as_plain(knobs), "channels": data.channels}
    folder = distributed.from_main(
        choose_folder(options.output_dir, options.fresh, f"{name}_{Path(options.data).name}")
    )
    found = find_checkpoint(folder, settings)

    # method: backbone, heads, objective, and what it remembers between steps
    method = build_method(
        name,
        knobs,
        options.arch,
        data.channels,
        options.global_crops_size,
        options.patch_size,
        options.global_crops_number,
    )
    started = start_from(method, name, options.pretrained) if options.pretrained and not found else ""
    method = method.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    freeze(method, options.freeze)
    if options.checkpoint_activations and not checkpoint_activations(method.backbone):
        raise config.InputError(f"--checkpoint-activations: {options.arch} has no sequence of blocks to run again")
    if options.compile:
        method.backbone.compile(dynamic=False)  # one graph for each size of views
    torch.backends.cudnn.benchmark = True  # their sizes stay the same: cuDNN may look for its fastest kernels
    wrapped = distributed.parallel(method, device, options.sync_bn_group)

    # optimisation
    groups = parameter_groups(method, options.weight_decay, options.bias_decay, options.backbone_weight_decay)
    optimizer = build_optimizer(options.optimizer, groups, options.lr, options.momentum)
    lr = warmup_cosine(
        options.lr, options.final_lr, options.warmup_start, options.warmup_epochs, options.epochs, len(loader)
    )
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    stop_request = StopRequest()
    trainer = Trainer(
        wrapped,
        optimizer,
        lr,
        loader,
        data.labels,
        device,
        autocast,
        options.log_every,
        stop_request,
        options.accumulate,
        options.clip_grad,
    )

    # run
    run = Run(folder, settings, found, options.save_every)
    if found:
        trainer.load_state_dict(found)
    total = options.epochs * len(loader) * options.batch_size
    progress = Progress(total, trainer.step * options.batch_size, enabled=distributed.is_main())
    progress.say(describe(settings))
    progress.say(
        f"{len(data):,} images, {len(loader)} steps per epoch of {loader.per_rank} images on each of "
        f"{distributed.world_size()} x {device.type}; {count_parameters(method):,} parameters; writing to {folder}"
    )
    if started:
        progress.say(started)
    if device.type == "cpu" and options.precision == "float16":
        progress.say("float16 is emulated on a CPU and many times slower there: --precision float32")
    if found:
        progress.say(f"going on from step {trainer.step} (epoch {trainer.epoch + 1} of {options.epochs})")
    stop_request.listen()
    try:
        while trainer.epoch < options.epochs:
            summary = trainer.train_epoch(progress)
            if held_out is not None and (trainer.epoch % options.eval_every == 0 or trainer.epoch == options.epochs):
                summary |= evaluate(
                    method, held_out, views, options.batch_size, device, summary["classifier"], autocast
                )
            run.finish_epoch(trainer, summary)
            if advice := method.diagnose(run.history):
                progress.say(advice)
            if trainer.epoch == 1 and (advice := loader.advice(summary)):
                progress.say(advice)
    except Interrupted as stopped:
        run.save(trainer)
        progress.say(
            f"{stopped}: saved {folder / 'checkpoint.pt'} at step {trainer.step}; the same command goes on from there"
        )
        raise SystemExit(128 + stopped.signal) from None
    finally:
        loader.close()
        progress.close()
        run.close()
    progress.say(method.report(run.history[-1]))
    progress.say(
        f"\nsaved {folder / 'checkpoint.pt'}; score it: python cls_eval.py --checkpoint {folder / 'checkpoint.pt'}"
    )
    distributed.stop()


def describe(settings: dict) -> str:
    """The resolved configuration, several options a line."""
    words = [f"{name}={value}" for name, value in settings.items() if value != ""]
    return textwrap.fill("  ".join(words), width=118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    config.run_script(main)

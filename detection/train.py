"""Fine-tune a pre-trained ResNet-50 for object detection or instance segmentation.

python detection/train.py --dataset voc --data datasets --pretrained runs/published
torchrun --standalone --nproc_per_node=8 detection/train.py --dataset coco --data datasets --pretrained model.pt
sbatch detection/train_coco.sh
"""

import json
import shlex
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection import config
from detection.errors import InputError, printable, run_program

if TYPE_CHECKING:
    import torch

    from detection.annotations import Annotations
    from detection.data import TrainingPictures
    from detection.models import Detector, ModelOptions
    from detection.trainer import Trainer

# Options that may differ when a run continues: they do not change what it computes, or only where its files are. The data is
# compared by its fingerprint.
MAY_DIFFER = {
    "data",
    "annotations",
    "images",
    "output_dir",
    "workers",
    "device",
    "log_every",
    "save_every",
    "dry_run",
    "pretrained",
}


def main() -> None:
    options = config.parse_train()
    if options["dry_run"]:
        print(json.dumps(options, indent=1))
        return
    import torch

    from detection import checkpoints, distributed
    from detection.data import TrainingPictures
    from detection.models import build_detector
    from detection.normalization import over_ranks
    from detection.schedule import build_optimizer, learning_rate
    from detection.trainer import Trainer

    device = distributed.start(options["device"])
    if options["batch_size"] % distributed.world_size():
        raise InputError(
            f"--batch-size {options['batch_size']} is not divisible by the {distributed.world_size()} ranks: choose a multiple"
        )

    # data
    annotations = read_training_set(options)
    pictures = TrainingPictures(
        annotations, sizes=tuple(options["min_size"]), longest=options["max_size"], masks=options["masks"]
    )

    # model, and what an earlier start of this run has left
    model_options = model_options_of(options, classes=len(annotations.classes))
    settings = {**{k: v for k, v in options.items() if k not in MAY_DIFFER}, "fingerprint": annotations.fingerprint()}
    folder = folder_of(options)
    found = previous_state(folder, settings)
    backbone = None
    if found is None and options["pretrained"]:
        backbone = checkpoints.read_backbone(options["pretrained"])
    torch.manual_seed(options["seed"])
    model = over_ranks(build_detector(model_options, backbone), device).to(device)

    # optimisation
    optimizer = build_optimizer(
        model, lr=options["lr"], momentum=options["momentum"], weight_decay=options["weight_decay"]
    )
    rate = partial(
        learning_rate,
        base=options["lr"],
        decay_steps=options["decay_steps"],
        gamma=options["gamma"],
        warmup_steps=options["warmup_steps"],
        warmup_factor=options["warmup_factor"],
    )
    facts = {"config": settings, "classes": annotations.classes, "model_options": model_options.as_plain()}

    def save(step: int) -> None:
        if distributed.rank() == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(folder / "checkpoint.pt", {**state, **facts})
        distributed.barrier()

    # run
    trainer = Trainer(
        model,
        optimizer,
        rate,
        steps=options["steps"],
        folder=folder,
        device=device,
        autocast=torch.bfloat16 if options["precision"] == "bfloat16" else None,
        save=save,
        log_every=options["log_every"],
        save_every=options["save_every"],
    )
    if found is not None:
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        trainer.step = found["step"]
    if distributed.rank() == 0:
        announce(options, annotations, folder=folder, step=trainer.step, backbone=backbone)
    trainer.train(batches_of(pictures, options, steps=(trainer.step, options["steps"])))
    finish(trainer, model, pictures=pictures, options=options, facts=facts)
    distributed.stop()


def read_training_set(options: dict[str, Any]) -> "Annotations":
    """Return the annotated pictures to train on."""
    from detection.coco import COCO_CLASSES, read_coco
    from detection.voc import read_voc

    if options["dataset"] == "voc":
        return read_voc(Path(options["data"]), options["sets"]).for_training()
    annotations, images = config.coco_paths(options, "train2017")
    content = read_coco(annotations, images, masks=options["masks"])
    if not options["annotations"] and len(content.classes) != COCO_CLASSES:
        raise InputError(
            f"{annotations}: {len(content.classes)} categories, expected the {COCO_CLASSES} of COCO: name the file with "
            "--annotations and --images if it is another data set"
        )
    return content.for_training()


def model_options_of(options: dict[str, Any], *, classes: int) -> "ModelOptions":
    """Return the options that determine the detector."""
    from detection.models import ModelOptions

    return ModelOptions(
        architecture=options["architecture"],
        classes=classes,
        masks=options["masks"],
        anchor_sizes=tuple(options["anchor_sizes"]),
        rpn_batch=options["rpn_batch"],
        roi_batch=options["roi_batch"],
        roi_size=options["roi_size"],
        **{name: options[name] for name in config.PROPOSALS["c4"]},
    )


def folder_of(options: dict[str, Any]) -> Path:
    """Return the folder of the run, on all ranks the same, and make it."""
    from detection import distributed

    dated = f"runs/detection-{options['dataset']}-{datetime.now():%Y%m%d-%H%M%S}"
    name = distributed.gather_objects(options["output_dir"] or dated)[0]
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {name}: {error.strerror}, expected a folder: name another one") from None
    return Path(name)


def previous_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint in the folder, or None. A folder of other options is refused."""
    from detection import checkpoints

    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    found = checkpoints.load(path, needed=("model", "optimizer", "step", "config", "classes", "model_options"))
    before = found["config"]
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        parts = ", ".join(
            f"{name} was {printable(before.get(name))}, is {printable(settings[name])}" for name in differing
        )
        raise InputError(
            f"{folder} holds a run with other options ({parts}): use the same options, or another --output-dir"
        )
    return found


def batches_of(pictures: "TrainingPictures", options: dict[str, Any], *, steps: tuple[int, int]) -> Any:
    """Return the loader of the batches of these steps."""
    from detection.data import Stream, training_batches

    stream = Stream(len(pictures), options["batch_size"], seed=options["seed"], steps=steps)
    return training_batches(pictures, stream, workers=options["workers"])


def announce(
    options: dict[str, Any],
    annotations: "Annotations",
    *,
    folder: Path,
    step: int,
    backbone: "dict[str, torch.Tensor] | None",
) -> None:
    """Print the command, the resolved options, what the data holds and what of it cannot be used; write config.json."""
    from detection import distributed, files

    files.write_text(folder / "config.json", json.dumps(options, indent=1) + "\n")
    print(f"command: {printable(shlex.join(sys.argv))}")
    print("  ".join(f"{name}={printable(value)}" for name, value in options.items() if value not in (None, "")))
    things = sum(len(picture.things) for picture in annotations.pictures)
    print(
        f"{len(annotations.pictures):,} images with {things:,} objects of {len(annotations.classes)} classes; "
        f"{options['batch_size']} images per step on {distributed.world_size()} rank(s); writing to {printable(folder)}"
    )
    for line in annotations.problems.lines():
        print(f"left out or changed: {line}")
    if step:
        print(f"resuming from step {step:,} of {options['steps']:,}")
    elif backbone is None:
        print("no --pretrained: the network starts from random weights")
    else:
        print(f"{len(backbone)} tensors of the ResNet-50 in {printable(options['pretrained'])} are loaded")
    sys.stdout.flush()


def finish(
    trainer: "Trainer",
    model: "Detector",
    *,
    pictures: "TrainingPictures",
    options: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Compute the final statistics of batch normalisation, and write model_final.pt."""
    from detection import checkpoints, distributed
    from detection.normalization import update_statistics

    steps, count = options["steps"], options["precise_bn"]
    if count:
        loader = batches_of(pictures, options, steps=(steps, steps + count))
        update_statistics(model, (trainer.on_device(examples) for examples in loader))
    path = trainer.folder / "model_final.pt"
    if distributed.rank() == 0:
        checkpoints.save(path, {"step": steps, "model": model.state_dict(), **facts})
        print(
            f"saved {printable(path)}; score it: python detection/evaluate.py --checkpoint {shlex.quote(str(path))} ..."
        )
    distributed.barrier()


if __name__ == "__main__":
    run_program(main)

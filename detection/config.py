"""The flags of the programs, and the published recipes. It imports no torch, so that `--help` answers at once."""

import argparse
from pathlib import Path
from typing import Any

from .errors import InputError

COMMON: dict[str, Any] = {
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "gamma": 0.1,
    "warmup_steps": 1000,
    "warmup_factor": 0.001,
    "max_size": 1333,
    "test_size": 800,
    "anchor_sizes": [32, 64, 128, 256, 512],
    "rpn_batch": 256,
    "roi_batch": 512,
    "roi_size": 14,
    "precise_bn": 200,
}
DATA: dict[str, dict[str, Any]] = {
    "coco": {
        "masks": True,
        "min_size": [640, 672, 704, 736, 768, 800],
        "steps": 180_000,
        "decay_steps": [120_000, 160_000],
    },
    "voc": {
        "masks": False,
        "min_size": list(range(480, 801, 32)),
        "steps": 24_000,
        "decay_steps": [18_000, 22_000],
        "warmup_steps": 100,
    },
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # the authors' configurations for their weights
    "self_classifier": {"coco": {"batch_size": 32, "lr": 0.1}, "voc": {"batch_size": 32, "lr": 0.15}},
    # the configurations from which they are derived, with supervised weights
    "supervised": {"coco": {"batch_size": 16, "lr": 0.02}, "voc": {"batch_size": 16, "lr": 0.02}},
    # SwAV's appendix; it gives the rates only for VOC
    "swav": {"voc": {"batch_size": 16, "lr": 0.1, "warmup_steps": 1000, "warmup_factor": 0.333}},
}
# Proposals of an image before and after non-maximum suppression, in training and in evaluation; with FPN the first two
# numbers before it are those of each level.
PROPOSALS: dict[str, dict[str, int]] = {
    "c4": {"pre_nms": 12_000, "post_nms": 2000, "pre_nms_test": 6000, "post_nms_test": 1000},
    "fpn": {"pre_nms": 2000, "post_nms": 1000, "pre_nms_test": 1000, "post_nms_test": 1000},
}
EXAMPLES = """examples:
  python detection/train.py --dataset voc --data datasets --pretrained runs/published
  torchrun --standalone --nproc_per_node=8 detection/train.py --dataset coco --data datasets --pretrained model.pt
  python detection/train.py --annotations my.json --images pictures --pretrained model.pt --steps 5000 --batch-size 8 --lr 0.02
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and status 2."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see --help)")


def parse_train(words: list[str] | None = None) -> dict[str, Any]:
    """Return the resolved options of `detection/train.py`.

    Raises:
        InputError: if the flags are wrong or contradict each other.
    """
    parser = Parser(
        description="Fine-tune a pre-trained ResNet-50 for object detection or instance segmentation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="self_classifier", help="published recipe; any flag overrides it")
    _add_data(parser, train=True)
    add("--pretrained", metavar="FILE", help="checkpoint, run folder, released file or export with a ResNet-50")
    add("--output-dir", metavar="DIR", help="folder of the run; one that holds a checkpoint is continued")
    add("--architecture", choices=("c4", "fpn"), default="c4", help="c4 is the published protocol (default)")
    add("--masks", action=argparse.BooleanOptionalAction, help="Mask R-CNN or Faster R-CNN; default: masks with coco")
    _add_training(parser)
    _add_model(parser)
    _add_running(parser)
    add("--seed", type=int, default=0, help="seed of order, sizes, mirroring, sampling and initial weights (default 0)")
    add("--log-every", type=int, default=20, metavar="N", help="steps between two lines of the log (default 20)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between two checkpoints (default 1000)")
    add("--dry-run", action="store_true", help="print the resolved options as JSON and end")
    return _resolve(vars(parser.parse_args(words)))


def _add_data(parser: argparse.ArgumentParser, *, train: bool) -> None:
    add = parser.add_argument
    if train:
        add("--dataset", choices=DATA, default="coco", help="format of the annotations, and schedule (default coco)")
    names = "train2017" if train else "val2017"
    sets = "2007_trainval 2012_trainval" if train else "2007_test"
    add(
        "--data",
        metavar="DIR",
        default="datasets",
        help="folder with coco/ or VOC2007/ and VOC2012/ (default datasets)",
    )
    coco = f"(default DATA/coco/annotations/instances_{names}.json)"
    add("--annotations", metavar="FILE", help=f"other annotations in COCO's format {coco}")
    add("--images", metavar="DIR", help=f"the images of --annotations (default DATA/coco/{names})")
    add("--sets", nargs="+", metavar="YEAR_SET", default=sets.split(), help=f"sets of VOC (default {sets})")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch-size", type=int, metavar="N", help="images of a step over all ranks; default: that of the preset")
    add("--lr", type=float, metavar="RATE", help="learning rate after the warm-up; default: that of the preset")
    add("--momentum", type=float, metavar="M", help="momentum of SGD (default 0.9)")
    add("--weight-decay", type=float, metavar="W", help="weight decay, not of normalisations (default 1e-4)")
    add("--steps", type=int, metavar="N", help="steps of the training (default 180000 with coco, 24000 with voc)")
    add("--decay-steps", type=int, nargs="*", metavar="N", help="steps at which the rate is multiplied by --gamma")
    add("--gamma", type=float, metavar="G", help="factor of the rate at --decay-steps (default 0.1)")
    add(
        "--warmup-steps",
        type=int,
        metavar="N",
        help="steps of the linear warm-up (default 1000 with coco, 100 with voc)",
    )
    add("--warmup-factor", type=float, metavar="F", help="the warm-up starts at F times the rate (default 0.001)")
    add(
        "--min-size", type=int, nargs="+", metavar="PX", help="lengths of the shorter side; one is drawn for each image"
    )
    add("--max-size", type=int, metavar="PX", help="limit of the longer side (default 1333)")
    add("--test-size", type=int, metavar="PX", help="length of the shorter side in evaluation (default 800)")
    add(
        "--precise-bn",
        type=int,
        metavar="N",
        help="batches for the final statistics of normalisation (default 200; 0: none)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--anchor-sizes", type=int, nargs="+", metavar="PX", help="sides of anchors (default 32 64 128 256 512)")
    add("--rpn-batch", type=int, metavar="N", help="anchors of an image that enter the loss (default 256)")
    add("--roi-batch", type=int, metavar="N", help="proposals of an image that enter the loss (default 512)")
    add("--roi-size", type=int, metavar="N", help="side of the features pooled from a box, with c4 (default 14)")
    both = {name: " or ".join(str(PROPOSALS[kind][name]) for kind in PROPOSALS) for name in PROPOSALS["c4"]}
    add("--pre-nms", type=int, metavar="N", help=f"proposals before suppression (c4 or fpn: {both['pre_nms']})")
    add("--post-nms", type=int, metavar="N", help=f"proposals after suppression ({both['post_nms']})")
    add("--pre-nms-test", type=int, metavar="N", help=f"the same in evaluation ({both['pre_nms_test']})")
    add("--post-nms-test", type=int, metavar="N", help=f"the same in evaluation ({both['post_nms_test']})")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the convolutions (default float32)")
    add("--workers", type=int, default=4, metavar="N", help="data-loading workers per rank (default 4)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto uses a GPU if there is one (default)")


def _resolve(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the preset, the data and the architecture determine, and check the result."""
    preset, dataset, kind = options["preset"], options["dataset"], options["architecture"]
    if dataset not in PRESETS[preset]:
        raise InputError(
            f"--preset {preset} has no recipe for --dataset {dataset}: use --dataset {' or '.join(PRESETS[preset])}"
        )
    if dataset == "voc" and (options["annotations"] or options["images"]):
        raise InputError("--annotations and --images are for --dataset coco: name the sets of VOC with --sets")
    if bool(options["annotations"]) != bool(options["images"]):
        raise InputError("--annotations and --images belong together: give both or neither")
    defaults = {**COMMON, **DATA[dataset], **PROPOSALS[kind], **PRESETS[preset][dataset]}
    if options["steps"] is not None and options["decay_steps"] is None:  # at the same fractions of the training
        whole = defaults["steps"]
        defaults["decay_steps"] = [step * options["steps"] // whole for step in defaults["decay_steps"]]
    for name, value in defaults.items():
        if options.get(name) is None:
            options[name] = value
    if dataset == "voc" and options["masks"]:
        raise InputError("--masks: the annotations of VOC have no masks: use --no-masks, or --dataset coco")
    _check(options)
    return options


def _check(options: dict[str, Any]) -> None:
    """Raise InputError for numbers outside their range."""
    positive = (
        "batch_size",
        "steps",
        "max_size",
        "test_size",
        "rpn_batch",
        "roi_batch",
        "roi_size",
        "log_every",
        "save_every",
    )
    for name in (*positive, *PROPOSALS["c4"]):
        if options[name] < 1:
            raise InputError(f"{_flag(name)} is {options[name]}, expected at least 1: correct it")
    for name in ("warmup_steps", "precise_bn", "workers", "seed", "weight_decay", "momentum", "warmup_factor", "gamma"):
        if not options[name] >= 0:
            raise InputError(f"{_flag(name)} is {options[name]}, expected at least 0: correct it")
    if not 0 < options["lr"] < float("inf"):
        raise InputError(f"--lr is {options['lr']}, expected a positive number: correct it")
    for name in ("min_size", "anchor_sizes"):
        if min(options[name]) < 8:
            raise InputError(f"{_flag(name)} has {min(options[name])}, expected at least 8 pixels: correct it")
    if options["architecture"] == "fpn" and len(options["anchor_sizes"]) != 5:
        raise InputError(
            f"--anchor-sizes has {len(options['anchor_sizes'])} sizes, expected 5, one for each level of FPN: correct it"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_evaluate(words: list[str] | None = None) -> dict[str, Any]:
    """Return the options of `detection/evaluate.py`.

    Raises:
        InputError: if the flags are wrong.
    """
    parser = Parser(description="Score a detector that detection/train.py wrote, with the metrics of COCO or VOC.")
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="model_final.pt of a run, a checkpoint, or the folder of the run",
    )
    _add_data(parser, train=False)
    add(
        "--output-dir",
        metavar="DIR",
        help="folder for detections.json and evaluate.json (default: that of the checkpoint)",
    )
    evaluators = ("auto", "hotcoco", "faster-coco-eval", "pycocotools")
    add(
        "--evaluator",
        choices=evaluators,
        default="auto",
        help="COCO's metrics; auto: the first of these that is installed",
    )
    rules = "11-point (VOC 2007, default) or area (VOC 2010 and later)"
    add("--ap-rule", choices=("11-point", "area"), default="11-point", help=f"VOC's average precision: {rules}")
    _add_running(parser)
    options = vars(parser.parse_args(words))
    if bool(options["annotations"]) != bool(options["images"]):
        raise InputError("--annotations and --images belong together: give both or neither")
    if options["workers"] < 0:
        raise InputError(f"--workers is {options['workers']}, expected at least 0: correct it")
    return options


def parse_convert(words: list[str] | None = None) -> dict[str, Any]:
    """Return the options of `detection/convert.py`.

    Raises:
        InputError: if the flags are wrong.
    """
    parser = Parser(description="Convert the ResNet-50 in a checkpoint to detectron2's format.")
    parser.add_argument("checkpoint", help="checkpoint, run folder, released file or export with a ResNet-50")
    parser.add_argument("output", help="file to write, ending in .pkl; it must not exist")
    return vars(parser.parse_args(words))


def coco_paths(options: dict[str, Any], split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of COCO.

    Args:
        split: "train2017" or "val2017", if the options name no files.
    """
    if options["annotations"]:
        return Path(options["annotations"]), Path(options["images"])
    root = Path(options["data"]) / "coco"
    return root / "annotations" / f"instances_{split}.json", root / split

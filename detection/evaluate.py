"""Score a detector with the metrics of COCO or VOC.

python detection/evaluate.py --checkpoint runs/voc --data datasets
torchrun --standalone --nproc_per_node=8 detection/evaluate.py --checkpoint runs/coco/model_final.pt --data datasets
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection import config
from detection.errors import InputError, printable, run_program

if TYPE_CHECKING:
    from detection.annotations import Annotations
    from detection.models import Detector

LABELS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large"}


def main() -> None:
    options = config.parse_evaluate()
    import torch

    from detection import checkpoints, distributed, files, metrics
    from detection.annotations import check_classes
    from detection.inference import detect

    device = distributed.start(options["device"])
    path = checkpoints.in_folder(options["checkpoint"], "model_final.pt")
    state = checkpoints.load(path)
    settings = state["config"]
    evaluator = (
        metrics.choose_evaluator(options["evaluator"])
        if settings["dataset"] == "coco"
        else f"VOC, {options['ap_rule']}"
    )
    annotations = read_test_set(options, settings)
    check_classes(annotations, state["classes"])
    folder = Path(options["output_dir"] or path.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {error.strerror}, expected a folder: name another one") from None

    model = load_detector(state, path).to(device)
    main_rank = distributed.rank() == 0
    if main_rank:
        print(
            f"{len(annotations.pictures):,} images, {len(annotations.classes)} classes; evaluator: {evaluator}",
            flush=True,
        )
    found = detect(
        model,
        annotations,
        shorter=settings["test_size"],
        longest=settings["max_size"],
        device=device,
        autocast=torch.bfloat16 if options["precision"] == "bfloat16" else None,
        workers=options["workers"],
        say=main_rank,
    )
    if main_rank:
        for line in annotations.problems.lines():
            print(f"left out or changed: {line}")
        scores, results = score(annotations, found, settings=settings, options={**options, "evaluator": evaluator})
        files.write_text(folder / "detections.json", json.dumps(results))
        facts = {
            "checkpoint": str(path),
            "step": state.get("step"),
            "images": len(annotations.pictures),
            "evaluator": evaluator,
            "test_size": settings["test_size"],
            "max_size": settings["max_size"],
            "problems": annotations.problems.counts(),
        }
        files.write_text(folder / "evaluate.json", json.dumps({**facts, **scores}, indent=1) + "\n")
        show(scores)
        print(f"wrote {printable(folder / 'evaluate.json')} and detections.json")
    distributed.barrier()
    distributed.stop()


def read_test_set(options: dict[str, Any], settings: dict[str, Any]) -> "Annotations":
    """Return the annotated pictures to score on, in the format of the training data."""
    from detection.coco import read_coco
    from detection.voc import read_voc

    if settings["dataset"] == "voc":
        if options["annotations"]:
            raise InputError("--annotations: the detector was trained on VOC: name its sets with --data and --sets")
        return read_voc(Path(options["data"]), options["sets"])
    annotations, images = config.coco_paths(options, "val2017")
    return read_coco(annotations, images, masks=settings["masks"])


def load_detector(state: dict[str, Any], path: Path) -> "Detector":
    """Return the detector of a checkpoint.

    Raises:
        InputError: if its weights do not fit its options.
    """
    from detection.models import ModelOptions, build_detector

    try:
        chosen = dict(state["model_options"])
        model = build_detector(ModelOptions(**{**chosen, "anchor_sizes": tuple(chosen["anchor_sizes"])}), None)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        line = printable(str(error).partition("\n")[0])
        raise InputError(f"checkpoint {path}: its weights do not fit its options ({line}): use another copy") from None
    return model


def score(
    annotations: "Annotations", found: list[dict], *, settings: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], list[dict]]:
    """Return the scores, {"bbox": {...}} and with masks also "segm", and the detections as they are written to a file."""
    from detection import coco, metrics
    from detection.voc import voc_scores

    results = coco.as_results(found, annotations)
    if settings["dataset"] == "voc":
        return {"bbox": voc_scores(annotations, found, rule=options["ap_rule"])}, results
    truth = coco.as_coco(annotations)
    kinds = ("bbox", "segm") if settings["masks"] else ("bbox",)
    return {
        kind: metrics.coco_scores(truth, results, kind=kind, evaluator=options["evaluator"]) for kind in kinds
    }, results


def show(scores: dict[str, dict[str, float]]) -> None:
    """Print the scores in percent. COCO's -1, for sizes without an object, becomes a dash."""
    names = [name for name in LABELS if any(name in one for one in scores.values())]
    print("".join(f"{text:>8}" for text in ("", *(LABELS[name] for name in names))))
    for kind, one in scores.items():
        cells = ["-" if one[name] < 0 else f"{100 * one[name]:.1f}" for name in names]
        print("".join(f"{text:>8}" for text in ({"bbox": "boxes", "segm": "masks"}[kind], *cells)))


if __name__ == "__main__":
    run_program(main)

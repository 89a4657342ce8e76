"""COCO's metrics, through pycocotools or one of two faster packages that give the same numbers."""

import contextlib
import importlib
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError

PACKAGES = {"hotcoco": "hotcoco", "faster-coco-eval": "faster_coco_eval", "pycocotools": "pycocotools"}  # fastest first
NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


def choose_evaluator(name: str) -> str:
    """Return the evaluator to use.

    Args:
        name: one of `PACKAGES`, or "auto" for the fastest that is installed.

    Raises:
        InputError: if it is not installed.
    """
    wanted = list(PACKAGES) if name == "auto" else [name]
    for candidate in wanted:
        if importlib.util.find_spec(PACKAGES[candidate]):
            return candidate
    raise InputError(f"no evaluator of COCO is installed: pip install {'pycocotools' if name == 'auto' else name}")


def _classes(evaluator: str) -> tuple[Any, Any]:
    """Return the classes of a package that read annotations and evaluate detections."""
    if evaluator == "pycocotools":
        return importlib.import_module("pycocotools.coco").COCO, importlib.import_module(
            "pycocotools.cocoeval"
        ).COCOeval
    package = importlib.import_module(PACKAGES[evaluator])
    return package.COCO, package.COCOeval if evaluator == "hotcoco" else package.COCOeval_faster


def coco_scores(truth: dict[str, Any], results: list[dict[str, Any]], *, kind: str, evaluator: str) -> dict[str, float]:
    """Return COCO's twelve numbers as fractions; -1 if no object counts.

    Args:
        truth: content of an annotation file.
        results: detections; see `coco.as_results`. Without any, all numbers are 0.
        kind: "bbox" or "segm".
        evaluator: see `choose_evaluator`.
    """
    if not results:
        return dict.fromkeys(NAMES, 0.0)
    if kind == "bbox":  # else the packages would take the boxes and areas of the masks
        results = [{name: value for name, value in result.items() if name != "segmentation"} for result in results]
    else:
        results = [{name: value for name, value in result.items() if name != "bbox"} for result in results]
    reader, evaluation = _classes(evaluator)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        paths = [Path(folder) / "truth.json", Path(folder) / "results.json"]
        for path, content in zip(paths, (truth, results), strict=True):
            path.write_text(json.dumps(content))
        annotated = reader(str(paths[0]))
        scored = evaluation(annotated, annotated.loadRes(str(paths[1])), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {name: float(value) for name, value in zip(NAMES, scored.stats, strict=False)}

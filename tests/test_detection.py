"""detection/: training and evaluation on pictures with coloured shapes."""

import json

import pytest
from detecting import SMALL, run_detection, write_shapes

pytest.importorskip("pycocotools", reason="pycocotools is not installed: it decodes masks")


def test_training_and_evaluation_run_end_to_end(tmp_path, capsys):
    shapes = write_shapes(tmp_path / "shapes", images=2)
    data = ("--annotations", shapes / "annotations.json", "--images", shapes / "images")
    run_detection(
        "train", *data, *SMALL, "--output-dir", tmp_path / "run", "--batch-size", 2, "--steps", 2, "--lr", 0.01
    )
    run_detection("evaluate", "--checkpoint", tmp_path / "run", *data, "--workers", 0, "--evaluator", "pycocotools")
    assert "2 images with 3 objects of 3 classes" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert scores["images"] == 2
    assert 0 <= scores["bbox"]["ap50"] <= 1
    assert {"ap50", "ap75"} <= scores["segm"].keys()

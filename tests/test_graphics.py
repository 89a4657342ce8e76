"""The picture of the architecture in the README."""

import importlib.util

import pytest
from conftest import ROOT
from PIL import Image

from src.methods.self_classifier import Config

SCRIPT, PICTURE = ROOT / "graphics" / "architecture.py", ROOT / "graphics" / "architecture.png"


@pytest.fixture(scope="module")
def architecture():
    spec = importlib.util.spec_from_file_location("architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_picture(run_python, tmp_path):
    file = tmp_path / "picture.png"
    done = run_python(SCRIPT, file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Image.open(file) as drawn, Image.open(PICTURE) as kept:
        assert drawn.size == kept.size
        assert drawn.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # readable on a dark page
    assert PICTURE.stat().st_size < 50_000
    assert "](graphics/architecture.png)" in (ROOT / "README.md").read_text()


def test_the_same_file_every_time(architecture, tmp_path):
    for name in ("a.png", "b.png"):
        architecture.draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_numbers_are_those_of_the_recipe(architecture, tmp_path):
    architecture.draw(tmp_path / "a.svg")
    text, config = (tmp_path / "a.svg").read_text(), Config()
    numbers = [f"{n:,}" for n in (*config.classes, config.queue_length)]
    for part in (*numbers, f"{config.dim} numbers", f"temperature {config.row_tau}", f"temperature {config.col_tau}"):
        assert part in text, part


def test_no_text_leaves_its_box(architecture, tmp_path, monkeypatch):
    """Each text in a box is narrower and lower than the box."""
    boxes = []

    def box(axes, place, *words, **how):
        before = len(axes.texts)
        drawn(axes, place, *words, **how)
        boxes.append((axes, place, axes.texts[before:]))

    drawn = architecture._box
    monkeypatch.setattr(architecture, "_box", box)
    architecture.draw(tmp_path / "a.png")
    assert len(boxes) == 11
    for axes, (left, bottom, width, height), texts in boxes:
        for text in texts:
            corners = axes.transData.inverted().transform(text.get_window_extent().corners())
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            assert left < x0, text.get_text()
            assert x1 < left + width, text.get_text()
            assert bottom < y0, text.get_text()
            assert y1 < bottom + height, text.get_text()

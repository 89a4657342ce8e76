"""python -m src.data.shrink: what is in the copy, stopping and starting again, damaged files."""

import numpy as np
import pytest
from PIL import Image

from src.data.shrink import shrink


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def folder(tmp_path):
    """Three photographs and a drawing in two classes, a damaged file and a text."""
    rng = np.random.default_rng(0)
    source = tmp_path / "photographs"
    for name, size in (
        ("a/wide.jpg", (90, 60)),
        ("a/small.JPEG", (30, 20)),
        ("b/tall.jpeg", (50, 100)),
        ("b/drawing.png", (80, 80)),
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).resize(size).save(source / name)
    (source / "b" / "broken.jpg").write_bytes((source / "a" / "wide.jpg").read_bytes()[:300])
    (source / "a" / "notes.txt").write_text("no image")
    return source


def test_shorter_sides_are_cut_down_and_the_rest_is_copied(folder, tmp_path, run_python):
    done = run_python("-m", "src.data.shrink", folder, tmp_path / "copy", "--short-side", "40", "--workers", "2")
    assert done.returncode == 0, done.stderr
    sizes = {str(path.relative_to(tmp_path / "copy")): size_of(path) for path in (tmp_path / "copy").rglob("*.*")}
    assert sizes == {
        "a/wide.jpg": (60, 40),
        "a/small.JPEG": (30, 20),
        "b/tall.jpeg": (40, 80),
        "b/drawing.png": (80, 80),
    }
    assert (tmp_path / "copy/a/small.JPEG").read_bytes() == (folder / "a/small.JPEG").read_bytes()
    assert "left out: " in done.stdout
    assert "broken.jpg" in done.stdout
    assert "4 images in " in done.stdout
    again = run_python("-m", "src.data.shrink", folder, tmp_path / "copy", "--short-side", "20")
    assert again.returncode == 0
    assert size_of(tmp_path / "copy/a/wide.jpg") == (60, 40)  # was there already


def test_a_copy_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    def half(self, path, *_, **__):
        path.write_bytes(b"half")
        raise ValueError("encoder")

    monkeypatch.setattr(Image.Image, "save", half)
    assert "encoder" in shrink(folder / "a/wide.jpg", tmp_path / "copy" / "wide.jpg", 40, 90)
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nowhere", "copy"), "nowhere: no such folder"),
        (("photographs", "photographs/copy"), "lies in"),
        (("photographs", "photographs"), "lies in"),
        (("empty", "copy"), "empty: no images in it"),
        (("photographs", "copy", "--quality", "0"), "--quality from 1 to 95"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, run_python, words, complaint):
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / word for word in words[:2]]
    done = run_python("-m", "src.data.shrink", *paths, *words[2:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not (tmp_path / "copy").exists()

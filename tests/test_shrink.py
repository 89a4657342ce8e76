"""python -m src.data.shrink: what is in the copy, stopping and starting again, damaged files."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from src import files
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


def test_shorter_sides_are_cut_down_and_the_rest_is_copied(folder, tmp_path, run_python, run_program):
    done = run_python("-m", "src.data.shrink", folder, tmp_path / "copy", "--short-side", "40", "--workers", "2")
    assert done.returncode == 0, done.stderr
    sizes = {str(path.relative_to(tmp_path / "copy")): size_of(path) for path in (tmp_path / "copy").rglob("[!.]*.*")}
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
    (tmp_path / "copy/a/wide.jpg").unlink()
    (tmp_path / "copy/b/tall.jpeg").write_bytes(b"there")
    again = run_program("-m", "src.data.shrink", folder, tmp_path / "copy", "--short-side", "40")
    assert again.returncode == 0
    assert size_of(tmp_path / "copy/a/wide.jpg") == (60, 40)
    assert (tmp_path / "copy/b/tall.jpeg").read_bytes() == b"there"  # what is there is not done again
    other = run_program("-m", "src.data.shrink", folder, tmp_path / "copy", "--short-side", "20")
    assert other.returncode == 2
    assert (
        "was made with {'short_side': 40, 'quality': 92}, but the settings are now {'short_side': 20, 'quality': 92}"
        in other.stderr
    )


def test_odd_files_of_the_source_are_left_out_by_name(folder, tmp_path, run_program):
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "a" / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "a" / "round").symlink_to(folder)
    os.symlink(folder / "b" / "broken.jpg", os.fsencode(folder) + b"/b/\xff.jpg")
    done = run_program("-m", "src.data.shrink", folder, tmp_path / "copy", "--workers", "1", timeout=60)
    assert done.returncode == 0, done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 4
    assert sum("FileNotFoundError" in line for line in left_out) == 1
    assert "4 images in " in done.stdout


def test_a_copy_keeps_what_turns_and_colours_it(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(folder / "a/wide.jpg") as image:
        image.save(folder / "a/turned.jpg", exif=exif, icc_profile=b"profile")
    assert shrink(folder / "a/turned.jpg", tmp_path / "turned.jpg", short_side=40, quality=90) == ""
    with Image.open(tmp_path / "turned.jpg") as copy:
        assert (copy.size, copy.getexif()[0x0112], copy.info["icc_profile"]) == ((60, 40), 6, b"profile")


def test_a_copy_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        shrink(folder / "a/wide.jpg", tmp_path / "copy" / "wide.jpg", short_side=40, quality=90)
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nowhere", "copy"), "nowhere: no such folder"),
        (("photographs", "photographs/copy"), "lies in"),
        (("photographs", "photographs"), "lies in"),
        (("empty", "copy"), "empty: no images in this folder"),
        (("photographs", "copy", "--quality", "0"), "--quality from 1 to 95"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, run_program, words, complaint):
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / word for word in words[:2]]
    done = run_program("-m", "src.data.shrink", *paths, *words[2:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not (tmp_path / "copy").exists()

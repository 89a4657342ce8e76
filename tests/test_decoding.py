"""Files to pixels: whatever decodes them, they are Pillow's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import decoding
from src.data.decoding import decode

WAYS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "coarse": {"quality": 5},
}


def photograph(mode="RGB", size=(333, 217)):
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def pillows(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def is_pillows(path):
    ours = decode(str(path))
    assert ours.dtype == torch.uint8
    assert ours.stride()[0] == 1  # channels last, which is what makes resizing fast
    return np.abs(ours.permute(1, 2, 0).numpy() - pillows(path)).mean() < 1


@pytest.fixture
def codec(monkeypatch):
    """Counts the files that torchcodec decodes."""
    pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed", exc_type=(ImportError, OSError))
    calls = []
    theirs = decoding.decode_jpeg
    monkeypatch.setattr(decoding, "decode_jpeg", lambda encoded: (calls.append(1), theirs(encoded))[1])
    return calls


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("way", WAYS)
def test_torchcodec_gives_pillows_pixels(codec, tmp_path, mode, way):
    if mode == "L" and "subsampling" in WAYS[way]:
        pytest.skip("one channel has no subsampling")
    photograph(mode).save(tmp_path / "a.jpg", **WAYS[way])
    assert is_pillows(tmp_path / "a.jpg")
    assert codec


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_photograph_stays_as_it_is_stored(codec, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph().save(tmp_path / "a.jpg", exif=exif)
    assert is_pillows(tmp_path / "a.jpg")
    assert not codec
    exif[0x0112] = 1
    photograph().save(tmp_path / "b.jpg", exif=exif)
    assert is_pillows(tmp_path / "b.jpg")
    assert codec


def test_what_torchcodec_does_not_take_goes_to_pillow(codec, tmp_path):
    photograph("CMYK").save(tmp_path / "a.jpg")
    photograph().save(tmp_path / "b.jpg", "PNG")  # the name says otherwise
    for name in "ab":
        assert is_pillows(tmp_path / f"{name}.jpg")
    assert not codec


def test_a_truncated_file_is_refused_with_pillows_reason(codec, tmp_path):
    whole = io.BytesIO()
    photograph().save(whole, "JPEG")
    (tmp_path / "a.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(OSError, match="truncated"):
        decode(str(tmp_path / "a.jpg"))
    assert codec


def test_without_torchcodec_pillow_decodes(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    photograph().save(tmp_path / "a.jpg")
    assert is_pillows(tmp_path / "a.jpg")


def test_a_huge_picture_is_refused_before_it_is_decoded(codec, monkeypatch, tmp_path):
    photograph().save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError, match="decompression bomb"):
        decode(str(tmp_path / "a.jpg"))
    assert not codec

"""Files to pixels: whatever decodes them, they are Pillow's."""

import io

import numpy as np
import pytest
import torch
from conftest import view_settings
from PIL import Image

from src.config import parse_train
from src.data import decoding
from src.data.datasets import open_folder
from src.data.decoding import decode, decode_on, encoded
from src.data.loaders import TrainLoader
from src.data.views import build_views
from src.errors import InputError, RunError

WAYS = [
    ("RGB", {"subsampling": "4:2:0"}),
    ("RGB", {"subsampling": "4:2:2"}),
    ("RGB", {"subsampling": "4:4:4"}),
    ("RGB", {"progressive": True}),
    ("RGB", {"quality": 5}),
    ("L", {}),
    ("L", {"progressive": True}),
]


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


@pytest.mark.parametrize(("mode", "way"), WAYS)
def test_torchcodec_gives_pillows_pixels(codec, tmp_path, mode, way):
    photograph(mode).save(tmp_path / "a.jpg", **way)
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


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_upright_photograph_is_turned_as_a_viewer_turns_it(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a{suffix}")
    photograph().save(path, exif=exif)
    stored, shown = (decode(path, upright=upright).permute(1, 2, 0).numpy() for upright in (False, True))
    turned = {3: stored[::-1, ::-1], 6: stored.swapaxes(0, 1)[:, ::-1], 8: stored.swapaxes(0, 1)[::-1]}
    turned |= {2: stored[:, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1), 7: stored[::-1, ::-1].swapaxes(0, 1)}
    expected = turned.get(orientation, stored)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 1
    assert decode_on(torch.device("cpu"), [encoded(path, upright=True)])[0].shape[1] == shown.shape[0]


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


# --------------------------------------------------------------------------------------------------------------------
# kept in memory


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        photograph(size=(40, 30)).rotate(i).save(tmp_path / f"{i:02}.jpg")
    return tmp_path


def batches(data, workers, epochs=2, **how):
    views = build_views("x", data, view_settings(2, 0, 16, 8))
    loader = TrainLoader(data, views, batch_size=4, seed=0, device=torch.device("cpu"), workers=workers, **how)
    try:
        return [batch.views for epoch in range(epochs) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [2**20, 3 * 40 * 30 * 5 - 1])  # for all, and for a few
def test_kept_images_are_those_decoded_anew(folder, workers, room):
    data = open_folder(str(folder), "train")
    kept = data.keeping(room)
    for anew, again in zip(batches(data, workers), batches(kept, workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(anew, again, strict=True))
    there = [i for i in range(12) if kept.kept.get(i) is not None]
    assert len(there) == (12 if room == 2**20 else 4)  # what workers keep, this process sees
    assert all(torch.equal(kept.kept.get(i), data.decode(i)) for i in there)


def test_a_kept_image_is_not_read_again(folder):
    data = open_folder(str(folder), "train").keeping(2**20)
    first = data.decode(3)
    (folder / "03.jpg").unlink()
    assert torch.equal(data.decode(3), first)
    with pytest.raises(FileNotFoundError):
        data.keep(np.array([3]), np.array([-1]), []).decode(0)  # another selection has other positions


def test_memory_that_is_not_to_be_had_is_refused(folder):
    with pytest.raises(InputError, match=r"--keep-decoded: the system cannot reserve 1e\+09 GiB of memory"):
        open_folder(str(folder), "train").keeping(10**9 * 2**30)
    assert open_folder(str(folder), "train").keeping(0).decode(0).shape == (3, 30, 40)  # a whisker, which holds nothing


def test_the_flag_is_for_files(tmp_path):
    options, _, _ = parse_train(["--data", str(tmp_path), "--keep-decoded", "0.5"])
    assert options.keep_decoded == 0.5
    with pytest.raises(InputError, match="--keep-decoded is for image files, but --data digits"):
        parse_train(["--data", "digits", "--keep-decoded", "1"])


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_behind_the_workers_it_is_the_same(folder, workers):
    """On a device, all files of a batch at once; here that is the CPU, whose pixels are the same. What torchcodec does not take
    comes decoded."""
    pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed", exc_type=(ImportError, OSError))
    photograph(size=(40, 30)).save(folder / "12.png")
    photograph("CMYK", size=(40, 30)).save(folder / "13.jpg")
    turned = Image.Exif()
    turned[decoding.ORIENTATION] = 6
    photograph(size=(40, 30)).save(folder / "14.jpg", exif=turned)
    photograph("L", size=(40, 30)).save(folder / "15.jpg")
    data = open_folder(str(folder), "train")
    assert [decoding.encoded(path).ndim for path in data.paths[10:]] == [1, 1, 3, 3, 3, 1]
    here, there = batches(data, workers), batches(data, workers, decode_on_device=True)
    assert len(here) == len(there) == 8
    assert all(
        torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("seen_by_its_end", [True, False])
def test_damage_found_behind_the_workers_is_replaced_and_counted(tmp_path, capsys, monkeypatch, seen_by_its_end):
    pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed", exc_type=(ImportError, OSError))
    for i in range(100):
        photograph(size=(40, 30)).rotate(i).save(tmp_path / f"{i:02}.jpg")
    whole = (tmp_path / "50.jpg").read_bytes()
    (tmp_path / "50.jpg").write_bytes(whole[:-100])  # its header is as it should be
    if seen_by_its_end:
        with pytest.raises(OSError, match="truncated"):
            decoding.encoded(str(tmp_path / "50.jpg"))
    else:
        monkeypatch.setattr(decoding, "END_OF_IMAGE", b"")
        assert decoding.encoded(str(tmp_path / "50.jpg")).ndim == 1
    data = open_folder(str(tmp_path), "train")
    made = []
    for on_device in (False, True):
        views = build_views("x", data, view_settings(2, 0, 16, 8))
        loader = TrainLoader(
            data, views, batch_size=20, seed=0, device=torch.device("cpu"), workers=0, decode_on_device=on_device
        )
        made.append(list(loader.epoch(0)))
        assert list(loader.damaged) == [str(tmp_path / "50.jpg")]
        assert "50.jpg" in capsys.readouterr().out
    for here, there in zip(*made, strict=True):
        assert torch.equal(here.indices, there.indices)
        assert all(torch.equal(a, b) for a, b in zip(here.views, there.views, strict=True))
    (tmp_path / "51.jpg").write_bytes(whole[:-100])
    (tmp_path / "52.jpg").write_bytes(whole[:-100])
    loader = TrainLoader(
        data, views, batch_size=20, seed=0, device=torch.device("cpu"), workers=0, decode_on_device=True
    )
    with pytest.raises(RunError, match="more than 1 % of the images are damaged"):
        list(loader.epoch(0))


def test_what_a_device_cannot_decode_the_host_does(folder, monkeypatch, capsys):
    data = open_folder(str(folder), "train")
    here = batches(data, 0)

    def cannot(device, images):
        raise RuntimeError("nvJPEG says no\nand why")

    monkeypatch.setattr("src.data.loaders.decode_on", cannot)
    there = batches(data, 0, decode_on_device=True)
    assert all(
        torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert capsys.readouterr().out == (
        "the device cannot decode some images (nvJPEG says no): the host decodes them\n"  # once
    )

    def full(device, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("src.data.loaders.decode_on", full)
    with pytest.raises(torch.OutOfMemoryError):
        batches(data, 0, decode_on_device=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "digits"], "is for image files, but --data digits is in memory"),
        (["--device", "cpu"], "needs a GPU, but --device is cpu"),
        (["--reference-views"], "does not go with --reference-views"),
        (["--keep-decoded", "1"], "does not go with --keep-decoded"),
    ],
)
def test_decoding_on_a_gpu_is_refused_where_it_makes_no_sense(words, message, tmp_path):
    with pytest.raises(InputError, match=f"--decode-on-gpu {message}.*: drop one of them"):
        parse_train(["--data", str(tmp_path), "--decode-on-gpu", *words])


def test_decoding_on_a_gpu_is_refused_without_one(monkeypatch):
    with pytest.raises(InputError, match="--decode-on-gpu needs a GPU"):
        decoding.check_decoding_on(torch.device("cpu"))
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    with pytest.raises(InputError, match="--decode-on-gpu needs a torchcodec"):
        decoding.check_decoding_on(torch.device("cuda"))

    def broken(encoded, device):
        raise RuntimeError("no nvJPEG\nand more")

    monkeypatch.setattr(decoding, "decode_jpeg", broken)
    with pytest.raises(
        InputError, match=r"--decode-on-gpu: torchcodec cannot decode on this GPU \(no nvJPEG\): drop the flag"
    ):
        decoding.check_decoding_on(torch.device("cuda"))

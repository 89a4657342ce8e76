"""Features of a data set: placed by index, the same over ranks, kept in a cache that is never stale."""

import os

import pytest
import torch
from PIL import Image
from torch import nn

from src.data.datasets import MemoryImages, open_folder
from src.errors import InputError
from src.features import extract

CPU = torch.device("cpu")


class Pixels:
    """The pixels themselves as the evaluation view."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def single(self, images):
        return images.float().flatten(1) * self.scale

    def single_cut(self, image):
        return image

    def single_finish(self, crops):
        return self.single(crops)


class Method(nn.Module):
    """Layer "backbone" multiplies by a weight, "head" by two; neither does while it is trained. Counts its batches."""

    def __init__(self, weight: float = 2.0):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.weight = nn.Parameter(torch.tensor(weight))
        self.backbone.forward = lambda images: self.run(images, self.backbone.weight)
        self.head = nn.Parameter(torch.tensor(3.0))
        self.batches = 0

    def run(self, images, factor):
        self.batches += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return images @ torch.eye(images.shape[1]) * factor

    def embed(self, images):
        return self.run(images, self.backbone.weight * self.head)


def images(count: int = 5, seed: int = 0) -> MemoryImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)
    return MemoryImages(pixels, torch.zeros(count, dtype=torch.long), ["all"])


def pull(method, data, cache="", views=None, **how):
    how = {"layer": "backbone", "batch_size": 2, **how}
    return extract(method, data, views or Pixels(), split="train", device=CPU, workers=0, cache=cache, **how)


@pytest.mark.parametrize(("layer", "factor"), [("backbone", 2.0), ("head", 6.0)])
def test_features_of_each_layer_are_placed_by_index(layer, factor):
    method, data = Method().train(), images()
    found = pull(method, data, layer=layer)
    assert found.dtype == torch.float32
    assert torch.equal(found, factor * data.images.flatten(1).float())
    assert method.training  # as before
    with pytest.raises(ValueError, match="layer"):
        pull(method, data, layer="neck")


def test_half_precision_runs_the_network_in_it():
    data = images()
    exact = 2 * data.images.flatten(1).float() * 1.001
    found = pull(Method(), data, views=Pixels(1.001), autocast=torch.bfloat16)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert torch.allclose(found, exact, rtol=0.01)


def test_what_is_in_the_cache_is_not_computed_again(tmp_path, capsys):
    method, data = Method(), images()
    first = pull(method, data, tmp_path / "deep" / "cache")
    assert method.batches == 3
    (file,) = (tmp_path / "deep" / "cache").iterdir()  # nothing else is left lying about
    again = Method()
    assert torch.equal(pull(again, data, tmp_path / "deep" / "cache", batch_size=5), first)
    assert again.batches == 0
    assert str(file) in capsys.readouterr().out
    other_labels = MemoryImages(data.images, data.labels + 1, ["a", "b"])
    pull(again, other_labels, tmp_path / "deep" / "cache")
    assert again.batches == 0


@pytest.mark.parametrize(
    "change",
    [
        {"method": Method(2.5)},
        {"data": images(seed=1)},
        {"views": Pixels(2.0)},
        {"layer": "head"},
        {"autocast": torch.bfloat16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_weights_images_views_layer_or_precision_are_computed(tmp_path, change):
    usual = {"method": Method(), "data": images(), "cache": tmp_path}
    pull(**usual)
    changed = {**usual, **change}
    before = changed["method"].batches
    found = pull(**changed)
    assert changed["method"].batches > before
    assert torch.equal(found, pull(**{**changed, "cache": ""}))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_head_alone_does_not_change_the_backbones_features(tmp_path):
    pull(Method(), images(), tmp_path)
    other = Method()
    other.head.data += 1
    pull(other, images(), tmp_path)
    assert other.batches == 0
    pull(other, images(), tmp_path, layer="head")
    assert other.batches > 0


def test_parts_without_weights_count(tmp_path):
    """An activation leaves no trace in the state dict."""
    data = images()
    for activation in (nn.ReLU(), nn.LeakyReLU()):
        method = Method()
        method.backbone = nn.Sequential(nn.Flatten(), activation)
        pull(method, data, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty"])
def test_a_damaged_file_is_computed_again_and_said(tmp_path, capsys, damage):
    data = images(400)
    first = pull(Method(), data, tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        where = content.find(first[100].numpy().tobytes())
        content[where] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "other": b"not a cache", "empty": b""}.get(damage, content))
    method = Method()
    assert torch.equal(pull(method, data, tmp_path), first)
    assert method.batches == 200
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{file} is damaged" in said
    again = Method()
    assert torch.equal(pull(again, data, tmp_path), first)  # repaired
    assert again.batches == 0


def test_image_files_are_known_by_name_size_and_time(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    cache = tmp_path / "cache"

    def files_after():
        pull(Method(), open_folder(str(tmp_path / "in"), "train"), cache)
        return len(list(cache.iterdir()))

    assert [files_after(), files_after()] == [1, 1]
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "in")
    assert files_after() == 1
    status = os.stat(tmp_path / "in" / "1.png")
    Image.new("RGB", (2, 2), (9, 0, 0)).save(tmp_path / "in" / "1.png")
    os.utime(tmp_path / "in" / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files_after() == 2
    (tmp_path / "in" / "2.png").rename(tmp_path / "in" / "3.png")
    assert files_after() == 3


def test_a_cache_that_is_no_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    method = Method()
    with pytest.raises(InputError, match=r"--features-cache .*file"):
        pull(method, images(), tmp_path / "file")
    assert method.batches == 0


def test_a_full_disk_does_not_cost_the_features(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    data = images()
    assert torch.equal(pull(Method(), data, tmp_path), 2 * data.images.flatten(1).float())
    assert "No space left" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

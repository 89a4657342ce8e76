"""SCAN's strong augmentation: each operation beside Pillow's, what is drawn how often, and the hole."""

import numpy as np
import pytest
import torch
from conftest import view_settings
from PIL import Image

from src.data import reference
from src.data.photographs import HOLE, STRONG
from src.data.randomness import uniforms
from src.data.strong import OPERATIONS, cutout, draw, holes, strengthen
from src.data.views import build_views, photo_recipes

# fact sheet of SCAN, section 3.4
RANGES = {
    "identity": (0, 0),
    "autocontrast": (0, 0),
    "equalize": (0, 0),
    "rotate": (-30, 30),
    "solarize": (0, 256),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "brightness": (0.05, 0.95),
    "sharpness": (0.05, 0.95),
    "shear_x": (-0.1, 0.1),
    "translate_x": (-0.1, 0.1),
    "translate_y": (-0.1, 0.1),
    "posterize": (4, 8),
    "shear_y": (-0.1, 0.1),
}


def pictures(size):
    """Photographs, more or less, and what is special: one colour, two levels, few pixels of a second level."""
    rng = np.random.default_rng(size)
    made = []
    for grain in (0, 2, 9, 30):
        coarse = Image.fromarray(rng.integers(20, 230, (5, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        made.append((smooth + rng.normal(0, 1, smooth.shape) * grain).clip(0, 255))
    flat, split, dotted = (np.full((size, size, 3), (200, 90, 0)) for _ in range(3))
    split[: size // 3] = (10, 250, 90)
    dotted[0, 0] = 255
    return [Image.fromarray(image.astype(np.uint8)) for image in (*made, flat, split, dotted)]


def grey_levels(images):
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])).float()


@pytest.mark.parametrize("size", [32, 57, 224])
@pytest.mark.parametrize("name", RANGES)
def test_every_operation_is_pillows(name, size):
    images = pictures(size)
    for shift in (0.0, 0.5, 0.999):  # so that every image meets small and large magnitudes
        share = (np.arange(len(images)) / len(images) + shift) % 1
        low, high = RANGES[name]
        magnitudes = low + (high - low) * share
        ours = OPERATIONS[name].apply(grey_levels(images), magnitudes)
        operate = reference.OPERATIONS[name]
        theirs = grey_levels([operate(image, m) for image, m in zip(images, magnitudes.tolist(), strict=True)])
        difference = (ours - theirs).abs()
        assert difference.mean() < 0.01
        assert difference.max() <= 1
        assert name == "identity" or not torch.equal(ours, grey_levels(images))


def test_each_operation_is_drawn_one_time_in_fourteen():
    names = tuple(OPERATIONS)
    which, magnitudes = draw(names, uniforms(seed=0, epoch=0, indices=np.arange(20000), view=0, count=8))
    assert which.shape == magnitudes.shape == (20000, 4)
    for k, (name, (low, high)) in enumerate(RANGES.items()):
        assert names[k] == name
        drawn = which == k
        assert drawn.mean(axis=0) == pytest.approx(np.full(4, 1 / 14), abs=0.008)  # 4 standard deviations
        share = (magnitudes[drawn] - low) / max(high - low, 1e-9)
        assert share.min() >= 0
        assert share.max() <= 1
        if high > low:
            assert share.mean() == pytest.approx(0.5, abs=0.02)
            assert share.var() == pytest.approx(1 / 12, abs=0.005)
    assert (which[:, 0] == which[:, 1]).mean() == pytest.approx(1 / 14, abs=0.008)  # with replacement
    bits = magnitudes[which == names.index("posterize")].astype(int)
    assert np.bincount(bits, minlength=9)[4:] / len(bits) == pytest.approx([0.25, 0.25, 0.25, 0.25, 0], abs=0.03)


def test_operations_follow_one_another_as_drawn():
    image = pictures(32)[3:4]
    u = np.array([[0.9, 0.0, 0.5, 0.3, 0.75, 0.7]])  # solarise, rotate, solarise; three shares of their ranges
    step = OPERATIONS["solarize"].apply(grey_levels(image), np.array([256 * 0.3]))
    step = OPERATIONS["rotate"].apply(step, np.array([15.0]))
    expected = OPERATIONS["solarize"].apply(step, np.array([256 * 0.7]))
    assert torch.equal(strengthen(grey_levels(image), ("rotate", "solarize"), u), expected)


@pytest.mark.parametrize(
    ("size", "longest", "mean", "largest"), [(32, 16, 6.9, 25), (96, 32, 3.3, 11.1), (224, 75, 3.3, 10.9)]
)
def test_the_hole_is_as_large_as_published(size, longest, mean, largest):
    recipes = photo_recipes(view_settings(2, 0, size, 8, augment="scan_strong"))
    assert {recipe.cutout for recipe in recipes} == {longest}
    top, bottom, left, right = holes(
        uniforms(seed=0, epoch=0, indices=np.arange(40000), view=0, count=3), size, longest
    ).T
    area = 100 * (bottom - top) * (right - left) / size**2
    assert area.mean() == pytest.approx(mean, abs=0.1)
    assert area.max() == pytest.approx(largest, abs=0.05)
    assert (area == 0).mean() == pytest.approx(1 / longest, abs=0.01)  # a side of 1 gives none
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == size


def test_cutout_sets_each_images_own_hole_to_zero_and_nothing_else():
    x = torch.rand(2, 3, 8, 8) + 1
    cut = cutout(x, np.array([[0, 2, 3, 8], [5, 5, 0, 8]]))
    assert (cut[0, :, :2, 3:] == 0).all()
    assert (cut == 0).sum() == 3 * 2 * 5
    assert torch.equal(cut[cut != 0], x[cut != 0])


def images_in_memory(count, size=32):
    return torch.from_numpy(np.random.default_rng(1).integers(1, 255, (count, 3, size, size), dtype=np.uint8))


def test_the_hole_comes_behind_normalisation():
    views = build_views("cifar10", None, view_settings(2, 0, 32, 8, augment="scan_strong"))
    indices = np.arange(50)
    for number, view in enumerate(views(images_in_memory(50), indices, seed=3, epoch=2)):
        u = uniforms(seed=3, epoch=2, indices=indices, view=number, count=STRONG)[:, HOLE]
        for image, (top, bottom, left, right) in zip(view, holes(u, 32, 16).tolist(), strict=True):
            assert (image[:, top:bottom, left:right] == 0).all()
            assert (image == 0).sum() == 3 * (bottom - top) * (right - left)  # no grey level becomes zero


@pytest.mark.parametrize("augment", ["scan_strong", "scan_self_label"])
def test_a_view_is_the_same_bit_for_bit_in_any_batch(augment):
    views = build_views("cifar10", None, view_settings(2, 1, 32, 18, augment=augment))
    images, indices = images_in_memory(60), np.arange(100, 160)
    whole = views(images, indices, seed=0, epoch=1)
    for part in np.split(np.random.default_rng(0).permutation(60), [1, 3, 10]):
        for of_all, of_part in zip(whole, views(images[part], indices[part], seed=0, epoch=1), strict=True):
            assert torch.equal(of_all[part], of_part)
    assert not torch.equal(whole[1], views(images, indices, seed=0, epoch=2)[1])
    assert not torch.equal(whole[1], views(images, indices, seed=1, epoch=1)[1])


def test_self_labelling_sees_the_first_view_as_evaluation_does():
    """Fact sheet of SCAN, section 4.1: targets come from the image as it is, the loss from the strong view."""
    for size, stored in ((32, 32), (48, 60)):
        views = build_views("somewhere", None, view_settings(3, 0, size, 8, augment="scan_self_label"))
        images = images_in_memory(20, stored)
        weak, strong, other = views(images, np.arange(20), seed=0, epoch=0)
        assert (weak - views.single(images)).abs().max() < 0.5 / 255 / 0.22  # half a grey level: rounded, like Pillow
        assert (weak - strong).abs().mean() > 0.2
        assert (strong - other).abs().mean() > 0.2

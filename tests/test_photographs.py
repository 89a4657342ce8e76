import colorsys
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import view_settings
from PIL import Image, ImageFilter
from torchvision import transforms

from src.config import TrainOptions
from src.data import photographs
from src.data.colour import adjust_hue
from src.data.photographs import (
    NONE,
    ORDERS,
    PhotoRecipe,
    PhotoViews,
    crop_boxes,
    crop_resize,
    gaussian_blur,
    jitter,
    jitter_at_once,
    published_views,
)
from src.data.randomness import uniforms
from src.data.views import build_views, photo_recipes


def smooth(seed, height=40, width=52):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]


def nearly_equal(a, b):
    """Compare views; a few pixels at a threshold, or half-way between grey levels, may fall to the other side."""
    return ((a - b).abs() > 1e-4).float().mean() < 0.005


@pytest.mark.parametrize("size", [12, 64])
@pytest.mark.parametrize("box", [(3, 5, 30, 40), (0, 0, 40, 52), (20, 10, 7, 9)])
@pytest.mark.parametrize("bicubic", [True, False])
def test_crop_and_resize_is_pillows(box, size, bicubic):
    image, (top, left, height, width) = smooth(0), box
    filter = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    expected = image.crop((left, top, left + width, top + height)).resize((size, size), filter)
    difference = (crop_resize(tensor(image), np.array([box]), size, bicubic=bicubic)[0] - tensor(expected)[0]).abs()
    assert difference.mean() < (0.1 if bicubic else 0.15)  # bilinear sums often lie half-way, where Pillow rounds up
    assert difference.max() <= 2  # once in each of the two passes


NUMBERS = (2, 1, 224, 96, (0.2, 1.0))  # views, their sizes and the scale of the large ones


@pytest.mark.parametrize(
    ("augment", "blurs", "solarizes", "saturation", "bicubic"),
    [
        ("dino", [0.1, 1.0, 0.5], [0.0, 0.2, 0.0], 0.2, True),
        ("moco_v2", [0.5, 0.5, 0.5], [0.0, 0.0, 0.0], 0.4, False),
    ],
)
def test_recipes_are_the_published_ones(augment, blurs, solarizes, saturation, bicubic):
    """The second generation treats each view in its own way, the first both alike; fact sheet, sections 1.7 and 8.1."""
    recipes = build_views("somewhere", None, view_settings(*NUMBERS, augment=augment)).recipes
    assert [recipe.blur for recipe in recipes] == blurs
    assert [recipe.solarize for recipe in recipes] == solarizes
    assert [recipe.size for recipe in recipes] == [224, 224, 96]
    assert [recipe.scale for recipe in recipes] == [(0.2, 1.0), (0.2, 1.0), (0.05, 0.4)]
    for r in recipes:
        assert (r.flip, r.jitter, r.grayscale, r.blur_radius, r.bicubic) == (0.5, 0.8, 0.2, (0.1, 2.0), bicubic)
        assert (r.brightness, r.contrast, r.saturation, r.hue) == (0.4, 0.4, saturation, 0.1)
        assert r.ratio == (3 / 4, 4 / 3)


CENTRAL = {"crop": "central", "resize_first": True}
PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
FACTS = {  # of SCAN's fact sheet, sections 2.3 and 3.4; of SeLa's, section 3.3
    "simclr": {"jitter": 0.8, "hue": 0.1, "grayscale": 0.2, "grayscale_first": False, "blur": 0.0, "flip": 0.5},
    "scan_strong": {**PLAIN, "crop": "random", "resize_first": True, "drawn": 4, "flip": 0.5},
    "sela_0": {**PLAIN, **CENTRAL, "flip": 0.0},
    "sela_1": {**PLAIN, **CENTRAL, "flip": 0.5},
    "sela_2": {**PLAIN, "crop": "resized", "resize_first": True, "flip": 0.5},
    "sela_3": {"jitter": 1.0, "hue": 0.4, "grayscale": 0.2, "grayscale_first": True, "blur": 0.0, "flip": 0.5},
}


@pytest.mark.parametrize("augment", FACTS)
def test_recipes_of_scan_and_sela_are_the_published_ones(augment):
    rest = {"solarize": 0.0, "bicubic": False, "drawn": 0, "crop": "resized", "resize_first": False}
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    recipes = build_views("somewhere", None, view_settings(*NUMBERS, augment=augment)).recipes
    assert [recipe.size for recipe in recipes] == [224, 224, 96]
    for recipe in recipes:
        assert vars(recipe).items() >= {**rest, **strengths, **FACTS[augment]}.items()


def test_every_choice_of_the_flag_has_a_recipe_and_a_row_in_the_document():
    (choices,) = (get_args(field.type) for field in fields(TrainOptions) if field.name == "augment")
    rows = re.findall(r"^\| `(\w+)` \|", (Path(__file__).parents[1] / "docs" / "training.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(choices)
    for augment in choices:
        for reference in (False, True):
            views = build_views("somewhere", None, view_settings(2, 1, 40, 16, augment=augment), reference=reference)
            made = views(torch.cat([tensor(smooth(i)) for i in range(3)]), np.arange(3), seed=0, epoch=0)
            assert [view.shape for view in made] == [(3, 3, 40, 40)] * 2 + [(3, 3, 16, 16)]


def test_windows_are_central_or_anywhere_and_as_large_as_the_view():
    for crop in ("central", "random"):
        recipe = PhotoRecipe(size=16, scale=(0.2, 1.0), crop=crop)
        top, left, h, w = crop_boxes([recipe], seed=0, epoch=0, indices=np.arange(2000), view=0, height=20, width=45).T
        assert (h == 16).all()
        assert (w == 16).all()
        if crop == "central":
            assert (top == 2).all()
            assert (left == 14).all()
        else:
            assert np.bincount(top) / 2000 == pytest.approx([0.2] * 5, abs=0.04)
            assert np.bincount(left) / 2000 == pytest.approx([1 / 30] * 30, abs=0.02)
    mixed = [PhotoRecipe(size=16, scale=(0.5, 0.5)), PhotoRecipe(size=16, scale=(0.2, 1.0), crop="central")]
    boxes = crop_boxes(mixed, seed=0, epoch=0, indices=np.array([3, 3]), view=np.array([0, 1]), height=20, width=45)
    assert (
        boxes[0].tolist()
        == crop_boxes(mixed[:1], seed=0, epoch=0, indices=np.array([3]), view=0, height=20, width=45)[0].tolist()
    )
    assert boxes[1].tolist() == [2, 14, 16, 16]
    small = crop_boxes(
        [PhotoRecipe(size=16, scale=(0.2, 1.0), crop="random")],
        seed=0,
        epoch=0,
        indices=np.array([3]),
        view=0,
        height=10,
        width=12,
    )
    assert small[0, 2:].tolist() == [10, 10]


def test_level_0_of_sela_is_the_view_of_evaluation():
    views = build_views("somewhere", None, view_settings(2, 0, 70, 8, augment="sela_0"))
    image = tensor(smooth(4, 100, 133))
    for view in views.finish(views.cut(image, np.array([5]), seed=0, epoch=0), np.array([5]), seed=0, epoch=0):
        assert torch.equal(view, views.single_finish(views.single_cut(image[0])))
    for view in views(image, np.array([5]), seed=0, epoch=0):
        assert (view - views.single(image)).abs().max() < 0.51 / 255 / 0.224  # in whole grey levels


def test_what_is_grey_before_the_jitter_has_no_hue_to_turn():
    images = torch.cat([tensor(smooth(i)) for i in range(6)])

    def made(**changes):
        unchanged = {"flip": 0.0, "blur": 0.0, "grayscale": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.9}
        recipe = PhotoRecipe(size=16, scale=(0.4, 1.0), hue=0.4, **unchanged, **changes)
        return PhotoViews([recipe], 16)(images, np.arange(6), seed=0, epoch=0)[0]

    assert nearly_equal(made(jitter=1.0, grayscale_first=True), made(jitter=0.0))
    assert (made(jitter=1.0) - made(jitter=0.0)).abs().mean() > 0.05


def test_all_views_resize_the_image_first_or_none():
    mixed = [PhotoRecipe(size=16, scale=(0.2, 1.0), resize_first=first) for first in (True, False)]
    with pytest.raises(ValueError, match="all or none"):
        PhotoViews(mixed, 16)


def test_swavs_recipe_is_the_published_one():
    """Fact sheet, section 1.6: colours at full strength, and a standard deviation of red that is SwAV's own."""
    views = build_views("somewhere", None, view_settings(*NUMBERS, augment="swav"))
    assert views.std == (0.228, 0.224, 0.225)
    for r in views.recipes:
        assert (r.brightness, r.contrast, r.saturation, r.hue) == (0.8, 0.8, 0.8, 0.2)
        assert (r.jitter, r.grayscale, r.blur, r.solarize, r.blur_radius) == (0.8, 0.2, 0.5, 0.0, (0.1, 2.0))


def test_the_blur_of_small_views_shrinks_with_them():
    large, _, small = published_views(view_settings(2, 1, 64, 32))
    assert (large.blur_radius, small.blur_radius) == ((0.1, 2.0), (0.1, 1.0))
    assert published_views(view_settings(1, 0, 96, 8))[0].blur_radius == (0.1, 2.0)
    assert published_views(view_settings(1, 0, 4, 8))[0].blur_radius == (0.1, 0.2)


def test_crop_and_flip_do_nothing_else():
    flat = torch.full((4, 3, 40, 40), 77, dtype=torch.uint8)
    views = build_views("somewhere", None, view_settings(2, 0, 32, 8, (0.2, 1.0), augment="crop_flip"))
    for view in views(flat, np.arange(4), seed=0, epoch=0):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (views.mean, views.std))
        assert torch.allclose(view, ((77 / 255 - mean) / std).expand_as(view), atol=1e-4)
    half = torch.cat(
        [torch.zeros(500, 3, 40, 20), torch.full((500, 3, 40, 20), 200)], dim=3
    ).byte()  # dark, then bright
    left, right = views(half, np.arange(500), seed=0, epoch=0)[0].mean(dim=(1, 2)).tensor_split(2, dim=1)
    turned = (left.mean(dim=1) > right.mean(dim=1)).float().mean().item()
    assert turned == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("data", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        ("cifar100-20", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("somewhere", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_normalisation_is_the_data_sets(data, mean, std):
    views = build_views(data, None, view_settings(2, 0, 32, 8, augment="moco_v2"))
    assert (tuple(views.mean), tuple(views.std)) == (mean, std)
    assert views.recipes[0].blur_radius == (0.1, 2.0)  # on 32 pixels as well, as the authors


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_blur_is_near_pillows(radius):
    image = smooth(1, 48, 48)
    ours = gaussian_blur(tensor(image).float(), torch.tensor([radius]), 2.0)
    assert (ours - tensor(image.filter(ImageFilter.GaussianBlur(radius)))).abs().mean() < 1


@pytest.mark.parametrize("side", [20, 100, 150])  # within one block of rows, and over two and three
def test_blur_is_a_convolution_wherever_a_block_ends(side):
    x = torch.rand(2, 3, side, side, dtype=torch.float64) * 255
    taps = np.exp(-0.5 * (np.arange(-6, 7) / 1.7) ** 2)
    taps /= taps.sum()
    padded = np.pad(x[0, 1].numpy(), 6, mode="edge")
    across = sum(taps[j] * padded[:, j : j + side] for j in range(13))
    expected = sum(taps[j] * across[j : j + side] for j in range(13))
    ours = gaussian_blur(x, torch.tensor([1.7, 0.4], dtype=torch.float64), 2.0)[0, 1]
    assert np.abs(ours.numpy() - expected).max() < 1e-9


def test_an_image_is_blurred_alike_in_any_company():
    x = torch.rand(3, 3, 32, 32) * 255
    radii = torch.tensor([1.0, 2.0, 0.3])
    together = gaussian_blur(x, radii, 2.0)
    for i in range(3):
        assert (gaussian_blur(x[i : i + 1], radii[i : i + 1], 2.0) - together[i]).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(301, 500), (500, 333), (375, 500), (257, 256), (259, 256), (224, 1000), (90, 61)])
def test_the_evaluation_view_is_torchvisions(size):
    """The same rounding of the longer side and of the crop's place; a pixel's shift is a score's third digit."""
    image = smooth(4, *size)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    views = build_views("somewhere", None, view_settings(*NUMBERS))
    pixels = tensor(image)[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert (views.single_cut(pixels).float() - tensor(theirs)[0].float()).abs().mean() < 0.1


def test_hue_is_turned_as_by_colorsys():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3))
    ours = adjust_hue(torch.from_numpy(pixels.T.reshape(1, 3, 5, 10)).float(), torch.tensor([0.07]))
    for i, pixel in enumerate(pixels / 255):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        assert ours[0].reshape(3, 50)[:, i].tolist() == pytest.approx(
            [255 * c for c in colorsys.hsv_to_rgb((h + 0.07) % 1, s, v)], abs=0.01
        )


def test_boxes_keep_to_area_and_ratio_and_stay_inside():
    recipe = PhotoRecipe(size=16, scale=(0.2, 0.6))
    top, left, h, w = crop_boxes([recipe], seed=0, epoch=0, indices=np.arange(3000), view=0, height=100, width=140).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 100).all()
    assert (left + w <= 140).all()
    area = h * w / 14000
    assert 0.19 < area.min() < 0.22
    assert 0.57 < area.max() < 0.61
    assert 0.72 < (w / h).min() < 0.79
    assert 1.27 < (w / h).max() < 1.37


def test_a_box_that_never_fits_becomes_the_central_one():
    boxes = crop_boxes(
        [PhotoRecipe(size=16, scale=(0.9, 1.0))], seed=0, epoch=0, indices=np.arange(4), view=0, height=10, width=400
    )
    assert boxes.tolist() == [[0, 193, 10, 13]] * 4


@pytest.mark.parametrize("augment", ["dino", "simclr", "scan_strong", "sela_2", "sela_3"])
def test_views_belong_to_seed_epoch_image_and_view(augment):
    views = PhotoViews(photo_recipes(view_settings(2, 1, 16, 8, augment=augment)), 16)
    images = torch.cat([tensor(smooth(i)) for i in range(6)])
    whole = views(images, np.arange(6), seed=0, epoch=1)
    alone = views(images[4:5], np.array([4]), seed=0, epoch=1)
    assert all(nearly_equal(a[4], b[0]) for a, b in zip(whole, alone, strict=True))
    assert not torch.allclose(whole[0], views(images, np.arange(6), seed=0, epoch=2)[0], atol=0.1)
    assert not torch.allclose(whole[0], views(images, np.arange(6), seed=1, epoch=1)[0], atol=0.1)


def test_what_is_compiled_is_what_views_are_made_with(monkeypatch):
    used = []
    monkeypatch.setattr(photographs, "_compiled", lambda function: used.append(function) or function)
    images = torch.cat([tensor(smooth(i)) for i in range(6)])
    for augment, expected in (("dino", [jitter_at_once] * 2), ("crop_flip", [])):
        settings = view_settings(2, 0, 16, 8, augment=augment)
        plain, compiled = (
            build_views("x", None, settings, compiled=each)(images, np.arange(6), seed=0, epoch=0)
            for each in (False, True)
        )
        assert all(nearly_equal(a, b) for a, b in zip(plain, compiled, strict=True))
        assert used == expected
        used.clear()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_adjustments_at_once_are_those_one_by_one(compiled):
    rng = np.random.default_rng(0)
    at_once = torch.compile(jitter_at_once, dynamic=True) if compiled else jitter_at_once
    for size in (16, 9):  # compiled once for both
        x = torch.from_numpy(rng.uniform(0, 255, (30, 3, size, size))).float()
        order = np.concatenate([ORDERS, np.full((6, 4), NONE)])
        factors = np.array([1.0, 1.0, 1.0, 0.0]) + np.array([0.4, 0.4, 0.2, 0.1]) * rng.uniform(-1, 1, (30, 4))
        together = at_once(x, torch.from_numpy(order), torch.from_numpy(factors).float())
        one_by_one = x.clone()
        jitter(one_by_one, order, factors)
        assert (together - one_by_one).abs().max() < 1e-3
        assert torch.equal(together[24:], x[24:])
        assert ((together[:24] - x[:24]).abs().amax(dim=(1, 2, 3)) > 1).all()


@pytest.mark.parametrize(("bicubic", "filter"), [(True, Image.Resampling.BICUBIC), (False, Image.Resampling.BILINEAR)])
@pytest.mark.parametrize("width", [40, 150, 290])  # narrower and wider than the view
def test_a_workers_crop_is_pillows(bicubic, filter, width):
    image = smooth(3, 200, 300)
    recipe = PhotoRecipe(size=96, scale=(width * 100 / 60000,) * 2, ratio=(width / 100,) * 2, bicubic=bicubic)
    ((crop,),) = PhotoViews([recipe], 96).cut([tensor(image)[0]], np.array([7]), seed=0, epoch=0)
    ((top, left, height, wide),) = crop_boxes(
        [recipe], seed=0, epoch=0, indices=np.array([7]), view=0, height=200, width=300
    ).tolist()
    assert (height, wide) == (100, width)
    expected = image.crop((left, top, left + wide, top + height)).resize((96, 96), filter)
    assert crop.dtype == torch.uint8
    difference = np.abs(crop.numpy().astype(int) - np.asarray(expected).transpose(2, 0, 1))
    assert difference.mean() < 0.3
    assert np.percentile(difference, 99) <= 1


@pytest.mark.parametrize("augment", ["dino", "moco_v2", "scan_strong", "scan_self_label", "sela_0", "sela_2"])
def test_files_and_memory_give_the_same_views(augment):
    views = PhotoViews(photo_recipes(view_settings(2, 1, 16, 8, augment=augment)), 16)
    image = smooth(2)
    crops = views.cut(tensor(image), np.array([5]), seed=0, epoch=3)
    there = views.finish(crops, np.array([5]), seed=0, epoch=3)
    here = views(tensor(image), np.array([5]), seed=0, epoch=3)
    assert all((a - b).abs().mean() < 0.02 for a, b in zip(here, there, strict=True))
    single = views.single_finish(views.single_cut(tensor(image)[0])[None])
    assert (views.single(tensor(image)) - single).abs().mean() < 0.03


def test_uniforms_depend_on_each_coordinate_and_on_nothing_else():
    base = uniforms(seed=1, epoch=2, indices=np.arange(500), view=3, count=40)
    assert base.mean() == pytest.approx(0.5, abs=0.01)
    assert base.var() == pytest.approx(1 / 12, abs=0.003)
    assert np.array_equal(uniforms(seed=1, epoch=2, indices=np.array([7, 3]), view=3, count=10), base[[7, 3], :10])
    every = uniforms(seed=1, epoch=2, indices=np.array([7]), view=np.arange(5), count=10)  # the views of one image
    assert np.array_equal(every[3], base[7, :10])
    assert np.array_equal(every[4], uniforms(seed=1, epoch=2, indices=np.array([7]), view=4, count=10)[0])
    for other in (
        uniforms(seed=0, epoch=2, indices=np.arange(500), view=3, count=40),
        uniforms(seed=1, epoch=0, indices=np.arange(500), view=3, count=40),
        uniforms(seed=1, epoch=2, indices=np.arange(500), view=0, count=40),
    ):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.05

"""Views on the device beside those that Pillow makes one by one, from the same boxes and parameters; bounds in grey levels."""

import numpy as np
import pytest
import torch
from conftest import view_settings
from PIL import Image

from src.config import parse_train
from src.data import reference
from src.data.photographs import PhotoRecipe, PhotoViews
from src.data.reference import ReferenceViews
from src.data.views import build_views, photo_recipes
from src.errors import InputError

NOTHING = {"flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}


def photograph(seed, height=120, width=160):
    """Smooth shapes with some grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8))


def both(recipes, count=12):
    """(V, count, 3, size, size) grey levels of either kind, of views of the same size."""
    made = []
    for kind in (ReferenceViews, PhotoViews):
        views = kind(recipes, 64, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
        images = [torch.from_numpy(np.array(photograph(i))).permute(2, 0, 1) for i in range(count)]
        crops = views.cut(images, np.arange(count), seed=0, epoch=1)
        made.append(torch.stack(views.finish(crops, np.arange(count), seed=0, epoch=1)))
    return made


OPERATIONS = [
    # what is done, changes to a recipe that does nothing, mean absolute difference allowed
    ("crop and resize", {}, 0.3),
    ("bilinear", {"bicubic": False}, 0.3),
    ("flip", {"flip": 1.0}, 0.3),
    ("brightness", {"jitter": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, 1.0),  # Pillow rounds down
    ("contrast", {"jitter": 1.0, "brightness": 0.0, "saturation": 0.0, "hue": 0.0}, 1.0),  # Pillow rounds down
    ("saturation", {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "hue": 0.0}, 1.0),
    ("hue", {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}, 1.5),
    ("grayscale", {"grayscale": 1.0}, 0.7),
    ("blur", {"blur": 1.0}, 0.8),
    ("resized first", {"resize_first": True}, 0.4),  # rounded four times
    ("grey first", {"grayscale": 1.0, "jitter": 1.0, "grayscale_first": True}, 1.5),
    ("solarise", {"solarize": 1.0}, 1.5),  # a grey level of 127.6 is inverted by the one and not by the other
]


@pytest.mark.parametrize(("changes", "bound"), [row[1:] for row in OPERATIONS], ids=[row[0] for row in OPERATIONS])
def test_every_operation_is_pillows(changes, bound):
    recipe = PhotoRecipe(size=64, scale=(0.2, 0.8), **{**NOTHING, **changes})
    theirs, ours = both([recipe])
    difference = (theirs - ours).abs().mean()
    assert difference < bound
    assert difference > 0 or changes == {}


@pytest.mark.parametrize(
    ("augment", "mean", "highest"),
    [
        ("dino", 1.5, 8),  # solarised, with many pixels near the threshold
        ("moco_v2", 1.5, 4),
        ("swav", 2.5, 6),
        ("simclr", 1.5, 4),
        ("crop_flip", 0.3, 0.5),
        ("scan_strong", 0.05, 1),  # the strong operations are exact, what differs is the resized image
        ("scan_self_label", 0.05, 1),
        ("sela_0", 0.02, 0.05),
        ("sela_1", 0.02, 0.05),
        ("sela_2", 0.3, 0.5),
        ("sela_3", 2, 5),
    ],
)
def test_whole_recipes_are_pillows(augment, mean, highest):
    theirs, ours = both(photo_recipes(view_settings(3, 0, 64, 32, (0.2, 1.0), augment=augment)), count=40)
    each = (theirs - ours).abs().mean(dim=(2, 3, 4))
    assert each.mean() < mean
    assert each.max() < highest


def test_both_take_the_same_parameters_in_any_order():
    """An image that is one colour stays one: of every order of the jitter the two agree to a few grey levels."""
    recipe = PhotoRecipe(size=8, scale=(0.5, 0.8), **{**NOTHING, "jitter": 1.0})
    flat = [Image.new("RGB", (20, 20), (200, 90, 40)) for _ in range(200)]
    theirs, ours = (
        kind([recipe], 8, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)(
            torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in flat]),
            np.arange(200),
            seed=0,
            epoch=0,
        )[0]
        for kind in (ReferenceViews, PhotoViews)
    )
    colours = [views.mean(dim=(2, 3)) for views in (theirs, ours)]
    # a step of Pillow's hue, a 256th of the circle, is 3.75 grey levels between 200 and 40
    assert (colours[0] - colours[1]).abs().mean() < 3
    assert (colours[0] - colours[1]).abs().max() < 12
    assert colours[0].std(dim=0).min() > 10  # the images do differ


def test_hue_of_a_whole_turn_is_none():
    image = photograph(0)
    back = np.asarray(reference.hue(image, 256 / 255)).astype(int)
    assert np.abs(back - np.asarray(image.convert("HSV").convert("RGB")).astype(int)).max() == 0


def test_the_flag_chooses_them(tmp_path):
    assert isinstance(build_views("x", None, view_settings(2, 0, 32, 8), reference=True), ReferenceViews)
    options, _, _ = parse_train(["--data", str(tmp_path), "--reference-views"])
    assert options.reference_views
    with pytest.raises(InputError, match="--reference-views is for photographs"):
        parse_train(["--data", "digits", "--reference-views"])

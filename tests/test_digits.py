"""Handwritten digits: the split, and each operation of a view against its value known by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from src.data import digits
from src.data.datasets import open_data
from src.data.digits import DigitRecipe, DigitViews

STILL = DigitRecipe(rotation=0, stretch=0, shear=0, shift=0, brightness=0, noise=0)
ROTATION, HEIGHT, SHEAR, RIGHT, DOWN, BRIGHTNESS, NOISE = range(7)  # positions of the draws
INDICES = np.arange(4)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def draw(monkeypatch):
    """Make every draw ½, which changes nothing, but those named by position."""

    def choose(**chosen: float) -> None:
        def constants(seed, epoch, indices, view, count):
            numbers = np.full((len(indices), count), 0.5)
            for name, value in chosen.items():
                numbers[:, globals()[name]] = value
            return numbers

        monkeypatch.setattr(digits, "uniforms", constants)

    return choose


def view(images, recipe, indices=INDICES, seed=0, epoch=0):
    return DigitViews([recipe])(images, indices, seed=seed, epoch=epoch)[0]


def labelled():
    source = load_digits()
    return source.images, source.target


def as_ink(images):
    """What a view without any change shows: 0..255 as -1..1."""
    return 2 * images.float() / 255 - 1


# --------------------------------------------------------------------------------------------------------------------
# the data


def test_split_is_1437_and_360_images_that_together_are_all():
    splits = [open_data("digits", split) for split in ("train", "test")]
    assert [len(data) for data in splits] == [1437, 360]
    assert all(data.images.shape[1:] == (1, 8, 8) for data in splits)
    ink = load_digits().images.astype(int)  # 0..16
    expected = ((2 * 255 * ink + 16) // 32).astype(np.uint8)  # 255/16 of it, rounded
    assert sorted(image.numpy().tobytes() for data in splits for image in data.images) == sorted(
        image.tobytes() for image in expected
    )


def test_every_image_keeps_its_label():
    known = {
        (255 * image / 16).round().astype(np.uint8).tobytes(): label for image, label in zip(*labelled(), strict=True)
    }
    for split in ("train", "test"):
        data = open_data("digits", split)
        assert [known[image.numpy().tobytes()] for image in data.images] == data.labels.tolist()


def test_split_is_stratified_and_always_the_same():
    train, test = (open_data("digits", split) for split in ("train", "test"))
    totals = np.bincount(load_digits().target)
    assert train.labels.bincount().tolist() == (totals - test.labels.bincount().numpy()).tolist()
    assert np.abs(test.labels.bincount().numpy() - totals * 360 / 1797).max() < 1
    assert train.classes == list("0123456789")
    assert torch.equal(train.images, open_data("digits", "train").images)


# --------------------------------------------------------------------------------------------------------------------
# each operation alone


def test_no_strength_is_the_image_itself(images):
    assert torch.allclose(view(images, STILL), as_ink(images), atol=1e-6)
    assert torch.allclose(DigitViews([STILL]).single(images), as_ink(images), atol=1e-6)


def test_draws_in_the_middle_change_nothing_at_any_strength(images, draw):
    draw()
    assert torch.allclose(view(images, DigitRecipe()), as_ink(images), atol=1e-5)


@pytest.mark.parametrize(("drawn", "turns"), [(1.0, 1), (0.0, -1)])
def test_rotation_by_90_degrees(images, draw, drawn, turns):
    draw(ROTATION=drawn)
    turned = view(images, replace(STILL, rotation=90))
    assert torch.allclose(turned, as_ink(images).rot90(turns, dims=(2, 3)), atol=1e-5)


@pytest.mark.parametrize("drawn", [1.0, 0.0])
def test_rotation_is_in_degrees_and_leaves_the_centre(draw, drawn):
    draw(ROTATION=drawn)
    point = torch.zeros(4, 1, 9, 9, dtype=torch.uint8)
    point[:, :, 4, 8] = point[:, :, 4, 4] = 255
    turned = (view(point, replace(STILL, size=9, rotation=45)) + 1) / 2
    assert torch.allclose(turned[:, :, 4, 4], torch.tensor(1.0), atol=1e-5)
    row, column = divmod(turned[0, 0].flatten().argsort()[-2].item(), 9)
    assert (row, column) in ({(1, 7)} if drawn else {(7, 7)})  # 4 / sqrt(2) = 2.8 pixels up or down, and to the right


@pytest.mark.parametrize(
    ("position", "drawn", "moved"),
    [("RIGHT", 1.0, (0, -1)), ("RIGHT", 0.0, (0, 1)), ("DOWN", 1.0, (-1, 0)), ("DOWN", 0.0, (1, 0))],
)
def test_shift_by_an_eighth_is_one_pixel_with_paper_behind(images, draw, position, drawn, moved):
    draw(**{position: drawn})
    expected = torch.full((4, 1, 8, 8), -1.0)
    rows, columns = ((slice(max(m, 0), 8 + min(m, 0)), slice(max(-m, 0), 8 + min(-m, 0))) for m in moved)
    expected[:, :, rows[0], columns[0]] = as_ink(images)[:, :, rows[1], columns[1]]
    assert torch.allclose(view(images, replace(STILL, shift=1 / 8)), expected, atol=1e-5)


RAMP = torch.arange(8).mul(20).to(torch.uint8).expand(4, 1, 8, 8)  # 20 grey levels a pixel, to the right


@pytest.mark.parametrize(("drawn", "factor"), [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75)])
def test_stretch_multiplies_the_height_at_which_the_image_is_read(draw, drawn, factor):
    recipe = replace(STILL, stretch=0.5)
    expected = 2 * 20 * (3.5 + factor * (torch.arange(8) - 3.5)) / 255 - 1
    draw(HEIGHT=drawn)
    assert torch.allclose(view(RAMP.mT, recipe), expected.expand(4, 1, 8, 8).mT, atol=1e-5)
    assert torch.allclose(view(RAMP, recipe), as_ink(RAMP), atol=1e-5)  # the width is left alone


@pytest.mark.parametrize(("drawn", "slope"), [(1.0, 0.2), (0.0, -0.2)])
def test_shear_shifts_each_row_by_its_height(draw, drawn, slope):
    draw(SHEAR=drawn)
    down, right = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    expected = 2 * 20 * (3.5 + right + slope * down) / 255 - 1
    inside = slice(1, 7)  # the shift is at most 0.7 pixels
    sheared = view(RAMP, replace(STILL, shear=0.2))
    assert torch.allclose(sheared[..., inside], expected[:, inside].expand(4, 1, 8, 6), atol=1e-5)


@pytest.mark.parametrize(("drawn", "factor"), [(1.0, 1.3), (0.0, 0.7), (0.75, 1.15)])
def test_brightness_scales_the_ink_and_leaves_the_paper(images, draw, drawn, factor):
    draw(BRIGHTNESS=drawn)
    expected = 2 * factor * images.float() / 255 - 1
    assert torch.allclose(view(images, replace(STILL, brightness=0.3)), expected, atol=1e-5)


@pytest.mark.parametrize(("drawn", "deviations"), [(0.8413447, 1.0), (0.0227501, -2.0), (0.5, 0.0)])
def test_noise_is_the_normal_quantile_of_its_draw(images, draw, drawn, deviations):
    draw(NOISE=drawn)
    noisy = view(images, replace(STILL, noise=0.1))
    expected = as_ink(images)
    expected[:, :, 0, 0] += 2 * 0.1 * deviations
    assert torch.allclose(noisy, expected, atol=1e-4)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_the_most_extreme_draw_is_finite_noise(images, draw, drawn):
    draw(NOISE=drawn)
    assert 3 < ((view(images, replace(STILL, noise=1.0)) - as_ink(images))[:, 0, 0, 0].abs() / 2).max() < 6


def test_noise_is_normal_and_each_pixel_has_its_own():
    paper = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    noise = (view(paper, replace(STILL, noise=0.1), np.arange(2000)) + 1) / 2 / 0.1
    assert abs(noise.mean()) < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.15)  # of the normal distribution; 1.8 of the uniform
    correlation = torch.corrcoef(noise.flatten(1).T) - torch.eye(64)
    assert correlation.abs().max() < 0.1


def test_nothing_is_mirrored():
    """A dark left half stays left of a light right half, whatever is drawn; a mirrored digit is another sign."""
    halves = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    halves[..., :4] = 255
    for index, shown in enumerate((halves, halves.mT)):
        ink = view(shown, replace(DigitRecipe(), noise=0.0), np.arange(500))
        ink = ink if index == 0 else ink.mT
        assert (ink[..., :4].sum(dim=(1, 2, 3)) > ink[..., 4:].sum(dim=(1, 2, 3))).all()


def test_ink_stays_within_what_brightness_allows():
    full = torch.full((500, 1, 8, 8), 255, dtype=torch.uint8)
    ink = view(full, replace(DigitRecipe(), noise=0.0), np.arange(500))
    assert ink.min() >= -1 - 1e-6
    assert 1.55 < ink.max() <= 2 * 1.3 - 1 + 1e-5
    assert ink[:, 0, 3:5, 3:5].min() >= 2 * 0.7 - 1 - 1e-5  # the middle is never left for paper


@pytest.mark.parametrize("size", [5, 8, 12, 16])
def test_every_view_has_the_size_of_its_recipe(images, size):
    views = DigitViews([DigitRecipe(size=8), DigitRecipe(size=size)])
    assert [tuple(x.shape) for x in views(images, INDICES, seed=0, epoch=0)] == [(4, 1, 8, 8), (4, 1, size, size)]
    assert DigitViews([DigitRecipe(size=size)]).single(images).shape == (4, 1, size, size)
    assert all(x.dtype == torch.float32 for x in views(images, INDICES, seed=0, epoch=0))


def test_enlarging_to_twice_the_size_interpolates(images):
    ink = as_ink(images)
    large = view(images, replace(STILL, size=16))
    # Output pixel 3 lies a quarter of a pixel right of input pixel 1.
    across = 0.75 * ink[..., 1] + 0.25 * ink[..., 2]
    expected = 0.75 * across[:, :, 1] + 0.25 * across[:, :, 2]
    assert torch.allclose(large[:, :, 3, 3], expected, atol=1e-5)
    assert torch.allclose(DigitViews([replace(STILL, size=16)]).single(images)[:, :, 3, 3], expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# randomness


def test_a_view_does_not_depend_on_its_batch(images):
    order = np.array([2, 0, 3, 1])
    whole = view(images, DigitRecipe(), np.array([7, 8, 9, 10]), seed=3, epoch=5)
    mixed = view(images[order], DigitRecipe(), np.array([7, 8, 9, 10])[order], seed=3, epoch=5)
    alone = view(images[1:2], DigitRecipe(), np.array([8]), seed=3, epoch=5)
    # products of matrices of another size may be rounded otherwise
    torch.testing.assert_close(mixed, whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-5)


def test_seed_epoch_index_and_view_each_change_what_is_drawn(images):
    same = images[:1].expand(4, 1, 8, 8)
    views = DigitViews([DigitRecipe(), DigitRecipe()])
    first, second = views(same, INDICES, seed=1, epoch=2)
    again, _ = views(same, INDICES, seed=1, epoch=2)
    assert torch.equal(first, again)
    others = [
        second,
        views(same, INDICES, seed=2, epoch=2)[0],
        views(same, INDICES, seed=1, epoch=3)[0],
        views(same, INDICES + 4, seed=1, epoch=2)[0],
    ]
    others += [views(same, INDICES, seed=2, epoch=1)[0]]  # seed and epoch are not simply added
    for other in others:
        assert ((first - other).abs().amax(dim=(1, 2, 3)) > 0.05).all()
    assert all((first[i] - first[j]).abs().max() > 0.05 for i in range(4) for j in range(i))


@pytest.mark.parametrize("amount", [field.name for field in fields(DigitRecipe) if field.name != "size"])
def test_each_amount_matters_and_images_get_their_own(amount):
    same = open_data("digits", "test").images[:1].expand(64, 1, 8, 8)
    recipe = replace(STILL, **{amount: getattr(DigitRecipe(), amount)})
    change = (view(same, recipe, np.arange(64)) - as_ink(same)).abs().mean(dim=(1, 2, 3))
    assert change.mean() > 0.01
    assert len(change.unique()) == 64


def test_strengths_are_drawn_from_both_sides_alike(images):
    full = torch.full((4000, 1, 1, 1), 255, dtype=torch.uint8)
    factor = (view(full, replace(STILL, size=1, brightness=0.3), np.arange(4000)).flatten() + 1) / 2
    assert (factor.min().item(), factor.max().item()) == pytest.approx((0.7, 1.3), abs=0.002)
    assert factor.mean().item() == pytest.approx(1, abs=0.01)
    assert factor.std().item() == pytest.approx(0.6 / math.sqrt(12), rel=0.03)

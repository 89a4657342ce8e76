"""Maps of features: which images they show, and where."""

import numpy as np
import pytest

from src.errors import InputError
from src.evaluation.maps import choose_images, name_directions, tsne, two_directions


def test_images_of_randomly_chosen_classes_are_shown_the_same_for_the_same_seed():
    labels = np.array([3, 1, -1, 7, 3, 5, 1, 7, -1, 5])
    first = choose_images(labels, 2, seed=0)
    assert len(np.unique(labels[first])) == 2
    assert np.array_equal(first, np.flatnonzero(np.isin(labels, labels[first])))  # all images of both
    assert np.array_equal(first, choose_images(labels, 2, seed=0))
    assert len({tuple(choose_images(labels, 2, seed=s)) for s in range(60)}) == 6  # every pair of four classes


@pytest.mark.parametrize("num_classes", [0, 4, 9])
def test_all_classes_are_shown_if_asked_for_or_if_there_are_no_more(num_classes):
    labels = np.array([3, 1, -1, 7, 3, 5])
    assert choose_images(labels, num_classes, seed=0).tolist() == [0, 1, 3, 4, 5]


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="needs three, there are 2"):
        choose_images(np.array([0, -1, 1]), 0, seed=0)


@pytest.mark.parametrize("size", [1, 40])
def test_images_that_are_alike_land_together(size):
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(size, 16)) + offset for offset in (0, 30, 60)]).astype(np.float32)
    points = tsne(features)
    assert points.shape == (3 * size, 2)
    assert np.array_equal(points, tsne(features))
    if size > 1:
        centres = points.reshape(3, size, 2).mean(axis=1)
        distances = np.linalg.norm(points[:, None] - centres, axis=2)
        assert (distances.argmin(axis=1) == np.arange(3).repeat(size)).all()


def test_two_directions_are_those_of_the_singular_vectors():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 6)) * [1, 5, 0.2, 9, 1, 1] + 100).astype(np.float32)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centred)
    points, shares = two_directions(features)
    assert np.allclose(np.abs(points), np.abs(centred @ directions[:2].T), atol=1e-9)
    assert np.allclose(shares, (singular**2 / (singular**2).sum())[:2])


@pytest.mark.parametrize(("shape", "expected"), [((5, 1), [1, 0]), ((1, 4), [0, 0])])
def test_a_direction_that_does_not_exist_is_zero(shape, expected):
    points, shares = two_directions(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    assert points.shape == (shape[0], 2)
    assert (points[:, 1] == 0).all()
    assert shares.tolist() == pytest.approx(expected)


def test_directions_are_named_with_their_share_of_the_variance():
    assert name_directions(np.array([0.4312, 0.0])) == (
        "first principal direction, 43.1 % of the variance",
        "second principal direction, 0.0 % of the variance",
    )

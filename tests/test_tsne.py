"""t-SNE figures: which images, which features, where they land."""

import numpy as np
import pytest

from src.config import InputError
from src.evaluation.tsne import choose_images, project


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
    with pytest.raises(InputError, match="only 2 with a label"):
        choose_images(np.array([0, -1, 1]), 0, seed=0)


@pytest.mark.parametrize("size", [1, 40])
def test_images_that_are_alike_land_together(size):
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(size, 16)) + offset for offset in (0, 30, 60)]).astype(np.float32)
    points = project(features)
    assert points.shape == (3 * size, 2)
    assert np.array_equal(points, project(features))
    if size > 1:
        centres = points.reshape(3, size, 2).mean(axis=1)
        distances = np.linalg.norm(points[:, None] - centres, axis=2)
        assert (distances.argmin(axis=1) == np.arange(3).repeat(size)).all()

"""Features in the plane: by t-SNE, as in the figures of Self-Classifier's first generation (arXiv:2103.10994v1), and by the
two directions with the largest variance."""

import numpy as np

from ..errors import InputError


def choose_images(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Return the positions of all images of `num_classes` random classes, in ascending order (0: of all classes).

    Args:
        labels: (N,) class or cluster of every image, -1 if unknown. Images with -1 are never chosen.

    Raises:
        InputError: if there are fewer than three such images.
    """
    classes = np.unique(labels[labels >= 0])
    if 0 < num_classes < len(classes):
        classes = np.random.default_rng(seed).choice(classes, num_classes, replace=False)
    chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) < 3:
        raise InputError(f"--tsne places images by their neighbours and needs three, there are {len(chosen)}: drop it")
    return chosen


def tsne(features: np.ndarray) -> np.ndarray:
    """Compute scikit-learn's t-SNE in two dimensions with random state 0, (N, F) → (N, 2).

    The perplexity is 30, or less for fewer than 91 images.
    """
    from sklearn.manifold import TSNE  # slow to import

    return TSNE(perplexity=min(30.0, max((len(features) - 1) / 3, 1.0)), random_state=0).fit_transform(features)


def two_directions(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components, (N, F) → (N, 2), and their shares of the variance, (2,).

    A component that does not exist is zero.
    """
    centred = features - features.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    points = centred @ directions[:, :-3:-1]
    missing = 2 - points.shape[1]
    shares = variances[:-3:-1].clip(min=0) / max(variances.clip(min=0).sum(), 1e-300)
    return np.pad(points, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def name_directions(shares: np.ndarray) -> tuple[str, str]:
    """Return the axis labels of a map of principal components, given their shares of the variance, (2,)."""
    first, second = (f"{100 * share:.1f} % of the variance" for share in shares)
    return f"first principal direction, {first}", f"second principal direction, {second}"

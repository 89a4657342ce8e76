"""Numbers about clusters and features that need no labels."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..metrics import adjusted_mutual_information, contingency


def agreement(clusters: np.ndarray, sizes: list[int]) -> dict[int, tuple[float, int]]:
    """Measure how far classifiers of the same size find the same clusters.

    Args:
        clusters: (K, N) cluster of every image by each classifier.
        sizes: number of clusters of each classifier.

    Returns:
        {size: (mean AMI over all pairs of classifiers of this size, number of pairs)}. A size that only one classifier has is
        left out. So are classifiers that put all images into one cluster, because any two of them agree.
    """
    found = {}
    for size in dict.fromkeys(sizes):
        rows = [row for row, own in zip(clusters, sizes, strict=True) if own == size]
        rows = [row for row in rows if len(np.unique(row)) > 1]
        pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
        if pairs:
            scores = [adjusted_mutual_information(contingency(a, b)[2]) for a, b in pairs]
            found[size] = float(np.mean(scores)), len(pairs)
    return found


def align(clusters: np.ndarray, reference: np.ndarray, size: int) -> np.ndarray:
    """Find the new number of each cluster that gives as many images as possible the number they have in `reference`.

    Args:
        clusters, reference: (N,) in [0, C), where C is `size`.

    Returns:
        (C,) new number of each cluster, a permutation.
    """
    counts = np.bincount(clusters * size + reference, minlength=size * size).reshape(size, size)
    return linear_sum_assignment(counts, maximize=True)[1]


def rankme(features: Tensor) -> float:
    """Compute RankMe, the effective rank of (N, F) features: exp of the entropy of their singular values, in [1, F].

    Garrido et al., "RankMe", ICML 2023, arXiv:2210.02885, equation 3. The features are neither centred nor normalised. The
    singular values are the roots of the eigenvalues of the F × F matrix of products, which is summed in float64 over chunks
    of rows.
    """
    products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(65536):
        rows = rows.double()
        products.addmm_(rows.T, rows)
    values = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300) + 1e-7  # the constant of the paper
    return torch.exp(-(shares * shares.log()).sum()).item()


def silhouette(features: Tensor, clusters: np.ndarray, *, sample: int = 5000, seed: int = 0) -> float | None:
    """Compute the mean silhouette of random images with Euclidean distances, in [-1, 1].

    The silhouette is 1 if clusters are far apart and 0 if they touch.

    Args:
        features: (N, F).
        clusters: (N,) cluster of every image.
        sample: number of images to draw.
        seed: seed of the draw.

    Returns:
        The mean, or None if all images drawn are in one cluster or each of them is in another cluster.
    """
    from sklearn.metrics import silhouette_score  # slow to import

    rows = np.sort(np.random.default_rng(seed).permutation(len(clusters))[:sample])
    if not 1 < len(np.unique(clusters[rows])) < len(rows):
        return None
    return float(silhouette_score(features[torch.from_numpy(rows)].cpu().numpy(), clusters[rows]))

"""What can be said about clusters and features without a label."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..metrics import adjusted_mutual_information, contingency


def agreement(clusters: np.ndarray, sizes: list[int]) -> dict[int, tuple[float, int]]:
    """How far classifiers of one size find the same clusters: {size: (mean AMI of all pairs, number of pairs)}.

    Args:
        clusters: (K, N) cluster of every image by each classifier.
        sizes: number of clusters of each. One that no other shares is left out; so is a classifier that puts all images into
            one cluster, in which any two would agree.
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
    """Rename clusters so that as many images as possible are in clusters of the same name: (C,) new name of each.

    Args:
        clusters, reference: (N,) in [0, C), C being `size`.
    """
    counts = np.bincount(clusters * size + reference, minlength=size * size).reshape(size, size)
    return linear_sum_assignment(counts, maximize=True)[1]


def rankme(features: Tensor) -> float:
    """In how many directions features spread: exp of the entropy of their singular values, in [1, F].

    Garrido et al., "RankMe", ICML 2023, arXiv:2210.02885, equation 3, of (N, F) features as they are. By the eigenvalues of
    the F × F products in float64, chunk by chunk.
    """
    products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(65536):
        rows = rows.double()
        products.addmm_(rows.T, rows)
    values = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300) + 1e-7  # the paper's own constant
    return torch.exp(-(shares * shares.log()).sum()).item()


def silhouette(features: Tensor, clusters: np.ndarray, *, sample: int = 5000, seed: int = 0) -> float | None:
    """Mean silhouette of images drawn at random, in [-1, 1]: 1 if clusters are far apart, 0 if they touch, by Euclidean
    distance. None if the images drawn are of one cluster, or all of different ones."""
    from sklearn.metrics import silhouette_score  # slow to import

    rows = np.sort(np.random.default_rng(seed).permutation(len(clusters))[:sample])
    if not 1 < len(np.unique(clusters[rows])) < len(rows):
        return None
    return float(silhouette_score(features[torch.from_numpy(rows)].cpu().numpy(), clusters[rows]))

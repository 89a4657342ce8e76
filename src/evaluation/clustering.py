"""Unsupervised classification: how well clusters agree with classes that training never saw.

Protocol of Self-Classifier, arXiv:2103.10994v3: one unaugmented central view per image, evaluation mode, the cluster is the
arg-max of a classifier; NMI, AMI and ARI with arithmetic means, ACC after Hungarian matching. Labels serve the score alone.
"""

import numpy as np
import torch

from ..data.datasets import Images
from ..data.loaders import Views, single_views
from ..features import predict_clusters
from ..metrics import clustering_scores

SCORES = ("acc", "nmi", "ami", "ari")


def score_classifiers(labels: np.ndarray, clusters: np.ndarray) -> list[dict]:
    """`clustering_scores` of each classifier's clusters, (K, N), on the images that have a label, with `used` clusters."""
    known = labels >= 0
    return [{**clustering_scores(labels[known], row[known]), "used": len(np.unique(row))} for row in clusters]


def kmeans_on_pixels(train: np.ndarray, test: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """The baseline that any method must beat: k-means on raw pixels, ten starts, fitted on the training images.

    Args:
        train, test: (N, ...) images of one size.

    Returns:
        (N_test,) cluster of each test image.
    """
    from sklearn.cluster import KMeans  # slow to import

    flat = [images.reshape(len(images), -1).astype(np.float64) for images in (train, test)]
    return KMeans(num_clusters, n_init=20, random_state=seed).fit(flat[0]).predict(flat[1])


def evaluate(
    method,
    data: Images,
    views: Views,
    batch_size: int,
    device: torch.device,
    classifier: int,
    autocast: torch.dtype | None = None,
    workers: int = -1,
) -> dict[str, float]:
    """Score one classifier on a split, for the log of a run: acc, nmi, ami, ari; empty if the split has no labels."""
    if not (data.labels >= 0).any():
        return {}
    clusters, _ = predict_clusters(method, single_views(data, views, batch_size, device, workers), len(data), autocast)
    scores = score_classifiers(data.labels.numpy(), clusters[[classifier]])[0]
    return {name: scores[name] for name in SCORES}

"""Unsupervised classification: how well clusters agree with classes that training never saw.

Protocol of Self-Classifier, arXiv:2103.10994v3: one unaugmented central view per image, evaluation mode, the cluster is the
arg-max of a classifier; NMI, AMI and ARI with arithmetic means, ACC after Hungarian matching. Labels serve the score alone.
"""

import numpy as np
import torch

from ..data.datasets import Images
from ..data.loaders import Views, single_views
from ..features import predict_clusters
from ..metrics import clustering_scores, superclass_accuracy

SCORES = ("acc", "nmi", "ami", "ari")


def score_classifiers(labels: np.ndarray, clusters: np.ndarray) -> list[dict]:
    """`clustering_scores` of each classifier's clusters, (K, N), on the images that have a label, with `used` clusters."""
    known = labels >= 0
    return [{**clustering_scores(labels[known], row[known]), "used": len(np.unique(row))} for row in clusters]


def score_superclasses(
    labels: np.ndarray, clusters: np.ndarray, class_to_superclass: dict[int, int]
) -> dict[str, dict]:
    """Score clusters by two protocols on the images whose class has a superclass.

    "published": as the authors did. Clusters are matched with classes, both are renamed to superclasses, and `acc` counts
    what then agrees; `nmi`, `ami` and `ari` stay those of the classes. "throughout": the labels are superclasses from the
    start, clusters are matched with them by the over-clustering rule, and all four scores are about them.

    Args:
        labels: (N,) class of every image, -1 where unknown.
        clusters: (N,) cluster of every image.
        class_to_superclass: {class: superclass}, of some classes, at least one of them with an image.
    """
    belongs = np.isin(labels, list(class_to_superclass))
    labels, clusters = labels[belongs], clusters[belongs]
    published = clustering_scores(labels, clusters) | {
        "acc": superclass_accuracy(labels, clusters, class_to_superclass)
    }
    throughout = clustering_scores(np.array([class_to_superclass[label] for label in labels.tolist()]), clusters)
    return {
        "published": {name: published[name] for name in SCORES},
        "throughout": {name: throughout[name] for name in SCORES},
    }


def kmeans_on_pixels(*, train: np.ndarray, test: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """The baseline that any method must beat: k-means on raw pixels, twenty starts, fitted on the training images.

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
    *,
    batch_size: int,
    device: torch.device,
    classifier: int,
    autocast: torch.dtype | None = None,
    workers: int = -1,
) -> dict[str, float]:
    """Score one classifier on a split, for the log of a run: acc, nmi, ami, ari; empty if the split has no labels."""
    if not (data.labels >= 0).any():
        return {}
    batches = single_views(data, views, batch_size=batch_size, device=device, workers=workers)
    clusters, _, _ = predict_clusters(method, batches, len(data), autocast=autocast)
    scores = score_classifiers(data.labels.numpy(), clusters[[classifier]])[0]
    return {name: scores[name] for name in SCORES}

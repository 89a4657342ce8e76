"""Unsupervised classification: scores of clusters against classes that training never saw.

Protocol of Self-Classifier, arXiv:2103.10994v3: one unaugmented central view per image, in evaluation mode. The cluster of an
image is the arg-max of a classifier. NMI and AMI use arithmetic means, ACC uses Hungarian matching. Only the scores use labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.base import Views
from ..data.datasets import Images
from ..data.loaders import single_views
from ..features import extract, predict_clusters
from ..methods import Method
from ..metrics import balance, clustering_scores, knn_top, superclass_accuracy

SCORES = ("acc", "nmi", "ami", "ari")


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The clusters of N images by K classifiers, or by k-means, for which K is 1.

    Attributes:
        names: names of the classifiers.
        sizes: number of clusters of each classifier, including clusters without images.
        clusters: (K, N) cluster of every image.
        confidences: (K, N) in [0, 1]: the probability of the cluster, or for k-means 1 - distance / distance to the second
            nearest centroid.
        weights: (C_k,) mean probability of each cluster, one array per classifier; None for k-means.
        chosen: number of the classifier whose clusters are scored.
        chosen_by: the reason for this choice.
        protocol: description of the protocol.
        settings: settings of k-means; None for classifiers.
        ensemble: the members of the ensemble of the chosen classifier, and the clusters of the ensemble, (N,).
        features: (N, F) features of the images, if k-means has computed them.
        log_sums: (K, N) minus the sum of the log probabilities of each image; None for k-means.
    """

    names: list[str]
    sizes: list[int]
    clusters: np.ndarray
    confidences: np.ndarray
    weights: list[np.ndarray] | None
    chosen: int
    chosen_by: str
    protocol: str
    settings: dict[str, Any] | None = None
    ensemble: tuple[list[int], np.ndarray] | None = None
    features: Tensor | None = None
    log_sums: np.ndarray | None = None

    def counts(self, k: int) -> np.ndarray:
        """Return the number of images in each cluster of classifier k, (C_k,)."""
        return np.bincount(self.clusters[k], minlength=self.sizes[k])

    def balances(self, k: int) -> dict[str, float]:
        """Return the hard and the soft balance of classifier k. k-means has no probabilities and only the hard balance."""
        found = {"balance_hard": balance(self.counts(k))}
        return found if self.weights is None else {**found, "balance_soft": balance(self.weights[k])}


def score_classifiers(labels: np.ndarray, clusters: np.ndarray) -> list[dict]:
    """Compute `clustering_scores` for each of K classifiers.

    Args:
        labels: (N,) class of every image, -1 where unknown. Images without a label do not enter the scores.
        clusters: (K, N) cluster of every image by each classifier.

    Returns:
        The scores of each classifier, and in `used` the number of clusters with images, labelled or not.
    """
    known = labels >= 0
    return [{**clustering_scores(labels[known], row[known]), "used": len(np.unique(row))} for row in clusters]


def score_superclasses(
    labels: np.ndarray, clusters: np.ndarray, class_to_superclass: dict[int, int]
) -> dict[str, dict]:
    """Score clusters by two protocols on the images whose class has a superclass.

    "published" is the protocol of the authors. It matches clusters with classes, replaces both by their superclasses, and
    computes `acc` from the result; `nmi`, `ami` and `ari` are those of the classes. "throughout" replaces the labels by
    superclasses first and matches clusters with superclasses by the over-clustering rule; all four scores refer to
    superclasses.

    Args:
        labels: (N,) class of every image, -1 where unknown.
        clusters: (N,) cluster of every image.
        class_to_superclass: {class: superclass}. Not every class needs to be in it, but at least one class with an image.
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
    """Cluster test images by k-means on raw pixels, fitted on the training images with 20 starts.

    This is the baseline that every method must beat.

    Args:
        train, test: (N, ...) images of one size.

    Returns:
        (N_test,) cluster of each test image.
    """
    from sklearn.cluster import KMeans  # slow to import

    flat = [images.reshape(len(images), -1).astype(np.float64) for images in (train, test)]
    return KMeans(num_clusters, n_init=20, random_state=seed).fit(flat[0]).predict(flat[1])


def evaluate(
    method: Method,
    data: Images,
    views: Views,
    *,
    batch_size: int,
    device: torch.device,
    classifier: int,
    autocast: torch.dtype | None = None,
    workers: int = -1,
) -> dict[str, float]:
    """Score one classifier on a split for the log of a run.

    Args:
        classifier: number of the classifier.
        autocast: dtype of the network in mixed precision, or None.
        workers: number of processes per rank that decode files; -1: one per available core.

    Returns:
        acc, nmi, ami and ari as fractions, or nothing if the split has no labels.
    """
    if not (data.labels >= 0).any():
        return {}
    batches = single_views(data, views, batch_size=batch_size, device=device, workers=workers)
    clusters, *_ = predict_clusters(method, batches, len(data), autocast=autocast)
    scores = score_classifiers(data.labels.numpy(), clusters[[classifier]])[0]
    return {name: scores[name] for name in SCORES}


def nearest_score(
    method: Method,
    bank: Images,
    data: Images,
    *,
    views: Views,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Score the embeddings of a method without classifiers by their nearest neighbours, for the log of a run.

    Protocol of SCAN's first step, arXiv:2005.12320: 100 neighbours among the training images, weighted by
    exp(similarity / 0.1).

    Args:
        bank: the training images.
        data: the images that are scored.

    Returns:
        knn, the top-1 accuracy as a fraction, or nothing if one of the two splits has no labels.
    """
    if not (data.labels >= 0).any() or not (bank.labels >= 0).any():
        return {}
    found = []
    for split, images in (("train", bank), ("test", data)):
        rows = extract(
            method, images, views, split=split, layer="head", batch_size=batch_size, device=device, autocast=autocast
        )
        known = images.labels >= 0
        found += [rows[known].to(device), images.labels[known].to(device)]
    k = min(100, len(found[0]))
    top1, _ = knn_top(found[0], found[1], found[2], found[3], ks=(k,), tau=0.1)[k]
    return {"knn": top1}

"""How far to trust clusters, without labels: the partition, each cluster and each image, judged separately.

A network can be sure of a wrong partition, for example one that puts two classes into one cluster. So the confidence of an image
says nothing about the partition. Other heads do: two heads with the same partition differ only where one of them errs. If their
mean confidences p and q are right, that is at most a share (1 - p) + (1 - q) of the images. Heads that differ on more do not
have the same partition, and at least one of them is wrong or surer than it should be.

Heads of the same run share their features and may share a mistake. Only independent runs, with other seeds, can confirm a
partition. The levels are the words "green", "yellow" and "red".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..neighbors import nearest
from .clustering import Clustering
from .quality import align

GREEN, YELLOW, RED = "green", "yellow", "red"
LOWER = 0.05  # a loss is lower than another one if the relative difference is larger
LEVELS = {GREEN: "good", YELLOW: "unsure", RED: "bad"}  # as the atlas calls them
SAMPLE = 5_000  # images whose neighbours are searched
NEIGHBOURS = 10
CLEAR = 0.95  # share of the draws from which on a match is clear
SURE, UNSURE = 0.9, 0.6  # confidences of images and qualities of clusters from which on they are green, and yellow


@dataclass(frozen=True, kw_only=True)
class Head:
    """What one classifier finds.

    Attributes:
        clusters: (N,) cluster of every image.
        confidence: mean probability of these clusters.
        loss: its training loss; None if unknown.
        probabilities: (N, C), if they are needed.
    """

    clusters: np.ndarray
    confidence: float
    loss: float | None = None
    probabilities: np.ndarray | None = None


def agreement_of(one: Head, other: Head, size: int) -> tuple[float, float]:
    """Compare two heads with C clusters each.

    Args:
        size: C.

    Returns:
        The share of the images on which they agree after their clusters are matched, and the share on which two heads with
        the same partition would agree at least, p + q - 1.
    """
    share = float((align(other.clusters, one.clusters, size)[other.clusters] == one.clusters).mean())
    return share, one.confidence + other.confidence - 1


def judge_partition(own: Head, *, same_run: Sequence[Head], independent: Sequence[Head], size: int) -> dict[str, Any]:
    """Judge the partition of one head.

    It is red if most independent runs have another partition, or if a head of the same run with a lower loss has. It is green
    if most independent runs, and none of those heads, confirm it. Otherwise, as without an independent run, it is yellow.

    Args:
        same_run: other heads of the same run with C clusters.
        independent: one head of each other run with C clusters.
        size: C.

    Returns:
        level, reason, and how many heads of either kind there are and confirm the partition.
    """

    def confirms(other: Head) -> bool:
        share, least = agreement_of(own, other, size)
        return share >= least

    beside = [other for other in same_run if confirms(other)]
    confirmed = sum(map(confirms, independent))
    better = [
        other
        for other in same_run
        if own.loss is not None and other.loss is not None and other.loss < (1 - LOWER) * own.loss
    ]
    rivals = [other for other in better if not confirms(other)]
    counts = f"{confirmed} of {len(independent)} independent runs"
    if rivals:
        level, reason = RED, "a classifier of the same run with another partition has a lower loss"
    elif independent and 2 * confirmed < len(independent):
        level, reason = RED, f"only {counts} have this partition"
    elif 2 * confirmed > len(independent):
        level, reason = GREEN, f"{counts} have this partition"
    elif independent:
        level, reason = YELLOW, f"{counts} have this partition"
    else:
        level, reason = (
            YELLOW,
            "no independent run to compare with: train with another seed and give cls_eval.py --compare",
        )
    return {
        "level": level,
        "reason": reason,
        "same_run": len(same_run),
        "same_run_confirms": len(beside),
        "independent": len(independent),
        "independent_confirms": confirmed,
    }


def judge_clusters(
    clusters: np.ndarray, *, others: Sequence[np.ndarray], neighbours: np.ndarray | None, size: int
) -> list[dict[str, Any]]:
    """Judge each cluster.

    Args:
        clusters: (N,) cluster of every image.
        others: (N,) clusters of the same images by other heads with C clusters.
        neighbours: (N, k) positions of the nearest images of every image; None: unknown.
        size: C.

    Returns:
        One entry per cluster: `images`; `stability`, the share of its images that the other heads keep together, or None;
        `neighbours`, the share of the neighbours of its images that are in it, or None; and the level, which is None for a
        cluster without images and follows the lower one of both.
    """
    kept = [align(other, clusters, size)[other] == clusters for other in others]
    stable = np.mean(kept, axis=0) if kept else None
    inside = None if neighbours is None else (clusters[neighbours] == clusters[:, None]).mean(axis=1)
    judged = []
    for cluster in range(size):
        own = clusters == cluster
        shares = [None if values is None or not own.any() else float(values[own].mean()) for values in (stable, inside)]
        known = [share for share in shares if share is not None]
        judged.append(
            {
                "cluster": cluster,
                "images": int(own.sum()),
                "stability": shares[0],
                "neighbours": shares[1],
                "level": level_of(min(known)) if known else None,
            }
        )
    return judged


def calibrated(own: Head, references: Sequence[Head], size: int) -> np.ndarray:
    """Return for every image how likely its cluster is right, by heads of independent runs.

    It is the mean probability that the references give to the clusters that match that of the image. If the head has a wrong
    partition, its own probabilities are too high, and these are not. For a cluster that holds two classes, nothing tells which
    of them it stands for. So matches are made for random draws of the images with replacement, and if they differ, all images
    of the cluster get its mean.

    Args:
        own: N images.
        references: with probabilities (N, C).
        size: C.

    Returns:
        (N,) in [0, 1].
    """
    found = np.zeros(len(own.clusters))
    for other in references:
        assert other.probabilities is not None
        weights = _matches(own.clusters, other.clusters, size)
        each = np.einsum("nc,nc->n", weights[own.clusters], other.probabilities)
        for cluster in np.flatnonzero(weights.max(axis=1) < CLEAR):
            members = own.clusters == cluster
            each[members] = each[members].mean() if members.any() else 0
        found += each
    return found / len(references)


def _matches(clusters: np.ndarray, reference: np.ndarray, size: int, *, draws: int = 40) -> np.ndarray:
    """Return how often each cluster is matched with each cluster of the reference in draws of the images, (C, C) in [0, 1]."""
    counts = np.bincount(clusters * size + reference, minlength=size * size)
    generator, weights = np.random.default_rng(0), np.zeros((size, size))
    for _ in range(draws):
        drawn = generator.multinomial(len(clusters), counts / len(clusters)).reshape(size, size)
        rows, columns = linear_sum_assignment(drawn, maximize=True)
        weights[rows, columns] += 1 / draws
    return weights


def judge_images(confidences: np.ndarray, *, by: int = 0) -> dict[str, Any]:
    """Summarise the confidences of images.

    Args:
        confidences: (N,) in [0, 1].
        by: number of independent runs that have calibrated them; 0: they are those of the head itself.

    Returns:
        expected_accuracy: their mean, which is the accuracy that a good partition has; the shares of the levels; and `by`.
    """
    green, yellow = confidences >= SURE, confidences >= UNSURE
    return {
        "expected_accuracy": float(confidences.mean()),
        GREEN: float(green.mean()),
        YELLOW: float((yellow & ~green).mean()),
        RED: float((~yellow).mean()),
        "calibrated_by": by,
    }


def judge(
    found: Clustering, *, history: Sequence[dict[str, Any]], others: Sequence[Head], features: Tensor | None
) -> dict[str, Any]:
    """Judge the clusters of the chosen classifier.

    Args:
        found: the clusters of N images by all classifiers.
        history: summaries of the epochs of the run.
        others: the chosen classifiers of independent runs; only those with probabilities for as many clusters count.
        features: (N, F), from which the neighbours of some images come; None: no neighbours.

    Returns:
        The results of `judge_partition`, `judge_clusters` and `judge_images` as `partition`, `clusters` and `images`.
    """
    k, last = found.chosen, history[-1] if history else {}
    size = found.sizes[k]
    heads = {
        j: Head(clusters=found.clusters[j], confidence=float(found.confidences[j].mean()), loss=last.get(f"loss_{j}"))
        for j, each in enumerate(found.sizes)
        if each == size
    }
    own = heads.pop(k)
    independent = [
        other for other in others if other.probabilities is not None and other.probabilities.shape[1] == size
    ]
    rows = np.linspace(0, len(own.clusters) - 1, min(SAMPLE, len(own.clusters))).astype(int)
    neighbours = None
    if features is not None and len(rows) > NEIGHBOURS:
        neighbours = neighbours_of(features[torch.from_numpy(rows)])
    else:
        rows = np.arange(len(own.clusters))
    compared = independent or list(heads.values())
    return {
        "partition": judge_partition(own, same_run=list(heads.values()), independent=independent, size=size),
        "clusters": judge_clusters(
            own.clusters[rows], others=[other.clusters[rows] for other in compared], neighbours=neighbours, size=size
        ),
        "images": judge_images(
            calibrated(own, independent, size) if independent else found.confidences[k], by=len(independent)
        ),
    }


def neighbours_of(rows: Tensor) -> np.ndarray:
    """Return the positions of the ten nearest other rows of each row by cosine, (N, 10)."""
    unit = F.normalize(rows.float(), dim=1)
    return nearest(unit, unit, NEIGHBOURS + 1)[1][:, 1:].numpy()  # the first one is the row itself, or an equal one


def notes(judged: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the judgements as sentences, each with the level "good", "unsure" or "bad", as the atlas calls them."""
    partition, images = judged["partition"], judged["images"]
    used = [each for each in judged["clusters"] if each["level"]]
    worst = [each for each in used if each["level"] == RED]
    good = sum(each["level"] == GREEN for each in used)
    level = RED if worst else GREEN if good == len(used) else YELLOW
    beside = ""
    if partition["same_run"]:
        beside = (
            f"; {partition['same_run_confirms']} of {partition['same_run']} other classifiers of this run find the same "
            "partition"
        )
    return [
        (LEVELS[partition["level"]], f"partition: {partition['level']}, {partition['reason']}{beside}"),
        (
            LEVELS[level],
            f"clusters: {good} of {len(used)} green" + (f", {len(worst)} red" if worst else ""),
        ),
        (
            LEVELS[level_of(images["expected_accuracy"])],
            f"images: {images[GREEN]:.0%} green, {images[YELLOW]:.0%} yellow, {images[RED]:.0%} red; mean "
            f"confidence {images['expected_accuracy']:.1%}",
        ),
    ]


def level_of(quality: float) -> str:
    """Return the level of a confidence or of another share in [0, 1]."""
    return GREEN if quality >= SURE else YELLOW if quality >= UNSURE else RED


def expected_calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Compute the expected calibration error: the mean gap between confidence and accuracy in bins of equal width.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, equation 5.

    Args:
        confidences: (N,) in [0, 1].
        right: (N,) bool.
    """
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=confidences - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))

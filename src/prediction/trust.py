"""How far to trust the predictions: judge a sample of the predicted images with all classifiers of the network."""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation import trust
from ..evaluation.trust import Head
from ..neighbors import nearest
from .network import Classifier
from .store import Image, Store

SAMPLE = 2_000  # images
NEIGHBOURS = 10
LEVELS = {trust.GREEN: "good", trust.YELLOW: "unsure", trust.RED: "bad"}  # as the atlas calls them


def judge(store: Store, classifier: Classifier) -> dict[str, Any]:
    """Return the judgements of the partition, the clusters and the images.

    The partition and the clusters are judged by a sample that is spread evenly over the images, and by the other classifiers of
    the same network. A sample that an earlier run has judged is judged again only if the predictions have changed.
    """
    numbers, _, confidences = store.overview()
    key = [len(numbers), int(numbers.sum()), float(confidences.sum())]
    kept = store.fact("trust")
    if kept is None or kept["key"] != key:
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(SAMPLE, len(numbers))).astype(int)]
        kept = {"key": key, **_judge_sample(store, classifier, chosen.tolist())}
        store.set_fact("trust", kept)
    return {
        "partition": kept["partition"],
        "clusters": kept["clusters"],
        "images": trust.judge_images(confidences),
        "sample": kept["sample"],
    }


def _judge_sample(store: Store, classifier: Classifier, numbers: list[int]) -> dict[str, Any]:
    images = [store.image(number) for number in numbers]
    own, *others = see_again(store, classifier, images)
    clusters = np.array([image.clusters[0] for image in images])
    neighbours = None
    if len(images) > NEIGHBOURS:
        rows = F.normalize(torch.from_numpy(np.stack([image.embedding for image in images]).astype(np.float32)), dim=1)
        found = nearest(rows, rows, NEIGHBOURS + 1)[1].numpy()
        neighbours = found[:, 1:]  # the first one is the image itself, or one that is equal to it
    comparable = len(own.clusters) == len(clusters)  # no file has vanished
    return {
        "partition": trust.judge_partition(own, same_run=others, independent=[], size=classifier.clusters),
        "clusters": trust.judge_clusters(
            clusters,
            others=[other.clusters for other in others] if comparable else [],
            neighbours=neighbours,
            size=classifier.clusters,
        ),
        "sample": len(images),
    }


def see_again(store: Store, classifier: Classifier, images: list[Image]) -> list[Head]:
    """Return what all classifiers with as many clusters as this one find in images that were predicted, this one first."""
    own = Head(
        clusters=np.array([image.clusters[0] for image in images]),
        confidence=float(np.mean([image.probabilities[0] for image in images])),
    )
    if len(classifier.equals) == 1:
        return [own]
    top, size = store.fact("top"), classifier.options.batch_size
    files = [(i, os.path.join(top, image.path)) for i, image in enumerate(images)]
    return classifier.heads((files[i : i + size] for i in range(0, len(files), size)), len(files))


def notes(judged: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the judgements as sentences, each with the level that the atlas gives it."""
    partition, images = judged["partition"], judged["images"]
    used = [each for each in judged["clusters"] if each["level"]]
    worst = [each for each in used if each["level"] == trust.RED]
    good = sum(each["level"] == trust.GREEN for each in used)
    level = trust.RED if worst else trust.GREEN if good == len(used) else trust.YELLOW
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
            LEVELS[trust.level_of(images["expected_accuracy"])],
            f"images: {images[trust.GREEN]:.0%} green, {images[trust.YELLOW]:.0%} yellow, {images[trust.RED]:.0%} red; mean "
            f"confidence {images['expected_accuracy']:.1%}",
        ),
    ]

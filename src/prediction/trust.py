"""How far to trust the predictions: judge a sample of the predicted images with all classifiers of the network."""

import os
from typing import Any

import numpy as np
import torch

from ..evaluation import trust
from ..evaluation.trust import Head
from .network import Classifier
from .store import Image, Store

SAMPLE = 2_000  # images


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
    if len(images) > trust.NEIGHBOURS:
        neighbours = trust.neighbours_of(torch.from_numpy(np.stack([image.embedding for image in images])))
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

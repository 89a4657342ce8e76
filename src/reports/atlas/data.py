"""What an atlas shows, and the choice of the images for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_IMAGES = 10_000  # an atlas holds at most so many images


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The clusters of N images by one classifier, by one run or by k-means.

    Attributes:
        name: what the page calls it, such as "classifier 3".
        clusters: (N,) cluster of every image.
        confidences: (N,) in [0, 1].
        size: C, the number of clusters, including those without images.
        model: fingerprint of the weights, for names.json.
        classifier: number of the classifier, for names.json; None for k-means, whose clusters predict.py cannot assign.
        top: the T most likely clusters of every image and their probabilities, both (N, T), the most likely first; None if
            there are no probabilities.
        names: content of a file of names to start with.
    """

    name: str
    clusters: np.ndarray
    confidences: np.ndarray
    size: int
    model: str
    classifier: int | None
    top: tuple[np.ndarray, np.ndarray] | None = None
    names: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AtlasData:
    """N images and everything that an atlas shows of them.

    Attributes:
        title: heading of the page.
        paths: N names of the images, as in the CSV file next to the atlas.
        picture: returns image i, (H, W) or (H, W, 3) uint8. An image for which it raises an error is shown as broken.
        embeddings: (N, F).
        clusterings: at least one; the page shows the first one first.
        files: N paths of the files, to which the page links; None: no links.
        labels: (N,) class of every image, -1 if unknown; None: no labels.
        classes: names of the classes.
        skipped: path and reason of files that could not be read.
        totals: (C,) number of images in each cluster of the first clustering, if the N images are a part of them.
        left_out: {cluster: names and paths of images that the page lists as links only}.
        history: the epochs of the run.
        config: the configuration of the run.
        notes: sentences about how far to trust the clusters, each with the level "good", "unsure" or "bad".
    """

    title: str
    paths: Sequence[str]
    picture: Callable[[int], np.ndarray]
    embeddings: np.ndarray
    clusterings: Sequence[Clusters]
    files: Sequence[str] | None = None
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    skipped: Sequence[tuple[str, str]] = ()
    totals: np.ndarray | None = None
    left_out: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        count = len(self.paths)
        if not 1 <= count <= MOST_IMAGES:
            raise ValueError(f"an atlas takes 1 to {MOST_IMAGES} images, got {count}: use choose()")
        if not self.clusterings:
            raise ValueError("an atlas needs at least one clustering")
        lengths = {"embeddings": len(self.embeddings)}
        lengths |= {each.name: len(each.clusters) for each in self.clusterings}
        if self.files is not None:
            lengths["files"] = len(self.files)
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"{name}: got {length} entries for {count} images")


def choose(clusters: np.ndarray, confidences: np.ndarray, most: int = MOST_IMAGES) -> np.ndarray:
    """Choose the images for an atlas, at most `most` of them.

    If there are more, every cluster gets the same number of places; what small clusters leave over goes to the large ones.
    Half of the places of a cluster go to its surest images. The others are spread evenly over the rest, from sure to unsure.

    Args:
        clusters: (N,) cluster of every image.
        confidences: (N,).

    Returns:
        Positions of the chosen images, ascending.
    """
    if len(clusters) <= most:
        return np.arange(len(clusters))
    _, numbers, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    order = np.lexsort((np.arange(len(clusters)), -confidences, numbers))
    starts = np.cumsum(sizes) - sizes
    chosen = []
    for start, size, places in zip(starts.tolist(), sizes.tolist(), _places(sizes, most).tolist(), strict=True):
        sure = (places + 1) // 2 if places < size else places
        rest = np.linspace(sure, size - 1, places - sure).round().astype(int)
        chosen.append(order[start + np.concatenate([np.arange(sure), rest])])
    return np.sort(np.concatenate(chosen))


def _places(sizes: np.ndarray, most: int) -> np.ndarray:
    """Share `most` places among clusters: min(size, cap) for the largest possible cap, and the remainder to the first ones."""
    cap = 0
    low, high = 0, int(sizes.max())
    while low <= high:
        cap = (low + high) // 2
        if np.minimum(sizes, cap).sum() <= most:
            low = cap + 1
        else:
            high = cap - 1
    places = np.minimum(sizes, high)
    larger = np.flatnonzero(sizes > high)[: most - places.sum()]
    places[larger] += 1
    return places

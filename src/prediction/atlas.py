"""Write the atlas of the predicted images. It shows at most `MOST_IMAGES` of them and lists some of the others."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.decoding import decode
from ..errors import printable
from ..reports.atlas import MOST_IMAGES, AtlasData, Clusters, choose, write
from .network import Classifier
from .store import Store

FILE = "atlas.html"
MOST_LISTED = 10_000  # images that the page only lists, over all clusters


def write_atlas(
    store: Store, classifier: Classifier, *, top: Path, folder: Path, notes: Sequence[tuple[str, str]]
) -> None:
    """Write atlas.html into the output folder.

    Args:
        top: folder of the images.
        notes: sentences about how far to trust the clusters, see `AtlasData`.

    Raises:
        OSError: if the file cannot be written.
    """
    numbers, clusters, confidences = store.overview()
    chosen = choose(clusters, confidences, MOST_IMAGES)
    images = [store.image(number) for number in numbers[chosen].tolist()]
    files = [os.path.join(top, image.path) for image in images]
    labels, classes = labels_of([image.path for image in images])
    likely = np.stack([image.clusters for image in images]), np.stack([image.probabilities for image in images])
    write(
        AtlasData(
            title=f"{printable(Path(os.path.realpath(classifier.options.data)).name)}: {len(numbers):,} images",
            paths=[printable(image.path, reversible=True) for image in images],
            picture=lambda i: decode(files[i]).permute(1, 2, 0).numpy(),
            embeddings=np.stack([image.embedding for image in images]),
            clusterings=[
                Clusters(
                    name=f"classifier {classifier.number}",
                    clusters=clusters[chosen],
                    confidences=confidences[chosen],
                    size=classifier.clusters,
                    model=classifier.model,
                    classifier=classifier.number,
                    top=likely,
                    names=store.fact("names"),
                )
            ],
            files=files,
            labels=labels,
            classes=classes,
            skipped=[(printable(path, reversible=True), reason) for path, reason in store.skipped()],
            totals=np.bincount(clusters, minlength=classifier.clusters),
            left_out=_left_out(store, numbers=numbers, clusters=clusters, chosen=chosen, top=top),
            history=classifier.state.get("history", []),
            config=classifier.trained,
            notes=notes,
        ),
        folder / FILE,
    )


def labels_of(paths: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """Return the class folders of images as labels, and their names.

    As in training, the folders are classes if there are two or more of them and no image lies beside them.

    Args:
        paths: relative to the folder of the images.
    """
    folders = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
    classes = sorted(set(folders))
    if len(classes) < 2 or "" in classes:
        return None, []
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[folder] for folder in folders]), [printable(name) for name in classes]


def _left_out(
    store: Store, *, numbers: np.ndarray, clusters: np.ndarray, chosen: np.ndarray, top: Path
) -> dict[int, list[tuple[str, str]]]:
    """Return the names and paths of images that are not shown: equally many of each cluster, in the order of their paths."""
    rest = np.setdiff1d(np.arange(len(numbers)), chosen)
    listed = {}
    for cluster in np.unique(clusters[rest]).tolist():
        rows = rest[clusters[rest] == cluster][: MOST_LISTED // len(np.unique(clusters[rest]))]
        paths = [store.image(number).path for number in numbers[rows].tolist()]
        listed[cluster] = [(printable(path, reversible=True), os.path.join(top, path)) for path in paths]
    return listed

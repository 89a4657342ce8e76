"""The atlas of cls_eval.py: look at the images again, and write the page that shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from .. import fingerprints
from ..data.base import Views
from ..data.datasets import ImageFiles, Images
from ..data.subsets import keep_rows
from ..errors import InputError, printable
from ..features import predict_likeliest
from ..reports.atlas import AtlasData, Clusters, choose
from ..reports.atlas import write as write_page
from .clustering import Clustering
from .session import Session

LIKELIEST = 5  # clusters of an image whose probabilities are shown
FILE = "atlas.html"


Others = Mapping[str, tuple[nn.Module, Views, int]]  # {checkpoint: (network, views, number of its classifier)}


def look(session: Session, data: Images, found: Clustering, *, split: str, others: Others) -> AtlasData:
    """Return what the atlas shows. All ranks must call the function.

    Args:
        data: the images of the split.
        others: checkpoints to compare with.
    """
    rows = choose(found.clusters[found.chosen], found.confidences[found.chosen])
    kept = keep_rows(data, rows)
    if found.settings is None:
        clusterings, embeddings = _by_classifiers(session, kept, found, others=others)
    else:
        layer = found.settings["layer"]
        if session.features_cache:  # it holds the whole split
            embeddings = session.features(data, split=split, layer=layer)[rows].numpy()
        else:
            embeddings = session.features(kept, split=split, layer=layer).numpy()
        clusterings = [_by_kmeans(session, found, rows)]
    files = kept.paths if isinstance(kept, ImageFiles) else None
    return AtlasData(
        title=printable(Path(session.source.data).name or session.source.data),
        paths=[printable(path, reversible=True) for path in files] if files else [str(row) for row in rows.tolist()],
        picture=kept.picture,
        embeddings=embeddings,
        clusterings=clusterings,
        files=files,
        labels=kept.labels.numpy() if (data.labels >= 0).any() else None,
        classes=[printable(name) for name in data.classes],
        totals=found.counts(found.chosen),
        history=session.state.get("history") or (),
        config={key: value for key, value in session.trained.items() if value not in (None, "", [])},
    )


def write(data: AtlasData, folder: Path) -> None:
    """Write the atlas into the folder of the results, and print its name.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        write_page(data, folder / FILE)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {FILE}: {error.strerror}; give another") from None
    print(f"wrote {FILE} to {printable(folder)}: open it in a browser")


def _by_classifiers(
    session: Session, kept: Images, found: Clustering, *, others: Others
) -> tuple[list[Clusters], np.ndarray]:
    """Return the clusters by all classifiers, the chosen one first, and by the other checkpoints; and the embeddings."""
    own = cast(nn.Module, session.network)
    likeliest, embeddings = _predict(session, kept, own, classifier=found.chosen)
    model = fingerprints.of_weights(own)
    clusterings = []
    for k in sorted(range(len(likeliest)), key=lambda k: (k != found.chosen, k)):
        name = f"{found.names[k]} (chosen)" if k == found.chosen and len(likeliest) > 1 else found.names[k]
        clusterings.append(_clusters(likeliest[k], name=name, size=found.sizes[k], model=model, classifier=k))
    for name, (network, views, k) in others.items():
        likeliest, _ = _predict(session, kept, network.to(session.device), classifier=k, views=views)
        size, model = cast(Any, network).classes[k], fingerprints.of_weights(network)
        clusterings.append(_clusters(likeliest[k], name=printable(name), size=size, model=model, classifier=k))
        network.cpu()
    return clusterings, embeddings


def _predict(
    session: Session, kept: Images, network: nn.Module, *, classifier: int, views: Views | None = None
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    batches = session.batches(kept, views)
    return predict_likeliest(
        network, batches, len(kept), count=LIKELIEST, classifier=classifier, autocast=session.autocast
    )


def _clusters(
    likeliest: tuple[np.ndarray, np.ndarray], *, name: str, size: int, model: str, classifier: int
) -> Clusters:
    clusters, shares = likeliest
    return Clusters(
        name=name,
        clusters=clusters[:, 0],
        confidences=shares[:, 0],
        size=size,
        model=model,
        classifier=classifier,
        top=likeliest,
    )


def _by_kmeans(session: Session, found: Clustering, rows: np.ndarray) -> Clusters:
    return Clusters(
        name=found.names[0],
        clusters=found.clusters[0, rows],
        confidences=found.confidences[0, rows],
        size=found.sizes[0],
        model=fingerprints.of_weights(cast(nn.Module, session.network)),
        classifier=None,
    )

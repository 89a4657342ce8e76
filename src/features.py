"""Run a trained method over a data set, every image once, results placed by the image's index."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import distributed, fingerprints
from .data.datasets import Images
from .data.loaders import Views, single_views
from .errors import InputError
from .logs import Progress

LAYERS = ("backbone", "head")
VERSION = 1  # of the files in a features cache and of how their contents are computed; another one is another key
PIECE = 1 << 26  # bytes of features that travel between ranks at once


@torch.no_grad()
def predict_clusters(
    method, batches: Iterable[tuple[Tensor, np.ndarray]], num_images: int, *, autocast: torch.dtype | None = None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The cluster of every image by each classifier, in evaluation mode.

    Args:
        batches: images on the method's device and their indices; this rank's share.
        num_images: N, over all ranks.

    Returns:
        clusters (K, N) long, arg-max of the logits; confidences (K, N) in [0, 1], the probability of that class; the mean
        prediction of each classifier, K × (C_k,), which sums to 1.
    """
    clusters = confidences = sums = None
    for probabilities, indices in _probabilities(method, batches, autocast):
        if clusters is None:
            clusters = torch.zeros(len(probabilities), num_images, dtype=torch.long)
            confidences = torch.zeros(len(probabilities), num_images)
            sums = [torch.zeros(p.shape[1], dtype=torch.float64) for p in probabilities]
        for k, p in enumerate(probabilities):
            best = p.max(dim=1)
            clusters[k, indices], confidences[k, indices] = best.indices.cpu(), best.values.cpu()
            sums[k] += p.sum(dim=0).double().cpu()
    if clusters is None:
        raise ValueError("no images: every rank needs at least one")
    # Every image was seen by one rank and is zero on the others.
    if distributed.world_size() > 1:
        clusters, confidences = distributed.sum_over_ranks(clusters), distributed.sum_over_ranks(confidences)
        sums = [distributed.sum_over_ranks(each) for each in sums]
    _refuse_nan(~confidences.isfinite().all(dim=0), "probabilities")
    return clusters.numpy(), confidences.numpy(), [(each / num_images).numpy() for each in sums]


@torch.no_grad()
def average_clusters(
    method,
    batches: Iterable[tuple[Tensor, np.ndarray]],
    num_images: int,
    *,
    names: dict[int, np.ndarray],
    autocast: torch.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of every image by the mean probability of several classifiers with C clusters each.

    Args:
        batches, num_images: as for `predict_clusters`.
        names: {classifier: (C,) common name of each of its clusters}.

    Returns:
        clusters (N,) long, in common names; confidences (N,) in [0, 1], the mean probability of that cluster.
    """
    clusters, confidences = torch.zeros(num_images, dtype=torch.long), torch.zeros(num_images)
    for probabilities, indices in _probabilities(method, batches, autocast):
        mean = 0
        for k, name in names.items():
            own = torch.from_numpy(np.argsort(name)).to(probabilities[k].device)  # what the classifier calls each
            mean = mean + probabilities[k][:, own] / len(names)
        best = mean.max(dim=1)
        clusters[indices], confidences[indices] = best.indices.cpu(), best.values.cpu()
    return distributed.sum_over_ranks(clusters).numpy(), distributed.sum_over_ranks(confidences).numpy()


def _probabilities(method, batches, autocast: torch.dtype | None) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Of each batch the K × (B, C_k) probabilities of the classifiers, in evaluation mode, and the indices."""
    was_training = method.training
    method.eval()
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = method.predict(images)
        yield [(z.float() / method.temperature).softmax(dim=1) for z in logits], indices
    method.train(was_training)


# --------------------------------------------------------------------------------------------------------------------
# features, which k-NN, probes and k-means share


@torch.no_grad()
def extract(
    method,
    data: Images,
    views: Views,
    *,
    split: str,
    layer: str,
    batch_size: int,
    device: torch.device,
    workers: int = -1,
    autocast: torch.dtype | None = None,
    cache: str | Path = "",
) -> Tensor:
    """The features of every image's evaluation view, in evaluation mode. To be called on all ranks.

    Args:
        method: on `device`. Layer "backbone" is `method.backbone(images)`, "head" is `method.embed(images)`.
        split: what to call this part of the data in messages and file names; it chooses nothing.
        batch_size: images per forward pass and rank.
        autocast: half precision to run the network in; None: float32.
        cache: folder in which features are looked for, and left for the next evaluation of the same checkpoint; "": none.
            What names a file there is computed from the weights and the images themselves.

    Returns:
        (N, F) float32 on the CPU, on every rank, of whatever length they are; row i belongs to image i of `data`.

    Raises:
        InputError: if an image cannot be read, or the cache folder cannot be written to.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer}")
    progress = Progress(len(data), 0, enabled=distributed.is_main())
    file = features = None
    try:
        if cache and distributed.is_main():
            key = cache_key(method, data, views, layer=layer, device=device, autocast=autocast)
            name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
            file = _open_folder(Path(cache)) / f"{split}_{layer}_{name}.pt"
            features = _read(file, key, progress)
        found = distributed.from_main(features is not None)
        if not found:
            batches = single_views(data, views, batch_size=batch_size, device=device, workers=workers)
            progress_of = partial(progress.count, what=f"features, {split}")
            features = _run(method, batches, len(data), layer=layer, autocast=autocast, count=progress_of)
        features = _sum_rows(features, len(data))
        _refuse_nan(~features.isfinite().all(dim=1), "features")
        if file and not found:
            _write(file, key, features, progress)
        return features
    finally:
        progress.close()


def _refuse_nan(rows: Tensor, what: str) -> None:
    if rows.any():
        raise InputError(
            f"the network gives {what} that are not numbers for {int(rows.sum())} of {len(rows)} images: its weights are "
            "damaged, or --precision float32 is needed"
        )


def _run(
    method, batches, num_images: int, *, layer: str, autocast: torch.dtype | None, count: Callable[[int], None]
) -> Tensor | None:
    """This rank's rows of the (N, F) features, zeros elsewhere; None if this rank has no image."""
    forward = method.backbone if layer == "backbone" else method.embed
    was_training = method.training
    method.eval()
    features = None
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            rows = forward(images).float().cpu()
        if features is None:
            features = torch.zeros(num_images, rows.shape[1])
        features[indices] = rows
        count(len(rows) * distributed.world_size())
    method.train(was_training)
    return features


def _sum_rows(features: Tensor | None, num_images: int) -> Tensor:
    """Sum of every rank's (N, F) features, in place and piece by piece: a second copy of a large bank might not fit."""
    if distributed.world_size() == 1:
        return features
    width = int(distributed.max_over_ranks(torch.tensor(0 if features is None else features.shape[1])))
    if features is None:
        features = torch.zeros(num_images, width)
    for rows in features.split(max(PIECE // (4 * width), 1)):
        rows.copy_(distributed.sum_over_ranks(rows))
    return features


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_key(
    method, data: Images, views: Views, *, layer: str, device: torch.device, autocast: torch.dtype | None
) -> dict[str, str | int]:
    """Everything that features depend on. Labels are not among it.

    Weights and images in memory enter by their contents, image files by their paths below their common folder, sizes and
    times of change: reading a million of them would cost as much as the features.
    """
    network = method.backbone if layer == "backbone" else method
    return {
        "version": VERSION,
        "layer": layer,
        "weights": fingerprints.of_network(network),
        "images": fingerprints.of_images(data),
        "view": f"{type(views).__name__} {vars(views)}",
        "precision": str(autocast or torch.float32),
        "device": device.type,  # the last digits differ
    }


def _open_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--features-cache {folder}: {error.strerror}, expected a folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--features-cache {folder}: no permission to write in it")
    return folder


def _read(file: Path, key: dict, progress: Progress) -> Tensor | None:
    """The features in a file of the cache, or None if there is none or it is damaged, which is said."""
    if not file.exists():
        return None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        features = content["features"]
        if content["key"] != key or content["sha256"] != hashlib.sha256(fingerprints.of_bytes(features)).hexdigest():
            raise ValueError("other contents than were written")
    except Exception as error:  # arbitrary bytes can make the reader stumble in any way
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        progress.say(f"features cache: {file} is damaged ({detail}): computing it again")
        return None
    progress.say(f"features of {len(features):,} images taken from {file}")
    return features


def _write(file: Path, key: dict, features: Tensor, progress: Progress) -> None:
    """Write aside, then rename: the file is whole or not there. Without room for it the evaluation goes on."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        content = {
            "key": key,
            "sha256": hashlib.sha256(fingerprints.of_bytes(features)).hexdigest(),
            "features": features,
        }
        torch.save(content, aside)
        os.replace(aside, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        aside.unlink(missing_ok=True)
        progress.say(f"features cache: {file} was not written ({error}): going on without")

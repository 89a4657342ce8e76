"""Apply a trained method to every image of a data set: features and predictions of clusters.

Each image is processed once. The position of a result is the index of its image.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, fingerprints
from .checkpoint import write_tensors
from .data.datasets import Images
from .data.loaders import Views, single_views
from .errors import InputError, printable
from .inspection import checked_checkpoint, first_line
from .logs import Progress

LAYERS = ("backbone", "head")
VERSION = 2  # of the cached files and of the computation of their contents; it is part of the cache key
PIECE = 1 << 26  # bytes of features that one exchange between ranks sends

Batches = Iterable[tuple[Tensor, np.ndarray]]  # images on the device of the network, and their indices


class Classifiers(Protocol):
    """Interface of a network that predicts clusters, such as `methods.base.Method`."""

    temperature: float
    classes: Sequence[int]

    def predict(self, images: Tensor) -> list[Tensor]:
        """Return the (B, C_k) logits of each classifier k."""


@torch.no_grad()
def predict_clusters(
    method: nn.Module, batches: Batches, num_images: int, *, autocast: torch.dtype | None = None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Predict the cluster of every image with each of the K classifiers of a method, in evaluation mode.

    Args:
        method: network with classifiers; see `Classifiers`.
        batches: this rank's images, on the device of the method, and their indices.
        num_images: N, the number of images over all ranks.
        autocast: half-precision type for the network; None: float32.

    Returns:
        The clusters, (K, N) long, arg-max of the logits; the confidences, (K, N) in [0, 1], the probability of the cluster;
        the mean prediction of each classifier, K × (C_k,), which sums to 1; and minus the sum over the classes of the log
        probabilities, (K, N) float64. The authors of Self-Classifier call the last one entropy in their first generation.

    Raises:
        InputError: if the network returns probabilities that are NaN or infinite.
        ValueError: if this rank has no image.
    """
    clusters, confidences, log_sums = torch.empty(0), torch.empty(0), torch.empty(0)
    sums: list[Tensor] = []
    for logits, indices in _scaled_logits(method, batches, autocast):
        if not sums:
            clusters = torch.zeros(len(logits), num_images, dtype=torch.long)
            confidences = torch.zeros(len(logits), num_images)
            log_sums = torch.zeros(len(logits), num_images, dtype=torch.float64)
            sums = [torch.zeros(z.shape[1], dtype=torch.float64) for z in logits]
        for k, z in enumerate(logits):
            p = z.softmax(dim=1)
            best = p.max(dim=1)
            log_sums[k, indices] = -z.double().log_softmax(dim=1).sum(dim=1).cpu()
            clusters[k, indices], confidences[k, indices] = best.indices.cpu(), best.values.cpu()
            sums[k] += p.sum(dim=0).double().cpu()
    if not sums:
        raise ValueError("this rank has no image, expected at least one per rank: start fewer ranks")
    # Only one rank has processed an image. The other ranks hold zeros for it, so the sum is its result.
    if distributed.world_size() > 1:
        clusters, confidences = distributed.sum_over_ranks(clusters), distributed.sum_over_ranks(confidences)
        log_sums = distributed.sum_over_ranks(log_sums)
        sums = [distributed.sum_over_ranks(each) for each in sums]
    _refuse_nan(~confidences.isfinite().all(dim=0), "probabilities")
    return clusters.numpy(), confidences.numpy(), [(each / num_images).numpy() for each in sums], log_sums.numpy()


@torch.no_grad()
def predict_likeliest(
    method: nn.Module,
    batches: Batches,
    num_images: int,
    *,
    count: int,
    classifier: int,
    autocast: torch.dtype | None = None,
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Predict the most likely clusters of every image with each of the K classifiers of a method, in evaluation mode.

    Args:
        method, batches, num_images, autocast: as for `predict_clusters`. The method has its classifiers in `classifiers`.
        count: T, the number of clusters; a classifier with fewer clusters returns all of them.
        classifier: the classifier whose input is returned.

    Returns:
        For each classifier the clusters and their probabilities, both (N, min(T, C_k)), the most likely first; and the input
        of the classifier, (N, F) float32, for our methods the embeddings.
    """
    layer = cast(nn.ModuleList, method.classifiers)[classifier]
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    found: list[tuple[Tensor, Tensor]] = []
    embeddings = torch.empty(0)
    try:
        for logits, indices in _scaled_logits(method, batches, autocast):
            rows = inputs.pop().float().cpu()
            best = [z.softmax(dim=1).topk(min(count, z.shape[1]), dim=1) for z in logits]
            if not found:
                embeddings = torch.zeros(num_images, rows.shape[1])
                widths = [each.values.shape[1] for each in best]
                found = [
                    (torch.zeros(num_images, width, dtype=torch.long), torch.zeros(num_images, width))
                    for width in widths
                ]
            embeddings[indices] = rows
            for (clusters, shares), each in zip(found, best, strict=True):
                clusters[indices], shares[indices] = each.indices.cpu(), each.values.cpu()
    finally:
        hook.remove()
    if distributed.world_size() > 1:  # only one rank has processed an image; the other ranks hold zeros for it
        embeddings = distributed.sum_over_ranks(embeddings)
        found = [(distributed.sum_over_ranks(a), distributed.sum_over_ranks(b)) for a, b in found]
    return [(clusters.numpy(), shares.numpy()) for clusters, shares in found], embeddings.numpy()


@torch.no_grad()
def average_clusters(
    method: nn.Module,
    batches: Batches,
    num_images: int,
    *,
    names: dict[int, np.ndarray],
    autocast: torch.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the cluster of every image from the mean probability of several classifiers with C clusters each.

    Args:
        method, batches, num_images, autocast: as for `predict_clusters`.
        names: {classifier: (C,) common number of each of its clusters}.

    Returns:
        The clusters, (N,) long, in common numbers; the confidences, (N,) in [0, 1], the mean probability of the cluster.
    """
    clusters, confidences = torch.zeros(num_images, dtype=torch.long), torch.zeros(num_images)
    for logits, indices in _scaled_logits(method, batches, autocast):
        shares = []
        for k, name in names.items():
            # `own` lists the classifier's own number of each common cluster.
            own = torch.from_numpy(np.argsort(name)).to(logits[k].device)
            shares.append(logits[k].softmax(dim=1)[:, own] / len(names))
        best = reduce(torch.add, shares).max(dim=1)
        clusters[indices], confidences[indices] = best.indices.cpu(), best.values.cpu()
    return distributed.sum_over_ranks(clusters).numpy(), distributed.sum_over_ranks(confidences).numpy()


@torch.no_grad()
def stream_predictions(
    method: nn.Module, batches: Batches, *, classifier: int, autocast: torch.dtype | None = None
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Yield the predictions of one classifier batch by batch; nothing is kept.

    Args:
        method, batches, autocast: as for `predict_clusters`. The method has its classifiers in `classifiers`.
        classifier: number of the classifier.

    Yields:
        The probabilities, (B, C) float32; the input of the classifier, (B, F) float32, for our methods the embeddings; and the
        indices of the images. Both tensors are on the CPU.

    Raises:
        InputError: if the network returns probabilities that are NaN or infinite.
    """
    inputs: list[Tensor] = []
    layer = cast(nn.ModuleList, method.classifiers)[classifier]
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        for logits, indices in _scaled_logits(method, batches, autocast):
            probabilities = logits[classifier].softmax(dim=1).cpu()
            _refuse_nan(~probabilities.isfinite().all(dim=1), "probabilities")
            yield probabilities, inputs.pop().float().cpu(), indices
    finally:
        hook.remove()


def predict_probabilities(
    method: nn.Module, batches: Batches, num_images: int, *, classifier: int, autocast: torch.dtype | None = None
) -> np.ndarray:
    """Return the probabilities of the clusters of one classifier for every image, (N, C) float32; see `predict_clusters`."""
    found = torch.zeros(num_images, cast(Classifiers, method).classes[classifier])
    for probabilities, _, indices in stream_predictions(method, batches, classifier=classifier, autocast=autocast):
        found[indices] = probabilities
    return (distributed.sum_over_ranks(found) if distributed.world_size() > 1 else found).numpy()


def _scaled_logits(
    method: nn.Module, batches: Batches, autocast: torch.dtype | None
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Yield the logits of the classifiers over the temperature, K × (B, C_k), and the indices of each batch.

    The method is in evaluation mode.
    """
    classifiers = cast(Classifiers, method)
    was_training = method.training
    method.eval()
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = classifiers.predict(images)
        yield [z.float() / classifiers.temperature for z in logits], indices
    method.train(was_training)


# --------------------------------------------------------------------------------------------------------------------
# features for k-NN, probes and k-means


@torch.no_grad()
def extract(
    method: nn.Module,
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
    """Compute the features of the evaluation view of every image, in evaluation mode. All ranks must call this function.

    Args:
        method: network on `device`.
        split: name of this part of the data in messages and file names. It does not select images.
        layer: "backbone" for `method.backbone(images)`, "head" for `method.embed(images)`.
        batch_size: images per forward pass and rank.
        workers: number of data-loading workers per rank; -1: one per core available to this rank.
        autocast: half-precision type for the network; None: float32.
        cache: folder of cached features; "": no cache. The function reads the features from the cache or writes them to it,
            for the next evaluation of the same checkpoint. The file name is a hash of the weights and the images.

    Returns:
        The features on every rank, (N, F) float32 on the CPU, as the network returns them. Row i belongs to image i of `data`.

    Raises:
        InputError: if an image cannot be read, if the cache folder cannot be written, or if a feature is NaN or infinite.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer is {layer}, expected {' or '.join(LAYERS)}")
    progress = Progress(len(data), 0, enabled=distributed.is_main())
    file: Path | None = None
    key: dict[str, str | int] = {}
    features: Tensor | None = None
    try:
        if cache and distributed.is_main():
            key = cache_key(method, data, views, layer=layer, device=device, autocast=autocast)
            name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
            file = _open_folder(Path(cache)) / f"{split}_{layer}_{name}.pt"
            features = _read(file, key, progress, rows=len(data))
        found = distributed.from_main(features is not None)
        if not found:
            batches = single_views(data, views, batch_size=batch_size, device=device, workers=workers)
            progress_of = partial(progress.count, what=f"features, {split}")
            features = _run(method, batches, len(data), layer=layer, autocast=autocast, count=progress_of)
        features = _sum_rows(features, len(data))
        _refuse_nan(~features.isfinite().all(dim=1), "features")
        if file and not found:
            _write(file, key, features, progress=progress)
        return features
    finally:
        progress.close()


def _refuse_nan(rows: Tensor, what: str) -> None:
    if rows.any():
        raise InputError(
            f"the network returns {what} that are NaN or infinite for {int(rows.sum())} of {len(rows)} images: use "
            "--precision float32, or another checkpoint if the weights are damaged"
        )


def _run(
    method: nn.Module,
    batches: Batches,
    num_images: int,
    *,
    layer: str,
    autocast: torch.dtype | None,
    count: Callable[[int], None],
) -> Tensor | None:
    """Return the (N, F) features with the rows of this rank and zeros elsewhere, or None if this rank has no image."""
    forward = cast(Callable[[Tensor], Tensor], method.backbone if layer == "backbone" else method.embed)
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
    """Sum the (N, F) features of all ranks, in place.

    The sum proceeds in pieces, because a second copy of a large feature bank might not fit into memory.
    """
    if distributed.world_size() == 1 and features is not None:
        return features
    width = int(distributed.max_over_ranks(torch.tensor(0 if features is None else features.shape[1])))
    if features is None:
        features = torch.zeros(num_images, width)
    for rows in features.split(max(PIECE // max(4 * width, 1), 1)):
        rows.copy_(distributed.sum_over_ranks(rows))
    return features


# ---- feature cache ---------------------------------------------------------------------------------------------------


def cache_key(
    method: nn.Module, data: Images, views: Views, *, layer: str, device: torch.device, autocast: torch.dtype | None
) -> dict[str, str | int]:
    """Return everything that the features depend on. Labels do not belong to it.

    The key contains fingerprints of the weights and of the images; see `fingerprints.of_images`.
    """
    network = cast(nn.Module, method.backbone) if layer == "backbone" else method
    return {
        "version": VERSION,
        "layer": layer,
        "weights": fingerprints.of_network(network),
        "images": fingerprints.of_images(data),
        "view": f"{type(views).__name__} {vars(views)}",
        "precision": str(autocast or torch.float32),
        "device": device.type,  # the last digits of the features differ between devices
    }


def _open_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--features-cache {folder}: {error.strerror}, expected a folder: pass another path") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--features-cache {folder}: no permission to write, expected a writable folder: pass another path"
        )
    return folder


def _read(file: Path, key: dict[str, str | int], progress: Progress, *, rows: int) -> Tensor | None:
    """Return the (rows, F) features in a cached file, or None if the file does not exist or is damaged. Report the outcome."""
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened:
            content = torch.load(checked_checkpoint(opened, verify=False), map_location="cpu", weights_only=True)
        features = content["features"]
        if not isinstance(features, Tensor) or features.ndim != 2 or features.dtype != torch.float32:
            raise ValueError("no matrix of features")
        if len(features) != rows:
            raise ValueError(f"features of {len(features)} images, expected {rows}")
        if content["key"] != key or content["sha256"] != hashlib.sha256(fingerprints.of_bytes(features)).hexdigest():
            raise ValueError("the contents have changed since they were written")
    except Exception as error:  # arbitrary bytes can raise any kind of error
        progress.say(f"feature cache: {printable(file)} is damaged ({first_line(error)}): computing the features again")
        return None
    progress.say(f"feature cache: features of {len(features):,} images taken from {printable(file)}")
    return features


def _write(file: Path, key: dict[str, str | int], features: Tensor, *, progress: Progress) -> None:
    """Write features to the cache, as a whole or not at all.

    If the disk is full, the evaluation continues without a cached file.
    """
    try:
        content = {
            "key": key,
            "sha256": hashlib.sha256(fingerprints.of_bytes(features)).hexdigest(),
            "features": features,
        }
        write_tensors(file, content)
    except OSError as error:
        progress.say(f"feature cache: {printable(file)} was not written ({printable(error)}): continuing without it")

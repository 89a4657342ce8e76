"""Run a trained method over a data set, every image once, results placed by the image's index."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from . import distributed


@torch.no_grad()
def predict_clusters(
    method, batches: Iterable[tuple[Tensor, np.ndarray]], num_images: int, autocast: torch.dtype | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of every image by each classifier, in evaluation mode.

    Args:
        batches: images on the method's device and their indices; this rank's share.
        num_images: N, over all ranks.

    Returns:
        clusters (K, N) long, arg-max of the logits; confidences (K, N) in [0, 1], the probability of that class.
    """
    was_training = method.training
    method.eval()
    clusters = confidences = None
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = method.predict(images)
        if clusters is None:
            clusters = torch.zeros(len(logits), num_images, dtype=torch.long)
            confidences = torch.zeros(len(logits), num_images)
        for k, z in enumerate(logits):
            best = (z.float() / method.temperature).softmax(dim=1).max(dim=1)
            clusters[k, indices], confidences[k, indices] = best.indices.cpu(), best.values.cpu()
    method.train(was_training)
    if clusters is None:
        raise ValueError("no images: every rank needs at least one")
    # Every image was seen by one rank and is zero on the others.
    if distributed.world_size() > 1:
        clusters, confidences = distributed.sum_over_ranks(clusters), distributed.sum_over_ranks(confidences)
    return clusters.numpy(), confidences.numpy()


@torch.no_grad()
def backbone_features(
    method, batches: Iterable[tuple[Tensor, np.ndarray]], num_images: int, autocast: torch.dtype | None = None
) -> np.ndarray:
    """(N, F) float32 features of every image, as the backbone gives them, in evaluation mode; as in `predict_clusters`."""
    was_training = method.training
    method.eval()
    features = torch.zeros(num_images, method.backbone.width)
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            features[indices] = method.backbone(images).float().cpu()
    method.train(was_training)
    return distributed.sum_over_ranks(features).numpy()

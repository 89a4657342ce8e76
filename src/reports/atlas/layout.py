"""Neighbours of images, and a map on which neighbours lie close together.

The map follows PaCMAP: Wang, Huang, Rudin and Shaposhnik, "Understanding How Dimension Reduction Tools Work", JMLR 22, 2021,
arXiv:2012.04145. Three kinds of pairs pull and push the points: neighbours, pairs of medium distance, which give the map its
large-scale shape, and far pairs. Neighbours come from cosine similarities.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...neighbors import nearest

NEIGHBOURS = 10  # of each image, stored in the page
FURTHER = 40  # candidates beyond them, among which the scaled distance chooses the pairs
MIDDLE, FAR = 5, 20  # pairs of each point
CHUNK = 1024  # queries that are compared with all images at once
STEPS = 450
DIRECTIONS = 64  # principal directions that are kept for distances between middle pairs

Pairs = tuple[Tensor, Tensor, Tensor]


def unit_rows(embeddings: np.ndarray) -> Tensor:
    """Return the embeddings at unit length, (N, F) float32. A row of zeros stays zero."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, dtype=np.float32)), dim=1)


def find_neighbours(rows: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other rows of each row by dot product, the nearest first.

    Args:
        rows: (N, F) of unit length.
        k: if there are fewer other rows, all of them are returned.

    Returns:
        Positions and similarities, both (N, min(k, N - 1)).
    """
    count = len(rows)
    k = min(k, count - 1)
    found, similar = np.zeros((count, k), dtype=np.int64), np.zeros((count, k), dtype=np.float32)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        values, positions = (each.numpy() for each in nearest(rows, rows[part], k + 1))
        own = positions == np.arange(part.start, part.stop)[:, None]
        own[~own.any(axis=1), -1] = True  # among many equal rows the row itself may be missing; drop the last one
        found[part] = positions[~own].reshape(part.stop - part.start, k)
        similar[part] = values[~own].reshape(part.stop - part.start, k)
    return found, similar


def two_dimensions(rows: Tensor, *, seed: int = 0) -> np.ndarray:
    """Place N points in the plane so that neighbours lie close together, by PaCMAP.

    The result depends only on the rows and the seed.

    Args:
        rows: (N, F) of unit length.

    Returns:
        (N, 2) float32 in [0, 1]; the longer side of the map is 1.
    """
    if len(rows) < 4:
        return np.stack([np.linspace(0, 1, len(rows)), np.zeros(len(rows))], axis=1).astype(np.float32)
    generator = torch.Generator().manual_seed(seed)
    centred = rows - rows.mean(dim=0)
    reduced = centred @ _directions(centred, DIRECTIONS)
    pairs = _near_pairs(rows), _middle_pairs(reduced, generator), _random(len(rows), FAR, generator)
    start = torch.zeros(len(rows), 2)
    start[:, : reduced.shape[1]] = reduced[:, :2]
    start = 0.01 * start + 1e-6 * torch.randn(start.shape, generator=generator)  # equal images get different places
    points = _descend(start, pairs)
    points -= points.min(dim=0).values
    return (points / points.max().clamp(min=1e-12)).numpy()


def sketch(rows: Tensor, width: int = 8) -> np.ndarray:
    """Return the principal components of the rows as a rough copy for distances in the page, (N, width) int8."""
    centred = rows - rows.mean(dim=0)
    small = centred @ _directions(centred, width)
    scaled = small / small.abs().max().clamp(min=1e-12) * 127
    return F.pad(scaled, (0, width - scaled.shape[1])).round().to(torch.int8).numpy()


def _directions(centred: Tensor, count: int) -> Tensor:
    """Return the first principal directions, (F, count) or fewer, with signs that do not depend on the library."""
    vectors = torch.linalg.eigh(centred.T.double() @ centred.double()).eigenvectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).float()


def _near_pairs(rows: Tensor) -> Tensor:
    """Return the positions of the neighbours of each point, (N, n), by the distance that the local density scales."""
    found, similar = find_neighbours(rows, NEIGHBOURS + FURTHER)
    squared = (2 - 2 * torch.from_numpy(similar)).clamp(min=0)
    scale = squared[:, 3:6].sqrt().mean(dim=1).clamp(min=1e-6) if squared.shape[1] > 3 else torch.ones(len(rows))
    positions = torch.from_numpy(found)
    order = (squared / (scale[:, None] * scale[positions])).argsort(dim=1, stable=True)
    return positions.gather(1, order[:, :NEIGHBOURS])


def _middle_pairs(reduced: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each point the second nearest of six random points, five times, (N, 5)."""
    chosen = []
    for _ in range(MIDDLE):
        six = _random(len(reduced), 6, generator)
        distances = (reduced[six] - reduced[:, None]).square().sum(dim=2)
        chosen.append(six.gather(1, distances.argsort(dim=1, stable=True)[:, 1:2]))
    return torch.cat(chosen, dim=1)


def _random(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Return random positions of other points, (N, width)."""
    steps = torch.randint(1, count, (count, width), generator=generator)
    return (torch.arange(count)[:, None] + steps) % count


def _weights(step: int) -> tuple[float, float, float]:
    """Return the weights of near, middle and far pairs in a step: first the large shape, then the local one."""
    if step < 100:
        return 2.0, 1000.0 + (3.0 - 1000.0) * step / 100, 1.0
    return (3.0, 3.0, 1.0) if step < 200 else (1.0, 0.0, 1.0)


@torch.no_grad()
def _descend(points: Tensor, pairs: Pairs) -> Tensor:
    """Minimise the loss of PaCMAP by 450 steps of Adam with learning rate 1."""
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    for step in range(STEPS):
        gradient = _gradient(points, pairs, _weights(step))
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        rate = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        points = points - rate * mean / (square.sqrt() + 1e-7)
    return points


def _gradient(points: Tensor, pairs: Pairs, weights: tuple[float, float, float]) -> Tensor:
    """Return the gradient of the loss of PaCMAP at the points, (N, 2).

    With d = 1 + squared distance: near pairs cost d / (10 + d), middle pairs d / (10000 + d), far pairs 1 / (1 + d).
    """
    gradient = torch.zeros_like(points)
    for kind, (others, weight) in enumerate(zip(pairs, weights, strict=True)):
        if not weight:
            continue
        apart = points[:, None] - points[others]
        d = apart.square().sum(dim=2, keepdim=True) + 1
        offset = (10.0, 10000.0, 1.0)[kind]
        slope = (-1 if kind == 2 else offset) / (offset + d).square()
        pull = 2 * weight * slope * apart
        gradient += pull.sum(dim=1)
        gradient.index_add_(0, others.flatten(), -pull.flatten(0, 1))
    return gradient

"""Judge a clustering without labels: images and their nearest neighbours should share a class, and all classes should be used.

Source: the criterion by which SCAN (arXiv:2005.12320) selects an epoch and a head. It has the form of SCAN's loss with an
entropy weight of 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed
from .losses import entropy_of
from .neighbors import QUERY_CHUNK, nearest


class Score(NamedTuple):
    """A score without labels, in nats. `loss` is `consistency` - `entropy`; lower is better."""

    loss: float
    consistency: float
    entropy: float


@torch.no_grad()
def nearest_others(rows: Tensor, k: int) -> Tensor:
    """Return each row's position and those of the k rows with the largest cosines, best first. All ranks must call it.

    The ranks share the work. Among equally similar rows, the earlier row comes first.

    Args:
        rows: (N, F), the same on all ranks; N > k.
        k: number of neighbours.

    Returns:
        (N, 1 + k) int32 on the device of the rows. Column 0 is the row itself.
    """
    rows = F.normalize(rows, dim=1)
    own = torch.arange(distributed.rank(), len(rows), distributed.world_size(), device=rows.device)
    found = torch.zeros(len(rows), 1 + k, dtype=torch.int32, device=rows.device)
    for part in own.split(QUERY_CHUNK):
        _, near = nearest(rows, rows[part], k + 1)
        other = near != part[:, None]
        # If k + 1 other rows are at least as similar as the row itself, which are copies of it, the last one is left out.
        other[:, -1] &= ~other.all(dim=1)
        found[part, 0] = part.to(torch.int32)
        found[part, 1:] = near[other].view(-1, k).to(torch.int32)
    return distributed.sum_over_ranks(found)


@torch.no_grad()
def label_free_score(probabilities: Tensor, neighbors: Tensor) -> Score:
    """Score a clustering by the consistency of neighbours and the entropy of the mean prediction.

        consistency = - mean log( sum_c p_c q_c ) over all pairs of an image and a neighbour
        entropy = - sum_c m_c log m_c for the mean m of all p

    Args:
        probabilities: (N, C) float64, rows sum to 1.
        neighbors: (N, M) positions of the neighbours of each image. In SCAN they are the image itself and five others.
    """
    total = 0.0
    for column in neighbors.long().unbind(dim=1):
        agreement = (probabilities * probabilities[column]).sum(dim=1)
        total -= agreement.log().clamp(min=-100).sum().item()
    consistency = total / neighbors.numel()
    entropy = entropy_of(probabilities.mean(dim=0)).item()
    return Score(consistency - entropy, consistency, entropy)


def label_agreement(labels: Tensor, neighbors: Tensor) -> float | None:
    """Return the share of neighbours with the class of their image, or None if no pair has labels.

    Args:
        labels: (N,) classes, -1 where unknown.
        neighbors: (N, 1 + k), as `nearest_others` returns them.
    """
    here, there = labels[:, None], labels[neighbors[:, 1:].long()]
    known = (here >= 0) & (there >= 0)
    return ((here == there) & known).sum().item() / known.sum().item() if known.any() else None

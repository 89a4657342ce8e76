"""How well nearest neighbours in a labelled bank name the class of unseen images.

Protocol of Self-Classifier, arXiv:2103.10994v3, after Wu et al., arXiv:1805.01978: evaluation views, features of unit length,
each of the k nearest images votes for its class with weight exp(similarity / tau).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed
from ..neighbors import count_hits

SMALLEST = 1e-12  # length that is divided by, so that a feature of zeros stays one


def unit_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, F) float32 features brought to unit length, in place where `dtype` is float32: a bank may fill half the memory."""
    for rows in features.split(65536):
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
    return features.to(dtype)


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    tau: float,
    device: torch.device,
) -> dict[int, dict[str, float]]:
    """`metrics.knn_top` by all ranks together, on `device`; every rank has all features and searches for its share.

    Returns:
        {k: {"top1": fraction, "top5": fraction}}
    """
    mine = slice(distributed.rank(), None, distributed.world_size())
    hits = dict.fromkeys(ks, (0, 0))
    if device.type == "cuda" and 2 * bank.nbytes < torch.cuda.mem_get_info(device)[0]:
        bank = bank.to(device)  # where there is room; else it travels piece by piece, for every part of the queries
    if len(queries[mine]):
        hits = count_hits(bank, bank_labels, queries[mine].to(device), query_labels[mine], ks, tau)
    hits = distributed.sum_over_ranks(torch.tensor([hits[k] for k in ks]))
    return {
        k: {"top1": first / len(queries), "top5": five / len(queries)}
        for k, (first, five) in zip(ks, hits.tolist(), strict=True)
    }

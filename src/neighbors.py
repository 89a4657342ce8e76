"""Exact nearest neighbours by dot product, and what they vote for. Memory is bounded by one chunk of queries × bank."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, *, bank_chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest dot product with each query, best first.

    Of equally similar rows the earlier comes first, so the answer does not depend on `bank_chunk`, apart from the
    rounding of the products. These are taken in float32, of float64 rows in float64.

    Args:
        bank: (N, F), N >= k; may lie on another device than the queries, to which it then travels chunk by chunk.
        queries: (Q, F); all of them are compared at once.

    Returns:
        similarities (Q, k), float32 or float64, and rows (Q, k) long, both on the queries' device.
    """
    dtype = torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)
    queries = queries.to(dtype)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        part = bank[start : start + bank_chunk].to(queries.device).to(dtype)
        similarities = queries @ part.T
        found, where = _largest(similarities, min(k, len(part)))
        # The best so far come first: they are the earlier rows, and the stable sort keeps them before their equals.
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, where + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order[:, :k])
    return best, rows


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and their columns; of equals the first, which `topk` does not promise."""
    top, columns = values.topk(k, dim=1)
    last = top[:, -1:]
    cut = (values == last).sum(dim=1) > (top == last).sum(dim=1)  # equals on both sides of the cut
    if cut.any():
        columns[cut] = values[cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    top, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return top, columns.gather(1, order)


@torch.no_grad()
def count_hits(
    bank: Tensor,
    bank_labels: Tensor,
    *,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    tau: float,
    query_chunk: int = 2048,
    bank_chunk: int = 16384,
) -> dict[int, tuple[int, int]]:
    """How many queries have their class first, and how many among the first five, of the neighbours' votes.

    Each of the k nearest rows of the bank votes for its class with weight exp(similarity / tau); Wu et al.,
    arXiv:1805.01978, as in Self-Classifier, arXiv:2103.10994v3. Of classes with equally many votes the smaller number
    comes first; that also goes for those without any, which fill the first five if neighbours agree.

    Args:
        as `src.metrics.knn_top`, which checks them.

    Returns:
        {k: (hits of the first, hits of the first five)}
    """
    device = queries.device
    classes, numbers = torch.cat([bank_labels.to(device), query_labels.to(device)]).unique(return_inverse=True)
    of_bank, of_queries = numbers[: len(bank)], numbers[len(bank) :]
    hits = {k: [0, 0] for k in ks}
    for start in range(0, len(queries), query_chunk):
        part = slice(start, start + query_chunk)
        similarities, rows = nearest(bank, queries[part], max(ks), bank_chunk=bank_chunk)
        # Relative to the nearest: exp(1 / 0.01) would be infinite in float32. A factor of all votes changes no order.
        weights = ((similarities - similarities[:, :1]).double() / tau).exp()
        labels, target = of_bank[rows], of_queries[part, None]
        votes = weights.new_zeros(len(rows), len(classes))
        counted = 0
        for k in sorted(hits):
            votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
            counted = k
            own = votes.gather(1, target)
            smaller = torch.arange(len(classes), device=device) < target
            place = ((votes > own) | ((votes == own) & smaller)).sum(dim=1)
            hits[k][0] += int((place < 1).sum())
            hits[k][1] += int((place < 5).sum())
    return {k: tuple(found) for k, found in hits.items()}

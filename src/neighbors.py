"""Find exact nearest neighbours by dot product and count their votes. The largest matrix is one chunk of queries × bank."""

from collections.abc import Sequence

import torch
from torch import Tensor

QUERY_CHUNK = 2048  # rows of the queries that are compared at once
BANK_CHUNK = 16384  # rows of the bank that are compared at once


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, *, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """Return the k rows of the bank with the largest dot products with each query, best first.

    Among equally similar rows, the earlier row comes first. So the result does not depend on `bank_chunk`, apart from
    the rounding of the dot products. They are computed in float64 if the bank or the queries are float64, else in
    float32.

    Args:
        bank: (N, F) rows, N >= k. They may be on another device than the queries; each chunk is copied to that device.
        queries: (Q, F) rows, all of which are compared at once.
        bank_chunk: number of rows of the bank that are compared at once.

    Returns:
        similarities: (Q, k) float32 or float64, on the device of the queries.
        rows: (Q, k) long, on the device of the queries.
    """
    dtype = torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)
    queries = queries.to(dtype)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        part = bank[start : start + bank_chunk].to(queries.device).to(dtype)
        similarities = queries @ part.T
        found, where = _largest(similarities, min(k, len(part)))
        # The best rows so far are earlier rows. They come first, and a stable sort keeps them before their equals.
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, where + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order[:, :k])
    return best, rows


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their columns. Among equal values, the first columns are returned.

    `topk` does not guarantee which of several equal values it returns.
    """
    top, columns = values.topk(k, dim=1)
    last = top[:, -1:]
    cut = (values == last).sum(dim=1) > (top == last).sum(dim=1)  # rows where topk left out a value equal to its last
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
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> dict[int, tuple[int, int]]:
    """Count the queries whose class is first, and among the first five, in the votes of the k nearest rows of the bank.

    Wu et al., arXiv:1805.01978, as in Self-Classifier, arXiv:2103.10994v3. Each of the k rows votes for its class with
    the weight exp(similarity / tau). Among classes with equally many votes, the smaller class comes first. This rule
    also orders classes without votes, which can be among the first five.

    Args:
        See `src.metrics.knn_top`, which also checks the arguments.

    Returns:
        {k: (top1 hits, top5 hits)}, numbers of queries.
    """
    device = queries.device
    classes, numbers = torch.cat([bank_labels.to(device), query_labels.to(device)]).unique(return_inverse=True)
    of_bank, of_queries = numbers[: len(bank)], numbers[len(bank) :]
    top1, top5 = dict.fromkeys(ks, 0), dict.fromkeys(ks, 0)
    for start in range(0, len(queries), query_chunk):
        part = slice(start, start + query_chunk)
        similarities, rows = nearest(bank, queries[part], max(ks), bank_chunk=bank_chunk)
        # Relative to the nearest row, because exp(1 / 0.01) is infinite in float32. A common factor changes no order.
        weights = ((similarities - similarities[:, :1]).double() / tau).exp()
        labels, target = of_bank[rows], of_queries[part, None]
        votes = weights.new_zeros(len(rows), len(classes))
        counted = 0
        for k in sorted(top1):
            votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
            counted = k
            own = votes.gather(1, target)
            smaller = torch.arange(len(classes), device=device) < target
            place = ((votes > own) | ((votes == own) & smaller)).sum(dim=1)
            top1[k] += int((place < 1).sum())
            top5[k] += int((place < 5).sum())
    return {k: (top1[k], top5[k]) for k in top1}

"""Find exact nearest neighbours by dot product and count their votes.

On a CPU faiss searches in float32: Douze et al., "The Faiss library", arXiv:2401.08281. It selects the neighbours while the
products are in the cache. torch searches on a GPU, in float64, and where faiss is not installed.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

QUERY_CHUNK = 2048  # rows of the queries that are compared at once
BANK_CHUNK = 16384  # rows of the bank that torch compares at once
CONVERTED = 1 << 26  # largest number of entries of a part of the bank that is converted to float32 for faiss
WORTHWHILE = 1 << 32  # number of multiplications below which the import of faiss takes longer than it saves


def faiss_for(*tensors: Tensor, multiplications: int) -> ModuleType | None:
    """Return the module faiss if it is the faster way to search these tensors, else None.

    It is if all tensors are on the CPU and none is float64, and if there are many multiplications to do. From then on, faiss
    uses as many threads as torch.
    """
    if any(each.device.type != "cpu" or each.dtype == torch.float64 for each in tensors):
        return None
    if multiplications < WORTHWHILE:
        return None
    try:
        import faiss  # slow to import
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, *, bank_chunk: int = BANK_CHUNK) -> tuple[Tensor, Tensor]:
    """Return the k rows of the bank with the largest dot products with each query, best first.

    Among equally similar rows, the earlier row comes first. So the result does not depend on `bank_chunk`, apart from
    the rounding of the dot products. They are computed in float64 if the bank or the queries are float64, else in
    float32.

    Args:
        bank: (N, F) rows, N >= k. They may be on another device than the queries; each chunk is copied to that device.
        queries: (Q, F) rows, all of which are compared at once.
        bank_chunk: number of rows of the bank that torch compares at once.

    Returns:
        similarities: (Q, k) float32 or float64, on the device of the queries.
        rows: (Q, k) long, on the device of the queries.
    """
    faiss = faiss_for(bank, queries, multiplications=bank.numel() * len(queries))
    if faiss is None:
        return _nearest_by_torch(bank, queries, k, bank_chunk=bank_chunk)
    best, rows = _nearest_by_faiss(bank, queries.float(), min(k + 1, len(bank)), faiss=faiss)
    # faiss does not guarantee which of several equal values it returns. The next value after the k-th tells whether it
    # had to leave one out. It finds no row (-1) if a product is not finite.
    unclear = (rows < 0).any(dim=1)
    if len(bank) > k:
        unclear |= best[:, k - 1] == best[:, k]
        best, rows = best[:, :k].contiguous(), rows[:, :k].contiguous()
    tied = (best[:, 1:] == best[:, :-1]).any(dim=1).nonzero()[:, 0]
    best[tied], rows[tied] = _earlier_first(best[tied], rows[tied])
    if unclear.any():
        best[unclear], rows[unclear] = _nearest_by_torch(bank, queries[unclear], k, bank_chunk=bank_chunk)
    return best, rows


def _nearest_by_faiss(bank: Tensor, queries: Tensor, k: int, *, faiss: ModuleType) -> tuple[Tensor, Tensor]:
    """Return what `nearest` returns, but with equally similar rows in any order and any choice."""
    size = len(bank)
    if bank.dtype != torch.float32 or not bank.is_contiguous():
        size = max(CONVERTED // bank.shape[1], 1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(bank), size):
        part = bank[start : start + size].float().contiguous()
        found, where = faiss.knn(
            queries.contiguous().numpy(), part.numpy(), min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best = torch.cat([best, torch.from_numpy(found)], dim=1)
        rows = torch.cat([rows, torch.from_numpy(where) + start], dim=1)
        if start > 0:
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
    return best, rows


def _nearest_by_torch(bank: Tensor, queries: Tensor, k: int, *, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """Return what `nearest` returns. The largest matrix is queries × `bank_chunk`."""
    dtype = torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)
    queries = queries.to(dtype)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        part = bank[start : start + bank_chunk].to(queries.device).to(dtype)
        found, where = _largest(queries @ part.T, min(k, len(part)))
        # The best rows so far are earlier rows. They come first, and a stable sort keeps them before their equals.
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, where + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order[:, :k])
    return best, rows


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their columns. Among equal values, the first columns are returned.

    `topk` does not guarantee which of several equal values it returns. The next value tells whether it left one out.
    """
    top, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    if top.shape[1] > k:
        cut = top[:, k - 1] == top[:, k]
        top, columns = top[:, :k], columns[:, :k]
        if cut.any():
            columns[cut] = values[cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
            top = values.gather(1, columns)
    return _earlier_first(top, columns)


def _earlier_first(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by value, largest first, and equal values by column."""
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


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

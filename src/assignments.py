"""Assign images to prototypes over all ranks: Sinkhorn on a batch, Sinkhorn on a data set, and spherical k-means.

Legend: B samples on this rank, N samples over all ranks, K prototypes, D features.
"""

import math
from collections.abc import Callable
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed

CHUNK = 1 << 22  # entries of a samples × prototypes matrix that are held at once in float64
LARGEST_SHIFT = 30.0  # a plan in memory is computed again when the logarithm of a factor has changed by more


# ---- on a batch -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute soft codes that divide the samples of all ranks evenly among the prototypes.

    SwAV, arXiv:2006.09882v5, section 3.1. The codes Q maximise sum(Q * scores) + epsilon * entropy(Q) over all matrices
    whose rows sum to 1 and whose columns sum to N/K. Sinkhorn's algorithm starts from exp(scores / epsilon) and scales
    the columns and the rows in turn. Each iteration ends with the rows, so the rows sum to 1 exactly. The column sums
    approach N/K with the number of iterations.

    Args:
        scores: (B, K) cosines of embeddings and prototypes. B may differ between ranks.
        epsilon: smoothness of the codes, above 0.
        iterations: number of times that the columns and then the rows are scaled, at least 1. The paper uses 3.

    Returns:
        (B, K) codes without gradient, float32 or float64.

    Raises:
        ValueError: if `epsilon` or `iterations` is out of range.

    Differs from the plain formula only in its arithmetic, which neither overflows nor underflows for any epsilon: the
    first scaling of the columns uses logarithms. After it, every column has an entry of at least 1/N. Then each row is
    divided by its largest entry.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"epsilon is {epsilon}, iterations is {iterations}: expected epsilon > 0 and iterations >= 1")
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    with torch.autocast(scores.device.type, enabled=False):
        logs = scores / epsilon
        peak = distributed.max_over_ranks(_column_peaks(logs))
        total = distributed.sum_over_ranks(_exp(logs - peak).sum(dim=0))
        logs -= peak + total.log_()
        codes = _exp(logs - logs.amax(dim=1, keepdim=True))
        codes /= codes.sum(dim=1, keepdim=True)
        for _ in range(iterations - 1):
            codes /= distributed.sum_over_ranks(codes.sum(dim=0))
            codes /= codes.sum(dim=1, keepdim=True)
    return codes


def _exp(logs: Tensor) -> Tensor:
    """Compute exp in place, with 0 for results so small that a later division could make them denormal.

    Arithmetic with denormal numbers is many times slower on CPUs.
    """
    smallest = math.log(torch.finfo(logs.dtype).tiny) + 20
    return logs.masked_fill_(logs < smallest, -math.inf).exp_()


def _column_peaks(logs: Tensor) -> Tensor:
    """Return the largest entry of each column, -inf if this rank has no rows."""
    return logs.amax(dim=0) if len(logs) else logs.new_full(logs.shape[1:], -math.inf)


# ---- on a data set --------------------------------------------------------------------------------------------------


@torch.no_grad()
def balanced_labels(
    log_probabilities: Tensor, lam: float, tolerance: float, *, max_iterations: int | None = None
) -> Tensor:
    """Compute hard labels that divide a whole data set almost evenly among K classes with the least cross-entropy.

    SeLa, arXiv:1911.05371v3, section 3: optimal transport with the cost -log p between N images and K classes. Images
    have equal weights, classes have equal weights, and an entropy term with the factor 1/lam smooths the plan. The label
    of an image is the class with the largest entry in its row of the plan. The computation runs in float64 on logarithms,
    one chunk of images at a time. In the authors' code, powers of p underflow.

    Args:
        log_probabilities: (B, K) of this rank's images. Adding a constant to a row does not change the labels.
        lam: sharpness, above 0: a larger value is closer to transport without smoothing. The authors use 25 on ImageNet.
        tolerance: threshold of convergence, above 0. After the 1st, 11th, 21st ... iteration, the relative changes of
            the images' scaling factors are summed over all images. The iterations end once the sum is at most this.
        max_iterations: largest number of iterations; None: no limit, as in the authors' code. With a large `lam` and the
            outputs of an untrained network, convergence takes more than 10,000 iterations, and the labels hardly change
            in the later ones.

    Returns:
        (B,) long, the label of each image of this rank.

    Raises:
        ValueError: if an entry is not finite, or `lam` or `tolerance` is not positive.
    """
    B, K = log_probabilities.shape
    read = log_probabilities.__getitem__
    return _balance(
        read, B, K, device=log_probabilities.device, lam=lam, tolerance=tolerance, max_iterations=max_iterations
    )


@torch.no_grad()
def balanced_prototype_labels(
    embeddings: Tensor,
    prototypes: Tensor,
    temperature: float,
    *,
    lam: float,
    tolerance: float,
    max_iterations: int | None,
    bias: Tensor | None = None,
    memory: int = 0,
) -> Tensor:
    """Compute `balanced_labels` for p = softmax((embeddings · prototypes + bias) / temperature).

    Every iteration computes p again, one chunk at a time. So only the embeddings and one chunk of p are in memory. The
    embeddings have D numbers per image, the whole matrix p has K. On ImageNet with 3,000 prototypes, the whole matrix would
    take 15 GB over all ranks. If there is room for it, it is computed once.

    Args:
        embeddings: (B, D) of this rank's images.
        prototypes: (K, D), the same on all ranks.
        temperature: temperature of the softmax, above 0.
        lam, tolerance, max_iterations: see `balanced_labels`.
        bias: (K,), the same on all ranks; None: zero.
        memory: number of bytes that the whole matrix of this rank may take.
    """

    def read(rows: slice) -> Tensor:
        products = embeddings[rows] @ prototypes.T
        return (products if bias is None else products.add_(bias)).div_(temperature)

    B, K = len(embeddings), len(prototypes)
    in_memory = B * K * (8 + embeddings.element_size()) <= memory
    if in_memory:
        scores = embeddings.new_empty(B, K)
        for rows in _chunks(B, K):
            scores[rows] = read(rows)
    return _balance(
        scores.__getitem__ if in_memory else read,
        B,
        K,
        device=embeddings.device,
        lam=lam,
        tolerance=tolerance,
        max_iterations=max_iterations,
        in_memory=in_memory,
    )


def _chunks(B: int, K: int) -> list[slice]:
    """Divide B rows of K entries into chunks that are processed at once."""
    size = max(CHUNK // K, 1)
    return [slice(start, start + size) for start in range(0, B, size)]


def _balance(
    read: Callable[[slice], Tensor],
    B: int,
    K: int,
    *,
    device: torch.device,
    lam: float,
    tolerance: float,
    max_iterations: int | None,
    in_memory: bool = False,
) -> Tensor:
    """Compute `balanced_labels`. `read(rows)` returns log-probabilities of some rows, each row up to a constant.

    The plan has the entries c_n r_k p_nk^lam, with a factor c for each image n and a factor r for each class k.

    Args:
        in_memory: keep the plan in memory, which saves most of the time.
    """
    if lam <= 0 or tolerance <= 0:
        raise ValueError(f"lam is {lam}, tolerance is {tolerance}: expected lam > 0 and tolerance > 0")
    chunks = _chunks(B, K)
    images = int(distributed.sum_over_ranks(torch.tensor(B, device=device)))
    log_c = torch.full((B,), -math.log(images), dtype=torch.float64, device=device)
    # r_k = 1/K / sum_n c_n p_nk^lam: a log-sum-exp that is accumulated over the chunks, then over the ranks
    peak = torch.full((K,), -math.inf, dtype=torch.float64, device=device)
    total = torch.zeros_like(peak)
    for rows in chunks:
        logs = read(rows).double()
        log_c[rows] -= lam * logs.logsumexp(dim=1)  # removes the constant of each row
        logs = logs.mul(lam).add_(log_c[rows, None])
        higher = torch.maximum(peak, logs.amax(dim=0))
        total = total * (peak - higher).exp() + _exp(logs.sub_(higher)).sum(dim=0)
        peak = higher
    highest = distributed.max_over_ranks(peak)
    total = distributed.sum_over_ranks(total * (peak - highest).exp())
    log_r = -(total.log() + highest) - math.log(K)
    # sums are N times the column sums of the plan. With these initial values, the first iteration does not change r.
    sums = torch.full_like(log_r, images / K)
    kept = log_r.new_empty(B, K) if in_memory else None
    plan = _Plan(read, chunks, lam=lam, images=images, kept=kept)
    for iteration in islice(count(), max_iterations):
        # r_k /= K sums_k / N. No sum is 0, because the previous r gave every column an entry of at least 1/(K N).
        log_r = log_r - (sums * K / images).log()
        before, (log_c, sums) = log_c, plan.scale(log_r, log_c)
        sums = distributed.sum_over_ranks(sums)
        if not sums.isfinite().all():
            raise ValueError("a probability is not finite, or a class has probability 0 for every image")
        if iteration % 10 == 0:
            change = distributed.sum_over_ranks((before - log_c).expm1().abs().sum())
            if change <= tolerance:
                break
    labels = torch.empty(B, dtype=torch.long, device=device)
    for rows in chunks:
        labels[rows] = read(rows).double().mul(lam).add_(log_r).argmax(dim=1)
    return labels


class _Plan:
    """N times the transport plan of this rank's images, computed one chunk at a time or kept in memory.

    Args:
        read: returns log-probabilities of some rows, each row up to a constant.
        chunks: the rows that are processed at once.
        images: number N of images over all ranks.
        kept: (B, K) float64 memory for the plan; None: only one chunk is in memory.
    """

    def __init__(
        self, read: Callable[[slice], Tensor], chunks: list[slice], *, lam: float, images: int, kept: Tensor | None
    ):
        self.read, self.chunks, self.lam, self.images, self.kept = read, chunks, lam, images, kept
        self.log_c = self.log_r = torch.empty(0)  # the scaling of the plan that is kept

    def scale(self, log_r: Tensor, log_c: Tensor) -> tuple[Tensor, Tensor]:
        """Scale the rows for given factors of the classes: c_n = 1/N / sum_k r_k p_nk^lam. Then each row sums to 1/N.

        Args:
            log_r: (K,) logarithms of r.
            log_c: (B,) logarithms of the previous c.

        Returns:
            (B,) logarithms of c, and the (K,) column sums of the rows of this rank.
        """
        if self.kept is not None and len(self.log_r):
            shift = log_r - self.log_r
            if shift.abs().max() < LARGEST_SHIFT:
                ratio = shift.exp()
                totals = self.kept @ ratio
                return self.log_c - totals.log(), ratio * (totals.reciprocal() @ self.kept)
        log_c, sums = torch.empty_like(log_c), torch.zeros_like(log_r)
        for rows in self.chunks:
            logs = self.read(rows).double().mul(self.lam).add_(log_r)
            peaks = logs.amax(dim=1, keepdim=True)
            plan = _exp(logs.sub_(peaks))
            row_sums = plan.sum(dim=1, keepdim=True)
            sums += plan.div_(row_sums).sum(dim=0)
            log_c[rows] = -(peaks + row_sums.log()).flatten() - math.log(self.images)
            if self.kept is not None:
                self.kept[rows] = plan
        if self.kept is not None:
            self.log_r, self.log_c = log_r, log_c
        return log_c, sums


# ---- k-means --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spherical_kmeans(embeddings: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Run spherical k-means on the unit rows of all ranks, from given centroids.

    DeepCluster-v2, arXiv:2006.09882v5, appendix D. Each iteration assigns every row to the centroid with the largest dot
    product; among equals, to the first. Then each centroid becomes the mean of its rows, scaled to unit length. A
    centroid without rows does not change.

    Args:
        embeddings: (B, D) unit rows of this rank. B may differ between ranks.
        centroids: (K, D) initial centroids, the same on all ranks.
        iterations: number of iterations.

    Returns:
        assignments: (B,) long, the final centroid of each row.
        centroids: (K, D) final centroids of unit length.
    """
    for _ in range(iterations):
        assignments = _nearest_centroid(embeddings, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, assignments, embeddings)
        counts = torch.bincount(assignments, minlength=len(centroids)).to(centroids.dtype)
        sums, counts = distributed.sum_over_ranks(sums), distributed.sum_over_ranks(counts)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        centroids = F.normalize(means, dim=1)
    return _nearest_centroid(embeddings, centroids), centroids


def _nearest_centroid(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """Return the position of the centroid with the largest dot product with each row, (B,) long."""
    found = [(rows @ centroids.T).argmax(dim=1) for rows in embeddings.split(max(CHUNK // len(centroids), 1))]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=embeddings.device)

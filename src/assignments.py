"""Which prototype an image is assigned to: Sinkhorn on a batch, Sinkhorn on a data set, spherical k-means, all over ranks.

Legend: B samples on this rank, N over all ranks, K prototypes, D features.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed

CHUNK = 1 << 22  # entries of a samples × prototypes matrix that are raised to float64 at once
KMEANS_ITERATIONS = 10


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft codes that share the samples of all ranks evenly among the prototypes.

    SwAV, arXiv:2006.09882v5, section 3.1: the codes Q maximise sum(Q * scores) + epsilon * entropy(Q) over matrices whose
    rows sum to 1 and whose columns sum to N/K; found by scaling the columns and rows of exp(scores / epsilon) in turn.
    The rows come last and sum to 1 exactly, the columns approach N/K with more iterations.

    Args:
        scores: (B, K), cosines of embeddings and prototypes. Ranks may hold different numbers of rows.
        epsilon: smoothness of the codes, > 0.
        iterations: scalings of columns and rows, at least 1. The paper uses 3.

    Returns:
        (B, K) codes without gradient, float32 or float64.

    Departs from the plain formula in arithmetic only, so that no epsilon over- or underflows: the first columns are scaled
    in the log domain. Then every column has an entry of at least 1/N, and every row is brought to a largest entry of 1.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"need epsilon > 0 and iterations >= 1, got {epsilon} and {iterations}")
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    with torch.autocast(scores.device.type, enabled=False):
        logs = scores / epsilon
        peak = distributed.max_over_ranks(_peaks(logs))
        total = distributed.sum_over_ranks(_exp(logs - peak).sum(dim=0))
        logs -= peak + total.log_()
        codes = _exp(logs - logs.amax(dim=1, keepdim=True))
        codes /= codes.sum(dim=1, keepdim=True)
        for _ in range(iterations - 1):
            codes /= distributed.sum_over_ranks(codes.sum(dim=0))
            codes /= codes.sum(dim=1, keepdim=True)
    return codes


def _exp(logs: Tensor) -> Tensor:
    """exp in place, 0 where later divisions could leave a denormal number, on which CPUs are many times slower."""
    smallest = math.log(torch.finfo(logs.dtype).tiny) + 20
    return logs.masked_fill_(logs < smallest, -math.inf).exp_()


def _peaks(logs: Tensor) -> Tensor:
    """The largest entry of each column; of none where this rank has no rows."""
    return logs.amax(dim=0) if len(logs) else logs.new_full(logs.shape[1:], -math.inf)


@torch.no_grad()
def balanced_labels(
    log_probabilities: Tensor, lam: float = 25.0, tolerance: float = 0.1, *, max_iterations: int = 1000
) -> Tensor:
    """Hard labels of a whole data set that share it nearly evenly among K classes, at the least cross-entropy.

    SeLa, arXiv:1911.05371v3, section 3: optimal transport with cost -log p between N images and K classes, both with uniform
    weights, smoothed by an entropy term 1/lam; each image takes its largest entry of the plan. Float64 in the log domain,
    chunk by chunk, where the authors' form with powers of p underflows.

    Args:
        log_probabilities: (B, K) of this rank's images. Anything that differs by a constant per row gives the same labels.
        lam: larger is nearer to exact transport; 25 on ImageNet.
        tolerance: iterations end when the sum over images of the relative change of their scaling, looked at after the
            1st, 11th, 21st ... iteration, is not above it,
        max_iterations: or after so many. The authors set no limit; a large `lam` on the outputs of an untrained network needs
            more than 10,000, and the labels hardly change any more.

    Returns:
        (B,) long.

    Raises:
        ValueError: if an entry is not finite, or `lam` or `tolerance` not positive.
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
    lam: float = 25.0,
    tolerance: float = 0.1,
    max_iterations: int = 1000,
) -> Tensor:
    """`balanced_labels` of p = softmax(embeddings · prototypes / temperature), computed anew in every iteration.

    Memory is that of the embeddings, D numbers for an image instead of K, and of a chunk: on ImageNet with 3,000 prototypes
    the whole matrix would take 15 GB over the ranks.

    Args:
        embeddings: (B, D) of this rank's images.
        prototypes: (K, D), the same on all ranks.
    """

    def read(rows: slice) -> Tensor:
        return (embeddings[rows] @ prototypes.T).div_(temperature)

    return _balance(
        read,
        len(embeddings),
        len(prototypes),
        device=embeddings.device,
        lam=lam,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def _balance(
    read: Callable[[slice], Tensor],
    B: int,
    K: int,
    *,
    device: torch.device,
    lam: float,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """See `balanced_labels`; `read(rows)` gives the log-probabilities of some rows up to a constant each, once in every
    iteration."""
    if lam <= 0 or tolerance <= 0:
        raise ValueError(f"need lam > 0 and tolerance > 0, got {lam} and {tolerance}")
    size = max(CHUNK // K, 1)
    chunks = [slice(start, start + size) for start in range(0, B, size)]
    images = distributed.sum_over_ranks(torch.tensor(B, device=device)).item()
    scaling = torch.full((B,), -math.log(images), dtype=torch.float64, device=device)  # log c, of images
    # r_k = 1/K / sum_n c_n p_nk^lam, a running log-sum-exp over chunks, then over ranks
    peak = torch.full((K,), -math.inf, dtype=torch.float64, device=device)
    total = torch.zeros_like(peak)
    for rows in chunks:
        logs = read(rows).double()
        scaling[rows] -= lam * logs.logsumexp(dim=1)  # in the place of the constants
        logs = logs.mul(lam).add_(scaling[rows, None])
        higher = torch.maximum(peak, logs.amax(dim=0))
        total = total * (peak - higher).exp() + _exp(logs.sub_(higher)).sum(dim=0)
        peak = higher
    highest = distributed.max_over_ranks(peak)
    total = distributed.sum_over_ranks(total * (peak - highest).exp())
    prototypes = -(total.log() + highest) - math.log(K)  # log r, of classes
    sums = torch.full_like(prototypes, images / K)  # of the plan's columns, times N; such that r stays at first
    for iteration in range(max_iterations):
        # r_k /= K sums_k / N, which is not 0: the r before gave every column an entry of at least 1/(K N)
        prototypes = prototypes - (sums * K / images).log()
        # c_n = 1/N / sum_k r_k p_nk^lam; N c_n r_k p_nk^lam is the row of the plan, of which the columns are summed
        before, scaling, sums = scaling, torch.empty_like(scaling), torch.zeros_like(prototypes)
        for rows in chunks:
            logs = read(rows).double().mul(lam).add_(prototypes)
            peaks = logs.amax(dim=1, keepdim=True)
            plan = _exp(logs.sub_(peaks))
            row_sums = plan.sum(dim=1, keepdim=True)
            sums += plan.div_(row_sums).sum(dim=0)
            scaling[rows] = -(peaks + row_sums.log()).flatten() - math.log(images)
        sums = distributed.sum_over_ranks(sums)
        if not sums.isfinite().all():
            raise ValueError("a probability is not finite, or a class has none")
        if iteration % 10 == 0:
            change = distributed.sum_over_ranks((before - scaling).expm1().abs().sum())
            if change <= tolerance:
                break
    labels = torch.empty(B, dtype=torch.long, device=device)
    for rows in chunks:
        labels[rows] = read(rows).double().mul(lam).add_(prototypes).argmax(dim=1)
    return labels


@torch.no_grad()
def spherical_kmeans(
    embeddings: Tensor, centroids: Tensor, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """k-means by cosine over the unit rows of all ranks, from given centroids.

    DeepCluster-v2, arXiv:2006.09882v5, appendix D: in each iteration every row joins the centroid of the largest dot product
    (of equals the first), then centroids become the unit-length mean of their rows; one without rows stays where it is.

    Args:
        embeddings: (B, D) unit rows of this rank; ranks may hold different numbers.
        centroids: (K, D), the same on all ranks.

    Returns:
        assignments (B,) long, to the final centroids (K, D) of unit length, which are the second value.
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
    found = [(rows @ centroids.T).argmax(dim=1) for rows in embeddings.split(max(CHUNK // len(centroids), 1))]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=embeddings.device)

"""Lloyd's k-means on features, on a CPU or a GPU, with the stopping rule of scikit-learn.

The function skips distances that cannot change an assignment. On a CPU, faiss computes the first iterations, in which most
distances are needed: Douze et al., "The Faiss library", arXiv:2401.08281.

The initial centroids come from k-means++: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
2007, in the greedy variant that they describe with their experiments. Bounds on the distances tell which distances to skip:
Elkan, "Using the Triangle Inequality to Accelerate k-Means", ICML 2003, with one lower bound per group of centroids as in Ding
et al., "Yinyang K-Means", ICML 2015. Up to rounding, the bounds change no assignment.

Legend: N rows of F features, K centroids in G groups of M.
"""

import math
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..neighbors import faiss_for

CHUNK = 1 << 22  # largest number of entries of a rows × centroids or rows × features matrix in memory
GROUP = 50  # number of centroids that share a lower bound
# A pair of a row and a group is open if the bounds do not exclude it.
MOST = 0.4  # share of open pairs above which comparing all pairs at once is faster
LOOSE = 0.9  # the same before the upper bounds are tightened; above this share, tightening would close few pairs
# Share of rows that change their centroid in an iteration, up to which faiss leaves the next iterations to the bounds. On one
# thread the bounds take half of faiss's time from here on, so they also win where faiss gains more from further threads.
SETTLED = 0.002
UNSETTLED = 20  # typical number of iterations with more changes
NEAR = 4.0  # the rows are centred for faiss only if their mean is farther from the origin, in units of their variance
TOLERANCE = 1e-4  # scikit-learn's default, see `lloyd`
EARLY = 2e-4  # `least_gain` of an early stop, see `lloyd`


class Fit(NamedTuple):
    """The result of k-means.

    centroids: (K, F), on the device of the features.
    inertia: sum of the squared distances of the rows to their nearest centroids.
    iterations: number of iterations of this start.
    restart: number of this start, counted from 0.
    """

    centroids: Tensor
    inertia: float
    iterations: int
    restart: int


@torch.no_grad()
def fit(
    features: Tensor,
    num_clusters: int,
    *,
    init: str = "k-means++",
    restarts: int = 1,
    seed: int = 0,
    max_iterations: int = 300,
    tolerance: float = TOLERANCE,
    least_gain: float = 0.0,
) -> Fit:
    """Run k-means from several starts and return the fit with the smallest sum of squared distances.

    All ranks must call the function with the same rows. They share the starts. The draws of a start depend only on its
    number, so any number of ranks finds the same centroids on one kind of hardware.

    Args:
        features: (N, F) float32 or float64.
        num_clusters: K, at most N.
        init: "k-means++", or "random", which draws K different rows.
        restarts: number of starts, at least 1; each has its own draws from `seed`.
        max_iterations, tolerance, least_gain: see `lloyd`.

    Raises:
        ValueError: if K is not in [1, N], `init` has another value, or `restarts` is below 1.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters must be from 1 to {len(features)}, the number of rows, got {num_clusters}")
    if init not in ("k-means++", "random") or restarts < 1:
        raise ValueError(f"init must be k-means++ or random and restarts at least 1, got {init} and {restarts}")
    ranks, rank = distributed.world_size(), distributed.rank()
    best: Fit | None = None
    # All ranks run the same number of starts, some of them twice. A rank without a start might wait until the timeout.
    for restart in sorted({(rank + turn) % restarts for turn in range(0, math.ceil(restarts / ranks) * ranks, ranks)}):
        rng = np.random.default_rng([seed, restart])
        if init == "random":
            rows = torch.from_numpy(rng.choice(len(features), num_clusters, replace=False))
        else:
            rows = plus_plus(features, num_clusters, rng)
        centroids, inertia, iterations = lloyd(
            features, features[rows], max_iterations=max_iterations, tolerance=tolerance, least_gain=least_gain
        )
        if best is None or inertia < best.inertia:
            best = Fit(centroids, inertia=inertia, iterations=iterations, restart=restart)
    assert best is not None  # there is at least one start
    if ranks == 1:
        return best
    every = distributed.gather_no_grad(
        torch.tensor([[best.inertia, best.restart, best.iterations]], dtype=torch.float64)
    )
    winner = min(range(ranks), key=lambda r: every[r, :2].tolist())
    centroids = best.centroids if rank == winner else torch.zeros_like(best.centroids)
    inertia, restart, iterations = every[winner].tolist()
    return Fit(distributed.sum_over_ranks(centroids), inertia=inertia, iterations=int(iterations), restart=int(restart))


@torch.no_grad()
def plus_plus(features: Tensor, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """Draw K rows as initial centroids by greedy k-means++, and return their positions, (K,) long.

    The probability of a row is proportional to its squared distance to the nearest row drawn before. Each time the function
    draws 2 + log K candidates and keeps the candidate that leaves the smallest sum of squared distances. Equal rows are
    drawn only if there are fewer than K different rows.
    """
    N = len(features)
    trials = 2 + int(math.log(num_clusters))
    chosen = [int(rng.integers(N))]
    closest = torch.full((N, 1), math.inf, dtype=features.dtype, device=features.device)
    closer = closest.expand(N, trials).contiguous()
    squares, middle = _centre(features)

    def compare(candidates: list[int]) -> Tensor:
        """Return the sum of squared distances that each of T candidates would leave, (T,) float64.

        The function writes the squared distance of each row to its nearest chosen row or candidate into `closer`.
        """
        left = torch.zeros(len(candidates), dtype=torch.float64, device=features.device)
        small, offset = _prepare(features[candidates], middle)
        for part in _chunks(N, max(features.shape[1], trials)):
            scores = torch.addmm(offset, features[part], small.T, alpha=-2)
            distances = scores.add_(squares[part, None]).clamp_(min=0)
            closer[part, : len(candidates)] = torch.minimum(distances, closest[part])
            left += closer[part, : len(candidates)].sum(dim=0, dtype=torch.float64)
        return left

    compare(chosen)
    closest.copy_(closer[:, :1])
    while len(chosen) < num_clusters:
        closest[chosen[-1]] = 0  # exactly, without rounding: the row is not drawn again
        total = closest[:, 0].double().cpu().numpy().cumsum()
        if total[-1] > 0:
            drawn = np.searchsorted(total, rng.random(trials) * total[-1], side="right").clip(max=N - 1)
        else:
            drawn = rng.choice(np.setdiff1d(np.arange(N), chosen), 1)
        best = int(compare(drawn.tolist()).argmin())
        chosen.append(int(drawn[best]))
        closest.copy_(closer[:, best : best + 1])
    return torch.tensor(chosen)


@torch.no_grad()
def lloyd(
    features: Tensor,
    centroids: Tensor,
    *,
    max_iterations: int = 300,
    tolerance: float = TOLERANCE,
    least_gain: float = 0.0,
) -> tuple[Tensor, float, int]:
    """Run k-means from given centroids.

    In each iteration every row is assigned to its nearest centroid, and every centroid becomes the mean of its rows. The
    iterations end as in scikit-learn's KMeans: when no assignment changes, when the sum of the squared moves of the
    centroids is at most `tolerance` times the mean variance of a feature, or after `max_iterations`.

    An early stop takes far fewer iterations. With `least_gain` 2e-4 it took a fifth of them on 100,000 × 256 features, for a
    sum of squared distances that is 0.16 % larger (docs/results/benchmarks.md).

    If n centroids have no rows, each of them takes one of the n rows that are farthest from their own centroids.

    Beyond the features, the function needs memory for N × K / GROUP bounds and for one chunk.

    Args:
        features: (N, F) float32 or float64.
        centroids: (K, F) on the same device.
        least_gain: the iterations also end when one lowers the sum of squared distances by less than `least_gain` times
            this sum. 0: no early stop.

    Returns:
        Centroids (K, F), the sum of the squared distances of the rows to their nearest centroids, and the number of
        iterations. After an early stop, the sum is that of the last assignment, which is larger by less than `least_gain`
        times itself: finding the nearest centroids once more would take as long as an iteration.
    """
    search = _Search(features, len(centroids))
    spread = search.squares.sum(dtype=torch.float64)
    limit = tolerance * spread / features.numel()
    before, left = None, math.inf
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        owner = search.nearest(centroids)
        empty = (torch.bincount(owner, minlength=len(centroids)) == 0).nonzero()[:, 0]
        if len(empty):
            far = _own_distances(features, owner, centroids).topk(len(empty))
            moving = far.values > 0  # a row that lies on its centroid stays there
            search.give(far.indices[moving], empty[moving])
        if before is not None and torch.equal(owner, before):
            break
        moved, counts = _means(features, owner, centroids)
        shift = (moved - centroids).norm(dim=1)
        search.move(shift)
        centroids, before = moved, owner.clone()
        if shift.double().square().sum() <= limit:
            break
        # With any m, and with c and n the mean and the number of the rows of a centroid:
        # Σ|x - c|² over the rows = Σ|x - m|² over the rows - Σ n |c - m|² over the centroids.
        apart = (counts * (moved - search.middle).double().square().sum(dim=1)).sum()
        left_before, left = left, (spread - apart).item()
        if left_before - left < least_gain * left:
            return centroids, left, iterations
    owner = search.nearest(centroids)
    return centroids, _own_distances(features, owner, centroids).sum(dtype=torch.float64).item(), iterations


@torch.no_grad()
def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroid of each row.

    Returns:
        (N,) long, the nearest centroids, and (N,) confidences in [0, 1]: 1 - distance / distance to the second nearest
        centroid, or 1 if there is only one centroid.
    """
    clusters = torch.empty(len(features), dtype=torch.long, device=features.device)
    sure = torch.ones(len(features), dtype=features.dtype, device=features.device)
    squares, middle = _centre(features)
    small, offset = _prepare(centroids, middle)
    for part in _chunks(len(features), max(centroids.shape)):
        scores = torch.addmm(offset, features[part], small.T, alpha=-2)
        nearest = scores.topk(min(2, len(centroids)), dim=1, largest=False)
        clusters[part] = nearest.indices[:, 0]
        if len(centroids) > 1:
            own, second = _distances(nearest.values, squares[part, None]).unbind(dim=1)
            sure[part] = torch.where(second > 0, 1 - own / second, 0.0)
    return clusters, sure


# ---- distances ------------------------------------------------------------------------------------------------------
# With m near the mean of the rows: |x - c|² = |x - m|² + |c - m|² + 2 m·(c - m) - 2 x·(c - m). In this form, features far from
# the origin lose no digits and need no centred copy. The score of a row and a centroid is the sum of the last three terms,
# those that depend on c.


def _centre(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return |x - m|² of each row, (N,), and m, (F,), the mean up to rounding. The identities hold for any m."""
    parts = _chunks(len(features), features.shape[1])
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in parts:
        total += features[part].sum(dim=0)
    middle = (total / len(features)).to(features.dtype)
    squares = features.new_empty(len(features))
    for part in parts:
        squares[part] = (features[part] - middle).square_().sum(dim=1)
    return squares, middle


def _prepare(centroids: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Return a = c - m, (K, F), and b = |c - m|² + 2 m·(c - m), (K,), which give the scores b - 2 x·a."""
    small = centroids - middle
    wide = small.double()
    return small, (wide.square().sum(dim=1) + 2 * wide @ middle.double()).to(centroids.dtype)


def _distances(scores: Tensor, squares: Tensor) -> Tensor:
    """Turn scores into distances, in place."""
    return (scores + squares).clamp_(min=0).sqrt_()


def _own_distances(features: Tensor, owner: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared distance of each row to its own centroid, (N,)."""
    found = features.new_empty(len(features))
    for part in _chunks(len(features), features.shape[1]):
        found[part] = (features[part] - centroids[owner[part]]).square_().sum(dim=1)
    return found


def _means(features: Tensor, owner: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the rows of each centroid, (K, F), and the numbers of rows, (K,).

    A centroid without rows keeps its place. The sums run in the order of the rows, so the result is reproducible.
    """
    counts = torch.bincount(owner, minlength=len(centroids))
    order = owner.argsort(stable=True)
    starts = counts.cumsum(0) - counts  # the rows of a centroid are neighbours in `order`
    sums = F.embedding_bag(order, features, starts, mode="sum")
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids), counts


def _size(width: int) -> int:
    """Return the number of rows of a chunk of a matrix with `width` columns."""
    return max(CHUNK // width, 1)


def _chunks(rows: int, width: int) -> list[slice]:
    """Return the chunks of a rows × width matrix."""
    return [slice(start, min(start + _size(width), rows)) for start in range(0, rows, _size(width))]


# ---- the search -----------------------------------------------------------------------------------------------------


class _Search:
    """Finds the nearest centroids of all rows again in every iteration.

    It skips most distances, because centroids move little between iterations.

    Each row has an upper bound on the distance to its own centroid, and for each group a lower bound on the distances to the
    other centroids of the group. When centroids move, the bounds grow or shrink by the distance of the move and stay valid.
    As long as upper <= lower, no other centroid of this group can be nearer than the own one.

    Groups consist of centroids that are close to each other, so that most groups are far from a given row. The groups are
    formed again whenever all rows are compared with all centroids.

    Attributes:
        owner: (N,) own centroid of each row.
        upper: (N,) upper bound on the distance of each row to its own centroid.
        lower: (G, N) lower bounds on the distances of each row to the other centroids of each group.
        order: (K,) centroids, group by group.
        place: (K,) position of each centroid in `order`.
    """

    def __init__(self, features: Tensor, num_clusters: int):
        N, K = len(features), num_clusters
        self.features, self.K = features, K
        self.groups = 1 if K <= 2 * GROUP else 2 ** round(math.log2(K / GROUP))
        self.size = math.ceil(K / self.groups)  # M
        self.squares, self.middle = _centre(features)
        self.order = torch.arange(K, device=features.device)
        self.place = self.order.clone()
        self.owner = torch.zeros(N, dtype=torch.long, device=features.device)
        self.upper = features.new_full((N,), math.inf)
        self.lower = features.new_full((self.groups, N), -math.inf)
        self.faiss = faiss_for(features, multiplications=UNSETTLED * K * features.numel())
        self.far = bool(self.middle.double().square().sum() > NEAR * self.squares.mean(dtype=torch.float64))

    def move(self, shift: Tensor) -> None:
        """Update the bounds after centroids have moved by (K,) distances."""
        self.upper += shift[self.owner]
        self.lower -= self._pad(shift[self.order], 0.0).view(self.groups, self.size).amax(dim=1)[:, None]

    def give(self, rows: Tensor, owner: Tensor) -> None:
        """Assign rows to other centroids than the nearest."""
        self.owner[rows] = owner
        self.lower[:, rows] = -math.inf  # there is no lower bound on the distance to the previous centroid

    def nearest(self, centroids: Tensor) -> Tensor:
        """Return the nearest centroid of each row, (N,)."""
        if self.faiss is not None:
            return self._nearest_by_faiss(self.faiss, centroids)
        width = self.features.shape[1]
        all_of_them = self._open() > LOOSE
        if not all_of_them:
            for rows in (self.upper > self.lower.amin(dim=0)).nonzero()[:, 0].split(_size(width)):
                own = centroids.index_select(0, self.owner[rows])
                self.upper[rows] = own.sub_(self.features.index_select(0, rows)).square_().sum(dim=1).sqrt_()
            all_of_them = self._open() > MOST
        if all_of_them:
            self.order = _alike(centroids, self.size)
            self.place[self.order] = torch.arange(self.K, device=self.order.device)
        small, offset = _prepare(centroids[self.order], self.middle)
        small, offset = self._pad(small, 0.0), self._pad(offset, math.inf)
        if all_of_them:
            for part in _chunks(len(self.features), max(len(small), width)):
                self._compare_all(part, small, offset)
            return self.owner
        for group in range(self.groups):
            part = slice(group * self.size, (group + 1) * self.size)
            for rows in (self.upper > self.lower[group]).nonzero()[:, 0].split(_size(max(self.size, width))):
                self._compare(rows, small[part], offset[part], group=group)
        return self.owner

    def _nearest_by_faiss(self, faiss: ModuleType, centroids: Tensor) -> Tensor:
        """Compare all rows with all centroids without bounds, and leave the next iterations to the bounds if few rows change."""
        before, self.owner = self.owner, torch.empty_like(self.owner)
        # faiss computes |x|² + |c|² - 2 x·c, which loses digits if the rows are far from the origin
        in_place = not self.far and self.features.is_contiguous()
        small = (centroids - self.middle if self.far else centroids).contiguous().numpy()
        for part in [slice(None)] if in_place else _chunks(*self.features.shape):
            rows = self.features[part] - self.middle if self.far else self.features[part].contiguous()
            found = faiss.knn(rows.numpy(), small, 1)[1]
            self.owner[part] = torch.from_numpy(found)[:, 0].clamp_(min=0)  # -1: no distance is finite
        if (self.owner != before).float().mean() <= SETTLED:
            self.faiss = None
        return self.owner

    def _open(self) -> float:
        """Return the share of open pairs of a row and a group."""
        return (self.upper > self.lower).float().mean().item()

    def _compare_all(self, part: slice, small: Tensor, offset: Tensor) -> None:
        """Compare rows with all centroids and set their bounds."""
        # The layout is centroids × rows: a minimum over centroids then reads contiguous memory.
        scores = torch.addmm(offset[:, None], small, self.features[part].T, alpha=-2).view(self.groups, self.size, -1)
        nearest = scores.amin(dim=1)  # (G, B)
        row, group = torch.arange(nearest.shape[1], device=scores.device), nearest.argmin(dim=0)
        inside = scores[group, :, row]  # (B, M)
        own, place = inside.min(dim=1)
        inside[row, place] = math.inf
        nearest[group, row] = inside.amin(dim=1)
        self.owner[part] = self.order[group * self.size + place]
        self.upper[part] = _distances(own, self.squares[part])
        self.lower[:, part] = _distances(nearest, self.squares[part])

    def _compare(self, rows: Tensor, small: Tensor, offset: Tensor, *, group: int) -> None:
        """Compare rows with the centroids of a group that is open for them."""
        scores = torch.addmm(offset[:, None], small, self.features.index_select(0, rows).T, alpha=-2)  # (M, B)
        squares, before, own = self.squares[rows], self.upper[rows], self.place[self.owner[rows]]
        mine = (own // self.size == group).nonzero()[:, 0]
        scores[own[mine] % self.size, mine] = math.inf
        found = _distances(scores.amin(dim=0), squares)
        self.lower[group, rows] = found
        better = (found < before).nonzero()[:, 0]
        rows, own, before, scores = rows[better], own[better], before[better], scores.index_select(1, better)
        place = scores.argmin(dim=0)
        self.owner[rows], self.upper[rows] = self.order[group * self.size + place], found[better]
        scores[place, torch.arange(len(better), device=rows.device)] = math.inf
        self.lower[group, rows] = _distances(scores.amin(dim=0), squares[better])
        # The previous centroid of a row is now one of the other centroids of its group.
        left = own // self.size
        self.lower[left, rows] = torch.minimum(self.lower[left, rows], before)

    def _pad(self, values: Tensor, filling: float) -> Tensor:
        """Append entries to K values so that all groups are full."""
        more = self.groups * self.size - self.K
        return torch.cat([values, values.new_full((more, *values.shape[1:]), filling)])


def _alike(centroids: Tensor, size: int) -> Tensor:
    """Return an order of the centroids, (K,), in which each `size` consecutive centroids are close to each other.

    The function divides the centroids into halves along the direction of the largest variance, again and again.
    """
    parts = [torch.arange(len(centroids), device=centroids.device)]
    while len(parts[0]) > size:
        halves: list[Tensor] = []
        for part in parts:
            rows = centroids[part] - centroids[part].mean(dim=0)
            direction = rows[rows.square().sum(dim=1).argmax()]
            for _ in range(
                5
            ):  # power iterations towards the first eigenvector of rows.T @ rows; an approximation suffices
                direction = F.normalize(rows.T @ (rows @ direction), dim=0)
            # the left half consists of full groups, so that only the last group may have fewer centroids
            left = size * math.ceil(len(part) / size / 2)
            halves += part[(rows @ direction).argsort(stable=True)].tensor_split([left])
        parts = [half for half in halves if len(half)]
    return torch.cat(parts)

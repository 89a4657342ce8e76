"""Lloyd's k-means on features, on a CPU or a GPU, with the distances that cannot matter left out.

k-means++: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007, the greedy form of their
section on experiments. Bounds: Elkan, "Using the Triangle Inequality to Accelerate k-Means", ICML 2003, one lower bound for a
group of centroids as in Ding et al., "Yinyang K-Means", ICML 2015. They skip work and change no assignment beyond rounding.

Legend: N rows of F features, K centroids in G groups of M.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed

CHUNK = 1 << 22  # entries of a rows × centroids or rows × features matrix that exist at once
GROUP = 50  # centroids that share a lower bound
MOST = 0.4  # share of centroids that rows must be compared with, above which all of them at once are faster
LOOSE = 0.9  # the same before the distances to the own centroids are computed anew, which would hardly lower it


class Fit(NamedTuple):
    """Centroids (K, F) on the features' device, the sum of squared distances to them, and how they were found."""

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
    tolerance: float = 2e-4,
) -> Fit:
    """The best of several k-means, by the sum of squared distances. To be called on all ranks, with the same rows.

    Ranks share the restarts. Which of them does one does not change what comes out, so any number of ranks, on one kind of
    hardware, finds the same centroids.

    Args:
        features: (N, F) float32 or float64.
        num_clusters: K, at most N.
        init: "k-means++" or "random", which draws K different rows.
        restarts: how often to begin, each time with other draws by `seed`.
        max_iterations, tolerance: as for `lloyd`.

    Raises:
        ValueError: if K is not from 1 to N, or `init` or `restarts` not as above.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters must be from 1 to {len(features)}, the number of rows, got {num_clusters}")
    if init not in ("k-means++", "random") or restarts < 1:
        raise ValueError(f"need init k-means++ or random and restarts >= 1, got {init} and {restarts}")
    ranks, rank = distributed.world_size(), distributed.rank()
    best = None
    # Every rank does equally many, some of them twice: a rank without one would wait for the others, perhaps too long.
    for restart in sorted({(rank + turn) % restarts for turn in range(0, math.ceil(restarts / ranks) * ranks, ranks)}):
        rng = np.random.default_rng([seed, restart])
        if init == "random":
            rows = torch.from_numpy(rng.choice(len(features), num_clusters, replace=False))
        else:
            rows = plus_plus(features, num_clusters, rng)
        found = Fit(*lloyd(features, features[rows], max_iterations=max_iterations, tolerance=tolerance), restart)
        if best is None or found.inertia < best.inertia:
            best = found
    if ranks == 1:
        return best
    every = distributed.gather_no_grad(
        torch.tensor([[best.inertia, best.restart, best.iterations]], dtype=torch.float64)
    )
    winner = min(range(ranks), key=lambda r: every[r, :2].tolist())
    centroids = best.centroids if rank == winner else torch.zeros_like(best.centroids)
    inertia, restart, iterations = every[winner].tolist()
    return Fit(distributed.sum_over_ranks(centroids), inertia, int(iterations), int(restart))


@torch.no_grad()
def plus_plus(features: Tensor, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """Rows to begin with, (K,) long: each drawn with a probability in proportion to its squared distance from those before.

    Greedy: of 2 + log K draws the one that leaves the smallest sum of squared distances. Equal rows are drawn only where
    there are not enough different ones.
    """
    N = len(features)
    trials = 2 + int(math.log(num_clusters))
    chosen = [int(rng.integers(N))]
    closest = torch.full((N, 1), math.inf, dtype=features.dtype, device=features.device)
    closer = closest.expand(N, trials).contiguous()
    squares, middle = _centre(features)

    def compare(candidates: list[int]) -> Tensor:
        """What is left with each of (T,) candidates, (T,) float64; fills `closer`."""
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
        closest[chosen[-1]] = 0  # not only nearly
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
    features: Tensor, centroids: Tensor, *, max_iterations: int = 300, tolerance: float = 2e-4
) -> tuple[Tensor, float, int]:
    """k-means from given centroids: each row joins the nearest one, each centroid becomes the mean of its rows.

    Ends when no row changes its centroid, when an iteration lowers the sum of squared distances by less than `tolerance` of
    it, or after `max_iterations`. scikit-learn goes on until centroids stand nearly still: in `benchmarks/kmeans.py` for
    five times as many iterations and 0.16 % of the sum. A centroid that is left without rows moves to the row farthest from
    its own centroid, which it takes with it; two such centroids to the two farthest, and so on.

    Memory beyond the features: N / GROUP × K bounds, and a chunk.

    Args:
        features: (N, F) float32 or float64.
        centroids: (K, F) on the same device.

    Returns:
        Centroids (K, F), the sum of squared distances of the rows to their nearest one, iterations done.
    """
    search = _Search(features, len(centroids))
    spread = search.squares.sum(dtype=torch.float64)
    before, left = None, math.inf
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        owner = search.nearest(centroids)
        empty = (torch.bincount(owner, minlength=len(centroids)) == 0).nonzero()[:, 0]
        if len(empty):
            far = _own_distances(features, owner, centroids).topk(len(empty))
            moving = far.values > 0  # or all rows lie on centroids, and there is nothing to give
            search.give(far.indices[moving], empty[moving])
        if before is not None and torch.equal(owner, before):
            break
        moved, counts = _means(features, owner, centroids)
        search.move((moved - centroids).norm(dim=1))
        centroids, before = moved, owner.clone()
        # Σ|x - c|² of rows and their means is Σ|x - m|² of all rows less what the means are apart.
        apart = (counts * (moved - search.middle).double().square().sum(dim=1)).sum()
        left_before, left = left, (spread - apart).item()
        if left_before - left < tolerance * left:
            break
    owner = search.nearest(centroids)
    return centroids, _own_distances(features, owner, centroids).sum(dtype=torch.float64).item(), iterations


@torch.no_grad()
def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row.

    Returns:
        (N,) long, and (N,) how sure that is, in [0, 1]: 1 - distance / distance to the second nearest; 1 with one centroid.
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
# |x - c|² = |x - m|² + |c - m|² + 2 m·(c - m) - 2 x·(c - m), with m the mean of the rows: so features far from the origin
# lose no digits, and need no centred copy. A score is what depends on c.


def _centre(features: Tensor) -> tuple[Tensor, Tensor]:
    """|x - m|² of each row, (N,), and m, (F,)."""
    parts = _chunks(*features.shape)  # in float64 all of them at once would be twice the features
    middle = (sum(features[part].sum(dim=0, dtype=torch.float64) for part in parts) / len(features)).to(features.dtype)
    squares = features.new_empty(len(features))
    for part in parts:
        squares[part] = (features[part] - middle).square_().sum(dim=1)
    return squares, middle


def _prepare(centroids: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """c - m, (K, F), and |c - m|² + 2 m·(c - m), (K,): a score is the second - 2 x·the first."""
    small = centroids - middle
    wide = small.double()
    return small, (wide.square().sum(dim=1) + 2 * wide @ middle.double()).to(centroids.dtype)


def _distances(scores: Tensor, squares: Tensor) -> Tensor:
    return (scores + squares).clamp_(min=0).sqrt_()


def _own_distances(features: Tensor, owner: Tensor, centroids: Tensor) -> Tensor:
    """(N,) squared distance of each row to its centroid."""
    found = features.new_empty(len(features))
    for part in _chunks(*features.shape):
        found[part] = (features[part] - centroids[owner[part]]).square_().sum(dim=1)
    return found


def _means(features: Tensor, owner: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(K, F) mean of each centroid's rows, or the centroid if it has none, and (K,) how many. In the order of rows, so always
    the same."""
    counts = torch.bincount(owner, minlength=len(centroids))
    order = owner.argsort(stable=True)
    starts = counts.cumsum(0) - counts  # each centroid's rows are a stretch of `order`
    sums = F.embedding_bag(order, features, starts, mode="sum")
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids), counts


def _size(width: int) -> int:
    """Rows of a chunk."""
    return max(CHUNK // width, 1)


def _chunks(rows: int, width: int) -> list[slice]:
    return [slice(start, min(start + _size(width), rows)) for start in range(0, rows, _size(width))]


# ---- the search -----------------------------------------------------------------------------------------------------


class _Search:
    """Nearest centroids again and again, while centroids move little.

    `upper` is at least a row's distance to its own centroid, `lower` at most its distance to any other of a group. When
    centroids move by `shift`, the one grows and the other shrinks by no more than that. As long as upper <= lower no
    centroid of that group can be nearer.

    Centroids that are alike make a group: then most groups as a whole are far from a row. Groups can be formed anew
    whenever all rows are compared with all centroids.
    """

    def __init__(self, features: Tensor, num_clusters: int):
        N, K = len(features), num_clusters
        self.features, self.K = features, K
        self.groups = 1 if K <= 2 * GROUP else 2 ** round(math.log2(K / GROUP))
        self.size = math.ceil(K / self.groups)  # M
        self.squares, self.middle = _centre(features)
        self.order = torch.arange(K, device=features.device)  # centroids, group by group
        self.place = self.order.clone()  # where a centroid is in it
        self.owner = torch.zeros(N, dtype=torch.long, device=features.device)
        self.upper = features.new_full((N,), math.inf)
        self.lower = features.new_full((self.groups, N), -math.inf)

    def move(self, shift: Tensor) -> None:
        """Centroids have moved by (K,) distances."""
        self.upper += shift[self.owner]
        self.lower -= self._pad(shift[self.order], 0.0).view(self.groups, self.size).amax(dim=1)[:, None]

    def give(self, rows: Tensor, owner: Tensor) -> None:
        """Rows get another centroid than the nearest."""
        self.owner[rows] = owner
        self.lower[:, rows] = -math.inf  # nothing is known of the one they had

    def nearest(self, centroids: Tensor) -> Tensor:
        """(N,) nearest centroid of each row."""
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

    def _open(self) -> float:
        """The share of pairs of a row and a group that have to be looked at."""
        return (self.upper > self.lower).float().mean().item()

    def _compare_all(self, part: slice, small: Tensor, offset: Tensor) -> None:
        """Compare rows with all centroids."""
        # centroids × rows, because the minimum over centroids is then one over whole stretches of memory
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
        """Compare rows with the centroids of a group in which there may be a nearer one than their own."""
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
        # The centroid that was left is now one of the others of its group.
        left = own // self.size
        self.lower[left, rows] = torch.minimum(self.lower[left, rows], before)

    def _pad(self, values: Tensor, filling: float) -> Tensor:
        """K entries filled up to whole groups."""
        more = self.groups * self.size - self.K
        return torch.cat([values, values.new_full((more, *values.shape[1:]), filling)])


def _alike(centroids: Tensor, size: int) -> Tensor:
    """(K,) an order in which stretches of `size` centroids lie close to one another: halved again and again along the
    direction of the largest variance."""
    parts = [torch.arange(len(centroids), device=centroids.device)]
    while len(parts[0]) > size:
        halves = []
        for part in parts:
            rows = centroids[part] - centroids[part].mean(dim=0)
            direction = rows[rows.square().sum(dim=1).argmax()]
            for _ in range(5):  # towards the first eigenvector of rows.T @ rows; near it is good enough
                direction = F.normalize(rows.T @ (rows @ direction), dim=0)
            # whole stretches to the left, so that only the last one is not full
            left = size * math.ceil(len(part) / size / 2)
            halves += part[(rows @ direction).argsort(stable=True)].tensor_split([left])
        parts = [half for half in halves if len(half)]
    return torch.cat(parts)

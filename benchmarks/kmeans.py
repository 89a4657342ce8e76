"""Compare our k-means with that of faiss, and with that of scikit-learn if you ask for it.

    python benchmarks/kmeans.py --threads 1
    python benchmarks/kmeans.py --threads 2 --scikit-learn     # takes several times as long

All sides start from the same centroids. There are four comparisons of Lloyd's algorithm: 25 iterations, the default of faiss;
the default rule of each library, with as many iterations of faiss as ours took; our early stop; and ours without faiss. The
last comparison is that of k-means++, with scikit-learn alone. The peak is the memory that the process uses beyond the features.
"""

import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    add_threads,
    in_words,
    machine,
    parse,
    parser,
    peak_memory,
    seconds_in_turns,
    spread,
    write,
)
from src import neighbors
from src.evaluation import kmeans

FIXED = 25  # default number of iterations of faiss


def features(rows: int, width: int, classes: int) -> torch.Tensor:
    """Draw rows in overlapping groups.

    The variance of a dimension is inversely proportional to its number, similar to features of networks.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    found = torch.randn(rows, width, generator=generator).add_(centres[labels], alpha=0.7)
    return found.mul_(torch.arange(1, width + 1) ** -0.5)


def inertia(rows: torch.Tensor, centroids) -> float:
    """Return the sum of the squared distances to the nearest centroids, in float64."""
    centroids = torch.as_tensor(np.asarray(centroids))
    clusters, _ = kmeans.assign(rows, centroids)
    total = 0.0
    for part in torch.arange(len(rows)).split(4096):
        total += (rows[part] - centroids[clusters[part]]).double().square().sum().item()
    return total


def lloyd(
    what: str,
    rows: torch.Tensor,
    start: torch.Tensor,
    *,
    turns: int,
    sklearn: bool,
    iterations: int | None = None,
    clock=time.perf_counter,
    **settings,
) -> dict:
    """Run Lloyd's algorithm from the same centroids. faiss takes as many iterations as ours.

    Args:
        what: title of the comparison.
        sklearn: also run scikit-learn.
        iterations: number of iterations of all sides; None: ours ends by its rule with these `settings`.
    """
    centroids, done = {}, {}
    if iterations is not None:
        settings = {"max_iterations": iterations, "tolerance": 0.0}

    def ours():
        centroids["ours"], _, done["ours"] = kmeans.lloyd(rows, start, **settings)

    def by_torch():
        worthwhile, neighbors.WORTHWHILE = neighbors.WORTHWHILE, 1 << 62
        centroids["ours, without faiss"], _, done["ours, without faiss"] = kmeans.lloyd(rows, start, **settings)
        neighbors.WORTHWHILE = worthwhile

    def with_faiss():
        # use all rows: faiss would otherwise draw 256 per cluster
        done["faiss"] = done["ours"]
        fitted = faiss.Kmeans(rows.shape[1], len(start), niter=done["faiss"], max_points_per_centroid=len(rows))
        fitted.train(rows.numpy(), init_centroids=start.numpy())
        centroids["faiss"] = fitted.centroids

    def by_sklearn():
        limits = {} if iterations is None else {"max_iter": iterations, "tol": 0}
        fitted = KMeans(len(start), init=start.numpy(), n_init=1, **limits).fit(rows.numpy())
        centroids["scikit-learn"], done["scikit-learn"] = fitted.cluster_centers_, fitted.n_iter_

    sides = {"ours": ours, "faiss": with_faiss, "ours, without faiss": by_torch}
    if sklearn:
        sides["scikit-learn"] = by_sklearn
    row = compare(what, sides, turns, clock)
    return {**row, "iterations": done, "inertia": {side: inertia(rows, found) for side, found in centroids.items()}}


def plus_plus(rows: torch.Tensor, clusters: int, turns: int) -> dict:
    """Run k-means++. Both sides draw the same number of candidates per centroid."""
    chosen = {}

    def ours():
        chosen["ours"] = rows[kmeans.plus_plus(rows, clusters, np.random.default_rng(0))]

    def sklearn():
        chosen["scikit-learn"] = kmeans_plusplus(rows.numpy(), clusters, random_state=0)[0]

    row = compare("k-means++", {"ours": ours, "scikit-learn": sklearn}, turns)
    return {**row, "inertia": {side: inertia(rows, found) for side, found in chosen.items()}}


def growth(rows: torch.Tensor, clusters: int) -> dict:
    """Measure the memory of five iterations beyond the features, for these rows and for twice as many."""
    peaks = {}
    for features_now in (rows, torch.cat([rows, rows.flip(0)])):
        start = rows[:clusters].clone()
        run = partial(kmeans.lloyd, features_now, start, max_iterations=5, tolerance=0.0)
        peaks[len(features_now)] = peak_memory(run)
    return {"what": "peak beyond the features", "peak_bytes": peaks}


def compare(what: str, sides: dict, turns: int, clock=time.perf_counter) -> dict:
    """Measure the time and the peak memory of several functions."""
    seconds = seconds_in_turns(sides, turns, clock=clock)
    return {"what": what, "seconds": seconds, "peak_bytes": {side: peak_memory(run) for side, run in sides.items()}}


def show(row: dict) -> None:
    """Print one comparison."""
    print(row["what"])
    for side, seconds in row["seconds"].items():
        ratio = median(seconds) / median(row["seconds"]["ours"])
        more = 100 * (row["inertia"][side] / row["inertia"]["ours"] - 1)
        done = f"{row['iterations'][side]:4} iterations" if "iterations" in row else " " * 15
        print(
            f"  {side:20}{spread(seconds, 2):22} s  {ratio:5.2f} × ours  {done}  inertia {more:+.3f} % from ours"
            f"  peak {row['peak_bytes'][side] / 2**20:5.0f} MiB",
            flush=True,
        )


def main():
    flags = parser(__doc__)
    add_threads(flags)
    flags.add_argument("--scikit-learn", action="store_true", help="also run scikit-learn")
    arguments = parse(flags)
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    where = machine("torch", "scikit-learn", "numpy", "faiss-cpu")
    N, width, K = (10_000, 64, 100) if arguments.quick else (50_000, 256, 1000)
    turns = arguments.turns
    rows = features(N, width, K)
    start = rows[np.random.default_rng(0).choice(N, K, replace=False)]
    print(in_words(where), flush=True)
    print(f"{N:,} x {width}, {K:,} clusters, {arguments.threads} thread(s); seconds: median (range) of {turns} runs")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    run = partial(lloyd, clock=clock, rows=rows, start=start, turns=turns, sklearn=arguments.scikit_learn)
    results = []
    with threadpool_limits(arguments.threads):
        for measure in (
            lambda: run(f"Lloyd, {FIXED} iterations", iterations=FIXED),
            lambda: run("Lloyd, our default rule"),
            lambda: run("Lloyd, our early stop", least_gain=kmeans.EARLY),
            *([lambda: plus_plus(rows, K, turns)] if arguments.scikit_learn else []),
        ):
            results.append(measure())
            show(results[-1])
    results.append(growth(rows, K))
    for size, peak in results[-1]["peak_bytes"].items():
        print(f"{size:,} rows: {peak / 2**20:.0f} MiB beyond the features ({size * width * 4 / 2**20:.0f} MiB)")
    write(arguments.json, where, results)


if __name__ == "__main__":
    main()

"""Compare our k-means with that of scikit-learn, and with that of faiss if it is installed.

    python benchmarks/kmeans.py
    PYTHONPATH=/tmp/faiss python benchmarks/kmeans.py      # after: pip install --target /tmp/faiss faiss-cpu

There are three comparisons: Lloyd's algorithm from the same centroids with the default stopping rule of each library (faiss
stops after 25 iterations), the same for exactly 25 iterations, and k-means++. The peak is the memory that the process uses
beyond the features.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, peak_memory, seconds_in_turns, spread, write
from src.evaluation import kmeans

try:
    import faiss
except ImportError:
    faiss = None

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


def lloyd(rows: torch.Tensor, start: torch.Tensor, turns: int, iterations: int | None) -> dict:
    """Run Lloyd's algorithm from the same centroids with the default stopping rules, or for a number of iterations."""
    centroids, done = {}, {}

    def ours():
        settings = {} if iterations is None else {"max_iterations": iterations, "tolerance": 0.0}
        centroids["ours"], _, done["ours"] = kmeans.lloyd(rows, start, **settings)

    def sklearn():
        settings = {} if iterations is None else {"max_iter": iterations, "tol": 0}
        fitted = KMeans(len(start), init=start.numpy(), n_init=1, **settings).fit(rows.numpy())
        centroids["scikit-learn"], done["scikit-learn"] = fitted.cluster_centers_, fitted.n_iter_

    def with_faiss():
        # use all rows: faiss would otherwise draw 256 per cluster
        fitted = faiss.Kmeans(rows.shape[1], len(start), niter=iterations or FIXED, max_points_per_centroid=len(rows))
        fitted.train(rows.numpy(), init_centroids=start.numpy())
        centroids["faiss"], done["faiss"] = fitted.centroids, iterations or FIXED

    sides = {"ours": ours, "scikit-learn": sklearn}
    if faiss:
        sides["faiss"] = with_faiss
    what = "Lloyd, default stopping rules" if iterations is None else f"Lloyd, {iterations} iterations"
    row = compare(what, sides, turns)
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


def compare(what: str, sides: dict, turns: int) -> dict:
    """Measure the time and the peak memory of several functions."""
    seconds = seconds_in_turns(sides, turns)
    return {"what": what, "seconds": seconds, "peak_bytes": {side: peak_memory(run) for side, run in sides.items()}}


def show(row: dict) -> None:
    """Print one comparison."""
    print(row["what"])
    for side, seconds in row["seconds"].items():
        ratio = median(seconds) / median(row["seconds"]["ours"])
        more = 100 * (row["inertia"][side] / row["inertia"]["scikit-learn"] - 1)
        done = f"{row['iterations'][side]:4} iterations" if "iterations" in row else " " * 15
        print(
            f"  {side:13}{spread(seconds, 2):22} s  {ratio:5.2f} × ours  {done}  inertia {more:+.3f} % from scikit-learn"
            f"  peak {row['peak_bytes'][side] / 2**20:5.0f} MiB",
            flush=True,
        )


def main():
    arguments = parse(parser(__doc__))
    packages = ("torch", "scikit-learn", "numpy", *(("faiss-cpu",) if faiss else ()))
    where = machine(*packages)
    N, width, K, turns = (10_000, 64, 100, 2) if arguments.quick else (100_000, 256, 1000, 3)
    rows = features(N, width, K)
    start = rows[np.random.default_rng(0).choice(N, K, replace=False)]
    print(in_words(where), flush=True)
    print(
        f"{N:,} x {width}, {K:,} clusters, {torch.get_num_threads()} threads; seconds: median (range) of {turns} runs"
    )
    results = []
    for measure in (
        lambda: lloyd(rows, start, turns, None),
        lambda: lloyd(rows, start, turns, FIXED),
        lambda: plus_plus(rows, K, turns),
    ):
        results.append(measure())
        show(results[-1])
    results.append(growth(rows, K))
    for size, peak in results[-1]["peak_bytes"].items():
        print(f"{size:,} rows: {peak / 2**20:.0f} MiB beyond the features ({size * width * 4 / 2**20:.0f} MiB)")
    write(arguments.json, where, results)


if __name__ == "__main__":
    main()

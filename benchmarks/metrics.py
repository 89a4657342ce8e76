"""Compare the time of our clustering scores with that of scikit-learn and SciPy in one run.

    python benchmarks/metrics.py                 # 15 minutes, nearly all of it for the AMI of scikit-learn
    python benchmarks/metrics.py --quick         # seconds, on smaller data
    python benchmarks/metrics.py --json out.json

Both sides get the same arrays of labels, and their time includes the contingency table. They run in turns, so that a busy
machine slows down both.
"""

import sys
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as theirs

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, spread, write
from src import metrics as ours


def imagenet_class_sizes(rng, N, K):
    """Return class sizes like those of ImageNet: 1300 in 895 of 1000 classes, 732 to 1299 in the others, scaled to N."""
    sizes = np.where(np.arange(K) < 0.895 * K, 1300, rng.integers(732, 1300, K))
    return with_sum(sizes, N)


def broad_sizes(rng, N, K):
    """Return log-normal sizes. The largest cluster is about 20 times as large as the smallest."""
    return with_sum(rng.lognormal(0, 0.5, K), N)


def different_sizes(rng, N, K):
    """Return sizes with the same spread, all different, in random order."""
    sizes = np.sort(broad_sizes(rng, N, K))
    sizes = np.maximum.accumulate(sizes - np.arange(K)) + np.arange(K)
    sizes[-1] += N - sizes.sum()
    if len(np.unique(sizes)) < K:
        raise ValueError(f"{K} different sizes of this spread do not fit into {N} images")
    return rng.permutation(sizes)


def with_sum(sizes, N):
    """Scale sizes to whole numbers whose sum is N."""
    ends = np.round(np.cumsum(sizes) * (N / np.sum(sizes))).astype(int)
    return np.diff(ends, prepend=0)


def labels_and_clusters(rng, class_sizes, cluster_sizes, agreement=0.4):
    """Draw clusters of exactly these sizes. About the share `agreement` of a cluster has the class of the cluster."""
    agreeing = (agreement * np.minimum(class_sizes, cluster_sizes)).astype(int)
    ids = np.arange(len(class_sizes))
    labels = np.concatenate([ids.repeat(agreeing), ids.repeat(class_sizes - agreeing)])
    clusters = np.concatenate([ids.repeat(agreeing), rng.permutation(ids.repeat(cluster_sizes - agreeing))])
    order = rng.permutation(len(labels))
    return labels[order], clusters[order]


def their_accuracy(labels, clusters):
    counts = theirs.confusion_matrix(labels, clusters)
    return counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels)


def our_accuracy(labels, clusters):
    counts = ours.contingency(labels, clusters)[2]
    return counts[ours.match_clusters(counts), np.arange(counts.shape[1])].sum() / len(labels)


SCORES = {
    "ami": (
        lambda labels, clusters: ours.adjusted_mutual_information(ours.contingency(labels, clusters)[2]),
        theirs.adjusted_mutual_info_score,
    ),
    "nmi": (
        lambda labels, clusters: ours.normalized_mutual_information(ours.contingency(labels, clusters)[2]),
        theirs.normalized_mutual_info_score,
    ),
    "ari": (
        lambda labels, clusters: ours.adjusted_rand_index(ours.contingency(labels, clusters)[2]),
        theirs.adjusted_rand_score,
    ),
    "acc": (our_accuracy, their_accuracy),
}


def timed(function, *arguments):
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def compare(score, labels, clusters, budget):
    """Time both sides in turns: at least twice, and then until five turns are done or `budget` seconds have passed."""
    seconds, largest_difference = {"ours": [], "theirs": []}, 0.0
    start = time.perf_counter()
    while len(seconds["ours"]) < 2 or (len(seconds["ours"]) < 5 and time.perf_counter() - start < budget):
        values = []
        for side, function in zip(seconds, SCORES[score], strict=True):
            duration, value = timed(function, labels, clusters)
            seconds[side].append(duration)
            values.append(value)
        largest_difference = max(largest_difference, abs(values[0] - values[1]))
    return {
        "score": score,
        "value": float(values[0]),
        "seconds": seconds,
        "ratio": median(seconds["theirs"]) / median(seconds["ours"]),
        "largest_difference": float(largest_difference),
    }


def main(arguments):
    where = machine("numpy", "scipy", "scikit-learn")
    print(in_words(where), flush=True)
    warnings.simplefilter("ignore")  # scikit-learn warns that many classes look like a regression target

    small, large, K = (5_000, 60_000, 100) if arguments.quick else (50_000, 1_281_167, 1000)
    cases = [
        (f"{small:,} images, {K} equal classes", small, lambda rng, N, K: with_sum(np.ones(K), N), broad_sizes),
        (f"{large:,} images, {K} classes as in ImageNet", large, imagenet_class_sizes, broad_sizes),
        (f"{large:,} images, {K} classes, no two sizes equal", large, different_sizes, different_sizes),
    ]
    results = []
    for title, N, class_sizes_of, cluster_sizes_of in cases:
        rng = np.random.default_rng(0)
        class_sizes, cluster_sizes = class_sizes_of(rng, N, K), cluster_sizes_of(rng, N, K)
        labels, clusters = labels_and_clusters(rng, class_sizes, cluster_sizes)
        sizes = {
            "different_class_sizes": len(np.unique(class_sizes)),
            "different_cluster_sizes": len(np.unique(cluster_sizes)),
            "smallest_cluster": int(cluster_sizes.min()),
            "largest_cluster": int(cluster_sizes.max()),
        }
        print(f"\n{title}: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in sizes.items()))
        print(f"{'':5}{'ours, s: median (range)':29}{'theirs, s':31}{'ratio':>7}{'difference':>12}{'runs':>6}")
        rows = []
        for score in SCORES:
            row = compare(score, labels, clusters, arguments.budget)
            rows.append(row)
            mine, yours = row["seconds"]["ours"], row["seconds"]["theirs"]
            print(
                f"{score:5}{spread(mine):29}{spread(yours):31}{row['ratio']:7.1f}{row['largest_difference']:12.1e}"
                f"{len(mine):6}",
                flush=True,
            )
        all_four = [timed(ours.clustering_scores, labels, clusters)[0] for _ in range(5)]
        print(f"all  {spread(all_four)}  (clustering_scores)", flush=True)
        results.append({"case": title, "N": N, "K": K, **sizes, "scores": rows, "clustering_scores_seconds": all_four})
    write(arguments.json, where, results)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument(
        "--budget",
        type=float,
        default=60,
        help="number of seconds after which a score gets no further turns (default: 60)",
    )
    main(parse(made))

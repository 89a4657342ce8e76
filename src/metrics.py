"""Scores against human labels: of a clustering, labels in, numbers out; of features, by their nearest neighbours.

Legend: N images, C classes that occur in the labels, K clusters that occur in the prediction. `counts` is the (C, K)
table of how many images of a class are in a cluster, dense or SciPy sparse; `contingency` makes it.

NMI, AMI and ARI follow Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11
(2010), with the arithmetic mean of the two entropies as the normaliser, as scikit-learn has it. The accuracy with its
over-clustering and superclass rules is that of the authors' evaluation of Self-Classifier, arXiv:2103.10994v3.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array

if TYPE_CHECKING:
    from torch import Tensor

Counts = NDArray | csr_array

# Expected mutual information: terms whose probability is below this share of the likeliest term are left out.
NEGLIGIBLE = 1e-20


# ---- from labels ----------------------------------------------------------------------------------------------------


def clustering_scores(labels: ArrayLike, clusters: ArrayLike) -> dict:
    """Score a clustering against human labels.

    Args:
        labels: (N,) class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0; the numbering is arbitrary.

    Returns:
        `acc`, `nmi` in [0, 1], `ami` and `ari` in [-1, 1]: fractions, 1 is perfect, `ami` and `ari` are 0 on average
        for a random clustering. `mapping`: {cluster: class} behind `acc`, for every cluster that occurs.

    Raises:
        ValueError: if the two differ in length, are empty, not one-dimensional, not integers, or negative.

    Example:
        >>> clustering_scores([0, 0, 1, 1], [5, 5, 3, 3])
        {'acc': 1.0, 'nmi': 1.0, 'ami': 1.0, 'ari': 1.0, 'mapping': {3: 1, 5: 0}}
    """
    classes, cluster_ids, counts = contingency(labels, clusters)
    partner = match_clusters(counts)
    return {
        "acc": int(counts[partner, np.arange(len(cluster_ids))].sum()) / int(counts.sum()),
        "nmi": normalized_mutual_information(counts),
        "ami": adjusted_mutual_information(counts),
        "ari": adjusted_rand_index(counts),
        "mapping": dict(zip(cluster_ids.tolist(), classes[partner].tolist(), strict=True)),
    }


def superclass_accuracy(labels: ArrayLike, clusters: ArrayLike, class_to_superclass: Mapping[int, int]) -> float:
    """Share of images whose cluster stands for the right superclass.

    Clusters are matched with the *fine* classes, as in `clustering_scores`; only then both sides are renamed to
    superclasses. Images of classes without a superclass are left out from the start.

    Args:
        labels: (N,) fine class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0.
        class_to_superclass: {class: superclass}; need not name every class.

    Returns:
        Fraction in [0, 1] of the images that belong to a superclass.

    Raises:
        ValueError: as `clustering_scores`, and if no image belongs to a superclass.
    """
    labels, clusters = _same_length_ids(labels, clusters)
    belongs = np.isin(labels, list(class_to_superclass))
    if not belongs.any():
        raise ValueError(f"none of the {len(labels)} images has a class that belongs to a superclass")
    classes, _, counts = contingency(labels[belongs], clusters[belongs])
    superclass = np.array([class_to_superclass[name] for name in classes.tolist()])  # (C,)
    cells = counts.tocoo()
    right = superclass[cells.row] == superclass[match_clusters(counts)][cells.col]
    return int(cells.data[right].sum()) / int(counts.sum())


def balance(shares: ArrayLike) -> float:
    """Return how evenly clusters share the images: the entropy of (C,) shares over ln C, that of equal shares.

    In [0, 1]: 1 if all clusters weigh the same, 0 if one has all. Of the sizes of clusters it is the hard balance, of the
    mean of the predicted probabilities the soft balance. The soft one is higher, because unsure predictions spread over
    all clusters.
    """
    shares = np.asarray(shares, dtype=np.float64) / np.sum(shares)
    held = shares[shares > 0]
    return float(abs((held * np.log(held)).sum()) / math.log(len(shares))) if len(shares) > 1 else 1.0


def contingency(labels: ArrayLike, clusters: ArrayLike) -> tuple[NDArray, NDArray, csr_array]:
    """Count the images of every class in every cluster.

    Args:
        labels: (N,) class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0.

    Returns:
        classes: (C,) ids that occur in `labels`, ascending.
        cluster_ids: (K,) ids that occur in `clusters`, ascending.
        counts: (C, K) sparse table of int64; its sum is N and no row or column is empty.

    Raises:
        ValueError: if the two differ in length, are empty, not one-dimensional, not integers, or negative.
    """
    labels, clusters = _same_length_ids(labels, clusters)
    classes, row = _renumber(labels)
    cluster_ids, column = _renumber(clusters)
    ones = np.ones(len(labels), dtype=np.int64)
    counts = coo_array((ones, (row, column)), shape=(len(classes), len(cluster_ids))).tocsr()  # adds up equal cells
    return classes, cluster_ids, counts


def _same_length_ids(labels: ArrayLike, clusters: ArrayLike) -> tuple[NDArray, NDArray]:
    labels, clusters = _ids("labels", labels), _ids("clusters", clusters)
    if len(labels) != len(clusters):
        raise ValueError(f"labels and clusters differ in length: {len(labels)} and {len(clusters)}")
    return labels, clusters


def _ids(name: str, values: ArrayLike) -> NDArray:
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be one-dimensional and not empty, got shape {values.shape}")
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if values.min() < 0:
        raise ValueError(f"{name} must not be negative, got {values.min()}")
    return values.astype(np.int64, copy=False)


def _renumber(ids: NDArray) -> tuple[NDArray, NDArray]:
    """Ids that occur, ascending, and for every entry its position among them."""
    if ids.max() > 10 * len(ids) + 1000:
        return np.unique(ids, return_inverse=True)
    # Many times faster than sorting, but takes memory in proportion to the largest id.
    present = np.flatnonzero(np.bincount(ids))
    position = np.zeros(present[-1] + 1, dtype=np.int64)
    position[present] = np.arange(len(present))
    return present, position[ids]


# ---- from the table of counts ---------------------------------------------------------------------------------------


def match_clusters(counts: Counts) -> NDArray:
    """Match clusters with classes one to one so that as many images as possible are right.

    Over-clustering rule: with more clusters than classes, a cluster left without a class takes its majority class
    (the smaller id of equals). Clusters that have a class keep it, even where another class is larger in them.

    Args:
        counts: (C, K) images per class and cluster, no empty row or column.

    Returns:
        (K,) row of the class of each cluster. Deterministic; where several matchings are equally good, which of them is
        returned depends on the order of rows and columns.

    Departs from the authors' code, which pads the table with zeros to a square of the largest id + 1. The padding does
    not change the best total; without it thousands of clusters take neither its memory nor its time.
    """
    per_cluster = _sparse(counts).toarray().T  # (K, C)
    partner = per_cluster.argmax(axis=1)
    matched, their_class = linear_sum_assignment(per_cluster, maximize=True)
    partner[matched] = their_class
    return partner


def normalized_mutual_information(counts: Counts) -> float:
    """Mutual information over the mean of the two entropies, in [0, 1]; 1 for equal partitions, not 0 for random ones.

    One cluster against several classes (or the reverse) scores 0; one against one is a perfect match and scores 1.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):
        return 1.0
    class_sizes, cluster_sizes = _marginals(counts)
    return _mutual_information(counts) / ((_entropy(class_sizes) + _entropy(cluster_sizes)) / 2)


def adjusted_mutual_information(counts: Counts) -> float:
    """Mutual information corrected for chance: (MI - E[MI]) / (mean entropy - E[MI]).

    1 for equal partitions, 0 on average for random ones of the same sizes, negative if worse. One cluster against
    several classes, and one cluster per image, score 0.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):  # also keeps 0/0 away: one cluster on both sides, or one cluster per image on both sides
        return 1.0
    if 1 in counts.shape:
        return 0.0
    class_sizes, cluster_sizes = _marginals(counts)
    expected = expected_mutual_information(class_sizes, cluster_sizes)
    mean_entropy = (_entropy(class_sizes) + _entropy(cluster_sizes)) / 2
    return (_mutual_information(counts) - expected) / (mean_entropy - expected)


def adjusted_rand_index(counts: Counts) -> float:
    """Share of pairs of images on which both partitions agree, corrected for chance.

    1 for equal partitions, 0 on average for random ones of the same sizes, at least -0.5.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):
        return 1.0
    class_sizes, cluster_sizes = _marginals(counts)
    # Python's integers: with 1.28 million images the products below pass 10^24, far beyond 64 bits.
    pairs = _pairs([counts.sum()])
    together, same_class, same_cluster = _pairs(counts.data), _pairs(class_sizes), _pairs(cluster_sizes)
    # (together - expected) / ((same_class + same_cluster) / 2 - expected), expected = same_class * same_cluster / pairs
    numerator = 2 * (pairs * together - same_class * same_cluster)
    return numerator / (pairs * (same_class + same_cluster) - 2 * same_class * same_cluster)


def expected_mutual_information(class_sizes: ArrayLike, cluster_sizes: ArrayLike) -> float:
    """Mean mutual information of two random partitions with these sizes, in nats.

    Vinh, Epps and Bailey (2010), Eq. 24a. The number X of images that a class of a and a cluster of b images share is
    hypergeometric, and with H the entropies of the sizes

        E[MI] = sum_ab E[ X/N log(N X / (a b)) ] = 1/N sum_ab E[X log X] + H(classes) + H(clusters) - log N.

    Args:
        class_sizes: (C,) images per class, positive integers; the sum is N.
        cluster_sizes: (K,) images per cluster, positive integers with the same sum.

    Returns:
        Value in [0, smaller entropy], up to rounding.

    Raises:
        ValueError: if the two sums differ.

    The cost does not grow with N: equal sizes are computed once (at most about sqrt(2N) can be different), and of each
    distribution only the part that carries weight is visited. What is left out is, per pair, less than
    NEGLIGIBLE * (1 + d / 46) of the probability, d being the number of terms visited on that side, because weights fall
    at least geometrically away from the mode; that is less than NEGLIGIBLE * (1 + d / 46) * min(C, K) * log N nats.
    """
    class_sizes, cluster_sizes = np.asarray(class_sizes), np.asarray(cluster_sizes)
    N = int(class_sizes.sum())
    if cluster_sizes.sum() != N:
        raise ValueError(f"class sizes add up to {N} images, cluster sizes to {cluster_sizes.sum()}")
    a_values, a_repeats = np.unique(class_sizes, return_counts=True)
    b_values, b_repeats = np.unique(cluster_sizes, return_counts=True)
    n = np.arange(1, min(a_values[-1], b_values[-1]) + 1)
    n_log_n = np.concatenate([[0.0], n * np.log(n)])

    total = 0.0
    for rows in _slices(len(a_values), 64):  # 64 x 128 pairs fit in the processor's cache
        for columns in _slices(len(b_values), 128):
            a, b = a_values[rows, None].astype(float), b_values[columns].astype(float)
            total += a_repeats[rows] @ _mean_x_log_x(a, b, N=N, n_log_n=n_log_n) @ b_repeats[columns]
    return float(total / N + _entropy(class_sizes) + _entropy(cluster_sizes) - np.log(N))


def _mean_x_log_x(a: NDArray, b: NDArray, *, N: int, n_log_n: NDArray) -> NDArray:
    """E[X log X] for X hypergeometric: how many of b images drawn from N are among a given ones.

    Walks from the mode outwards, where the ratio of neighbouring weights is simple and none overflows. The weights are
    relative to the mode's and normalised by their own sum, so no factorial is needed: logarithms of factorials are
    about 10^7 for a million images, and rounding them would cost eight digits.

    Args:
        a, b: float arrays of sizes that broadcast; neighbours should be similar, they are walked in step.
        n_log_n: table of n log n, up to the largest possible X at least.
    """
    mode = np.floor((a + 1) * (b + 1) / (N + 2))
    first = mode.astype(np.intp)
    mass = np.ones_like(mode)
    moment = n_log_n[first]
    # Two-by-two table at the mode: images in both, in a alone, in b alone, in neither. A step moves two cells up by one
    # and the other two down; a cell that reaches zero makes the weight zero, and it stays zero.
    both, a_alone, b_alone, neither = mode, a - mode, b - mode, N - a - b + mode
    for sign, (up_1, up_2), (down_1, down_2) in (
        (1, (both, neither), (a_alone, b_alone)),
        (-1, (a_alone, b_alone), (both, neither)),
    ):
        weight = np.ones_like(mode)
        for step in count(1):
            weight *= (down_1 - (step - 1)) * (down_2 - (step - 1)) / ((up_1 + step) * (up_2 + step))
            if weight.max() < NEGLIGIBLE:
                break
            mass += weight
            moment += weight * n_log_n.take(first + sign * step, mode="clip")  # clipped only where the weight is zero
    return moment / mass


def _mutual_information(counts: csr_array) -> float:
    """Mutual information of classes and clusters in nats."""
    class_sizes, cluster_sizes = _marginals(counts)
    N = counts.sum()
    cells = counts.tocoo()
    shared = cells.data.astype(float)
    independent = class_sizes[cells.row].astype(float) * cluster_sizes[cells.col]
    # Independent partitions have exactly 0; rounding may leave a little less.
    return max(float((shared / N * np.log(shared * N / independent)).sum()), 0.0)


def _entropy(sizes: NDArray) -> float:
    """Entropy in nats of the distribution proportional to positive sizes."""
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def _pairs(sizes: Sequence | NDArray) -> int:
    """Number of pairs within groups of these sizes."""
    # One group of 10^9 has 5 * 10^17 pairs, and splitting a group makes it fewer: no overflow in 64 bits.
    sizes = np.asarray(sizes, dtype=np.int64)
    return int((sizes * (sizes - 1) // 2).sum())


def _one_to_one(counts: csr_array) -> bool:
    """Whether every class is one cluster and the reverse: the partitions are the same."""
    return counts.shape[0] == counts.shape[1] == counts.nnz


def _marginals(counts: csr_array) -> tuple[NDArray, NDArray]:
    return counts.sum(axis=1), counts.sum(axis=0)


def _sparse(counts: Counts) -> csr_array:
    return csr_array(counts)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


# ---- from features --------------------------------------------------------------------------------------------------


def knn_top(
    bank: "Tensor",
    bank_labels: "Tensor",
    queries: "Tensor",
    query_labels: "Tensor",
    ks: Sequence[int],
    tau: float,
    query_chunk: int = 2048,
    bank_chunk: int = 16384,
) -> dict[int, tuple[float, float]]:
    """How often the k nearest labelled images vote for the right class, for several k from one exact search.

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978: similarity
    is the dot product, each neighbour's vote weighs exp(similarity / tau). Ties, which the authors' code leaves to
    chance: of equally similar images the earlier is nearer, of equally many votes the smaller class wins.

    Args:
        bank: (N, F) features of the labelled images, usually of unit length; float64, float32, bfloat16 or float16.
        bank_labels: (N,) class of each, integers >= 0.
        queries: (Q, F) features of the images to be classified; the work is done on their device.
        query_labels: (Q,) class of each, integers >= 0; need not occur in the bank.
        ks: numbers of neighbours, each at least 1 and at most N.
        tau: temperature above 0.
        query_chunk, bank_chunk: rows that are compared at once; memory beyond the arguments grows with their product.

    Returns:
        {k: (top1, top5)}: fractions in [0, 1] of the queries whose class has the most votes, or is among the five with the
        most. Classes without a vote count as well, so with at most five classes top5 is 1.

    Raises:
        ValueError: if shapes, labels, ks or tau are not as above, or a feature is not finite.
    """
    import torch  # slow to import, and not needed for the rest

    from .neighbors import count_hits

    bank, queries = torch.as_tensor(bank), torch.as_tensor(queries)
    bank_labels, query_labels = torch.as_tensor(bank_labels), torch.as_tensor(query_labels)
    for name, rows, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if rows.ndim != 2 or rows.shape[1] != bank.shape[1] or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point rows of one width, not empty, got {rows.dtype} {tuple(rows.shape)}"
                + f" beside a bank of {tuple(bank.shape)}" * (name == "queries")
            )
        if labels.shape != rows.shape[:1] or labels.is_floating_point() or labels.min() < 0:
            raise ValueError(f"labels of the {name} must be {len(rows)} integers >= 0, got {tuple(labels.shape)}")
        if not all(part.isfinite().all() for part in rows.split(bank_chunk)):
            raise ValueError(f"{name} must be finite, got infinite features or NaN")
    if not ks or not all(1 <= k <= len(bank) for k in ks):
        raise ValueError(f"ks must be from 1 to {len(bank)}, the size of the bank, got {list(ks)}")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    hits = count_hits(
        bank,
        bank_labels,
        queries=queries,
        query_labels=query_labels,
        ks=ks,
        tau=tau,
        query_chunk=query_chunk,
        bank_chunk=bank_chunk,
    )
    return {k: (first / len(queries), five / len(queries)) for k, (first, five) in hits.items()}

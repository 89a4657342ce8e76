"""Score clusters and features against human labels.

Legend: N images, C classes that occur in the labels, K clusters that occur in the prediction. `counts` is the (C, K)
table with the number of images of each class in each cluster, dense or SciPy sparse. `contingency` returns it.

NMI, AMI and ARI follow Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11
(2010). They are normalised by the arithmetic mean of the two entropies, as in scikit-learn. The accuracy and its rules
for over-clustering and superclasses follow the authors' evaluation of Self-Classifier, arXiv:2103.10994v3.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array

if TYPE_CHECKING:
    from torch import Tensor

Counts: TypeAlias = NDArray | csr_array

NEGLIGIBLE = 1e-20  # the expected mutual information ignores terms less likely than this share of the likeliest term


# ---- from labels ----------------------------------------------------------------------------------------------------


def clustering_scores(labels: ArrayLike, clusters: ArrayLike) -> dict[str, Any]:
    """Score a clustering against human labels.

    Args:
        labels: (N,) class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0 in any numbering.

    Returns:
        acc: accuracy after `match_clusters`, in [0, 1].
        nmi: normalised mutual information, in [0, 1].
        ami: adjusted mutual information, in [-1, 1]; 0 on average for a random clustering.
        ari: adjusted Rand index, in [-0.5, 1]; 0 on average for a random clustering.
        mapping: {cluster: class} for every cluster that occurs, the matching on which `acc` is based.

    Raises:
        ValueError: if the arguments differ in length, are empty, not one-dimensional, not integers, or negative.

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
    """Return the share of images whose cluster is mapped to the right superclass.

    The clusters are first matched with the *fine* classes, as in `clustering_scores`. Then the classes of both sides are
    replaced by their superclasses. Images whose class has no superclass are left out before the matching.

    Args:
        labels: (N,) fine class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0.
        class_to_superclass: {class: superclass}; classes may be missing.

    Returns:
        Fraction in [0, 1] of the images that belong to a superclass.

    Raises:
        ValueError: see `clustering_scores`; also if no image belongs to a superclass.
    """
    labels, clusters = _same_length_ids(labels, clusters)
    belongs = np.isin(labels, list(class_to_superclass))
    if not belongs.any():
        raise ValueError(f"none of the {len(labels)} images has a class in class_to_superclass: expected at least one")
    classes, _, counts = contingency(labels[belongs], clusters[belongs])
    superclass = np.array([class_to_superclass[name] for name in classes.tolist()])  # (C,)
    cells = counts.tocoo()
    right = superclass[cells.row] == superclass[match_clusters(counts)][cells.col]
    return int(cells.data[right].sum()) / int(counts.sum())


def balance(shares: ArrayLike) -> float:
    """Return the balance of clusters, the entropy of their shares divided by the entropy of equal shares.

    The cluster sizes give the hard balance; the mean of the predicted probabilities gives the soft balance. The soft
    balance is higher, because an uncertain prediction is spread over all clusters.

    Args:
        shares: (C,) sizes or probabilities >= 0; they are divided by their sum.

    Returns:
        Value in [0, 1]: 1 if all clusters have equal shares, 0 if one cluster has everything.
    """
    fractions = np.asarray(shares, dtype=np.float64) / np.sum(shares)
    if len(fractions) <= 1:
        return 1.0
    positive = fractions[fractions > 0]
    return float(abs((positive * np.log(positive)).sum()) / math.log(len(fractions)))


def contingency(labels: ArrayLike, clusters: ArrayLike) -> tuple[NDArray, NDArray, csr_array]:
    """Count the images of each class in each cluster.

    Args:
        labels: (N,) class of every image, integers >= 0.
        clusters: (N,) cluster of every image, integers >= 0.

    Returns:
        classes: (C,) ids that occur in `labels`, ascending.
        cluster_ids: (K,) ids that occur in `clusters`, ascending.
        counts: (C, K) sparse table of int64 with the sum N. No row or column is empty.

    Raises:
        ValueError: if the arguments differ in length, are empty, not one-dimensional, not integers, or negative.
    """
    labels, clusters = _same_length_ids(labels, clusters)
    classes, row = _renumber(labels)
    cluster_ids, column = _renumber(clusters)
    ones = np.ones(len(labels), dtype=np.int64)
    cells = coo_array((ones, (row, column)), shape=(len(classes), len(cluster_ids)))
    return classes, cluster_ids, cells.tocsr()  # tocsr adds the ones of each cell


def _same_length_ids(labels: ArrayLike, clusters: ArrayLike) -> tuple[NDArray, NDArray]:
    labels, clusters = _ids("labels", labels), _ids("clusters", clusters)
    if len(labels) != len(clusters):
        raise ValueError(
            f"labels and clusters differ in length: {len(labels)} and {len(clusters)}; expected one of each per image"
        )
    return labels, clusters


def _ids(name: str, values: ArrayLike) -> NDArray:
    ids = np.asarray(values)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"{name} have the shape {ids.shape}: expected one dimension and at least one entry")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} are {ids.dtype}: expected integers")
    if ids.min() < 0:
        raise ValueError(f"{name} contain {ids.min()}: expected integers of at least 0")
    return ids.astype(np.int64, copy=False)


def _renumber(ids: NDArray) -> tuple[NDArray, NDArray]:
    """Return the distinct ids in ascending order, and the position of every entry among them."""
    if ids.max() > 10 * len(ids) + 1000:
        return np.unique(ids, return_inverse=True)
    # Many times faster than sorting, but the memory is proportional to the largest id.
    present = np.flatnonzero(np.bincount(ids))
    position = np.zeros(present[-1] + 1, dtype=np.int64)
    position[present] = np.arange(len(present))
    return present, position[ids]


# ---- from the table of counts ---------------------------------------------------------------------------------------


def match_clusters(counts: Counts) -> NDArray:
    """Match clusters with classes one to one so that the most images are right.

    Over-clustering rule: if there are more clusters than classes, each cluster without a class is mapped to its majority
    class; among equals, to the class with the smaller id. A matched cluster keeps its class even if another class has
    more images in it.

    Args:
        counts: (C, K) images per class and cluster, without empty rows or columns.

    Returns:
        (K,) row of the class of each cluster. The result is deterministic. If several matchings are equally good, the
        order of the rows and columns decides between them.

    Departs from the authors' code, which pads the table with zeros to a square of the largest id + 1. The padding does
    not change the best total. Without it, thousands of clusters need less memory and time.
    """
    per_cluster = _sparse(counts).toarray().T  # (K, C)
    partner = per_cluster.argmax(axis=1)
    matched, their_class = linear_sum_assignment(per_cluster, maximize=True)
    partner[matched] = their_class
    return partner


def normalized_mutual_information(counts: Counts) -> float:
    """Return the mutual information divided by the mean of the two entropies.

    The value is in [0, 1], and 1 for equal partitions. Random partitions have a value above 0. The value is 0 if there
    is one cluster for several classes, or one class for several clusters. It is 1 for one cluster and one class.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):
        return 1.0
    class_sizes, cluster_sizes = _marginals(counts)
    return _mutual_information(counts) / ((_entropy(class_sizes) + _entropy(cluster_sizes)) / 2)


def adjusted_mutual_information(counts: Counts) -> float:
    """Return the mutual information corrected for chance, (MI - E[MI]) / (mean entropy - E[MI]).

    The value is 1 for equal partitions, 0 on average for random partitions of the same sizes, and negative below that
    average. If only one of the partitions has a single group, or one group per image, the value is 0.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):  # also the cases of 0/0: both partitions have one group, or both have one group per image
        return 1.0
    if 1 in counts.shape:
        return 0.0
    class_sizes, cluster_sizes = _marginals(counts)
    expected = expected_mutual_information(class_sizes, cluster_sizes)
    mean_entropy = (_entropy(class_sizes) + _entropy(cluster_sizes)) / 2
    return (_mutual_information(counts) - expected) / (mean_entropy - expected)


def adjusted_rand_index(counts: Counts) -> float:
    """Return the share of pairs of images on which both partitions agree, corrected for chance.

    The value is 1 for equal partitions, 0 on average for random partitions of the same sizes, and at least -0.5.
    """
    counts = _sparse(counts)
    if _one_to_one(counts):
        return 1.0
    class_sizes, cluster_sizes = _marginals(counts)
    # Python's integers do not overflow: with 1.28 million images, the products below exceed 10^24, far more than 64 bits.
    pairs = _pairs([counts.sum()])
    together, same_class, same_cluster = _pairs(counts.data), _pairs(class_sizes), _pairs(cluster_sizes)
    # (together - expected) / ((same_class + same_cluster) / 2 - expected), expected = same_class * same_cluster / pairs
    numerator = 2 * (pairs * together - same_class * same_cluster)
    return numerator / (pairs * (same_class + same_cluster) - 2 * same_class * same_cluster)


def expected_mutual_information(class_sizes: ArrayLike, cluster_sizes: ArrayLike) -> float:
    """Return the expected mutual information of two random partitions with these sizes, in nats.

    Vinh, Epps and Bailey (2010), Eq. 24a. Let X be the number of images that a class of a images and a cluster of b
    images share. X is hypergeometric. With the entropies H of the sizes,

        E[MI] = sum_ab E[ X/N log(N X / (a b)) ] = 1/N sum_ab E[X log X] + H(classes) + H(clusters) - log N.

    Args:
        class_sizes: (C,) images per class, positive integers; the sum is N.
        cluster_sizes: (K,) images per cluster, positive integers with the same sum.

    Returns:
        Value in [0, smaller entropy], up to rounding.

    Raises:
        ValueError: if the two sums differ.

    The cost does not grow with N. Equal sizes are computed once, and at most about sqrt(2N) sizes can be different. For
    each pair of sizes, only the likely values of X are visited. Let d be the number of values visited on one side of the
    mode. The weights fall at least geometrically away from the mode. So the ignored values on that side have less than
    NEGLIGIBLE * (1 + d / 46) of the probability of a pair. In the result, that is less than
    NEGLIGIBLE * (1 + d / 46) * min(C, K) * log N nats.
    """
    class_sizes, cluster_sizes = np.asarray(class_sizes), np.asarray(cluster_sizes)
    N = int(class_sizes.sum())
    if cluster_sizes.sum() != N:
        raise ValueError(
            f"class sizes add up to {N} images, cluster sizes to {cluster_sizes.sum()}: expected equal sums"
        )
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
    """Return E[X log X], where X counts how many of b images drawn from N are in a given set of a images.

    The loop starts at the mode and moves outwards. Neighbouring weights have a simple ratio, and no weight overflows.
    All weights are relative to the weight of the mode and are normalised by their sum, so no factorial is needed. The
    logarithms of factorials are about 10^7 for a million images, and their rounding would cost eight digits.

    Args:
        a, b: float arrays of sizes that broadcast. All pairs take the same number of steps, so similar sizes are faster.
        n_log_n: table of n log n, at least up to the largest possible X.
    """
    mode = np.floor((a + 1) * (b + 1) / (N + 2))
    first = mode.astype(np.intp)
    mass = np.ones_like(mode)
    moment = n_log_n[first]
    # The two-by-two table at the mode: images in both sets, in a alone, in b alone, and in neither. A step adds one to two
    # cells and subtracts one from the other two. Once a cell reaches zero, the weight is zero and stays zero.
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
            moment += weight * n_log_n.take(first + sign * step, mode="clip")  # clips only where the weight is zero
    return moment / mass


def _mutual_information(counts: csr_array) -> float:
    """Return the mutual information of classes and clusters in nats."""
    class_sizes, cluster_sizes = _marginals(counts)
    N = counts.sum()
    cells = counts.tocoo()
    shared = cells.data.astype(float)
    independent = class_sizes[cells.row].astype(float) * cluster_sizes[cells.col]
    # Independent partitions have exactly 0. Rounding can make the sum slightly negative.
    return max(float((shared / N * np.log(shared * N / independent)).sum()), 0.0)


def _entropy(sizes: NDArray) -> float:
    """Return the entropy in nats of the distribution that is proportional to positive sizes."""
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def _pairs(sizes: Sequence | NDArray) -> int:
    """Return the number of pairs within groups of these sizes."""
    # No overflow in 64 bits: one group of 10^9 has 5 * 10^17 pairs, and smaller groups of the same total have fewer.
    sizes = np.asarray(sizes, dtype=np.int64)
    return int((sizes * (sizes - 1) // 2).sum())


def _one_to_one(counts: csr_array) -> bool:
    """Return True if every class is one cluster and every cluster is one class."""
    return counts.shape[0] == counts.shape[1] == counts.nnz


def _marginals(counts: csr_array) -> tuple[NDArray, NDArray]:
    """Return the sizes of the classes and of the clusters."""
    return counts.sum(axis=1), counts.sum(axis=0)


def _sparse(counts: Counts) -> csr_array:
    return csr_array(counts)


def _slices(length: int, size: int) -> Iterator[slice]:
    """Yield the slices that divide `length` into parts of `size`."""
    return (slice(start, start + size) for start in range(0, length, size))


# ---- from features --------------------------------------------------------------------------------------------------


def knn_top(
    bank: "Tensor",
    bank_labels: "Tensor",
    queries: "Tensor",
    query_labels: "Tensor",
    ks: Sequence[int],
    tau: float,
    *,
    query_chunk: int | None = None,
    bank_chunk: int | None = None,
) -> dict[int, tuple[float, float]]:
    """Classify queries by the votes of their k nearest labelled images, for several k with one exact search.

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978. The
    similarity is the dot product, and each neighbour's vote has the weight exp(similarity / tau).

    The authors' code does not define how ties are resolved. Here, the earlier of equally similar images is nearer, and
    the smaller of the classes with equally many votes wins.

    Args:
        bank: (N, F) features of the labelled images, usually of unit length; float64, float32, bfloat16 or float16.
        bank_labels: (N,) class of each labelled image, integers >= 0.
        queries: (Q, F) features of the images to classify. The search runs on their device.
        query_labels: (Q,) class of each query, integers >= 0. A class may be missing in the bank.
        ks: numbers of neighbours, each from 1 to N.
        tau: temperature, above 0.
        query_chunk: number of queries that are compared at once (None: `QUERY_CHUNK` of src/neighbors.py).
        bank_chunk: number of rows of the bank that are compared at once (None: `BANK_CHUNK` of src/neighbors.py). The
            extra memory is proportional to query_chunk × bank_chunk.

    Returns:
        {k: (top1, top5)}. top1 is the fraction of queries whose class has the most votes, top5 the fraction of queries
        whose class is among the five classes with the most votes. Classes without votes are ranked too, so top5 is 1 if
        there are at most five classes.

    Raises:
        ValueError: if a shape, a label, an element of `ks` or `tau` is not as described, or a feature is not finite.
    """
    import torch  # slow to import, and the other functions do not need it

    from .neighbors import BANK_CHUNK, QUERY_CHUNK, count_hits

    query_chunk, bank_chunk = query_chunk or QUERY_CHUNK, bank_chunk or BANK_CHUNK
    bank, queries = torch.as_tensor(bank), torch.as_tensor(queries)
    bank_labels, query_labels = torch.as_tensor(bank_labels), torch.as_tensor(query_labels)
    for name, rows, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if rows.ndim != 2 or rows.shape[1] != bank.shape[1] or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name} are {rows.dtype} of shape {tuple(rows.shape)}, beside a bank of shape {tuple(bank.shape)}: "
                "expected floating-point rows of one width, at least one row"
            )
        if labels.shape != rows.shape[:1] or labels.is_floating_point() or labels.min() < 0:
            raise ValueError(
                f"the labels of the {name} are {labels.dtype} of shape {tuple(labels.shape)} with the minimum "
                f"{labels.min() if labels.numel() else None}: expected {len(rows)} integers >= 0"
            )
        if not all(part.isfinite().all() for part in rows.split(bank_chunk)):
            raise ValueError(f"{name} contain infinite features or NaN: expected finite features")
    if not ks or not all(1 <= k <= len(bank) for k in ks):
        raise ValueError(f"ks is {list(ks)}: expected numbers from 1 to {len(bank)}, the size of the bank")
    if not tau > 0:
        raise ValueError(f"tau is {tau}: expected a number above 0")
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

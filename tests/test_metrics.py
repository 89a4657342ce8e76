"""Clustering scores against scikit-learn, SciPy, exact arithmetic, and numbers of the original code."""

import warnings
from fractions import Fraction
from itertools import permutations
from math import comb, log

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sklearn_metrics

from src import metrics

TOY_LABELS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def scikit_learn_scores(labels, clusters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes many classes for a sign of a regression target
        return {
            "nmi": sklearn_metrics.normalized_mutual_info_score(labels, clusters),
            "ami": sklearn_metrics.adjusted_mutual_info_score(labels, clusters),
            "ari": sklearn_metrics.adjusted_rand_score(labels, clusters),
        }


def random_case(seed):
    """Labels and clusters of one of many kinds: agreeing or not, few or many groups, singletons, gaps in the ids."""
    rng = np.random.default_rng(seed)
    N = int(rng.choice([1, 2, 3, 5, 13, 40, 200, 1500]))
    labels = rng.integers(0, rng.integers(1, N + 1), N)
    clusters = rng.integers(0, rng.integers(1, N + 1), N)
    kind = seed % 6
    if kind == 1:  # mostly agreeing
        clusters = np.where(rng.random(N) < 0.8, labels, clusters)
    elif kind == 2:  # one cluster per image
        clusters = rng.permutation(N)
    elif kind == 3:  # one cluster only
        clusters = np.zeros(N, dtype=int)
    elif kind == 4:  # gaps in the ids, too large for a table, and very unequal sizes
        clusters = (rng.random(N) < 0.9) * 10**9 + clusters % 3
    elif kind == 5:  # equal but for the names
        clusters = rng.permutation(labels.max() + 1)[labels] * 3
    return labels, clusters


def planted(rng, N, num_classes, num_clusters, agreement):
    labels = rng.integers(0, num_classes, N)
    clusters = np.where(rng.random(N) < agreement, labels % num_clusters, rng.integers(0, num_clusters, N))
    return labels, clusters


# ---- NMI, AMI, ARI --------------------------------------------------------------------------------------------------


def test_information_and_pair_scores_equal_scikit_learn():
    for seed in range(180):
        labels, clusters = random_case(seed)
        ours, theirs = metrics.clustering_scores(labels, clusters), scikit_learn_scores(labels, clusters)
        for name in ("nmi", "ami", "ari"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-9), (name, seed)


def test_scores_equal_scikit_learn_where_large_clusters_share_thousands_of_images():
    rng = np.random.default_rng(0)
    labels, clusters = planted(rng, 60_000, 4, 3, agreement=0.2)
    ours, theirs = metrics.clustering_scores(labels, clusters), scikit_learn_scores(labels, clusters)
    for name in ("nmi", "ami", "ari"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9)


def test_scores_equal_scikit_learn_with_hundreds_of_different_sizes():
    labels = np.repeat(np.arange(180), np.arange(1, 181))  # sizes 1, 2, ... 180: more than one block of pairs
    clusters = np.concatenate([labels[:5000], np.random.default_rng(0).permutation(labels[5000:])])
    ours, theirs = metrics.clustering_scores(labels, clusters), scikit_learn_scores(labels, clusters)
    for name in ("nmi", "ami", "ari"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "clusters", "nmi", "ami", "ari"),
    [
        ([3], [7], 1, 1, 1),
        ([0, 0, 0], [5, 5, 5], 1, 1, 1),
        ([0, 1, 2, 3], [3, 1, 0, 2], 1, 1, 1),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1, 1, 1),
        ([0, 0, 1, 1], [0, 0, 0, 0], 0, 0, 0),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0, 0, 0),
        ([0, 0, 1, 1], [0, 1, 2, 3], 2 / 3, 0, 0),  # log 2 over the mean of log 2 and log 4
        ([0, 0, 1, 1], [0, 1, 0, 1], 0, -0.5, -0.5),
    ],
)
def test_degenerate_partitions_have_their_known_scores(labels, clusters, nmi, ami, ari):
    scores = metrics.clustering_scores(labels, clusters)
    assert (scores["nmi"], scores["ami"], scores["ari"]) == pytest.approx((nmi, ami, ari), abs=1e-12)


def exact_expected_mutual_information(class_sizes, cluster_sizes):
    """Sum over the hypergeometric distribution with exact probabilities."""
    N = sum(class_sizes)
    return sum(
        float(Fraction(comb(a, n) * comb(N - a, b - n), comb(N, b))) * n / N * log(N * n / (a * b))
        for a in class_sizes
        for b in cluster_sizes
        for n in range(max(1, a + b - N), min(a, b) + 1)
    )


@pytest.mark.parametrize(
    ("class_sizes", "cluster_sizes"),
    [
        ([3, 4, 5], [6, 6]),
        ([1] * 12, [5, 7]),
        ([1] * 12, [1] * 12),
        ([400, 390, 10], [700, 99, 1]),
        ([799, 1], [799, 1]),
        ([150] * 4, [300, 300]),
        (list(range(1, 30)), [200, 100, 100, 35]),
    ],
)
def test_expected_mutual_information_equals_exact_arithmetic(class_sizes, cluster_sizes):
    exact = exact_expected_mutual_information(class_sizes, cluster_sizes)
    assert metrics.expected_mutual_information(class_sizes, cluster_sizes) == pytest.approx(exact, abs=1e-13)


def test_expected_mutual_information_is_the_mean_over_shuffles():
    rng = np.random.default_rng(0)
    labels, clusters = planted(rng, 60, 3, 4, agreement=0.5)
    shuffled = [sklearn_metrics.mutual_info_score(labels, rng.permutation(clusters)) for _ in range(100)]
    expected = metrics.expected_mutual_information(np.bincount(labels), np.bincount(clusters))
    assert expected == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 10)


def test_expected_mutual_information_keeps_its_digits_at_the_size_of_imagenet():
    # Two pairs of classes that hardly differ from chance: E[MI] is a millionth of the entropies it is computed from.
    # The reference is a 50-digit evaluation of the definition.
    expected = metrics.expected_mutual_information([1300, 700, 1_279_167], [1_280_267, 900])
    assert expected == pytest.approx(8.351697793034323e-07, abs=1e-13)


def test_nearly_all_singletons_keep_their_digits():
    # The exact value, from 50 digits; differences of logarithms of factorials miss it by 3e-6.
    labels, clusters = np.arange(5000), np.arange(5000)
    labels[7] = 0
    clusters[[55, 90]] = 0
    ami = metrics.adjusted_mutual_information(metrics.contingency(labels, clusters)[2])
    assert ami == pytest.approx(-1.4214776701896272e-07, abs=1e-10)


def test_rand_index_of_a_million_images_does_not_overflow():
    N = 1_281_167
    labels = np.arange(N) % 1000
    counts = metrics.contingency(labels, labels // 500)[2]
    # Two clusters of 500 whole classes each: every pair within a class stays together.
    same_class, same_cluster = np.bincount(labels), np.bincount(labels // 500)
    a, b = (sum(n * (n - 1) // 2 for n in sizes.tolist()) for sizes in (same_class, same_cluster))
    chance = Fraction(a * b, N * (N - 1) // 2)
    assert metrics.adjusted_rand_index(counts) == pytest.approx(float((a - chance) / (Fraction(a + b, 2) - chance)))


def test_random_labels_score_near_zero():
    rng = np.random.default_rng(0)
    scores = metrics.clustering_scores(rng.integers(0, 50, 20_000), rng.integers(0, 80, 20_000))
    assert scores["ami"] == pytest.approx(0, abs=0.01)
    assert scores["ari"] == pytest.approx(0, abs=0.01)


def test_tables_may_be_dense():
    table = np.array([[3, 0, 1], [0, 4, 2]])
    labels, clusters = np.repeat([0, 0, 1, 1], [3, 1, 4, 2]), np.repeat([0, 2, 1, 2], [3, 1, 4, 2])
    scores = metrics.clustering_scores(labels, clusters)
    assert metrics.normalized_mutual_information(table) == scores["nmi"]
    assert metrics.adjusted_mutual_information(table) == scores["ami"]
    assert metrics.adjusted_rand_index(table) == scores["ari"]


# ---- accuracy and the mapping ---------------------------------------------------------------------------------------


def test_accuracy_is_the_best_over_all_one_to_one_mappings():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        num_classes = int(rng.integers(1, 6))
        num_clusters = int(rng.integers(1, num_classes + 1))
        labels, clusters = planted(rng, 12, num_classes, num_clusters, agreement=0.4)
        if len(set(clusters)) > len(set(labels)):
            continue  # then the over-clustering rule acts
        names = range(max(labels.max(), clusters.max()) + 1)
        best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(names))
        scores = metrics.clustering_scores(labels, clusters)
        assert scores["acc"] == pytest.approx(best)
        mapped = [scores["mapping"][cluster] for cluster in clusters.tolist()]
        assert np.mean(np.array(mapped) == labels) == pytest.approx(best)
        assert len(set(scores["mapping"].values())) == len(scores["mapping"])


def accuracies_of_the_published_rule(labels, clusters):
    """Every accuracy that the rule on the square matrix of the largest id + 1 allows, over all ways to break ties."""
    n = max(labels.max(), clusters.max()) + 1
    table = np.zeros((n, n), dtype=int)
    np.add.at(table, (clusters, labels), 1)
    predicted, real = np.unique(clusters), np.unique(labels)
    orders = [np.array(order) for order in permutations(range(n))]
    totals = [table[np.arange(n), order].sum() for order in orders]
    allowed = set()
    for order, total in zip(orders, totals, strict=True):
        if total == max(totals):
            partner = order.copy()
            if len(predicted) > len(real):
                for cluster in predicted:
                    if partner[cluster] not in real:
                        partner[cluster] = table[cluster].argmax()
            allowed.add(int(table[np.arange(n), partner].sum()))
    return allowed


def test_over_clustering_follows_the_published_rule_on_the_square_matrix():
    with_freedom = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels, clusters = planted(rng, 25, 3, 6, agreement=0.3)
        allowed = accuracies_of_the_published_rule(labels, clusters)
        acc = metrics.clustering_scores(labels, clusters)["acc"]
        assert round(acc * 25) in allowed
        assert acc == pytest.approx(round(acc * 25) / 25)
        with_freedom += len(allowed) > 1
    assert with_freedom < 15  # in most cases ties leave no choice, so the comparison is sharp


def test_matching_of_a_thousand_clusters_equals_scipy_on_the_square_matrix():
    rng = np.random.default_rng(0)
    labels, clusters = planted(rng, 30_000, 1000, 1000, agreement=0.3)
    table = np.zeros((1000, 1000))
    np.add.at(table, (clusters, labels), 1)
    best = table[linear_sum_assignment(table.max() - table)].sum() / 30_000
    assert metrics.clustering_scores(labels, clusters)["acc"] == pytest.approx(best)


def test_clusters_with_a_class_keep_it_and_only_the_others_take_their_majority():
    # Cluster 2 is class 1's only chance although class 0 is larger in it; cluster 1 is left over and takes class 0.
    labels = [0] * 5 + [0] * 3 + [0] * 3 + [1] * 2
    clusters = [0] * 5 + [1] * 3 + [2] * 3 + [2] * 2
    scores = metrics.clustering_scores(labels, clusters)
    assert scores["mapping"] == {0: 0, 1: 0, 2: 1}
    assert scores["acc"] == pytest.approx((5 + 3 + 2) / 13)


@pytest.mark.parametrize(
    ("clusters", "nmi", "ami", "ari", "acc", "mapping"),
    [
        ("111000022212", 0.48814, 0.35007, 0.31250, 0.75, {0: 1, 1: 0, 2: 2}),
        ("113300442212", 0.69911, 0.53276, 0.41152, 11 / 12, {0: 1, 1: 0, 2: 2, 3: 0, 4: 1}),
    ],
)
def test_toy_values_of_the_original_code(clusters, nmi, ami, ari, acc, mapping):
    scores = metrics.clustering_scores(TOY_LABELS, [int(c) for c in clusters])
    assert scores["mapping"] == mapping
    assert scores["acc"] == pytest.approx(acc)
    assert (scores["nmi"], scores["ami"], scores["ari"]) == pytest.approx((nmi, ami, ari), abs=5e-6)


# ---- superclasses ---------------------------------------------------------------------------------------------------


def test_superclass_accuracy_matches_fine_classes_first():
    # Clusters 0 and 1 share classes 0 and 1 equally; either way of matching them is right at the level of superclasses.
    labels, clusters = [0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, 0]
    superclasses = {0: 7, 1: 7, 2: 9}
    assert metrics.clustering_scores(labels, clusters)["acc"] == pytest.approx(3 / 6)
    assert metrics.superclass_accuracy(labels, clusters, superclasses) == pytest.approx(5 / 6)


def test_images_of_classes_without_a_superclass_are_left_out():
    labels, clusters = [0, 0, 1, 1, 5, 5, 5], [0, 0, 1, 0, 1, 1, 1]
    # Class 5 would win cluster 1; without its images cluster 1 is class 1.
    assert metrics.superclass_accuracy(labels, clusters, {0: 0, 1: 1}) == pytest.approx(3 / 4)


def test_superclasses_of_one_class_each_change_nothing():
    labels, clusters = planted(np.random.default_rng(0), 500, 10, 15, agreement=0.5)
    acc = metrics.clustering_scores(labels, clusters)["acc"]
    assert metrics.superclass_accuracy(labels, clusters, {c: 100 - c for c in range(10)}) == pytest.approx(acc)
    assert metrics.superclass_accuracy(labels, clusters, dict.fromkeys(range(10), 0)) == 1


def test_no_image_in_any_superclass_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 images"):
        metrics.superclass_accuracy([0, 1], [0, 1], {5: 0})


# ---- original code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_scores_equal_the_original_code(golden, case):
    prefix = f"case{case}_"
    numbers = golden("metrics.npz", f"{prefix}targets")
    data = {name.removeprefix(prefix): numbers[name] for name in numbers if name.startswith(prefix)}
    labels, clusters = data["targets"], data["predictions"]
    scores = metrics.clustering_scores(labels, clusters)
    for name in ("nmi", "ami", "ari"):
        assert scores[name] == pytest.approx(float(data[name]), abs=1e-9)

    superclass = data.get("superclass_of_class")
    if superclass is None:
        acc, mapping = scores["acc"], scores["mapping"]
    else:
        acc = metrics.superclass_accuracy(labels, clusters, dict(enumerate(superclass.tolist())))
        mapping = {cluster: superclass[name] for cluster, name in scores["mapping"].items()}
    assert acc == pytest.approx(float(data["acc"]), abs=1e-6)
    certain = [c for c in np.flatnonzero(data["cluster_is_certain"]).tolist() if c in mapping]
    assert certain
    assert [mapping[c] for c in certain] == data["cluster_to_class"][certain].tolist()


# ---- invariances and inputs -----------------------------------------------------------------------------------------


def test_renaming_classes_and_clusters_changes_no_score():
    rng = np.random.default_rng(0)
    labels, clusters = planted(rng, 3000, 10, 14, agreement=0.6)
    class_name, cluster_name = rng.permutation(10) * 2, rng.permutation(14) + 5
    before = metrics.clustering_scores(labels, clusters)
    after = metrics.clustering_scores(class_name[labels], cluster_name[clusters])
    for name in ("acc", "nmi", "ami", "ari"):
        assert after[name] == pytest.approx(before[name], abs=1e-12)
    assert after["mapping"] == {int(cluster_name[k]): int(class_name[c]) for k, c in before["mapping"].items()}


def test_order_of_images_changes_nothing():
    rng = np.random.default_rng(0)
    labels, clusters = planted(rng, 300, 10, 14, agreement=0.2)
    order = rng.permutation(300)
    assert metrics.clustering_scores(labels[order], clusters[order]) == metrics.clustering_scores(labels, clusters)


def test_exchanging_labels_and_clusters_keeps_nmi_ami_ari():
    labels, clusters = planted(np.random.default_rng(0), 500, 7, 12, agreement=0.4)
    one, other = metrics.clustering_scores(labels, clusters), metrics.clustering_scores(clusters, labels)
    for name in ("nmi", "ami", "ari"):
        assert one[name] == pytest.approx(other[name], abs=1e-12)


def test_lists_arrays_and_tensors_of_any_integer_type_agree():
    labels, clusters = [0, 0, 1, 2, 2], [4, 4, 0, 0, 9]
    expected = metrics.clustering_scores(labels, clusters)
    assert all(type(cluster) is int and type(name) is int for cluster, name in expected["mapping"].items())
    assert all(type(expected[name]) is float for name in ("acc", "nmi", "ami", "ari"))
    assert metrics.clustering_scores(torch.tensor(labels), torch.tensor(clusters)) == expected
    assert metrics.clustering_scores(np.uint8(labels), np.int32(clusters)) == expected


def test_contingency_counts_the_images_of_every_cell():
    labels, clusters = [5, 5, 2, 2, 2], [10**12, 3, 3, 3, 10**12]
    classes, cluster_ids, counts = metrics.contingency(labels, clusters)
    assert classes.tolist() == [2, 5]
    assert cluster_ids.tolist() == [3, 10**12]
    assert counts.toarray().tolist() == [[2, 1], [1, 1]]


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([0, 1, 2], [0, 1], "differ in length: 3 and 2"),
        ([], [], "labels have the shape .* expected one dimension and at least one entry"),
        ([0, 1], [], "clusters have the shape .* expected one dimension and at least one entry"),
        ([[0, 1]], [[0, 1]], r"labels have the shape \(1, 2\): expected one dimension"),
        ([0, -1], [0, 1], "labels contain -1: expected integers of at least 0"),
        ([0, 1], [0, -3], "clusters contain -3: expected integers of at least 0"),
        ([0.5, 1.0], [0, 1], "labels are float64: expected integers"),
    ],
)
def test_bad_labels_are_refused_with_the_culprit(labels, clusters, message):
    for function in (metrics.clustering_scores, metrics.contingency):
        with pytest.raises(ValueError, match=message):
            function(labels, clusters)
    with pytest.raises(ValueError, match=message):
        metrics.superclass_accuracy(labels, clusters, {0: 0})


def test_sizes_with_different_sums_are_refused():
    with pytest.raises(ValueError, match="add up to 5 images, cluster sizes to 6"):
        metrics.expected_mutual_information([2, 3], [3, 3])

"""Numbers without labels by hand and against scikit-learn; several classifiers as one; cls_eval.py as a user types it."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from evaluating import digit_features, digit_probabilities, save_untrained
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, silhouette_samples

from src.config import parse_cls_eval
from src.data.datasets import open_data
from src.errors import InputError
from src.evaluation.quality import agreement, align, rankme, silhouette
from src.features import average_clusters, predict_clusters
from src.metrics import balance, clustering_scores


def test_balance_is_one_for_equal_shares_and_zero_for_one_cluster():
    assert balance(np.ones(7)) == pytest.approx(1)
    assert balance(np.array([0.0, 4.0, 0.0])) == 0
    # -(3/4 ln 3/4 + 1/4 ln 1/4) / ln 2 of two clusters, and over ln 4 of four of which two are empty
    assert balance(np.array([30, 10])) == pytest.approx(0.8112781)
    assert balance(np.array([0.75, 0.25, 0, 0])) == pytest.approx(0.4056391)
    assert balance(np.array([5])) == 1


def test_agreement_is_the_mean_ami_of_pairs_of_one_size():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (3, 200))
    rows[1, :150] = rows[0, :150]
    clusters = np.stack([*rows, rng.integers(0, 6, 200), (rows[0] + 1) % 4])
    found = agreement(clusters, [4, 4, 4, 6, 4])
    pairs = [(a, b) for a in (0, 1, 2, 4) for b in (0, 1, 2, 4) if a < b]
    expected = np.mean([adjusted_mutual_info_score(clusters[a], clusters[b]) for a, b in pairs])
    assert found == {4: (pytest.approx(expected), 6)}
    assert agreement(clusters[[0, 4]], [4, 4])[4][0] == pytest.approx(1)
    assert agreement(np.zeros((2, 5), dtype=int), [4, 4]) == {}  # two that say nothing agree about nothing


def test_align_finds_the_renaming():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 6, 500)
    reference[reference == 5] = 4  # empty
    name = rng.permutation(6)
    clusters = np.argsort(name)[reference]
    clusters[:100] = rng.integers(0, 6, 100)
    found = align(clusters, reference, 6)
    assert np.array_equal(found, name)


def test_rankme_counts_directions():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(50, 8)))[0]
    assert rankme(torch.from_numpy(3 * directions)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.from_numpy(directions[:, :1] @ rng.normal(size=(1, 8)))) == pytest.approx(1, rel=1e-4)
    features = rng.normal(size=(200, 8)) * np.arange(1, 9) ** -2.0 + 0.5
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(torch.from_numpy(features)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


def test_silhouette_of_a_sample():
    # clusters {0, 1} and {5}: (5 - 1)/5, (4 - 1)/4 and 0 for an image alone
    features = torch.tensor([[0.0], [1.0], [5.0]])
    assert silhouette(features, np.array([0, 0, 1])) == pytest.approx((0.8 + 0.75 + 0) / 3)
    assert silhouette(features, np.array([2, 2, 2])) is None
    assert silhouette(features, np.array([0, 1, 2])) is None
    rng = np.random.default_rng(0)
    features, clusters = torch.from_numpy(rng.normal(size=(300, 3))), rng.integers(0, 3, 300)
    rows = np.random.default_rng(4).permutation(300)[:50]
    expected = silhouette_samples(features.numpy()[rows], clusters[rows]).mean()
    assert silhouette(features, clusters, sample=50, seed=4) == pytest.approx(expected)


class Logits(torch.nn.Module):
    """Stands for a method: its image i is the number i, its classifiers' logits a table."""

    temperature = 0.5

    def __init__(self, *tables):
        super().__init__()
        self.tables = tables

    def predict(self, images):
        return [table[images.long()] for table in self.tables]


def batches(N):
    return [(rows.float(), rows.numpy()) for rows in torch.arange(N).split(7)]


def test_mean_predictions_are_those_of_all_images():
    tables = torch.randn(20, 3), torch.randn(20, 5)
    method = Logits(*tables).train()
    clusters, confidences, predictions, log_sums = predict_clusters(method, batches(20), 20)
    for k, table in enumerate(tables):
        probabilities = (table / 0.5).softmax(dim=1)
        assert np.array_equal(clusters[k], table.argmax(dim=1))
        assert np.allclose(confidences[k], probabilities.amax(dim=1))
        assert np.allclose(predictions[k], probabilities.mean(dim=0), atol=1e-6)
        assert np.allclose(log_sums[k], [-sum(math.log(p) for p in row) for row in probabilities.tolist()], atol=1e-4)
    assert method.training


def test_an_ensemble_averages_probabilities_in_common_names():
    torch.manual_seed(0)
    tables = torch.randn(20, 4), torch.randn(20, 9), torch.randn(20, 4)
    names = {0: np.arange(4), 2: np.array([2, 0, 3, 1])}
    clusters, confidences = average_clusters(Logits(*tables), batches(20), 20, names=names)
    mean = torch.zeros(20, 4)
    for k, name in names.items():
        for c in range(4):
            mean[:, name[c]] += (tables[k] / 0.5).softmax(dim=1)[:, c] / 2
    assert np.array_equal(clusters, mean.argmax(dim=1))
    assert np.allclose(confidences, mean.amax(dim=1))
    alone, _ = average_clusters(Logits(*tables), batches(20), 20, names={2: np.arange(4)})
    assert not np.array_equal(clusters, alone)


# ---- cls_eval.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Classifiers of 10, 10, 20 and 10 classes on a network with random weights."""
    return save_untrained(tmp_path_factory.mktemp("run") / "checkpoint.pt", "--classes", "10", "10", "20", "10")


@pytest.fixture
def run(evaluate):
    return partial(evaluate, "cls_eval")


def test_the_written_numbers_are_those_of_the_network(trained, run):
    result, printed = run("--checkpoint", trained, "--classifier", "1", "--ensemble", "--feature-quality")
    features = digit_features(trained)[1][0]
    data = open_data("digits", "test")
    probabilities = [p.double() for p in digit_probabilities(trained)]
    clusters = [p.argmax(dim=1).numpy() for p in probabilities]

    def entropy(shares):
        """Of shares of 1, over that of equal shares: 1 if all clusters are as large."""
        return -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares))

    soft = [entropy(p.mean(dim=0).tolist()) for p in probabilities]
    hard = [
        entropy((np.bincount(row, minlength=p.shape[1]) / 360).tolist())
        for row, p in zip(clusters, probabilities, strict=True)
    ]
    assert [row["balance_soft"] for row in result["classifiers"]] == pytest.approx(soft, rel=1e-5)
    assert [row["balance_hard"] for row in result["classifiers"]] == pytest.approx(hard, rel=1e-9)
    assert min(abs(a - b) for a, b in zip(hard, soft, strict=True)) > 0.01  # so that exchanging them would be seen
    quality = result["quality"]
    assert quality["used"] == len(set(clusters[1]))
    assert (quality["balance_hard"], quality["balance_soft"]) == pytest.approx((hard[1], soft[1]), rel=1e-5)
    header = re.search("^ +clusters  used  balance \\(hard\\)  balance \\(soft\\)  ", printed, re.M)
    row = re.search(r"^classifier 1 \(chosen\) +10 +(\d+) +([\d.]+) +([\d.]+) ", printed, re.M)
    assert header
    both = [f"{100 * quality[name]:.1f}" for name in ("balance_hard", "balance_soft")]
    assert row.groups() == (str(quality["used"]), *both)
    pairs = [adjusted_mutual_info_score(clusters[a], clusters[b]) for a, b in ((0, 1), (0, 3), (1, 3))]
    assert quality["agreement"] == {"10": {"ami": pytest.approx(np.mean(pairs), abs=1e-6), "pairs": 3}}
    assert (
        f"agreement of the 3 pairs of classifiers with 10 clusters: AMI {100 * quality['agreement']['10']['ami']:.1f}"
        in printed
    )
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    assert quality["rankme"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-3)
    expected = silhouette_samples(features.numpy(), clusters[1]).mean()
    assert quality["silhouette"] == pytest.approx(expected, abs=1e-4)

    mean = torch.zeros(len(data), 10, dtype=torch.float64)
    for k in (0, 1, 3):
        counts = np.array([[((clusters[k] == a) & (clusters[1] == b)).sum() for b in range(10)] for a in range(10)])
        mean[:, linear_sum_assignment(-counts)[1]] += probabilities[k] / 3
    first, second = mean.topk(2).values.T
    within = 1e-6 if (first - second).min() > 1e-5 else 0.02  # rounding may decide the cluster of an image or two
    together = clustering_scores(data.labels.numpy(), mean.argmax(dim=1).numpy())
    assert result["ensemble"]["members"] == [0, 1, 3]
    assert result["ensemble"]["ami"] == pytest.approx(together["ami"], abs=within)
    assert abs(result["ensemble"]["ami"] - result["ami"]) > 0.02
    assert "mean of 3 classifiers" in printed


def test_no_pass_more_than_asked_for(trained, run, monkeypatch):
    monkeypatch.setattr("src.features._run", lambda *_, **__: pytest.fail("features were computed"))
    result, printed = run("--checkpoint", trained)
    assert set(result["quality"]) == {"used", "balance_hard", "balance_soft", "agreement"}
    assert "ensemble" not in result
    assert "RankMe" not in printed


def test_k_means_has_a_balance_of_sizes_and_one_pass(trained, run, monkeypatch):
    from src import features

    passes, compute = [], features._run

    def count_passes(*words, **how):
        passes.append(how["count"].keywords["what"])
        return compute(*words, **how)

    monkeypatch.setattr(features, "_run", count_passes)
    result, printed = run("--checkpoint", trained, "--kmeans", "3", "--restarts", "1", "--feature-quality")
    assert passes == ["features, test", "features, train"]
    hard = balance(np.array(result["cluster_sizes"]))
    assert result["quality"]["balance_hard"] == pytest.approx(hard)
    assert set(result["quality"]) == {"used", "balance_hard", "rankme", "features", "silhouette"}
    row = re.search(r"^k-means, backbone +3 +3 +([\d.]+) {18,}[\d.]+ ", printed, re.M)  # nothing below balance (soft)
    assert row[1] == f"{100 * hard:.1f}"


def test_wrong_flags(trained, run):
    with pytest.raises(InputError, match="--ensemble: classifier 2 is the only one with 20 classes"):
        run("--checkpoint", trained, "--classifier", "2", "--ensemble")
    with pytest.raises(InputError, match="--ensemble averages classifiers, but --kmeans"):
        parse_cls_eval(["--checkpoint", "x", "--kmeans", "3", "--ensemble"])

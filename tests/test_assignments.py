"""Sinkhorn and k-means against the authors' numbers, loops in float64, and what they must satisfy; over ranks as well."""

import math

import numpy as np
import pytest
import torch
from conftest import find_golden
from torch.overrides import TorchFunctionMode

from src.assignments import balanced_labels, balanced_prototype_labels, sinkhorn, spherical_kmeans


def plain_sinkhorn(scores, epsilon, iterations):
    """The published formula, entry by entry, in float64."""
    B, K = scores.shape
    Q = [[math.exp(float(scores[i, k]) / epsilon) for k in range(K)] for i in range(B)]
    for _ in range(iterations):
        for k in range(K):
            column = sum(Q[i][k] for i in range(B))
            for i in range(B):
                Q[i][k] /= column * K
        for i in range(B):
            row = sum(Q[i])
            Q[i] = [q / (row * B) for q in Q[i]]
    return torch.tensor(Q, dtype=torch.float64) * B


def cosines(B, K, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (B, K))
    return a @ b.T


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_is_the_published_formula(iterations):
    scores = cosines(24, 7)
    expected = plain_sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(sinkhorn(scores.double(), 0.05, iterations), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations).double(), expected, rtol=1e-4, atol=1e-6)


def test_sinkhorn_by_hand():
    """Two images that prefer the same of two prototypes by the same margin share both evenly; opposite ones do not."""
    assert sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 0.1, 5).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    codes = sinkhorn(torch.tensor([[0.1, 0.0], [0.0, 0.1]]), 0.1, 1)
    e = math.exp(1)
    torch.testing.assert_close(codes, torch.tensor([[e, 1], [1, e]]) / (1 + e))


def test_codes_are_constants():
    scores = cosines(24, 7).double().requires_grad_()
    codes = sinkhorn(scores, 0.1, 2)
    assert not codes.requires_grad
    torch.testing.assert_close(codes, plain_sinkhorn(scores.detach(), 0.1, 2), rtol=1e-10, atol=1e-12)


def test_authors_sinkhorn(golden):
    numbers = golden("swav.npz", "sinkhorn0_scores")
    assert int(numbers["num_sinkhorn"]) == 7
    for i in range(7):
        case = {
            name: numbers[f"sinkhorn{i}_{name}"] for name in ("scores", "codes", "codes64", "epsilon", "iterations")
        }
        how = float(case["epsilon"]), int(case["iterations"])
        for kind, name in ((torch.float32, "codes"), (torch.float64, "codes64")):
            codes = sinkhorn(torch.from_numpy(case["scores"]).to(kind), *how)
            expected = torch.from_numpy(case[name])
            assert (codes - expected).abs().max() <= (1e-4 if kind is torch.float32 else 1e-10) * expected.abs().max()


def test_the_columns_share_the_samples_evenly_and_the_rows_are_distributions():
    codes = sinkhorn(cosines(60, 12), 0.05, 200)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(60))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((12,), 5.0), rtol=1e-4, atol=0)


def test_a_constant_on_all_scores_changes_nothing():
    scores = cosines(16, 5).double()
    torch.testing.assert_close(sinkhorn(scores + 3, 0.05, 3), sinkhorn(scores, 0.05, 3))


@pytest.mark.parametrize("epsilon", [0.01, 0.001])
def test_small_epsilon_does_not_overflow(epsilon):
    """exp(1 / 0.001) is beyond float64; expected is the plain formula in the log domain."""
    scores = cosines(40, 6)
    scores[3] = -1 + scores[3] / 100  # an image far from everything, whose terms vanish beside the others'
    logs = scores.double() / epsilon
    for _ in range(3):
        logs = logs - logs.logsumexp(dim=0)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    codes = sinkhorn(scores, epsilon, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.double(), logs.exp(), rtol=1e-3 if epsilon == 0.001 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    scores = cosines(32, 8).to(dtype)
    assert torch.equal(sinkhorn(scores, 0.01, 3), sinkhorn(scores.float(), 0.01, 3))


def test_equal_images_get_uniform_codes():
    torch.testing.assert_close(sinkhorn(torch.full((10, 4), 0.7), 0.05, 3), torch.full((10, 4), 0.25))


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"iterations": 0}])
def test_meaningless_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
        sinkhorn(torch.zeros(2, 2), **{"epsilon": 0.05, "iterations": 3, **wrong})


# ---- k-means --------------------------------------------------------------------------------------------------------


def test_authors_kmeans(golden):
    """From their initial centroids: the same clusters of every image of all heads, banks taken in turn.

    In float64, where no margin between two centroids is within rounding; their centroids are those of float32.
    """
    numbers = golden("swav.npz", "kmeans0_banks")
    assert int(numbers["num_kmeans"]) == 4
    for i in range(4):
        banks, indices = numbers[f"kmeans{i}_banks"], numbers[f"kmeans{i}_bank_indices"]  # (W, A, M, D), (W, M)
        for h, heads in enumerate(numbers[f"kmeans{i}_heads"]):
            bank = torch.from_numpy(banks[:, h % banks.shape[1]]).double()
            start = bank[0][torch.from_numpy(numbers[f"kmeans{i}_initial_rows{h}"])]
            assert len(start) == heads
            found, centroids = spherical_kmeans(bank.flatten(0, 1), start, 10)
            assignments = np.full(int(numbers[f"kmeans{i}_dataset_size"]), -100)
            assignments[indices.ravel()] = found.numpy()
            assert (assignments == numbers[f"kmeans{i}_assignments"][h]).all()
            np.testing.assert_allclose(centroids, numbers[f"kmeans{i}_centroids{h}"], atol=1e-5)


def test_kmeans_by_hand():
    """Three rows around the first axis, one on the second; a centroid that nobody is nearest to stays."""
    rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found, centroids = spherical_kmeans(rows, start, 1)
    assert found.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(centroids, start)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_kmeans_is_the_published_rule(iterations):
    """Loops in float64. Few iterations do not converge, so rows still move from the centroids before the last."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator, dtype=torch.float64), dim=1)
    start = rows[:6]
    points, centroids = rows.tolist(), start.tolist()

    def nearest(point):
        products = [sum(a * b for a, b in zip(point, c, strict=True)) for c in centroids]
        return products.index(max(products))

    for _ in range(iterations):
        assignments = [nearest(point) for point in points]
        for k in range(len(centroids)):
            members = [point for point, cluster in zip(points, assignments, strict=True) if cluster == k]
            if members:
                total = [sum(axis) for axis in zip(*members, strict=True)]
                centroids[k] = [x / math.hypot(*total) for x in total]
    expected = [nearest(point) for point in points]
    assert (expected == assignments) == (iterations == 10)
    found, centres = spherical_kmeans(rows, start, iterations)
    assert found.tolist() == expected
    torch.testing.assert_close(centres, torch.tensor(centroids, dtype=torch.float64))


def test_kmeans_takes_the_number_of_iterations_it_is_told():
    rows = torch.nn.functional.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    start = rows[:10]
    once, c = spherical_kmeans(rows, start, 1)
    twice, d = spherical_kmeans(rows, c, 1)
    again, e = spherical_kmeans(rows, start, 2)
    assert torch.equal(twice, again)
    assert torch.equal(d, e)
    assert not torch.equal(once, twice)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(10))


# ---- balanced labels ------------------------------------------------------------------------------------------------


class CountedReads:
    """Log-probabilities that count how often they are read: once at the start, in each iteration, and at the end."""

    def __init__(self, values):
        self.values, self.shape, self.device, self.reads = values, values.shape, values.device, 0

    def __getitem__(self, rows):
        self.reads += 1
        return self.values[rows]

    @property
    def iterations(self):
        return self.reads - 2


@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case3", "case4", "cifar0", "cifar1"])
def test_authors_labels(golden, case):
    """Also of case 3, which underflows in their float32. As many iterations as theirs, too."""
    bits, tolerance = ("", 0.01) if case.startswith("cifar") else ("64", 0.1)
    numbers = golden("sela.npz", f"{case}_labels{bits}")
    logs = CountedReads(torch.from_numpy(numbers[f"{case}_probabilities"]).log())
    labels = balanced_labels(logs, float(numbers[f"{case}_lambda"]), tolerance)
    assert (labels.numpy() == numbers[f"{case}_labels{bits}"]).all()
    assert logs.iterations == int(numbers[f"{case}_iterations{bits}"])


def plain_transport(logs, lam, tolerance, max_iterations=1000):
    """Scale the rows and columns of p to the power lam in turn, in float64; labels and the number of iterations."""
    N, K = logs.shape
    p = logs.softmax(dim=1).double() ** lam
    r, c = torch.full((K,), 1 / K, dtype=torch.float64), torch.full((N,), 1 / N, dtype=torch.float64)
    for iteration in range(max_iterations):
        r = 1 / K / (c @ p)
        before, c = c, 1 / N / (p @ r)
        if iteration % 10 == 0 and (before / c - 1).abs().sum() <= tolerance:
            break
    return (p * r).argmax(dim=1), iteration + 1


@pytest.mark.parametrize(
    ("lam", "tolerance", "limit"), [(3.0, 0.1, 1000), (8.0, 0.1, 1000), (8.0, 1e-4, 1000), (8.0, 1e-4, 7)]
)
def test_labels_and_iterations_are_those_of_plain_scalings(lam, tolerance, limit):
    logits = torch.randn(80, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, iterations = plain_transport(logits, lam, tolerance, limit)
    assert 1 < iterations < 1000
    logs = CountedReads(logits)
    assert torch.equal(balanced_labels(logs, lam, tolerance, max_iterations=limit), expected)
    assert logs.iterations == iterations


def test_labels_are_balanced_whatever_the_network_prefers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 6, generator=generator) + torch.tensor([3.0, 2, 1, 0, -1, -2])
    counts = torch.bincount(balanced_labels(logits, 25.0, 0.1), minlength=6)
    assert counts.min() >= 95
    assert counts.max() <= 105


def test_a_constant_for_each_image_changes_no_label_and_chunks_do_not_matter(monkeypatch):
    logits = torch.randn(90, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = balanced_labels(logits.log_softmax(dim=1), 10.0, 0.1)
    assert torch.equal(balanced_labels(logits, 10.0, 0.1), labels)
    monkeypatch.setattr("src.assignments.CHUNK", 35)
    assert torch.equal(balanced_labels(logits, 10.0, 0.1), labels)


class Largest(TorchFunctionMode):
    """Remembers the number of entries of the largest tensor that any function returns."""

    entries = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.entries = max(self.entries, found.numel())
        return found


@pytest.mark.parametrize(("temperature", "lam"), [(0.1, 25.0), (0.5, 3.0)])
def test_labels_from_prototypes_are_those_of_the_whole_matrix(monkeypatch, temperature, lam):
    generator = torch.Generator().manual_seed(2)
    rows, prototypes = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=generator).double(), dim=1) for n in (700, 40)
    )
    logs = (rows @ prototypes.T / temperature).log_softmax(dim=1)
    expected = balanced_labels(logs, lam, 1e-3, max_iterations=200)
    assert len(expected.unique()) == 40
    monkeypatch.setattr("src.assignments.CHUNK", 2000)
    with Largest() as largest:
        found = balanced_prototype_labels(rows, prototypes, temperature, lam=lam, tolerance=1e-3, max_iterations=200)
    assert torch.equal(found, expected)
    assert largest.entries <= 700 * 5  # the embeddings; the whole matrix has 28,000


def test_an_impossible_class_and_a_meaningless_setting_are_refused():
    logs = torch.zeros(4, 2)
    logs[:, 1] = -math.inf
    with pytest.raises(ValueError, match="not finite"):
        balanced_labels(logs, 25.0, 0.1)
    with pytest.raises(ValueError, match="lam > 0"):
        balanced_labels(torch.zeros(4, 2), 0.0, 0.1)


# ---- over ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_one_process_finds(run_ranks, world_size):
    """Shares of unequal size. The golden numbers of two processes are these of one, to 2e-7."""
    code = f"""
        sys.path.insert(0, "tests")
        from test_assignments import cosines
        from src.assignments import balanced_labels, balanced_prototype_labels, sinkhorn, spherical_kmeans

        scores = cosines(50, 6).double()
        rows = torch.nn.functional.normalize(cosines(50, 8, seed=1).double(), dim=1)
        mine = slice(rank * 11, (rank + 1) * 11 if rank < {world_size} - 1 else 50)
        codes = sinkhorn(scores[mine], 0.03, 3)
        clusters, centroids = spherical_kmeans(rows[mine], rows[:5], 10)
        labels = balanced_labels(scores[mine], 25.0, 0.1)
        own = balanced_prototype_labels(rows[mine], rows[:5], 0.1, lam=25.0, tolerance=0.1, max_iterations=1000)
        torch.save((codes, clusters, labels, own, centroids), out / f"{{rank}}.pt")
    """
    codes, clusters, labels, own, centroids = zip(*run_ranks(world_size, code), strict=True)
    scores = cosines(50, 6).double()
    rows = torch.nn.functional.normalize(cosines(50, 8, seed=1).double(), dim=1)
    torch.testing.assert_close(torch.cat(codes), sinkhorn(scores, 0.03, 3))
    expected, centres = spherical_kmeans(rows, rows[:5], 10)
    assert torch.equal(torch.cat(clusters), expected)
    torch.testing.assert_close(centroids[-1], centres)
    assert torch.equal(torch.cat(labels), balanced_labels(scores, 25.0, 0.1))
    assert torch.equal(
        torch.cat(own), balanced_prototype_labels(rows, rows[:5], 0.1, lam=25.0, tolerance=0.1, max_iterations=1000)
    )


def test_authors_sinkhorn_on_two_ranks(golden, run_ranks):
    numbers = golden("swav.npz", "sinkhorn_two0_scores")
    count = int(numbers["num_sinkhorn_two"])
    code = f"""
        import numpy as np
        from src.assignments import sinkhorn

        numbers = np.load({str(find_golden("swav.npz", "sinkhorn_two0_scores"))!r})
        found = []
        for i in range({count}):
            case = {{name: numbers[f"sinkhorn_two{{i}}_{{name}}"] for name in ("scores", "epsilon", "iterations")}}
            mine = torch.from_numpy(case["scores"]).double().chunk(2)[rank]
            found.append(sinkhorn(mine, float(case["epsilon"]), int(case["iterations"])))
        torch.save(found, out / f"{{rank}}.pt")
    """
    halves = run_ranks(2, code)
    for i in range(count):
        codes = torch.cat([half[i] for half in halves])
        expected = torch.from_numpy(numbers[f"sinkhorn_two{i}_codes"])
        assert (codes - expected).abs().max() <= 1e-5 * expected.abs().max()  # theirs are float32

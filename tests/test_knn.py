"""Weighted nearest-neighbour votes: the authors' numbers, plain loops in float64, and what must not matter."""

import math
import sys

import numpy as np
import pytest
import torch
from evaluating import undecided

from src import neighbors
from src.evaluation.knn import unit_rows
from src.metrics import knn_top
from src.neighbors import faiss_for, nearest


def unit(generator, rows, width, dtype=torch.float64):
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def case(seed=0, bank=60, queries=40, width=6, classes=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(classes, (n,), generator=generator) for n in (bank, queries)]
    centres = unit(generator, classes, width)
    rows = [unit(generator, len(y), width) + 0.7 * centres[y] for y in labels]
    rows = [torch.nn.functional.normalize(x, dim=1).to(dtype) for x in rows]
    return rows[0], labels[0], rows[1], labels[1]


def by_loops(bank, bank_labels, queries, query_labels, ks, tau):
    """The definition, one query and one neighbour at a time."""
    classes = sorted({*bank_labels.tolist(), *query_labels.tolist()})
    result = {}
    for k in ks:
        first = five = 0
        for query, target in zip(queries.double().tolist(), query_labels.tolist(), strict=True):
            similarity = [sum(a * b for a, b in zip(row, query, strict=True)) for row in bank.double().tolist()]
            order = sorted(range(len(similarity)), key=lambda row: (-similarity[row], row))[:k]
            votes = dict.fromkeys(classes, 0.0)
            for row in order:
                votes[bank_labels[row].item()] += math.exp(similarity[row] / tau)
            ranking = sorted(classes, key=lambda name: (-votes[name], name))
            first += ranking[0] == target
            five += target in ranking[:5]
        result[k] = (first / len(queries), five / len(queries))
    return result


def rounding(bank, bank_labels, queries, k, tau, dtype=torch.float32):
    """The share of queries that rounding may decide, which no two processors do alike; none in float64."""
    error = {torch.float64: 1e-14, torch.float32: 1e-6}[dtype]
    share = undecided(bank.double(), bank_labels, queries.double(), k, tau, error) / len(queries)
    assert share < 0.1
    return share


def same(found, expected, within):
    """Whether the fractions of each k differ by no more than the queries that rounding may decide."""
    return found == {k: pytest.approx(scores, abs=within[k] + 1e-12) for k, scores in expected.items()}


def test_authors_numbers(golden):
    data = golden("knn.npz")
    for i in range(int(data["num_knn"])):
        part = {
            name: data[f"knn{i}_{name}"] for name in ("train_features", "train_labels", "test_features", "test_labels")
        }
        tensors = [torch.from_numpy(value) for value in part.values()]
        ks = data[f"knn{i}_nb_knn"].tolist()
        expected = data[f"knn{i}_results"] / 100
        for dtype, column in ((torch.float64, 1), (torch.float32, 3)):
            rows = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
            tau = float(data[f"knn{i}_tau"])
            found = knn_top(*rows, ks, tau)
            for k, line in zip(ks, expected, strict=True):
                within = 1e-6 + rounding(*tensors[:3], k, tau, dtype)
                assert found[k][0] == pytest.approx(line[column], abs=within)
                lowest, highest = line[5:7]  # theirs leaves the order of classes without votes to chance
                assert lowest - within <= found[k][1] <= highest + within
                if lowest == highest:
                    assert found[k][1] == pytest.approx(line[column + 1], abs=within)


@pytest.mark.parametrize("tau", [0.02, 0.1, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_loops_in_float64_say_the_same(seed, tau):
    data = case(seed)
    ks = [1, 3, 10, 60]
    expected = by_loops(*data, ks, tau)
    assert 0.1 < expected[3][0] < expected[3][1] < 1  # neither trivial nor hopeless
    assert knn_top(*data, ks, tau) == expected
    found = knn_top(*(x.float() if x.is_floating_point() else x for x in data), ks, tau)
    assert same(found, expected, {k: rounding(*data[:3], k, tau) for k in ks})


def test_closeness_weighs_and_more_so_at_low_temperature():
    """Three neighbours at 0.6 against one at 1: e^(1/tau) against 3 e^(0.6/tau), equal at tau = 0.4 / ln 3 = 0.364."""
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    data = (bank, torch.tensor([4, 2, 2, 2]), torch.tensor([[1.0, 0.0]]), torch.tensor([4]))
    assert knn_top(*data, [4], 0.36)[4][0] == 1
    assert knn_top(*data, [4], 0.37)[4][0] == 0
    assert knn_top(*data, [4, 1], 0.37) == {4: (0.0, 1.0), 1: (1.0, 1.0)}


@pytest.mark.parametrize("chunks", [(1, 1), (3, 7), (1000, 4), (7, 1000), (40, 60)])
def test_chunks_do_not_matter(chunks):
    """Similarities are whole numbers, with many ties, so that rounding cannot either."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randint(-2, 3, (n, 3), generator=generator).double() for n in (60, 40))
    labels = [torch.randint(9, (n,), generator=generator) for n in (60, 40)]
    data = (bank, labels[0], queries, labels[1])
    ks = [1, 2, 5, 23, 60]
    expected = by_loops(*data, ks, 2.0)
    assert knn_top(*data, ks, 2.0, query_chunk=chunks[0], bank_chunk=chunks[1]) == expected


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_of_equals_the_earlier_is_nearer(chunk):
    bank = torch.tensor([1.0, 3, 2, 3, 2, 2, 3, 2, 1, 2])[:, None]
    similarities, rows = nearest(bank, torch.ones(1, 1), 6, bank_chunk=chunk)
    assert rows.tolist() == [[1, 3, 6, 2, 4, 5]]
    assert similarities.tolist() == [[3, 3, 3, 2, 2, 2]]
    assert nearest(bank, -torch.ones(2, 1), 2, bank_chunk=chunk)[1].tolist() == [[0, 8], [0, 8]]


@pytest.fixture
def with_faiss(monkeypatch):
    """Let faiss search, also in a small bank."""
    monkeypatch.setattr(neighbors, "WORTHWHILE", 0)


@pytest.mark.parametrize(
    "converted", [1 << 26, 700, 1]
)  # entries of a bank in half precision that are converted at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "Q", "width", "k"), [(900, 90, 3, 200), (900, 7, 3, 1), (150, 40, 8, 149), (150, 40, 8, 150), (50, 30, 1, 7)]
)
def test_faiss_finds_the_same_rows_in_the_same_order(with_faiss, monkeypatch, converted, dtype, N, Q, width, k):
    """The products are whole numbers with many ties, so they are not rounded."""
    monkeypatch.setattr(neighbors, "CONVERTED", converted)
    generator = torch.Generator().manual_seed(N + k)
    bank, queries = (torch.randint(-3, 4, (rows, width), generator=generator).to(dtype) for rows in (N, Q))
    expected = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    similarities, rows = nearest(bank, queries, k)
    assert similarities.dtype == torch.float32
    assert torch.equal(similarities.double(), expected.values[:, :k])
    assert torch.equal(rows, expected.indices[:, :k])
    strided = torch.stack([bank, bank], dim=1)[:, 1]
    assert torch.equal(nearest(strided, queries, k)[1], rows)


def test_torch_searches_again_only_where_equals_were_left_out(with_faiss, monkeypatch):
    again = []
    by_torch = neighbors._nearest_by_torch
    monkeypatch.setattr(
        neighbors,
        "_nearest_by_torch",
        lambda *args, **settings: again.append(len(args[1])) or by_torch(*args, **settings),
    )
    bank = torch.tensor([4.0, 3, 2, 2, 1])[:, None]
    queries = torch.tensor([[1.0], [-1.0], [2.0]])
    assert nearest(bank, queries, 2)[1].tolist() == [[0, 1], [4, 2], [0, 1]]  # only the second has to choose
    assert nearest(bank, queries, 4)[1].tolist() == [[0, 1, 2, 3], [4, 2, 3, 1], [0, 1, 2, 3]]
    assert again == [1]


def test_infinite_products_are_neighbours_as_well(with_faiss):
    bank = torch.tensor([[-1e30, 0.0], [1e30, 0.0], [1.0, 0.0]])
    assert nearest(bank, torch.tensor([[1e30, 0.0]]), 3)[1].tolist() == [[1, 2, 0]]


def test_faiss_is_used_where_it_pays_and_exists(with_faiss, monkeypatch):
    rows = torch.ones(2, 2)
    faiss = faiss_for(rows, rows.half(), multiplications=8)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        faiss_for(rows, multiplications=8)
        assert faiss.omp_get_max_threads() == threads
    assert faiss_for(rows, rows.double(), multiplications=8) is None
    assert faiss_for(rows, rows.to("meta"), multiplications=8) is None
    monkeypatch.setattr(neighbors, "WORTHWHILE", 9)
    assert faiss_for(rows, multiplications=8) is None
    assert faiss_for(rows, multiplications=9) is faiss
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    assert faiss_for(rows, multiplications=9) is None
    assert nearest(rows, rows, 1)[1].tolist() == [[0], [0]]


def test_votes_after_a_search_by_faiss(with_faiss):
    data = case(dtype=torch.float32)
    expected = by_loops(*(x.double() if x.is_floating_point() else x for x in data), [1, 10, 60], 0.1)
    found = knn_top(*data, [1, 10, 60], 0.1)
    assert same(found, expected, {k: rounding(*data[:3], k, 0.1) for k in (1, 10, 60)})


def test_of_equal_votes_the_smaller_class_wins():
    bank = torch.ones(4, 1)
    data = (bank, torch.tensor([8, 3, 3, 8]), torch.ones(2, 1), torch.tensor([3, 8]))
    assert knn_top(*data, [4], 0.1) == {4: (0.5, 1.0)}
    # a query whose class has no vote: 1, 2, 3 and 4 have none either and come before 5, which is the sixth
    data = (bank, torch.tensor([0, 0, 0, 0]), torch.ones(5, 1), torch.tensor([1, 2, 3, 4, 5]))
    assert knn_top(*data, [4], 0.1) == {4: (0.0, 0.8)}


def test_with_three_classes_all_are_among_five():
    data = case(classes=3)
    found = knn_top(*data, [1, 20], 0.1)
    assert found == by_loops(*data, [1, 20], 0.1)
    assert 0 < found[20][0] < found[20][1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_a_low_temperature(dtype):
    """exp(1 / 0.05) is 5e8, far beyond float16's 65504; infinite votes would all tie."""
    data = case(dtype=dtype)
    expected = by_loops(*data, [5, 60], 0.05)  # of the rounded features
    assert same(knn_top(*data, [5, 60], 0.05), expected, {k: rounding(*data[:3], k, 0.05) for k in (5, 60)})
    nearest_alone = pytest.approx(knn_top(*data, [1], 0.1)[1][0], abs=rounding(*data[:3], 1, 0.1))
    assert knn_top(*data, [60], 1e-4)[60][0] == nearest_alone  # and no NaN
    full = by_loops(*(x.double() if x.is_floating_point() else x for x in case()), [5, 60], 0.05)
    assert expected[5][0] == pytest.approx(full[5][0], abs=0.1)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_products_of_half_precision_are_not_rounded_to_it(dtypes):
    """1 and 1 + 1/4096 are one number in float16, and the earlier row would win."""
    bank = torch.tensor([[1.0, 0.0], [1.0, 2.0**-12]]).to(dtypes[0])
    data = (bank, torch.tensor([0, 1]), torch.ones(1, 2).to(dtypes[1]), torch.tensor([1]))
    assert knn_top(*data, [1], 0.1)[1][0] == 1


def test_large_similarities_and_labels_far_apart_cost_nothing():
    bank, bank_labels, queries, query_labels = case()
    expected = knn_top(bank, bank_labels, queries, query_labels, [5], 0.1)
    far = (bank_labels * 10**12, query_labels * 10**12)
    assert knn_top(bank * 1e6, far[0], queries * 1e6, far[1], [5], 0.1 * 1e12) == expected


def test_numpy_arrays_are_taken_as_well():
    data = case()
    assert knn_top(*(np.asarray(x) for x in data), [5], 0.1) == knn_top(*data, [5], 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [61]}, "ks is .61.: expected numbers from 1 to 60, the size of the bank"),
        ({"ks": [0]}, "1 to 60"),
        ({"ks": []}, "1 to 60"),
        ({"tau": 0.0}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"queries": torch.ones(40, 5)}, r"queries .*\(40, 5\), beside a bank of shape \(60, 6\)"),
        ({"queries": torch.ones(0, 6), "query_labels": torch.ones(0, dtype=torch.long)}, "at least one row"),
        ({"bank_labels": torch.ones(59, dtype=torch.long)}, "60 integers"),
        ({"query_labels": torch.full((40,), -1)}, "40 integers >= 0"),
        ({"query_labels": torch.ones(40)}, "40 integers"),
        ({"bank": torch.full((60, 6), math.nan)}, "bank contain .* expected finite"),
        ({"queries": torch.full((40, 6), -math.inf)}, "queries contain .* expected finite"),
        ({"bank": torch.ones(60, 6, dtype=torch.long)}, "floating-point"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    names = ("bank", "bank_labels", "queries", "query_labels")
    usual = {**dict(zip(names, case(), strict=True)), "ks": [5], "tau": 0.1}
    with pytest.raises(ValueError, match=message):
        knn_top(**{**usual, **change})


def test_rows_are_brought_to_unit_length():
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(unit_rows(features.clone(), torch.float32), expected)
    half = unit_rows(features.clone(), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, atol=0.01)

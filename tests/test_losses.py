import math

import pytest
import torch

from src.losses import (
    IGNORED,
    assigned_cross_entropy,
    self_classifier,
    self_classifier_definition,
    self_classifier_terms,
    self_classifier_v1,
    swapped_prediction,
)


def wave(C, offset, V, N):
    """The logits of the fact sheet: z_v[n, c] = sin(1 + 0.7 n + 1.3 c + 2.1 v + offset)."""
    v, n, c = torch.meshgrid(*(torch.arange(size).double() for size in (V, N, C)), indexing="ij")
    return torch.sin(1 + 0.7 * n + 1.3 * c + 2.1 * v + offset).requires_grad_()


def by_loops(logits, row_tau, col_tau, eps=1e-12, num_global=2):
    """The equation, one pair of views and one sum at a time."""
    terms = []
    for views in logits:
        N, C = views[0].shape
        for i, a in enumerate(views):
            for j, b in enumerate(views):
                if i == j or (i >= num_global and j >= num_global):
                    continue
                total = 0.0
                column = [sum(math.exp(a[m, y] / col_tau) for m in range(N)) for y in range(C)]
                row = [sum(math.exp(b[n, y] / row_tau) for y in range(C)) for n in range(N)]
                mass = [sum(math.exp(b[n, y] / row_tau) / row[n] for n in range(N)) for y in range(C)]
                for n in range(N):
                    p_x_given_y = [math.exp(a[n, y] / col_tau) / column[y] for y in range(C)]
                    for y in range(C):
                        target = p_x_given_y[y] / max(sum(p_x_given_y), eps)
                        prediction = N / C * math.exp(b[n, y] / row_tau) / row[n] / max(mass[y], eps)
                        total -= target * math.log(prediction + eps)
                terms.append(total / N)
    return sum(terms) / len(terms)


# case: classifiers (C, offset), V, N, row_tau, col_tau, eps, loss and gradient norms in float64
SHEET = [
    ([(4, 0)], 2, 6, 0.1, 0.05, 1e-12, 11.1211610700, [13.30151999]),
    ([(4, 0)], 4, 6, 0.1, 0.05, 1e-12, 8.9597304352, [3.06582157]),
    ([(4, 0), (10, 0.5)], 4, 6, 0.1, 0.05, 1e-12, 9.8755743755, [1.53291079, 0.96897441]),
    ([(4, 0)], 2, 6, 1.0, 1.0, 1e-12, 1.7624113238, [0.20971921]),
    ([(4, 0), (10, 0.5)], 8, 16, 0.1, 0.05, 1e-12, 9.8920283040, [0.54713132, 0.48563674]),
    ([(4, 0)], 2, 6, 0.1, 0.1, 1e-8, 11.2130313975, [7.56137548]),
]


@pytest.mark.parametrize(("classifiers", "V", "N", "row_tau", "col_tau", "eps", "loss", "norms"), SHEET)
def test_loss_and_gradient_of_the_fact_sheet(classifiers, V, N, row_tau, col_tau, eps, loss, norms):
    logits = [wave(C, offset, V, N) for C, offset in classifiers]
    value = self_classifier(logits, row_tau, col_tau, eps)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    assert [z.grad.norm().item() for z in logits] == pytest.approx(norms, abs=1e-7)
    assert self_classifier([z.float() for z in logits], row_tau, col_tau, eps).item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_loss_equals_loops_over_the_equation(num_global):
    torch.manual_seed(0)
    logits = [list(torch.randn(4, 5, C, dtype=torch.double)) for C in (3, 7)]
    expected = by_loops(logits, 0.3, 0.2, num_global=num_global)
    assert self_classifier(logits, 0.3, 0.2, num_global=num_global).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_the_slope():
    torch.manual_seed(0)
    z = torch.randn(3, 5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: self_classifier([x], 0.5, 0.4), z)


def by_autograd(z, row_tau, col_tau, eps, num_global):
    """The equation in whole tensors, of one classifier; z is (V, N, C)."""
    V, N, C = z.shape
    p_x_given_y, p_y_given_x = (z / col_tau).softmax(dim=1), (z / row_tau).softmax(dim=2)
    targets = p_x_given_y / p_x_given_y.sum(dim=2, keepdim=True).clamp(min=eps)
    predictions = N / C * p_y_given_x / p_y_given_x.sum(dim=1, keepdim=True).clamp(min=eps)
    pairs = [(i, j) for i in range(V) for j in range(V) if i != j and min(i, j) < num_global]
    losses = [-(targets[i] * (predictions[j] + eps).log()).sum(dim=1).mean() for i, j in pairs]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_gradient_where_the_guards_act(num_global):
    """With an eps that is reached, a clamped sum is a constant, and the logarithm is that of q + eps."""
    row_tau, col_tau, eps = 0.5, 0.4, 0.2
    z = 3 * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    clamped = (z / col_tau).softmax(dim=1).sum(dim=2) < eps, (z / row_tau).softmax(dim=2).sum(dim=1) < eps
    assert all(0 < sums.sum() < sums.numel() for sums in clamped)
    values, gradients = [], []
    for loss in (self_classifier, lambda logits, **options: by_autograd(logits[0], **options)):
        leaf = z.clone().requires_grad_()
        value = loss([leaf], row_tau=row_tau, col_tau=col_tau, eps=eps, num_global=num_global)
        value.backward()
        values.append(value)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_collapse_costs_log_c():
    row = torch.rand(7).double() / 5
    assert self_classifier([row.expand(2, 20, 7)], 0.1, 0.05).item() == pytest.approx(math.log(7), abs=1e-9)


def test_confident_consistent_balanced_costs_nothing():
    z = 10 * torch.eye(5).double().repeat(4, 1)
    assert self_classifier([torch.stack([z, z])], 0.1, 0.05).item() == pytest.approx(0, abs=1e-9)


def test_confident_with_shares_q_costs_their_divergence_from_uniform():
    counts = [8, 4, 2, 2]
    z = 10 * torch.eye(4).double().repeat_interleave(torch.tensor(counts), dim=0)
    expected = sum(c / 16 * math.log(4 * c / 16) for c in counts)
    assert self_classifier([torch.stack([z, z])], 0.1, 0.05).item() == pytest.approx(expected, abs=1e-9)


def test_unused_classes_are_expensive():
    z = torch.zeros(21, 7).double()
    z[:12, 0] = z[12:, 1] = 100
    assert self_classifier([torch.stack([z, z])], 0.1, 0.05).item() == pytest.approx(20.12485695, rel=1e-6)


def test_names_of_classes_and_order_of_images_do_not_matter():
    torch.manual_seed(0)
    z = torch.randn(4, 12, 6).double()
    expected = self_classifier([z], 0.1, 0.05).item()
    assert self_classifier([z[..., torch.randperm(6)]], 0.1, 0.05).item() == pytest.approx(expected, rel=1e-10)
    assert self_classifier([z[:, torch.randperm(12)]], 0.1, 0.05).item() == pytest.approx(expected, rel=1e-10)
    assert self_classifier([z[[1, 0, 3, 2]]], 0.1, 0.05).item() == pytest.approx(expected, rel=1e-10)


def test_terms_are_the_losses_of_each_classifier_alone():
    torch.manual_seed(0)
    logits = [torch.randn(3, 8, C).double() for C in (4, 9)]
    alone = [self_classifier([z], 0.2, 0.1).item() for z in logits]
    assert self_classifier_terms(logits, row_tau=0.2, col_tau=0.1, eps=1e-12, num_global=2).tolist() == pytest.approx(
        alone, rel=1e-10
    )


def test_half_precision_is_raised():
    z = torch.randn(2, 16, 8)
    value = self_classifier([z.bfloat16()], 0.1, 0.05)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(self_classifier([z.bfloat16().float()], 0.1, 0.05).item(), rel=1e-6)


@pytest.mark.parametrize(("row_tau", "col_tau"), [(0, 0.1), (0.1, -1)])
def test_temperatures_must_be_positive(row_tau, col_tau):
    with pytest.raises(ValueError, match="positive"):
        self_classifier([torch.zeros(2, 4, 3)], row_tau, col_tau)


def test_one_view_is_not_enough():
    with pytest.raises(ValueError, match="two views"):
        self_classifier([torch.zeros(1, 4, 3)], 0.1, 0.05)


# ---- losses of given codes and clusters -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_cross_entropies_by_hand(temperature):
    """Two prototypes whose scores differ by m: ln(1 + exp(-m / temperature)) for the better one."""

    def cost(margin):
        return math.log(1 + math.exp(-margin / temperature))

    scores = torch.tensor([[0.3, 0.1], [0.1, 0.5], [0.2, 0.2]], dtype=torch.double)
    codes = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5]], dtype=torch.double)
    expected = (cost(0.2) + 0.75 * cost(-0.4) + 0.25 * cost(0.4) + cost(0)) / 3
    assert swapped_prediction(scores, codes, temperature).item() == pytest.approx(expected, rel=1e-12)

    views = torch.stack([scores, scores[[1, 2, 0]]])
    labels = torch.tensor([0, 1, IGNORED])
    expected = (cost(0.2) + cost(0.4) + cost(-0.4) + cost(0)) / 4
    assert assigned_cross_entropy(views, labels, temperature).item() == pytest.approx(expected, rel=1e-12)
    assert assigned_cross_entropy(views, torch.full((3,), IGNORED), temperature).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropies_raise_half_precision(dtype):
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, labels = torch.full((4, 5), 0.2), torch.tensor([0, 4, 2, IGNORED])
    half, full = (swapped_prediction(z, codes, 0.1) for z in (scores[0], scores[0].float()))
    assert torch.equal(half, full)
    half, full = (assigned_cross_entropy(z, labels, 0.1) for z in (scores, scores.float()))
    assert torch.equal(half, full)


def test_mean_over_ranks_of_the_cluster_loss_is_that_of_the_joined_batch(monkeypatch):
    """Two ranks, played one after the other, with three and one images that have a cluster."""
    scores = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    labels = torch.tensor([0, 4, 2, IGNORED, IGNORED, IGNORED, 3, IGNORED])
    joined = assigned_cross_entropy(scores, labels, 0.3)
    counts = [3, 1]
    monkeypatch.setattr("src.losses.world_size", lambda: 2)
    losses = []
    for rank, rows in enumerate((slice(0, 4), slice(4, 8))):

        def sum_over_ranks(mine, rank=rank):
            assert mine == counts[rank]
            return mine + counts[1 - rank]

        monkeypatch.setattr("src.losses.sum_over_ranks", sum_over_ranks)
        losses.append(assigned_cross_entropy(scores[:, rows], labels[rows], 0.3))
    torch.testing.assert_close(sum(losses) / 2, joined)


def test_gradients_are_the_slopes():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 3, generator=generator, dtype=torch.double, requires_grad=True)
    codes = torch.rand(4, 3, generator=generator, dtype=torch.double)
    labels = torch.tensor([2, IGNORED, 0, 1])
    assert torch.autograd.gradcheck(lambda x: swapped_prediction(x[0], codes, 0.5), z)
    assert torch.autograd.gradcheck(lambda x: assigned_cross_entropy(x, labels, 0.5), z)
    assert torch.autograd.gradcheck(lambda x: self_classifier_v1([x], 0.5, normalize_targets=True), z)


# ---- the authors' numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(10))
def test_authors_loss_and_gradient(golden, case):
    """Their float64 numbers. Float32 sums may be taken in any order: 1e-5 of the loss, 2e-4 of the largest gradient."""
    case = f"case{case:02}"
    data = golden("self_classifier_loss.npz", f"{case}_loss64")
    settings = [float(data[f"{case}_{name}"]) for name in ("row_tau", "col_tau", "eps")]
    K = len(data[f"{case}_classes"])
    scale = max(np_max(data[f"{case}_grad64_{k}"]) for k in range(K))
    for dtype, value_rtol, grad_rtol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 2e-4)):
        logits = [torch.from_numpy(data[f"{case}_logits{k}"]).to(dtype).requires_grad_() for k in range(K)]
        loss = self_classifier(logits, *settings)
        loss.backward()
        assert loss.item() == pytest.approx(float(data[f"{case}_loss64"]), rel=value_rtol, abs=1e-9)
        for k, z in enumerate(logits):
            difference = np_max(z.grad.numpy() - data[f"{case}_grad64_{k}"])
            assert difference <= max(grad_rtol * scale, 5e-8), (k, dtype)


def np_max(array):
    return float(abs(array).max())


def test_authors_loss_over_ranks(golden, run_ranks, tmp_path):
    data = golden("self_classifier_loss.npz", "dist00_rank_loss64")
    cases = sorted({name.split("_")[0] for name in data.files if name.startswith("dist")})
    for W in sorted({int(data[f"{case}_world_size"]) for case in cases}):
        mine = [case for case in cases if int(data[f"{case}_world_size"]) == W]
        work = [
            {
                "logits": [torch.from_numpy(data[f"{case}_logits{k}"]) for k in range(len(data[f"{case}_classes"]))],
                "settings": [float(data[f"{case}_{name}"]) for name in ("row_tau", "col_tau", "eps")],
            }
            for case in mine
        ]
        torch.save(work, tmp_path / "work.pt")
        saved = run_ranks(
            W,
            """
            from src.losses import self_classifier
            results = []
            for work in torch.load(out / "work.pt"):
                logits = [z.chunk(distributed.world_size(), dim=1)[rank].double().requires_grad_() for z in work["logits"]]
                loss = self_classifier(logits, *work["settings"])
                loss.backward()
                results.append((loss.item(), [z.grad for z in logits]))
            torch.save(results, out / f"{rank}.pt")
            """,
        )
        for number, case in enumerate(mine):
            losses = [rank[number][0] for rank in saved]
            assert losses == pytest.approx(data[f"{case}_rank_loss64"].tolist(), rel=1e-9)
            assert sum(losses) / W == pytest.approx(float(data[f"{case}_whole_batch_loss64"]), rel=1e-9)
            for k in range(len(work[number]["logits"])):
                joined = torch.cat([rank[number][1][k] for rank in saved], dim=1).numpy()
                expected = data[f"{case}_grad64_{k}"]
                assert np_max(joined - expected) <= 1e-9 * max(np_max(expected), 1e-3)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.3])  # at 0.3, some of the sums are below eps
@pytest.mark.parametrize(("V", "num_global"), [(2, 2), (2, 1), (4, 2), (5, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("sizes", [(5,), (4, 9), (3, 6, 11)])
def test_value_and_gradient_equal_the_definition(sizes, V, num_global, eps):
    generator = torch.Generator().manual_seed(V + num_global)
    logits = [3 * torch.randn(V, 7, C, generator=generator, dtype=torch.double) for C in sizes]
    settings = {"row_tau": 0.3, "col_tau": 0.2, "eps": eps, "num_global": num_global}
    fast, plain = ([z.clone().requires_grad_() for z in logits] for _ in range(2))
    terms = self_classifier_terms(fast, **settings)
    expected = torch.stack([self_classifier_definition(z, **settings) for z in plain])
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1, len(sizes) + 1, dtype=torch.double)
    (terms @ weights).backward()
    (expected @ weights).backward()
    for own, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)
    if eps == 0.3:
        sums = torch.cat([(z / 0.3).softmax(dim=2).sum(dim=1).flatten() for z in logits])
        assert 0 < (sums < eps).sum() < len(sums)

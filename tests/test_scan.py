"""SCAN and self-labelling: losses, neighbours and the selection without labels, against values known by hand, loops, the
authors' numbers and ranks."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.losses import confident, confident_cross_entropy, scan
from src.selection import label_agreement, label_free_score, nearest_others


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_golden(data, name: str) -> Tensor:
    return torch.from_numpy(data[name]).double()


# ---- SCAN's loss ----------------------------------------------------------------------------------------------------


def scan_by_loops(anchors: Tensor, neighbors: Tensor, weight: float) -> tuple[float, float, float]:
    p, q = anchors.softmax(dim=1).tolist(), neighbors.softmax(dim=1).tolist()
    consistency = -sum(math.log(sum(a * b for a, b in zip(*pair, strict=True))) for pair in zip(p, q, strict=True))
    mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
    entropy = -sum(m * math.log(m) for m in mean)
    return consistency / len(p) - weight * entropy, consistency / len(p), entropy


def test_the_loss_equals_loops():
    anchors, neighbors = random(6, 4), random(6, 4, seed=1)
    found = [value.item() for value in scan(anchors, neighbors, 2.5)]
    assert found == pytest.approx(scan_by_loops(anchors, neighbors, 2.5), rel=1e-12)


def test_the_loss_by_hand():
    uniform = torch.zeros(5, 10).double()
    assert [value.item() for value in scan(uniform, uniform, 5.0)] == pytest.approx(
        [-4 * math.log(10), math.log(10), math.log(10)], rel=1e-12
    )
    certain = 1000 * torch.eye(10).double()  # every image has a class of its own, which its neighbour shares
    assert [value.item() for value in scan(certain, certain, 5.0)] == pytest.approx(
        [-5 * math.log(10), 0, math.log(10)], abs=1e-6
    )
    total, consistency, _ = scan(certain, certain.roll(1, 0), 5.0)  # no neighbour shares the class
    assert consistency.item() == 100
    assert total.item() == pytest.approx(100 - 5 * math.log(10), rel=1e-6)


def test_the_gradient_does_not_vanish_where_neighbours_disagree():
    logits = torch.tensor([[30.0, 0.0], [-30.0, 0.0]]).double().requires_grad_()
    _, consistency, _ = scan(logits, logits.flip(0).detach(), 5.0)
    (gradient,) = torch.autograd.grad(consistency, logits)
    assert gradient.abs().max() > 0.1


def test_half_precision_is_raised():
    z = random(4, 3).bfloat16()
    assert [a.item() for a in scan(z, z, 5.0)] == [a.item() for a in scan(z.float(), z.float(), 5.0)]
    assert confident_cross_entropy(z, z, 0.5, True) == confident_cross_entropy(z.float(), z.float(), 0.5, True)


def test_authors_loss_of_scan(golden):
    data = golden("scan.npz", "scan0_anchors")
    for i in range(int(data["num_scan"])):
        anchors, neighbors = (of_golden(data, f"scan{i}_{name}").requires_grad_() for name in ("anchors", "neighbors"))
        found = scan(anchors, neighbors, float(data[f"scan{i}_entropy_weight"]))
        assert [value.item() for value in found] == pytest.approx(data[f"scan{i}_values64"].tolist(), rel=1e-6)
        gradients = torch.autograd.grad(found[0], [anchors, neighbors])
        for name, gradient in zip(("anchors", "neighbors"), gradients, strict=True):
            torch.testing.assert_close(gradient, of_golden(data, f"scan{i}_grad_{name}"), rtol=1e-4, atol=1e-7)


# ---- self-labelling's loss ------------------------------------------------------------------------------------------


def confident_by_loops(weak: Tensor, strong: Tensor, threshold: float, balance: bool) -> float:
    losses: dict[int, list[float]] = {}
    for p, log_q in zip(weak.softmax(dim=1).tolist(), strong.log_softmax(dim=1).tolist(), strict=True):
        label = p.index(max(p))
        if max(p) > threshold:
            losses.setdefault(label, []).append(-log_q[label])
    if not losses:
        return 0.0
    groups = list(losses.values()) if balance else [[loss for group in losses.values() for loss in group]]
    return sum(sum(group) / len(group) for group in groups) / len(groups)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999999])
def test_self_labelling_equals_loops(balance, threshold):
    weak, strong = random(30, 4), random(30, 4, seed=1)
    found = confident_cross_entropy(weak, strong, threshold, balance).item()
    assert found == pytest.approx(confident_by_loops(weak, strong, threshold, balance), rel=1e-12)


def test_without_a_confident_image_loss_and_gradient_are_zero():
    weak, strong = random(5, 4, scale=0.1), random(5, 4).requires_grad_()
    loss = confident_cross_entropy(weak, strong, 0.99, True)
    (gradient,) = torch.autograd.grad(loss, strong)
    assert (loss.item(), gradient.abs().max().item()) == (0, 0)


def test_an_image_at_the_threshold_does_not_count():
    half = torch.tensor([[0.0, 0.0]]).double()
    assert not confident(half, 0.5)[1]
    assert confident(half, 0.49)[1]


def test_the_weak_view_gets_no_gradient():
    weak, strong = random(5, 4).requires_grad_(), random(5, 4).requires_grad_()
    confident_cross_entropy(weak, strong, 0.3, True).backward()
    assert weak.grad is None
    assert strong.grad is not None


def test_authors_loss_of_self_labelling(golden):
    data = golden("scan.npz", "selflabel0_weak")
    for i in range(int(data["num_selflabel"])):
        case = f"selflabel{i}"
        weak, strong = of_golden(data, f"{case}_weak"), of_golden(data, f"{case}_strong").requires_grad_()
        threshold, balance = float(data[f"{case}_threshold"]), bool(data[f"{case}_balance"])
        assert confident(weak, threshold)[1].tolist() == data[f"{case}_confident"].tolist()
        loss = confident_cross_entropy(weak, strong, threshold, balance)
        assert loss.item() == pytest.approx(float(data[f"{case}_loss64"]), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, strong)
        torch.testing.assert_close(gradient, of_golden(data, f"{case}_grad_strong"), rtol=1e-4, atol=1e-7)


def test_two_ranks_equal_one(run_ranks, tmp_path):
    """The mean of the ranks' losses and of their gradients is that of the joined batch, also if one rank has no label."""
    weak, strong = random(8, 4), random(8, 4, seed=1)
    weak[4:] = 0.0  # the second rank has no confident image
    torch.save((weak, strong), tmp_path / "logits.pt")
    code = """
        from src.losses import confident_cross_entropy, scan
        weak, strong = (z[4 * rank : 4 * rank + 4] for z in torch.load(out / "logits.pt"))
        found = []
        for loss in (lambda z: scan(z, weak, 5.0)[0], lambda z: confident_cross_entropy(weak, z, 0.9, True)):
            z = strong.clone().requires_grad_()
            value = loss(z)
            value.backward()
            found.append((value.detach(), z.grad))
        torch.save(found, out / f"{rank}.pt")
    """
    states = run_ranks(2, code)
    for i, loss in enumerate((lambda z: scan(z, weak, 5.0)[0], lambda z: confident_cross_entropy(weak, z, 0.9, True))):
        z = strong.clone().requires_grad_()
        expected = loss(z)
        expected.backward()
        assert sum(state[i][0] for state in states).item() / 2 == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(torch.cat([state[i][1] for state in states]) / 2, z.grad)


# ---- neighbours and selection ---------------------------------------------------------------------------------------


def test_neighbours_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.3], [0.1, 1.0], [2.0, 0.0]]).double()
    assert nearest_others(rows, 2).tolist() == [[0, 4, 2], [1, 3, 2], [2, 0, 4], [3, 1, 2], [4, 0, 2]]
    copies = torch.ones(5, 3).double()
    assert nearest_others(copies, 2).tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1], [4, 0, 1]]


def test_authors_neighbours(golden):
    data = golden("scan.npz", "mining0_features")
    for i in range(int(data["num_mining"])):
        features, labels = of_golden(data, f"mining{i}_features"), torch.from_numpy(data[f"mining{i}_labels"])
        found = nearest_others(features, int(data[f"mining{i}_topk"]))
        expected = data[f"mining{i}_indices"].tolist()
        assert [set(row) for row in found.tolist()] == [set(row) for row in expected]
        assert found[:, 0].tolist() == list(range(len(features)))
        assert label_agreement(labels, found) == pytest.approx(float(data[f"mining{i}_accuracy"]), rel=1e-6)


def test_two_ranks_find_the_neighbours_of_one(run_ranks, tmp_path):
    torch.save(random(37, 5), tmp_path / "rows.pt")
    code = """
        from src.selection import nearest_others
        torch.save(nearest_others(torch.load(out / "rows.pt"), 4), out / f"{rank}.pt")
    """
    for found in run_ranks(2, code):
        assert torch.equal(found, nearest_others(random(37, 5), 4))


def test_agreement_counts_known_labels_alone():
    neighbors = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    assert label_agreement(torch.tensor([0, 0, 1]), neighbors) == pytest.approx(2 / 6)
    assert label_agreement(torch.tensor([0, 0, -1]), neighbors) == 1
    assert label_agreement(torch.tensor([0, -1, -1]), neighbors) is None


def test_the_selection_by_hand():
    certain = torch.eye(4).double().repeat(2, 1)  # images 0 and 4 share a class, and so on
    itself_and_twin = torch.tensor([[i, (i + 4) % 8] for i in range(8)])
    assert label_free_score(certain, itself_and_twin) == pytest.approx((-math.log(4), 0, math.log(4)), abs=1e-6)
    uniform = torch.full((8, 4), 0.25).double()
    assert label_free_score(uniform, itself_and_twin) == pytest.approx((0, math.log(4), math.log(4)), abs=1e-9)


def test_authors_selection(golden):
    data = golden("scan.npz", "hungarian0_neighbors")
    for i in range(int(data["num_hungarian"])):
        case = f"hungarian{i}"
        neighbors = torch.from_numpy(data[f"{case}_neighbors"])
        for head, name in enumerate(("other_probabilities", "probabilities")):
            found = label_free_score(of_golden(data, f"{case}_{name}"), neighbors)
            expected = [data[f"{case}_scan_{part}"][head] for part in ("total", "consistency", "entropy")]
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_neighbours_have_unit_length_whatever_the_rows_are():
    rows = random(20, 3)
    assert torch.equal(nearest_others(rows, 3), nearest_others(normalize(rows, dim=1), 3))

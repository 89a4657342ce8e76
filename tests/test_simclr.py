"""SimCLR's loss: values known by hand, a loop over the equation, the authors' numbers, and ranks."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from src.losses import nt_xent


def by_loops(embeddings, temperature, anchors):
    """The equation, one pair of views at a time."""
    rows = [row for view in embeddings.tolist() for row in view]
    B, losses = len(embeddings[0]), []
    for i in range(2 * B if anchors == "both" else B):
        products = [sum(a * b for a, b in zip(rows[i], row, strict=True)) / temperature for row in rows]
        total = sum(math.exp(product) for k, product in enumerate(products) if k != i)
        losses.append(-math.log(math.exp(products[(i + B) % (2 * B)]) / total))
    return sum(losses) / len(losses)


def unit(*shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return normalize(rows, dim=-1)


@pytest.mark.parametrize("anchors", ["both", "one"])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_loss_equals_loops(anchors, temperature):
    embeddings = unit(2, 5, 3)
    found = nt_xent(embeddings, temperature, anchors)
    assert found.item() == pytest.approx(by_loops(embeddings, temperature, anchors), rel=1e-12)


@pytest.mark.parametrize("anchors", ["both", "one"])
def test_loss_by_hand(anchors):
    equal = torch.tensor([[[1.0, 0.0]] * 4] * 2).double()
    assert nt_xent(equal, 0.5, anchors).item() == pytest.approx(math.log(7), rel=1e-12)
    # two images in orthogonal directions: the positive has the product 1, the two negatives have 0
    apart = torch.eye(2).double().expand(2, 2, 2)
    assert nt_xent(apart, 0.5, anchors).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-12)
    assert nt_xent(apart[:, :1], 0.5, anchors).item() == 0  # one image has no negatives


def test_anchors_differ():
    embeddings = unit(2, 5, 3)
    one, both = (nt_xent(embeddings, 0.5, anchors).item() for anchors in ("one", "both"))
    other = nt_xent(embeddings.flip(0), 0.5, "one").item()
    assert one != pytest.approx(other, rel=1e-3)
    assert both == pytest.approx((one + other) / 2, rel=1e-12)


def test_half_precision_is_raised():
    embeddings = unit(2, 6, 4).bfloat16()
    assert torch.equal(nt_xent(embeddings, 0.1), nt_xent(embeddings.float(), 0.1))


@pytest.mark.parametrize(("shape", "temperature", "message"), [((2, 3, 4), 0, "positive"), ((3, 3, 4), 1, "two views")])
def test_wrong_arguments_are_refused(shape, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.zeros(shape), temperature)


def test_authors_loss(golden):
    data = golden("scan.npz", "simclr0_features")
    cases = sorted({name.split("_")[0] for name in data.files if name.startswith("simclr")})
    assert cases
    for case in cases:
        embeddings = torch.from_numpy(data[f"{case}_features"]).double().transpose(0, 1).requires_grad_()
        loss = nt_xent(embeddings, float(data[f"{case}_temperature"]), "one")
        assert loss.item() == pytest.approx(float(data[f"{case}_loss64"]), rel=1e-6)  # features are float32
        (gradient,) = torch.autograd.grad(loss, embeddings)
        torch.testing.assert_close(
            gradient.transpose(0, 1), torch.from_numpy(data[f"{case}_grad"]).double(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("anchors", ["both", "one"])
def test_two_ranks_equal_one(run_ranks, tmp_path, anchors):
    embeddings = unit(2, 6, 4).requires_grad_()
    torch.save(embeddings.detach(), tmp_path / "embeddings.pt")
    loss = nt_xent(embeddings, 0.3, anchors)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    saved = run_ranks(
        2,
        f"""
        from src.losses import nt_xent
        mine = torch.load(out / "embeddings.pt").chunk(2, dim=1)[rank].clone().requires_grad_()
        loss = nt_xent(mine, 0.3, {anchors!r})
        (gradient,) = torch.autograd.grad(loss, mine)
        torch.save((loss.item(), gradient), out / f"{{rank}}.pt")
        """,
    )
    assert sum(value for value, _ in saved) / 2 == pytest.approx(loss.item(), rel=1e-12)
    averaged = torch.cat([part for _, part in saved], dim=1) / 2  # as DistributedDataParallel does
    torch.testing.assert_close(averaged, gradient, rtol=1e-10, atol=1e-12)

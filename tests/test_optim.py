import math

import numpy as np
import pytest
import torch
from torch import nn

from src.errors import InputError
from src.models.heads import WeightNormClassifier
from src.optim import LARS, build_optimizer, clip_gradients, freeze, parameter_groups, warmup_cosine


def test_trace_of_the_fact_sheet():
    w = torch.tensor([3.0, 4.0], dtype=torch.double, requires_grad=True)
    b = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = LARS([w, b], lr=4.8, momentum=0.9, weight_decay=0.01)
    for expected_w, expected_b in [
        ((2.977844710653, 4.005626740152), (-0.048, -0.096)),
        ((2.935793363818, 4.016306447284), (-0.091409294567, -0.182818589134)),
        ((2.875917458175, 4.031513026495), (-0.130842928041, -0.261685856082)),
    ]:
        w.grad, b.grad = torch.tensor([0.6, -0.2]).double(), torch.tensor([0.01, 0.02]).double()
        optimizer.step()
        assert w.tolist() == pytest.approx(expected_w, abs=1e-7)
        assert b.tolist() == pytest.approx(expected_b, abs=1e-7)


def test_authors_traces(golden):
    data = golden("optim.npz", "larc0_config")
    compared = 0
    for case in range(3):  # the fourth is with clipping, which LARS does not have
        lr, momentum, decay, trust, clip = data[f"larc{case}_config"]
        assert not clip
        keys = [f"larc{case}_param{j}" for j in range(int(data["num_larc_tensors"]))]
        params = [torch.tensor(data[key + "_initial"], requires_grad=True) for key in keys]
        optimizer = LARS(params, lr, momentum, decay, trust)
        for step in range(5):
            for key, param in zip(keys, params, strict=True):
                grad = torch.tensor(data[key + "_grads"][step])
                param.grad = None if grad.isnan().any() else grad
            optimizer.step()
            for key, param in zip(keys, params, strict=True):
                np.testing.assert_allclose(param.detach(), data[key + "_after"][step], atol=1e-12, rtol=0)
                compared += 1
    assert compared == 3 * 5 * 7


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lars_is_its_rule_number_by_number(momentum, decay):
    """A tensor that starts at zero, one whose gradient is zero once, one without a gradient once, and a second group."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(size, generator=generator, dtype=torch.double) for size in (3, 2, 4, 3)]
    starts[1] = torch.zeros(2).double()
    params = [start.clone().requires_grad_() for start in starts]
    values, buffers, decays = [start.tolist() for start in starts], [None] * 4, [decay] * 3 + [decay + 0.1]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": decay + 0.1}]
    optimizer = LARS(groups, 0.7, momentum, decay, trust_coefficient=0.05)
    for step in range(4):
        for j, (param, start) in enumerate(zip(params, starts, strict=True)):
            grad = torch.randn(start.shape, generator=generator, dtype=torch.double)
            param.grad = None if (step, j) == (1, 2) else 0 * grad if (step, j) == (2, 0) else grad
            if param.grad is None:
                continue
            g = param.grad.tolist()
            norm, grad_norm = math.hypot(*values[j]), math.hypot(*g)
            if norm > 0 and grad_norm > 0:
                ratio = 0.05 * norm / (grad_norm + decays[j] * norm + 1e-8)
                g = [ratio * (a + decays[j] * w) for a, w in zip(g, values[j], strict=True)]
            buffers[j] = [momentum * b + a for b, a in zip(buffers[j] or [0.0] * len(g), g, strict=True)]
            values[j] = [w - 0.7 * b for w, b in zip(values[j], buffers[j], strict=True)]
        optimizer.step()
        for param, value in zip(params, values, strict=True):
            assert param.tolist() == pytest.approx(value, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_built_optimisers_take_their_rate_momentum_and_decay(name):
    """Two steps of one weight by hand."""
    w = torch.tensor([2.0], dtype=torch.double, requires_grad=True)
    optimizer = build_optimizer(name, [{"params": [w], "weight_decay": 0.5}], lr=0.1, momentum=0.8)
    value, buffer = 2.0, 0.0
    for step in range(2):
        w.grad = torch.tensor([3.0], dtype=torch.double)
        optimizer.step()
        if name == "lars":
            buffer = 0.8 * buffer + 0.001 * value / (3 + 0.5 * value + 1e-8) * (3 + 0.5 * value)
            value -= 0.1 * buffer
        elif name == "sgd":
            buffer = 0.8 * buffer + 3 + 0.5 * value
            value -= 0.1 * buffer
        else:  # Adam's steps of a constant gradient are of length lr
            value = value * (1 - 0.1 * 0.5) - 0.1
        assert w.item() == pytest.approx(value, rel=1e-7), step


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (
            (4.8, 0.0048, 0.3, 10, 100, 313),
            {0: 0.3, 1: 0.3014381592, 3129: 4.8, 3130: 4.8, 3131: 4.799999985, 17215: 2.4024, 31299: 0.00480001491},
        ),
        ((3.2, 0.0032, 0.2, 10, 800, 313), {0: 0.2, 3129: 3.2, 126765: 1.6016, 250399: 0.003200000129}),
    ],
)
def test_schedule_of_the_fact_sheet(settings, values):
    names = ("warmup_start", "warmup_epochs", "epochs", "steps_per_epoch")
    lr = warmup_cosine(*settings[:2], **dict(zip(names, settings[2:], strict=True)))
    assert {step: lr(step) for step in values} == pytest.approx(values, rel=1e-8)


@pytest.mark.parametrize("case", ["sc0", "sc1", "sc2", "sc3", "sc4", "swav0", "swav1", "swav2"])
def test_authors_schedules(golden, case):
    """Of Self-Classifier and of SwAV."""
    data = golden("optim.npz", f"{case}_config")
    base, final, epochs, steps, warmup, start = data[f"{case}_config"]
    lr = warmup_cosine(
        base,
        base if np.isnan(final) else final,
        warmup_start=start,
        warmup_epochs=int(warmup),
        epochs=int(epochs),
        steps_per_epoch=int(steps),
    )
    expected = data[f"{case}_lr"].ravel()
    assert len(expected) == epochs * steps
    np.testing.assert_allclose([lr(step) for step in range(len(expected))], expected, atol=1e-12, rtol=0)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.projection_head = nn.Linear(4, 2)
        self.classifiers = nn.ModuleList([WeightNormClassifier(2, 5)])


def grouped(**settings) -> dict[str, float]:
    method = Small()
    groups = parameter_groups(method, 0.1, **settings)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    return {name: decay[id(p)] for name, p in method.named_parameters() if id(p) in decay}


def test_every_parameter_decays_alike_by_default():
    assert set(grouped().values()) == {0.1}
    assert len(parameter_groups(Small(), 0.1)) == 1


def test_no_decay_on_vectors_goes_before_the_backbones_own():
    assert grouped(bias_decay=False, backbone_decay=0.3) == {
        "backbone.0.weight": 0.3,
        "backbone.0.bias": 0.0,
        "backbone.1.weight": 0.0,
        "backbone.1.bias": 0.0,
        "projection_head.weight": 0.1,
        "projection_head.bias": 0.0,
        "classifiers.0.weight_g": 0.1,  # C × 1
        "classifiers.0.weight_v": 0.1,
    }


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_groups_reach_the_optimiser(name):
    optimizer = build_optimizer(name, parameter_groups(Small(), 0.1, bias_decay=False), lr=0.5, momentum=0.8)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    assert name == "adamw" or all(group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_frozen_parts_are_named_by_how_they_begin():
    method = Small()
    freeze(method, ("backbone.0", "classifiers.0.weight_g"))
    frozen = [name for name, p in method.named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.0.weight", "backbone.0.bias", "classifiers.0.weight_g"]
    assert not set(frozen) & grouped_names(method)
    with pytest.raises(InputError, match=r"--freeze back: no parameter has .*; expected .* backbone, projection_head"):
        freeze(method, ("back",))
    with pytest.raises(InputError, match="no parameter is left"):
        freeze(method, ("backbone", "projection_head", "classifiers"))


def grouped_names(method) -> set[str]:
    ids = {id(p) for group in parameter_groups(method, 0.1) for p in group["params"]}
    return {name for name, p in method.named_parameters() if id(p) in ids}


def test_schedule_by_hand():
    """Three steps of warm-up with both ends, then a cosine over six; no warm-up; a warm-up of one step."""
    lr = warmup_cosine(2.0, 0.5, warmup_start=0.4, warmup_epochs=1, epochs=3, steps_per_epoch=3)
    cosine = [0.5 + 0.75 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [lr(step) for step in range(9)] == pytest.approx([0.4, 1.2, 2.0, *cosine], rel=1e-12)
    lr = warmup_cosine(2.0, 0.5, warmup_start=0.4, warmup_epochs=0, epochs=2, steps_per_epoch=3)
    assert (lr(0), lr(3)) == pytest.approx((2.0, 1.25))
    lr = warmup_cosine(2.0, 0.5, warmup_start=0.4, warmup_epochs=1, epochs=3, steps_per_epoch=1)
    assert [lr(step) for step in range(3)] == pytest.approx([0.4, 2.0, 1.25])


def test_gradients_are_clipped_one_by_one():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, c], lr=1.0)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    clip_gradients(optimizer, 1.0)
    assert a.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert b.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-6)
    assert c.grad is None

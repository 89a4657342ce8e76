import numpy as np
import pytest
import torch

from src.optim import LARS, warmup_cosine


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
    data = golden("optim.npz")
    compared = 0
    for case in range(int(data["num_larc"])):
        lr, momentum, decay, trust, clip = data[f"larc{case}_config"]
        if clip:
            continue
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
    assert compared


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
    lr = warmup_cosine(*settings)
    assert {step: lr(step) for step in values} == pytest.approx(values, rel=1e-8)


def test_authors_schedules(golden):
    data = golden("optim.npz")
    for case in range(int(data["num_sc"])):
        base, final, epochs, steps, warmup, start = data[f"sc{case}_config"]
        lr = warmup_cosine(base, base if np.isnan(final) else final, start, int(warmup), int(epochs), int(steps))
        expected = data[f"sc{case}_lr"].ravel()
        np.testing.assert_allclose([lr(step) for step in range(len(expected))], expected, atol=1e-12, rtol=0)

"""The count of floating-point operations: values known by hand, one count per kind of step, and runs that go on."""

import pytest
import torch
from test_trainer import StopAfter, make_trainer, quiet
from torch import nn

from src.flops import OperationCounter
from src.stopping import Interrupted


def product(rows):
    return torch.ones(rows, 3) @ torch.ones(3, 5)


def test_a_product_counts_two_operations_per_multiplication():
    counter = OperationCounter()
    assert counter.run(product, 7).shape == (7, 5)
    assert counter.total == counter.epoch == 2 * 7 * 3 * 5


def test_forward_and_backward_of_a_layer_count():
    counter, layer = OperationCounter(), nn.Linear(4, 6)
    images = torch.ones(5, 4, requires_grad=True)
    counter.run(lambda: layer(images).sum().backward())
    assert counter.total == 3 * 2 * 5 * 4 * 6  # forward, gradient of the images, gradient of the weights


def test_only_the_first_of_equal_steps_is_counted(monkeypatch):
    counter, counted = OperationCounter(), []
    real = torch.utils.flop_counter.FlopCounterMode
    monkeypatch.setattr("src.flops.FlopCounterMode", lambda **how: counted.append(1) or real(**how))
    for rows, like in ((7, "a"), (7, "a"), (2, "b"), (7, "a"), (7, None), (7, None)):
        counter.run(product, rows, like=like)
    assert len(counted) == 4  # a, b, and twice without a name
    assert counter.total == 30 * (5 * 7 + 2)
    assert counter.end_epoch() == counter.total
    assert (counter.epoch, counter.total) == (0, 30 * 37)
    counter.run(product, 1, like="a")  # a new epoch counts again
    assert (counter.epoch, counter.total) == (30, 30 * 38)


def test_different_functions_with_equal_inputs_count_separately():
    counter = OperationCounter()
    counter.run(product, 7, like="a")
    counter.run(sum, [1, 2], like="a")
    assert counter.total == 2 * 7 * 3 * 5


def test_a_run_that_goes_on_has_the_same_count():
    straight, first = make_trainer(), make_trainer()
    for trainer in (straight, first):
        summary = trainer.train_epoch(quiet())
        assert summary["pflop"] == summary["total_pflop"] > 0
    second = make_trainer()
    second.load_state_dict(first.state_dict())
    expected, found = (trainer.train_epoch(quiet()) for trainer in (straight, second))
    assert found["total_pflop"] == expected["total_pflop"] > expected["pflop"] > 0
    assert found["pflop"] == expected["pflop"]


def test_a_checkpoint_without_a_count_starts_at_zero():
    first, second = make_trainer(), make_trainer()
    first.train_epoch(quiet())
    state = first.state_dict()
    del state["operations"]
    second.load_state_dict(state)
    assert second.operations.total == 0


def test_a_run_stopped_within_an_epoch_has_the_same_count():
    """The queue is full from the third step on, which takes more operations than the step that was counted."""
    straight, first, second = make_trainer(), make_trainer(), make_trainer()
    expected = straight.train_epoch(quiet())
    first.stop_request = StopAfter(first, 3)
    with pytest.raises(Interrupted):
        first.train_epoch(quiet())
    second.load_state_dict(first.state_dict())
    assert second.train_epoch(quiet())["pflop"] == expected["pflop"]

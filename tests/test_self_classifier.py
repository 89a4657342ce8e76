"""The method as a whole: how its parts are wired. What every method must do is in test_methods.py."""

import math

import pytest
import torch
from torch import nn

from src.data.loaders import Batch
from src.errors import InputError
from src.methods.self_classifier import Config, SelfClassifier
from src.trainer import TrainingStep


class Flat(nn.Module):
    """A backbone small enough to reason about: one linear layer on pixels."""

    def __init__(self, pixels=12, width=6):
        super().__init__()
        self.linear, self.width = nn.Linear(pixels, width), width

    def forward(self, images):
        return self.linear(images.flatten(1)[:, :12])


def small(**changes) -> SelfClassifier:
    torch.manual_seed(0)
    settings = {"classes": (3, 5), "dim": 4, "hidden_dim": 8, "queue_length": 8, **changes}
    return SelfClassifier(Flat(), Config(**settings))


def step_of(method, batch):
    """Return the step that the trainer would see."""
    return TrainingStep(method)(batch)


def batch(size=4, views=3, first=0, sides=(2, 2, 3)):
    torch.manual_seed(first + 1)
    return Batch(
        [torch.randn(size, 3, sides[v % 3], sides[v % 3]) for v in range(views)], torch.arange(first, first + size)
    )


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("bn", [True, False])
def test_embeddings_have_unit_length_whatever_the_head(layers, bn):
    method = small(head_layers=layers, head_bn=bn, dim=6, activation="relu")
    assert method.embed(torch.randn(5, 3, 2, 2)).norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)
    assert sum(isinstance(m, nn.Linear) for m in method.projection_head.modules()) == layers
    assert sum(isinstance(m, nn.BatchNorm1d) for m in method.projection_head.modules()) == (
        max(layers - 1, 0) if bn else 0
    )


def test_logits_start_as_cosines_and_follow_the_gain():
    method = small().double().eval()
    z = method.predict(torch.randn(50, 3, 2, 2).double())
    assert [tuple(logits.shape) for logits in z] == [(50, 3), (50, 5)]
    assert max(logits.abs().max() for logits in z) <= 1 + 1e-12
    images = torch.randn(5, 3, 2, 2).double()
    before = method.predict(images)[0]
    method.classifiers[0].weight_g.data.fill_(3)
    torch.testing.assert_close(method.predict(images)[0], 3 * before, rtol=1e-10, atol=1e-12)


def test_fixed_classifiers_get_no_gradient():
    method = small(fixed_classifiers=True)
    step_of(method, batch()).loss.backward()
    assert all(p.grad is None for p in method.classifiers.parameters())
    assert method.backbone.linear.weight.grad.abs().sum() > 0


def test_view_0_is_replaced_by_another_image_once_the_queue_is_full():
    method = small()
    assert step_of(method, batch(first=0)).neighbors is None
    assert step_of(method, batch(first=4)).neighbors is None  # full only now: the look-up precedes the push
    step = step_of(method, batch(first=0))
    assert step.neighbors.shape == (4,)
    assert not set(zip(range(4), step.neighbors.tolist(), strict=True)) & {(i, i) for i in range(4)}
    only_watching = small(use_neighbors=False)
    for first in (0, 4):
        step_of(only_watching, batch(first=first))
    assert step_of(only_watching, batch(first=0)).neighbors.tolist() == step.neighbors.tolist()
    assert step_of(only_watching, batch(first=0)).loss != step.loss


def test_replaced_view_gives_the_backbone_no_gradient():
    # head batch norm mixes the views, so exactly zero only without it
    plain = small(head_bn=False)
    for first in (0, 4):
        step_of(plain, batch(first=first))
    views = [view.requires_grad_() for view in batch(first=0).views]
    step_of(plain, Batch(views, torch.arange(4))).loss.backward()
    assert views[0].grad is None or views[0].grad.abs().max() == 0
    assert views[1].grad.abs().max() > 0


def test_chosen_classifier_has_the_lowest_loss_among_those_of_equal_size():
    method = small(classes=(3, 3, 5, 3))
    averages = {"terms": torch.tensor([0.9, 0.4, 0.1, 0.6])}
    for k, size in enumerate((3, 3, 5, 3)):
        averages[f"share_{k}"] = averages[f"prediction_{k}"] = torch.full((size,), 1 / size)
    averages["share_1"] = torch.tensor([0.5, 0.5, 0.0])
    summary = method.summarize(averages)
    assert summary["classifier"] == 1
    assert summary["used_1"] == 2
    assert summary["entropy_2"] == pytest.approx(math.log(5), rel=1e-5)


def test_occupancy_counts_what_view_1_predicts():
    scores = torch.tensor([[9.0, 1, 0], [0, 9, 1], [0, 1, 9], [9, 0, 1], [9, 1, 0]])
    numbers = small(classes=(3,)).occupancy([torch.stack([-scores, scores, -scores])])
    assert numbers["share_0"].tolist() == pytest.approx([0.6, 0.2, 0.2], rel=1e-5)
    expected = [(scores / 0.1).softmax(dim=1)[:, c].mean().item() for c in range(3)]
    assert numbers["prediction_0"].tolist() == pytest.approx(expected, rel=1e-4)


def test_collapse_is_said_in_one_sentence():
    method = small(classes=(10,))
    at_log_c = [{"classifier": 0, "loss_0": math.log(10), "used_0": 10}] * 5
    dying = [{"classifier": 0, "loss_0": 8.0, "used_0": 4}] * 5
    healthy = [{"classifier": 0, "loss_0": 0.5, "used_0": 10}] * 5
    assert "collapsed" in method.diagnose(at_log_c)
    assert "4 of 10 clusters" in method.diagnose(dying)
    assert method.diagnose(healthy) is None
    assert method.diagnose(at_log_c[:4]) is None


@pytest.mark.parametrize(
    "wrong",
    [{"row_tau": 0}, {"col_tau": -0.1}, {"classes": (1,)}, {"queue_length": 1}, {"head_layers": -1}, {"eps": 0.0}],
)
def test_nonsense_is_refused_naming_the_flag(wrong):
    with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
        Config(**wrong)


@pytest.mark.parametrize("length", [3, 50])
def test_queue_must_hold_a_batch_and_not_more_than_the_data(length):
    with pytest.raises(InputError, match=f"--queue-length {length}"):
        SelfClassifier.check_data(Config(queue_length=length), batch_size=4, num_images=40, num_views=2)


def test_no_layer_needs_the_backbones_width():
    with pytest.raises(InputError, match="--dim 6"):
        small(head_layers=0, dim=5)

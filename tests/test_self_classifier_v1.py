"""The first generation: its loss by the fact sheet and by loops, its frozen classifiers, and the method as a whole."""

import math

import pytest
import torch
from torch import nn

from src.data.loaders import Batch
from src.errors import InputError
from src.losses import self_classifier_v1, self_classifier_v1_terms
from src.methods.self_classifier_v1 import Config, SelfClassifierV1
from src.models.heads import CosineClassifier
from src.trainer import TrainingStep

# ---- loss -----------------------------------------------------------------------------------------------------------


def wave(C=4, V=2, N=6):
    """The logits of the fact sheet, section 1.3, with offset 0."""
    v, n, c = torch.meshgrid(*(torch.arange(size).double() for size in (V, N, C)), indexing="ij")
    return torch.sin(1 + 0.7 * n + 1.3 * c + 2.1 * v)


def by_loops(logits, tau, normalize_targets, eps=1e-12):
    """The equation, one direction, image and class at a time."""
    terms = []
    for a, b in [(views[i], views[1 - i]) for views in logits for i in (0, 1)]:  # a is the target, b predicts
        N, C = a.shape
        column = [sum(math.exp(a[m, y] / tau) for m in range(N)) for y in range(C)]
        total = 0.0
        for n in range(N):
            target = [math.exp(a[n, y] / tau) / column[y] for y in range(C)]
            weight = max(sum(target), eps) if normalize_targets else 1.0
            row = sum(math.exp(b[n, y] / tau) for y in range(C))
            total -= sum(target[y] / weight * math.log(math.exp(b[n, y] / tau) / row) for y in range(C))
        terms.append(total / N)
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("normalize_targets", "loss"), [(False, 9.1205025), (True, 12.5725346)])
def test_loss_of_the_fact_sheet(normalize_targets, loss):
    value = self_classifier_v1([wave()], 0.1, normalize_targets=normalize_targets).item()
    assert value == pytest.approx(loss, abs=2e-6)  # printed from the authors' float32, whose numbers lie 1e-6 apart
    assert value == pytest.approx(by_loops([wave()], 0.1, normalize_targets), rel=1e-12)
    in_float32 = self_classifier_v1([wave().float()], 0.1, normalize_targets=normalize_targets).item()
    assert in_float32 == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("normalize_targets", "loss"), [(False, 7 / 20 * math.log(7)), (True, math.log(7))])
def test_collapse_costs_what_the_fact_sheet_says(normalize_targets, loss):
    value = self_classifier_v1([torch.zeros(2, 20, 7).double()], 0.1, normalize_targets=normalize_targets).item()
    assert value == pytest.approx(loss, abs=1e-12)
    assert value == pytest.approx({False: 0.6810686, True: 1.9459101}[normalize_targets], abs=5e-8)


@pytest.mark.parametrize("normalize_targets", [False, True])
def test_loss_equals_loops_over_the_equation(normalize_targets):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 5, 4, dtype=torch.double)
    assert self_classifier_v1(logits, 0.3, normalize_targets=normalize_targets).item() == pytest.approx(
        by_loops(logits, 0.3, normalize_targets), abs=1e-12
    )


@pytest.mark.parametrize("normalize_targets", [False, True])
@pytest.mark.parametrize("group", [0, 3])
def test_gradient_is_the_slope(normalize_targets, group):
    torch.manual_seed(0)
    z = torch.randn(2, 2, 6, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: self_classifier_v1(x, 0.5, normalize_targets=normalize_targets, group=group), z
    )


def test_groups_are_batches_of_their_own():
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 12, 5).double()
    alone = [
        self_classifier_v1_terms(logits[:, :, first : first + 4], 0.2, normalize_targets=False, group=0)
        for first in (0, 4, 8)
    ]
    whole, of_4, of_12 = (
        self_classifier_v1_terms(logits, 0.2, normalize_targets=False, group=group) for group in (0, 4, 12)
    )
    assert torch.allclose(of_4, torch.stack(alone).mean(dim=0))
    assert torch.allclose(of_12, whole)
    assert not torch.allclose(of_4, whole)


def test_half_precision_is_raised():
    logits = torch.randn(2, 2, 8, 5).half()
    loss = self_classifier_v1(logits, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == self_classifier_v1(logits.float(), 0.1).item()


def test_views_may_be_swapped_and_classes_renamed():
    z = wave()
    loss = self_classifier_v1([z], 0.1, normalize_targets=True).item()
    assert self_classifier_v1([z.flip(0)], 0.1, normalize_targets=True).item() == pytest.approx(loss, rel=1e-12)
    assert self_classifier_v1([z[:, :, [2, 0, 3, 1]]], 0.1, normalize_targets=True).item() == pytest.approx(
        loss, rel=1e-12
    )


@pytest.mark.parametrize(
    ("logits", "settings", "message"),
    [
        (torch.zeros(1, 2, 6, 3), {"tau": 0}, "tau=0"),
        (torch.zeros(1, 3, 6, 3), {"tau": 0.1}, "3 views: expected two"),
        (torch.zeros(1, 2, 6, 3), {"tau": 0.1, "group": 4}, "group=4 does not divide the 6 rows"),
    ],
)
def test_loss_refuses_what_it_is_not_defined_for(logits, settings, message):
    with pytest.raises(ValueError, match=message):
        self_classifier_v1(logits, **settings)


# ---- classifiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 8), (8, 8), (20, 8)])
def test_classifiers_start_orthonormal_and_give_cosines(num_classes, dim):
    torch.manual_seed(0)
    classifier = CosineClassifier(dim, num_classes)
    weight = classifier.weight.detach().double()
    gram = weight @ weight.T if num_classes <= dim else weight.T @ weight
    assert torch.allclose(gram, torch.eye(min(num_classes, dim)).double(), atol=1e-5)
    x = nn.functional.normalize(torch.randn(30, dim), dim=1)
    expected = nn.functional.cosine_similarity(x[:, None], classifier.weight[None], dim=-1)
    assert torch.allclose(classifier(x), expected, atol=1e-5)
    assert not torch.equal(classifier.weight, CosineClassifier(dim, num_classes).weight)


# ---- method ---------------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """A backbone small enough to reason about: one linear layer on pixels."""

    def __init__(self, pixels=12, width=6):
        super().__init__()
        self.linear, self.width = nn.Linear(pixels, width), width

    def forward(self, images):
        return self.linear(images.flatten(1))


def small(**changes) -> SelfClassifierV1:
    torch.manual_seed(0)
    settings = {"num_classifiers": 3, "num_classes": 5, "dim": 4, "hidden_dim": 8, "softmax_group": 0, **changes}
    return SelfClassifierV1(Flat(), Config(**settings))


def batch(size=8):
    torch.manual_seed(1)
    return Batch([torch.randn(size, 3, 2, 2) for _ in range(2)], torch.arange(size))


@pytest.mark.parametrize("learnable", [False, True])
def test_classifiers_stay_as_they_start_unless_learnable(learnable):
    method = small(learnable=learnable)
    before = [classifier.weight.clone() for classifier in method.classifiers]
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5, weight_decay=0.1)
    backbone = method.backbone.linear.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        TrainingStep(method)(batch()).loss.backward()
        optimizer.step()
    moved = [not torch.equal(a, c.weight) for a, c in zip(before, method.classifiers, strict=True)]
    assert moved == [learnable] * 3
    assert not torch.equal(backbone, method.backbone.linear.weight)


@pytest.mark.parametrize("layers", [0, 2, 3, 4])
def test_the_head_is_the_authors(layers):
    """Their files hold the head as a flat sequence: hidden layer h at 3h with its normalisation behind it, the last at 3·layers."""
    method = small(head_layers=layers, dim=6 if layers == 0 else 4)
    names = {name for name in method.projection_head.state_dict() if name.endswith("weight")}
    hidden = max(layers - 1, 0)
    expected = {f"mlp.{3 * h + i}.weight" for h in range(hidden) for i in (0, 1)}
    assert names == expected | ({f"mlp.{3 * hidden}.weight"} if layers else set())
    assert method.embed(torch.randn(5, 3, 2, 2)).norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)
    activations = [m for m in method.projection_head.modules() if isinstance(m, nn.LeakyReLU)]
    assert len(activations) == hidden


def test_even_tiny_features_get_unit_length():
    head = small(head_layers=0, dim=6).projection_head
    assert head(1e-9 * torch.randn(5, 6)).norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_the_head_starts_as_linear_layers_do():
    weight = small(hidden_dim=400, head_layers=3).projection_head.mlp[3].weight
    assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(400), rel=0.01)


def test_a_step_is_the_loss_of_the_two_views_one_after_the_other():
    method, twin = (small(normalize_targets=True, tau=0.2).double() for _ in range(2))
    images = Batch([view.double() for view in batch().views], batch().indices)
    # batch statistics are those of a view alone
    embeddings = [twin.projection_head(twin.backbone(view)) for view in images.views]
    logits = [[e @ nn.functional.normalize(c.weight, dim=1).T for e in embeddings] for c in twin.classifiers]
    step = TrainingStep(method)(images)
    assert step.loss.item() == pytest.approx(self_classifier_v1(logits, 0.2, normalize_targets=True).item(), rel=1e-10)
    assert step.numbers["terms"].shape == (3,)
    same = [(a.argmax(1) == b.argmax(1)).float().mean().item() for a, b in logits]
    assert step.numbers["agreement"].tolist() == pytest.approx(same, rel=1e-5)


def test_named_is_the_classifier_with_the_lowest_loss():
    method = small()
    averages = {"terms": torch.tensor([0.9, 0.4, 0.6]), "agreement": torch.tensor([0.1, 0.7, 0.2])}
    for k in range(3):
        averages[f"share_{k}"] = averages[f"prediction_{k}"] = torch.full((5,), 0.2)
    summary = method.summarize(averages)
    assert (summary["classifier"], summary["agreement"]) == (1, pytest.approx(0.7))
    assert "classifier 1 (chosen)" in method.report(summary)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"normalize_targets": True}, math.log(5)),
        ({"normalize_targets": False}, 5 / 8 * math.log(5)),
        ({"normalize_targets": False, "softmax_group": 4}, 5 / 4 * math.log(5)),
    ],
)
def test_collapse_is_recognised_by_its_price(settings, loss):
    method = small(**settings)
    for parameter in method.projection_head.parameters():
        nn.init.zeros_(parameter)  # every embedding is zero, every prediction uniform
    assert TrainingStep(method)(batch(8)).loss.item() == pytest.approx(loss, rel=1e-5)
    assert "collapsed" in method.diagnose([{"classifier": 0, "loss_0": loss, "used_0": 5}] * 5)
    assert method.diagnose([{"classifier": 0, "loss_0": 0.8 * loss, "used_0": 5}] * 5) is None


@pytest.mark.parametrize(
    "wrong", [{"tau": 0}, {"num_classes": 1}, {"num_classifiers": 0}, {"softmax_group": 1}, {"head_layers": -1}]
)
def test_nonsense_is_refused_naming_the_flag(wrong):
    with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
        Config(**wrong)


def test_views_and_groups_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="--local-crops-number make 4"):
        SelfClassifierV1.check_data(Config(softmax_group=0), batch_size=64, num_images=1000, num_views=4)
    with pytest.raises(InputError, match="--softmax-group 48 does not divide the 64 images per rank"):
        SelfClassifierV1.check_data(Config(softmax_group=48), batch_size=64, num_images=1000, num_views=2)
    with pytest.raises(InputError, match="--dim 6"):
        small(head_layers=0)
    SelfClassifierV1.check_data(Config(softmax_group=32), batch_size=64, num_images=1000, num_views=2)


RANKS = """
    from src.methods.self_classifier_v1 import Config, SelfClassifierV1
    from src.data.loaders import Batch
    from src.models.backbones import SmallConvNet
    from src.trainer import TrainingStep
    results = []
    for group, normalize_targets in ((0, False), (0, True), (4, False)):
        torch.manual_seed(0)
        config = Config(num_classifiers=3, num_classes=6, dim=8, hidden_dim=16, tau=0.2, softmax_group=group,
                        normalize_targets=normalize_targets, learnable=True)
        method = SelfClassifierV1(SmallConvNet(3), config).double()
        wrapped = distributed.parallel(TrainingStep(method), torch.device("cpu"))
        torch.manual_seed(1)
        whole = [torch.randn(16, 3, 12, 12).double() for _ in range(2)]
        part = lambda x: x.chunk(distributed.world_size())[rank]
        step = wrapped(Batch([part(view) for view in whole], part(torch.arange(16))))
        step.loss.backward()
        gradients = {name: p.grad for name, p in method.named_parameters()}
        results.append((distributed.mean_over_ranks(step.loss), gradients, method.group))
    torch.save(results, out / f"{rank}.pt")
"""


def test_column_softmaxes_over_ranks_and_over_groups_are_those_of_one_process(run_ranks):
    """One step in float64, with every kind of target and learnable classifiers."""
    (one,) = run_ranks(1, RANKS)
    for rank, two in enumerate(run_ranks(2, RANKS)):
        for (loss, gradients, group), (loss_, gradients_, group_) in zip(one, two, strict=True):
            assert loss_.item() == pytest.approx(loss.item(), rel=1e-9), rank
            assert group_ == group
            scale = max(gradient.norm() for gradient in gradients.values())
            for name in gradients:
                assert (gradients_[name] - gradients[name]).norm() <= 1e-9 * scale, name

"""What saves memory must not change what is learned: parts of a batch, blocks run twice, groups of ranks."""

import copy

import pytest
import torch
from torch import nn

from src.data.datasets import MemoryImages, open_data
from src.data.digits import DigitRecipe, DigitViews
from src.data.loaders import TrainLoader
from src.logs import Progress
from src.methods.self_classifier import Config, SelfClassifier
from src.models.backbones import build_backbone
from src.models.memory import checkpoint_activations, statistics_kept
from src.optim import build_optimizer, parameter_groups
from src.trainer import Trainer, TrainingStep

CPU = torch.device("cpu")


class GroupNormNet(nn.Module):
    """A backbone in which no image sees another."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.LayerNorm(72)),
        )
        self.width = 72

    def forward(self, images):
        return self.layers(images)


def make_trainer(accumulate=1, batch_norm=False, autocast=None, double=False, lr=0.02, **changes):
    torch.manual_seed(0)
    knobs = {"classes": (6, 10), "dim": 8, "hidden_dim": 16, "queue_length": 48, "head_bn": batch_norm, **changes}
    backbone = build_backbone("small_convnet", 1) if batch_norm else GroupNormNet()
    method = SelfClassifier(backbone, Config(**knobs))
    with torch.no_grad():  # embeddings of a good length, so that the first step does not collapse this small network
        for weight in (p for p in method.projection_head.parameters() if p.dim() == 2):
            weight *= 10
    method = method.double() if double else method
    digits = open_data("digits", "train")
    data = MemoryImages(digits.images[:96], digits.labels[:96], digits.classes)
    views = DigitViews([DigitRecipe()] * 2 + [DigitRecipe(size=6)])
    if double:
        views = AsDouble(views)
    loader = TrainLoader(data, views, batch_size=24, seed=0, device=CPU)
    optimizer = build_optimizer("sgd", parameter_groups(method, 1e-4), lr=lr, momentum=0.9)
    how = {"loader": loader, "device": CPU, "labels": data.labels, "autocast": autocast, "accumulate": accumulate}
    return Trainer(method, optimizer, lambda step: lr, **how)


class AsDouble:
    def __init__(self, views):
        self.views = views

    def __call__(self, images, indices, **which):
        return [view.double() for view in self.views(images, indices, **which)]


def train(trainer, epochs=3):
    return [trainer.train_epoch(Progress(1, 0, enabled=False)) for _ in range(epochs)]


@pytest.mark.parametrize("parts", [3, 8])  # two: test_methods.py, for every method
def test_parts_of_a_batch_learn_what_the_whole_batch_does(parts):
    """Twelve steps, of which the last ten replace a view by its neighbour."""
    whole, accumulated = make_trainer(double=True), make_trainer(parts, double=True)
    expected, found = train(whole), train(accumulated)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-7)
    for name, value in whole.method.state_dict().items():
        assert torch.allclose(accumulated.method.state_dict()[name], value, rtol=1e-6, atol=1e-7), name


def test_in_float32_parts_agree_to_one_in_ten_thousand():
    whole, accumulated = make_trainer(), make_trainer(4)
    for trainer in (whole, accumulated):
        batch = next(iter(trainer.loader.epoch(0)))
        trainer.method.train()
        step, backward = trainer._forward(batch)
        backward()
        trainer.seen = step.loss.item()
    assert accumulated.seen == pytest.approx(whole.seen, rel=1e-4)
    for (name, a), b in zip(whole.method.named_parameters(), accumulated.method.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * max(a.grad.abs().max(), 1e-3), name


def test_the_mean_over_the_parts_losses_would_be_another_objective():
    """Why this is not done the usual way."""
    trainer = make_trainer()
    batch = next(iter(trainer.loader.epoch(0)))
    whole = trainer.forward(batch).loss
    rows = [slice(first, first + 4) for first in range(0, 24, 4)]
    parts = [type(batch)([view[part] for view in batch.views], batch.indices[part]) for part in rows]
    assert abs(sum(trainer.forward(part).loss for part in parts) / len(parts) - whole) > 0.02 * whole


def test_batch_statistics_count_each_part_once():
    trainer = make_trainer(3, batch_norm=True)
    train(trainer, 1)
    counted = trainer.method.backbone.layers[0][1].num_batches_tracked
    assert counted == 4 * 3 * 2  # steps, parts, sizes of views


def test_statistics_kept_still_normalises_by_the_batch():
    norm = nn.BatchNorm1d(3).train()
    rows = torch.randn(20, 3) * 4 + 1
    expected = norm(rows)
    before = copy.deepcopy(norm.state_dict())
    with statistics_kept(norm):
        assert torch.equal(norm(rows), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(rows)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize(("arch", "blocks"), [("resnet18", 8), ("cifar_resnet18", 9), ("vit_tiny", 12)])
def test_blocks_run_again_give_the_same_gradients_and_statistics(arch, blocks):
    torch.manual_seed(0)
    plain = build_backbone(arch, 3, image_size=32)
    again = copy.deepcopy(plain)
    assert checkpoint_activations(again) == blocks
    images = torch.randn(4, 3, 32, 32)
    for backbone in (plain, again):
        backbone.train()
        backbone(images).square().mean().backward()
    assert list(plain.state_dict()) == list(again.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value), name
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


def test_blocks_run_again_remember_less():
    backbone = build_backbone("cifar_resnet18", 3)
    images = torch.randn(8, 3, 32, 32)

    def remembered():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            backbone(images)
        return sum(kept)

    before = remembered()
    checkpoint_activations(backbone)
    assert remembered() < before / 3


def test_without_batch_norm_the_replaced_view_is_embedded_without_a_graph():
    trainer = make_trainer(double=True)
    batches = list(trainer.loader.epoch(0))
    assert trainer.method.idle_views() == 0
    for batch in batches[:2]:
        trainer.forward(batch)
    assert trainer.method.queue.full
    embeddings = trainer.method.embed_views(batches[2].views, trainer.method.idle_views())
    assert [view.requires_grad for view in embeddings] == [False, True, True]

    # and no gradient is lost: the same step with a graph everywhere
    step = copy.deepcopy(trainer.method).train()
    step._couples_images = True
    gradients = []
    for method in (step, trainer.method):
        TrainingStep(method)(batches[2]).loss.backward()
        gradients.append([p.grad for p in method.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_with_batch_norm_the_replaced_view_keeps_its_graph():
    trainer = make_trainer(batch_norm=True)
    for batch in list(trainer.loader.epoch(0))[:2]:
        trainer.forward(batch)
    assert trainer.method.queue.full
    assert trainer.method.idle_views() == 0


def test_float16_scales_the_loss_and_saves_the_scale():
    trainer = make_trainer(autocast=torch.float16)
    losses = [summary["loss"] for summary in train(trainer, 2)]
    full = [summary["loss"] for summary in train(make_trainer(), 2)]
    assert losses == pytest.approx(full, rel=0.05)
    state = trainer.state_dict()
    assert state["scaler"]["scale"] == 2.0**14
    state["scaler"]["scale"] = 8.0
    other = make_trainer(autocast=torch.float16)
    other.load_state_dict(state)
    assert other.scaler.get_scale() == 8.0


RANKS = """
from src.methods.self_classifier import Config, SelfClassifier
from src.models.backbones import build_backbone
from src.data.loaders import Batch
from src.trainer import TrainingStep
def setup(size=24):
    torch.manual_seed(0)
    config = Config(classes=(6, 10), dim=8, hidden_dim=16, queue_length=24)
    method = SelfClassifier(build_backbone("small_convnet", 1), config).double()
    torch.manual_seed(1)
    views = [torch.randn(size, 1, 8, 8), torch.randn(size, 1, 8, 8), torch.randn(size, 1, 6, 6)]
    views = [view.double() for view in views]
    return method, views
"""


def test_groups_of_ranks_share_their_batch_statistics_and_no_others(run_ranks):
    code = (
        RANKS
        + """
method, views = setup()
wrapped = distributed.parallel(TrainingStep(method), torch.device("cpu"), 2)
mine = slice(rank * 6, rank * 6 + 6)
step = wrapped(Batch([v[mine] for v in views], torch.arange(24)[mine]))
step.loss.backward()
norm = method.backbone.layers[0][1]
first = method.backbone.layers[0][0].weight.grad
torch.save([norm.running_mean.clone(), step.loss.detach(), first], out / f"{rank}.pt")
"""
    )
    found = run_ranks(4, code)
    means = [state[0] for state in found]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[2], means[3])
    assert not torch.allclose(means[0], means[2], atol=1e-4)
    assert all(torch.equal(state[2], found[0][2]) for state in found)  # gradients are averaged over all ranks

    # one process on the two groups: batch norm in halves, the loss over everything
    namespace = {"torch": torch}
    exec(RANKS, namespace)
    method, views = namespace["setup"]()
    halves = [method.embed_views([v[rows] for v in views]) for rows in (slice(12), slice(12, 24))]
    step = method.objective([torch.cat(view) for view in zip(*halves, strict=True)], torch.arange(24))
    step.loss.backward()
    assert torch.stack([state[1] for state in found]).mean() == pytest.approx(step.loss.item(), rel=1e-10)
    expected = method.backbone.layers[0][0].weight.grad
    assert (found[0][2] - expected).abs().max() < 1e-10 * expected.abs().max()


def test_accumulation_over_two_ranks_is_one_process(run_ranks):
    code = (
        RANKS
        + """
from test_memory import make_trainer, train
trainer = make_trainer(2, double=True)
train(trainer, 2)
torch.save(trainer.method.state_dict(), out / f"{rank}.pt")
"""
    )
    states = run_ranks(2, code)
    trainer = make_trainer(double=True)
    train(trainer, 2)
    for name, value in trainer.method.state_dict().items():
        assert torch.allclose(states[0][name], value, rtol=1e-6, atol=1e-7), name
        assert torch.equal(states[0][name], states[1][name]), name

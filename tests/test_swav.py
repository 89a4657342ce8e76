"""SwAV, DeepCluster-v2 and SeLa-v2: the authors' numbers, and what must hold of each method alone."""

import math

import pytest
import torch
from torch import nn

from src.data.loaders import Batch
from src.data.training import TrainingData
from src.errors import InputError
from src.losses import IGNORED, assigned_cross_entropy, swapped_prediction
from src.methods.deepcluster_v2 import Config as DeepClusterConfig
from src.methods.deepcluster_v2 import DeepClusterV2
from src.methods.sela_v2 import Config as SeLaConfig
from src.methods.sela_v2 import SeLaV2
from src.methods.swav import Config as SwAVConfig
from src.methods.swav import SwAV


class Flat(nn.Module):
    """A backbone whose features are the pixels; batch normalisation in the head is off in these tests."""

    width = 8

    def forward(self, images):
        return images.flatten(1)


def unit(*shape, seed=0):
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def swav(**knobs) -> SwAV:
    torch.manual_seed(0)
    return SwAV(Flat(), SwAVConfig(**{"dim": 8, "hidden_dim": 8, "head_bn": False, "prototypes": 12, **knobs}))


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_swapped_prediction_by_hand():
    codes = torch.tensor([[1.0, 0.0], [0.25, 0.75]]).double()
    scores = torch.tensor([[0.2, 0.0], [0.0, 0.0]]).double()
    first = math.log(1 + math.exp(-2))  # a margin of 0.2 at temperature 0.1
    expected = (first + math.log(2)) / 2
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(expected, rel=1e-5)
    assert swapped_prediction(torch.zeros(5, 30), torch.full((5, 30), 1 / 30), 0.1).item() == pytest.approx(
        math.log(30), rel=1e-5
    )


def test_authors_deepcluster_loss(golden):
    """In float64, so that only the rounding of their float32 is left."""
    numbers = golden("swav.npz", "dcv2_loss0_loss")
    for i in range(2):
        case = {name: numbers[f"dcv2_loss{i}_{name}"] for name in ("assignments", "idx", "tau", "crops", "loss")}
        labels = torch.from_numpy(case["assignments"])[:, torch.from_numpy(case["idx"])]
        scores = [
            torch.from_numpy(numbers[f"dcv2_loss{i}_scores{h}"]).double().requires_grad_() for h in range(len(labels))
        ]
        views = [z.unflatten(0, (int(case["crops"]), -1)) for z in scores]
        terms = [assigned_cross_entropy(z, y, float(case["tau"])) for z, y in zip(views, labels, strict=True)]
        loss = torch.stack(terms).mean()
        loss.backward()
        assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5)
        for h, z in enumerate(scores):
            expected = torch.from_numpy(numbers[f"dcv2_loss{i}_grad{h}"])
            assert (z.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_images_without_a_cluster_cost_nothing():
    scores = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([1, IGNORED, 4, IGNORED])
    kept = assigned_cross_entropy(scores[:, ::2], labels[::2], 0.1)
    assert assigned_cross_entropy(scores, labels, 0.1).item() == pytest.approx(kept.item(), rel=1e-5)
    assert assigned_cross_entropy(scores, torch.full((4,), IGNORED), 0.1).item() == 0


# ---- SwAV against the authors' training function --------------------------------------------------------------------


def test_authors_loss_of_given_scores_and_codes(golden):
    """Loss and gradient of the swapped predictions alone, without embeddings, Sinkhorn or a queue."""
    numbers = golden("swav.npz", "loss0_step0_scores")
    for i in (0, 1, 3):
        case = f"loss{i}_step0_"
        assigned, views = numbers[f"loss{i}_crops_for_assign"].tolist(), int(numbers[f"loss{i}_nmb_crops"].sum())
        scores = torch.from_numpy(numbers[f"{case}scores"]).double().requires_grad_()
        z, codes = scores.chunk(views), torch.from_numpy(numbers[f"{case}codes"]).double()
        tau = float(numbers[f"loss{i}_tau"])
        terms = [
            swapped_prediction(z[v], q, tau)
            for a, q in zip(assigned, codes, strict=True)
            for v in range(views)
            if v != a
        ]
        loss = torch.stack(terms).mean()
        loss.backward()
        assert loss.item() == pytest.approx(float(numbers[f"{case}loss64"]), rel=1e-5)  # of codes in float32
        expected = torch.from_numpy(numbers[f"{case}grad_scores"])
        assert (scores.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


TRAINED = ("nmb_crops", "crops_for_assign", "tau", "epsilon", "iterations", "queue_len", "steps", "frozen_steps")


def follow_authors(numbers, i: int, rank: int | None) -> int:
    """Compare every step of case i with ours; returns in how many the queue took part.

    Ours run in float64. `loss64` does as well, on prototypes that are not rounded; everything else of theirs is float32.
    """
    head = f"loss{i}_" + ("" if rank is None else f"rank{rank}_")
    case = {name: numbers[f"loss{i}_{name}"] for name in TRAINED}
    initial = numbers[f"loss{i}_prototypes_initial"]
    views = int(case["nmb_crops"].sum())
    method = swav(
        dim=initial.shape[1],
        prototypes=len(initial),
        temperature=float(case["tau"]),
        epsilon=float(case["epsilon"]),
        sinkhorn_iterations=int(case["iterations"]),
        assign_views=tuple(case["crops_for_assign"].tolist()),
        queue_length=int(case["queue_len"]),
        queue_start=0,
        freeze_prototypes=int(case["frozen_steps"]),
    ).double()
    method.prepare_epoch(0, None)
    weight, queued = method.classifiers[0].weight, 0
    for step in range(int(case["steps"])):
        found = {
            name.removeprefix(f"{head}step{step}_"): torch.from_numpy(numbers[name]).double()
            for name in numbers.files
            if name.startswith(f"{head}step{step}_")
        }
        weight.data.copy_(found["prototypes_used"])
        weight.grad = None
        embeddings = found["embeddings"].clone().requires_grad_()
        rows = list(embeddings.chunk(views))
        codes = []
        method._codes = lambda *given, keep=codes: keep.append(SwAV._codes(method, *given)) or keep[-1]
        queued += int(found["sinkhorn_columns"]) > len(rows[0])
        loss = method.objective(rows, torch.arange(len(rows[0]))).loss
        loss.backward()
        method.after_backward(step)
        torch.testing.assert_close(torch.stack(codes), found["codes"], rtol=1e-5, atol=1e-6)
        assert loss.item() == pytest.approx(found["loss64"].item(), rel=1e-6)
        assert (embeddings.grad - found["grad_embeddings"]).abs().max() <= 1e-5 * found["grad_embeddings"].abs().max()
        assert ("grad_prototypes" in found) == (weight.grad is not None)
        if weight.grad is not None:
            expected = found["grad_prototypes"]
            assert (weight.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
        if "queue_after" in found:  # theirs has the newest batch first
            for queue, after in zip(method.queues, found["queue_after"], strict=True):
                by_age = torch.cat([queue.embeddings[queue.pointer :], queue.embeddings[: queue.pointer]])
                batches = by_age.split(len(rows[0]))
                torch.testing.assert_close(torch.cat(batches[::-1]), after, rtol=0, atol=0)
    return queued


def test_authors_steps_with_and_without_a_queue(golden):
    numbers = golden("swav.npz", "loss0_tau")
    alone = [i for i in range(int(numbers["num_loss"])) if numbers[f"loss{i}_world_size"] == 1]
    queued = [follow_authors(numbers, i, None) for i in alone]
    assert len(alone) == 4
    assert sum(queued) >= 2


def test_authors_steps_on_two_ranks(golden, run_ranks):
    numbers = golden("swav.npz", "loss0_tau")
    (i,) = [i for i in range(int(numbers["num_loss"])) if numbers[f"loss{i}_world_size"] == 2]
    code = f"""
        sys.path.insert(0, "tests")
        import numpy as np
        from test_swav import follow_authors
        from conftest import find_golden
        torch.save(follow_authors(np.load(find_golden("swav.npz", "loss0_tau")), {i}, rank), out / f"{{rank}}.pt")
    """
    run_ranks(2, code)


# ---- SwAV -----------------------------------------------------------------------------------------------------------


def test_the_queue_starts_at_its_epoch_and_counts_once_it_is_full(monkeypatch):
    method = swav(queue_length=10, queue_start=1)
    seen = []
    monkeypatch.setattr("src.methods.swav.sinkhorn", lambda scores, *_: seen.append(len(scores)) or scores.softmax(1))
    for epoch in range(3):
        method.prepare_epoch(epoch, None)
        for step in range(2):
            method.objective(list(unit(2, 4, 8, seed=10 * epoch + step)), torch.arange(4))
    # two views a step: epoch 0 without a queue, 8 of its 10 rows written in epoch 1, 12 after the next step
    assert seen == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 14, 14]


def test_frozen_prototypes_keep_their_start_bit_for_bit():
    method = swav(freeze_prototypes=2)
    optimizer = torch.optim.SGD(method.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    start, moved = method.classifiers[0].weight.detach().clone(), []
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        method.objective(method.embed_views(list(unit(2, 6, 8, seed=step))), torch.arange(6)).loss.backward()
        method.after_backward(step)
        optimizer.step()
        moved.append(not torch.equal(method.classifiers[0].weight, start))
    assert moved == [False, False, True]
    method.after_step(None)
    torch.testing.assert_close(method.classifiers[0].weight.norm(dim=1), torch.ones(12), rtol=1e-5, atol=0)


def test_a_collapse_costs_the_logarithm_of_the_prototypes():
    method = swav(prototypes=30)
    same = unit(1, 8).expand(16, 8)
    codes = method._codes(0, same, method.scores([same])[0][0].detach())
    torch.testing.assert_close(codes, torch.full((16, 30), 1 / 30), rtol=1e-4, atol=1e-5)
    method.classifiers[0].weight.data.fill_(8**-0.5)
    assert method.objective([same, same, same], torch.arange(16)).loss.item() == pytest.approx(math.log(30), rel=1e-5)


# ---- DeepCluster-v2 and SeLa-v2 -------------------------------------------------------------------------------------


class Loader:
    """Batches of two views of given images, without randomness."""

    def __init__(self, images, batch, seed=0):
        self.data, self.batch, self.seed, self.device = images, batch, seed, torch.device("cpu")

    def epoch(self, epoch, *, start=0, apart=False):
        for indices in torch.arange(len(self.data)).split(self.batch)[start:]:
            if len(indices) == self.batch:
                yield Batch([self.data[indices], self.data[indices].roll(3, 1)], indices)


def clustered(per_cluster=20, clusters=4):
    centres = 3 * torch.eye(8, dtype=torch.float64)[:clusters]
    return (
        centres[:, None] + 0.1 * torch.randn(clusters, per_cluster, 8, generator=torch.Generator().manual_seed(3))
    ).flatten(0, 1)


def prepared(kind, config_kind, images, **knobs):
    torch.manual_seed(0)
    knobs = {"dim": 8, "hidden_dim": 8, "head_bn": False, "prototypes": (4, 3, 5), **knobs}
    method = kind(Flat(), config_kind(**knobs)).double()
    method.projection_head = nn.Sequential(nn.Identity())
    method.projection_head.forward = lambda x: nn.functional.normalize(x, dim=1)
    data = TrainingData(Loader(images, 16))
    method.prepare_run(data)
    method.prepare_epoch(0, data)
    return method, data


def test_the_first_epoch_clusters_what_one_pass_has_shown():
    images = clustered()[torch.randperm(80, generator=torch.Generator().manual_seed(1))][:70]
    method, _ = prepared(DeepClusterV2, DeepClusterConfig, images)
    clusters = method.bank.clusters
    assert clusters.shape == (3, 70)
    assert (clusters[:, :64] >= 0).all()
    assert (clusters[:, 64:] == IGNORED).all()  # the last, partial batch
    assert not method.bank.written.any()
    banks = method.bank.embeddings
    for head, bank in ((0, 0), (1, 1), (2, 0)):  # the heads take the banks in turn
        weight = method.classifiers[head].weight
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)).double())
        assert torch.equal((banks[bank, :64] @ weight.T).argmax(dim=1), clusters[head, :64])
    assert not any(parameter.requires_grad for parameter in method.classifiers.parameters())


def test_the_next_epoch_clusters_what_training_has_left():
    images = clustered()
    method, data = prepared(DeepClusterV2, DeepClusterConfig, images)
    half = [batch for batch, _ in zip(data.batches(0), range(3), strict=False)]
    for views, indices, _ in half:
        method.objective([nn.functional.normalize(-view, dim=1) for view in views], indices)
    assert method.bank.written.sum() == 48
    torch.testing.assert_close(method.bank.embeddings[0, :16], nn.functional.normalize(-images[:16], dim=1))
    method.prepare_epoch(1, data)
    assert (method.bank.clusters[:, :48] >= 0).all()
    assert (method.bank.clusters[:, 48:] == IGNORED).all()


def test_sela_labels_are_balanced_and_its_prototypes_learn():
    images = torch.cat([clustered(50, 1), clustered(10, 4)])[: 16 * 5]
    method, data = prepared(SeLaV2, SeLaConfig, images, prototypes=(4, 2), freeze_prototypes=1)
    for head, size in ((0, 20), (1, 40)):
        counts = torch.bincount(method.bank.clusters[head])
        assert (counts - size).abs().max() <= 2
    views, indices, _ = next(data.batches(0))
    for step, learns in ((0, False), (1, True)):
        method.zero_grad(set_to_none=True)
        method.objective([nn.functional.normalize(view, dim=1) for view in views], indices).loss.backward()
        method.after_backward(step)
        assert all((parameter.grad is not None) == learns for parameter in method.classifiers.parameters())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "frame", "complaint"),
    [
        (
            SwAV,
            SwAVConfig(queue_length=100),
            (128, 1000, 2, 900),
            "--queue-length 100 is shorter than --batch-size 128",
        ),
        (
            SwAV,
            SwAVConfig(queue_length=256, queue_start=46),
            (128, 1000, 2, 320),
            "--queue-length 256 with --queue-start 46 is full after 324 steps, but the run has 320",
        ),
        (
            SwAV,
            SwAVConfig(assign_views=(0, 2)),
            (128, 1000, 2, 900),
            "--assign-views names view 2, but there are only views 0 to 1",
        ),
        (SwAV, SwAVConfig(), (128, 1000, 2, 300), "--freeze-prototypes 313 is not less than the 300 steps"),
        (SeLaV2, SeLaConfig(prototypes=(10,)), (128, 1000, 2, 313), "--freeze-prototypes 313 is not less"),
        (
            DeepClusterV2,
            DeepClusterConfig(),
            (128, 3000, 2, 900),
            "--prototypes 3000 is more than the 2944 images of an epoch",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(kind, config, frame, complaint):
    names = ("batch_size", "num_images", "num_views", "steps")
    with pytest.raises(InputError, match=complaint):
        kind.check_data(config, **dict(zip(names, frame, strict=True)))


@pytest.mark.parametrize("wrong", [{"assign_views": ()}, {"assign_views": (1, 1)}, {"assign_views": (-1,)}])
@pytest.mark.parametrize("config", [SwAVConfig, DeepClusterConfig, SeLaConfig])
def test_assigned_views_are_positions(config, wrong):
    with pytest.raises(InputError, match="--assign-views is"):
        config(**wrong)

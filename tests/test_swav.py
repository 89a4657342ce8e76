"""SwAV, DeepCluster-v2 and SeLa-v2: the authors' numbers, what must hold of them, and digits end to end."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from src.errors import InputError
from src.losses import IGNORED, assigned_cross_entropy, swapped_prediction
from src.methods import METHODS
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
    codes = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    scores = torch.tensor([[0.2, 0.0], [0.0, 0.0]])
    first = math.log(1 + math.exp(-2))  # a margin of 0.2 at temperature 0.1
    expected = (first + math.log(2)) / 2
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(expected)
    assert swapped_prediction(torch.zeros(5, 30), torch.full((5, 30), 1 / 30), 0.1).item() == pytest.approx(
        math.log(30)
    )


def test_authors_deepcluster_loss(golden):
    numbers = golden("swav.npz")
    for i in range(2):
        case = {
            name: numbers[f"dcv2_loss{i}_{name}"] for name in ("assignments", "idx", "tau", "crops", "loss", "heads")
        }
        labels = torch.from_numpy(case["assignments"])[:, torch.from_numpy(case["idx"])]
        scores = [torch.from_numpy(numbers[f"dcv2_loss{i}_scores{h}"]).requires_grad_() for h in range(len(labels))]
        views = [z.unflatten(0, (int(case["crops"]), -1)) for z in scores]
        terms = [assigned_cross_entropy(z, y, float(case["tau"])) for z, y in zip(views, labels, strict=True)]
        loss = torch.stack(terms).mean()
        loss.backward()
        assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5)
        for h, z in enumerate(scores):
            expected = torch.from_numpy(numbers[f"dcv2_loss{i}_grad{h}"])
            assert (z.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_images_without_a_cluster_cost_nothing():
    scores = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, IGNORED, 4, IGNORED])
    kept = assigned_cross_entropy(scores[:, ::2], labels[::2])
    assert assigned_cross_entropy(scores, labels).item() == pytest.approx(kept.item())
    assert assigned_cross_entropy(scores, torch.full((4,), IGNORED)).item() == 0


# ---- SwAV against the authors' training function --------------------------------------------------------------------

TRAINED = ("nmb_crops", "crops_for_assign", "tau", "epsilon", "iterations", "queue_len", "steps", "frozen_steps")


def follow_authors(numbers, i: int, rank: int | None) -> int:
    """Compare every step of case i with ours; returns in how many the queue took part."""
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
    )
    method.prepare_epoch(0, None)
    weight, queued = method.classifiers[0].weight, 0
    for step in range(int(case["steps"])):
        found = {
            name.removeprefix(f"{head}step{step}_"): torch.from_numpy(numbers[name])
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
        assert loss.item() == pytest.approx(found["loss"].item(), rel=1e-5)
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
    numbers = golden("swav.npz")
    alone = [i for i in range(int(numbers["num_loss"])) if numbers[f"loss{i}_world_size"] == 1]
    queued = [follow_authors(numbers, i, None) for i in alone]
    assert len(alone) == 4
    assert sum(queued) >= 2


def test_authors_steps_on_two_ranks(golden, run_ranks):
    numbers = golden("swav.npz")
    (i,) = [i for i in range(int(numbers["num_loss"])) if numbers[f"loss{i}_world_size"] == 2]
    code = f"""
        sys.path.insert(0, "tests")
        import numpy as np
        from test_swav import follow_authors
        from conftest import GOLDEN
        torch.save(follow_authors(np.load(GOLDEN / "swav.npz"), {i}, rank), out / f"{{rank}}.pt")
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
    torch.testing.assert_close(method.classifiers[0].weight.norm(dim=1), torch.ones(12))


def test_a_collapse_costs_the_logarithm_of_the_prototypes():
    method = swav(prototypes=30)
    same = unit(1, 8).expand(16, 8)
    codes = method._codes(0, same, method.scores([same])[0][0].detach())
    torch.testing.assert_close(codes, torch.full((16, 30), 1 / 30))
    method.classifiers[0].weight.data.fill_(8**-0.5)
    assert method.objective([same, same, same], torch.arange(16)).loss.item() == pytest.approx(math.log(30))


# ---- DeepCluster-v2 and SeLa-v2 -------------------------------------------------------------------------------------


class Loader:
    """Batches of two views of given images, without randomness."""

    def __init__(self, images, batch, seed=0):
        self.data, self.batch, self.seed = images, batch, seed

    def epoch(self, epoch, start=0):
        from src.data.loaders import Batch

        for indices in torch.arange(len(self.data)).split(self.batch)[start:]:
            if len(indices) == self.batch:
                yield Batch([self.data[indices], self.data[indices].roll(3, 1)], indices)


def clustered(per_cluster=20, clusters=4):
    centres = 3 * torch.eye(8)[:clusters]
    return (
        centres[:, None] + 0.1 * torch.randn(clusters, per_cluster, 8, generator=torch.Generator().manual_seed(3))
    ).flatten(0, 1)


def prepared(kind, config_kind, images, **knobs):
    torch.manual_seed(0)
    knobs = {"dim": 8, "hidden_dim": 8, "head_bn": False, "prototypes": (4, 3, 5), **knobs}
    method = kind(Flat(), config_kind(**knobs))
    method.projection_head = nn.Sequential(nn.Identity())
    method.projection_head.forward = lambda x: nn.functional.normalize(x, dim=1)
    loader = Loader(images, 16)
    method.prepare_epoch(0, loader)
    return method, loader


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
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
        assert torch.equal((banks[bank, :64] @ weight.T).argmax(dim=1), clusters[head, :64])
    assert not any(parameter.requires_grad for parameter in method.classifiers.parameters())


def test_the_next_epoch_clusters_what_training_has_left():
    images = clustered()
    method, loader = prepared(DeepClusterV2, DeepClusterConfig, images)
    half = [batch for batch, _ in zip(loader.epoch(0), range(3), strict=False)]
    for views, indices in half:
        method.objective([nn.functional.normalize(-view, dim=1) for view in views], indices)
    assert method.bank.written.sum() == 48
    torch.testing.assert_close(method.bank.embeddings[0, :16], nn.functional.normalize(-images[:16], dim=1))
    method.prepare_epoch(1, loader)
    assert (method.bank.clusters[:, :48] >= 0).all()
    assert (method.bank.clusters[:, 48:] == IGNORED).all()


def test_sela_labels_are_balanced_and_its_prototypes_learn():
    images = torch.cat([clustered(50, 1), clustered(10, 4)])[: 16 * 5]
    method, loader = prepared(SeLaV2, SeLaConfig, images, prototypes=(4, 2), freeze_prototypes=1)
    for head, size in ((0, 20), (1, 40)):
        counts = torch.bincount(method.bank.clusters[head])
        assert (counts - size).abs().max() <= 2
    views, indices = next(loader.epoch(0))
    for step, learns in ((0, False), (1, True)):
        method.zero_grad(set_to_none=True)
        method.objective([nn.functional.normalize(view, dim=1) for view in views], indices).loss.backward()
        method.after_backward(step)
        assert all((parameter.grad is not None) == learns for parameter in method.classifiers.parameters())


# ---- over ranks -----------------------------------------------------------------------------------------------------

NAMES = ("swav", "deepcluster_v2", "sela_v2")
RANKS = """
    sys.path.insert(0, "tests")
    from test_swav import NAMES, train_steps
    torch.save({name: train_steps(name, torch.float64) for name in NAMES}, out / f"{rank}.pt")
"""


def train_steps(name: str, dtype) -> dict:
    """Two epochs of three steps on 48 images, the last five left out; this rank's share of every batch."""
    from src import distributed
    from src.data.loaders import Batch

    images = clustered(12).to(dtype)
    torch.manual_seed(0)
    knobs = {"dim": 8, "hidden_dim": 8, "head_bn": False}
    knobs |= (
        {"prototypes": 6, "queue_length": 24, "queue_start": 0, "freeze_prototypes": 2}
        if name == "swav"
        else {"prototypes": (6, 4, 5)}
    )
    knobs |= {"max_iterations": 50} if name == "sela_v2" else {}
    method = METHODS[name](Flat(), METHODS[name].Config(**knobs)).to(dtype)
    for module in method.modules():
        for key, value in list(module._buffers.items()):
            if value is not None and value.is_floating_point():
                module._buffers[key] = value.to(dtype)

    class Share(Loader):
        def epoch(self, epoch, start=0):
            order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(self.data)))[:36]
            for indices in order.split(12)[start:]:
                mine = indices.chunk(distributed.world_size())[distributed.rank()]
                yield Batch([self.data[mine], self.data[mine].flip(1) * 0.1 + self.data[mine]], mine)

    loader = Share(images, 12)
    wrapped = distributed.parallel(method, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.3, momentum=0.9)
    step, losses = 0, []
    for epoch in range(2):
        method.prepare_epoch(epoch, loader)
        for batch in loader.epoch(epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = wrapped(batch).loss
            loss.backward()
            method.after_backward(step)
            optimizer.step()
            method.after_step(batch)
            losses.append(distributed.mean_over_ranks(loss))
            step += 1
    return {"losses": torch.stack(losses), **{k: v.clone() for k, v in method.state_dict().items()}}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_what_one_process_trains(run_ranks, world_size):
    """Loss, weights, queue, memory bank and clusters after six steps."""
    on_ranks = run_ranks(world_size, RANKS)
    for name in NAMES:
        expected = train_steps(name, torch.float64)
        assert len(set(expected["losses"].tolist())) == 6
        for found in on_ranks:
            assert found[name].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name}: {key}")


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
            "--queue-length 256, filled from epoch 46 .* would be full after 324 steps, and the run has 320",
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
    with pytest.raises(InputError, match=complaint):
        kind.check_data(config, *frame)


@pytest.mark.parametrize("wrong", [{"assign_views": ()}, {"assign_views": (1, 1)}, {"assign_views": (-1,)}])
@pytest.mark.parametrize("config", [SwAVConfig, DeepClusterConfig, SeLaConfig])
def test_assigned_views_are_positions(config, wrong):
    with pytest.raises(InputError, match="--assign-views is"):
        config(**wrong)


# ---- end to end -----------------------------------------------------------------------------------------------------

FEW = ("--epochs", "12", "--warmup-epochs", "1", "--dim", "16", "--hidden-dim", "32")
QUEUE = ("--queue-length", "384", "--queue-start", "2")


STOP_AT_38 = """
import sys, runpy
from src import trainer
advance, count = trainer.Progress.advance, [0]
def stop_soon(self, *given):
    count[0] += 1
    if count[0] == 38:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
    return advance(self, *given)
trainer.Progress.advance = stop_soon
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("swav", QUEUE), ("deepcluster_v2", ()), ("sela_v2", ("--max-iterations", "30"))]
)
def test_a_run_of_digits_stops_in_mid_epoch_goes_on_bit_for_bit_and_is_scored(run_python, tmp_path, name, more):
    words = ("train.py", "--method", name, *FEW, *more)
    assert run_python(*words, "--output-dir", tmp_path / "whole").returncode == 0
    first = run_python("-c", STOP_AT_38, *words, "--output-dir", tmp_path / "cut")
    assert first.returncode == 128 + 15, first.stderr
    again = run_python(*words, "--output-dir", tmp_path / "cut")
    assert again.returncode == 0, again.stderr
    assert "resuming from step 39 " in again.stdout + again.stderr
    one, two = (torch.load(tmp_path / each / "checkpoint.pt") for each in ("whole", "cut"))
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    scored = run_python("cls_eval.py", "--checkpoint", tmp_path / "cut" / "checkpoint.pt")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((tmp_path / "cut" / "cls_eval.json").read_text())
    assert scores["acc"] > 0.4
    assert scores["classifiers"][0]["used"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("swav", QUEUE), ("deepcluster_v2", ())])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(run_python, tmp_path, name, more):
    """With the queue or bank of the one process; the start of the fifth epoch clusters it anew, on both ranks alike."""
    words = ("train.py", "--method", name, *FEW, *more, "--epochs", "5", "--output-dir", tmp_path)
    assert run_python("-c", STOP_AT_38, *words).returncode == 128 + 15
    memory = {key for key in torch.load(tmp_path / "checkpoint.pt")["model"] if key.startswith(("queue", "bank"))}
    assert memory
    again = run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words)
    assert again.returncode == 0, again.stderr
    assert "resuming from step 39 " in again.stdout + again.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 5
    assert losses[4] < losses[2]
    assert memory <= torch.load(tmp_path / "checkpoint.pt")["model"].keys()

"""What every method must do. The tests run for all of `METHODS`, so that a new method is tested once it is registered.

Each test trains a method on a few digits from the flags of its preset `digits`.
"""

import copy
import json
import math
import signal
from dataclasses import fields
from functools import partial

import pytest
import torch
from evaluating import save_untrained
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.config import as_plain, method_names, parse_train, read_method
from src.data.datasets import MemoryImages, open_data
from src.data.digits import DigitRecipe, DigitViews
from src.data.loaders import TrainLoader
from src.errors import InputError
from src.evaluation.clustering import evaluate
from src.loading import load_method
from src.logs import Progress
from src.methods import METHODS, build_method
from src.optim import build_optimizer, parameter_groups, warmup_cosine
from src.stopping import Interrupted
from src.trainer import Trainer

CPU = torch.device("cpu")
BATCH, IMAGES, EPOCHS = 24, 100, 2  # four steps an epoch, four images left out
# what the presets leave out, and what would come too late in so short a run
FLAGS = {
    "self_classifier": "--queue-length 48",
    "swav": "--queue-length 48 --queue-start 0 --freeze-prototypes 2",
    "sela_v2": "--freeze-prototypes 2",
    "sela": "--updates 5",
    "selflabel": "--threshold 0.105",  # of a network that has not been trained
}
each_method = pytest.mark.parametrize("name", METHODS)


class GroupNormNet(nn.Module):
    """A backbone in which no image sees another."""

    width = 72

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.LayerNorm(72)),
        )

    def forward(self, images):
        return self.layers(images)


class Typed:
    """Views of another type than float32."""

    def __init__(self, views, dtype):
        self.views, self.dtype = views, dtype

    def __call__(self, images, indices, **which):
        return [view.to(self.dtype) for view in self.views(images, indices, **which)]

    def single(self, images):
        return self.views.single(images).to(self.dtype)


def make_trainer(name: str, *, seed=0, dtype=torch.float32, batch_norm=True, accumulate=1) -> Trainer:
    """Prepare the training of a method, in two sizes of views if it takes them."""
    words = f"--method {name} --batch-size {BATCH} --epochs {EPOCHS} --warmup-epochs 1 {FLAGS.get(name, '')}".split()
    if not batch_norm:
        known = {field.name for field in fields(METHODS[name].Config)}
        words += ["--no-head-bn"] if "head_bn" in known else ["--head-layers", "1"] if "head_layers" in known else []
    options, _, knobs = parse_train(words)
    torch.manual_seed(seed)
    if batch_norm:
        method = build_method(name, knobs, {**as_plain(options), "channels": 1})
    else:
        method = METHODS[name](GroupNormNet(), knobs, options.global_crops_number)
    method = method.to(dtype)

    digits = open_data("digits", "train")
    data = MemoryImages(digits.images[:IMAGES], digits.labels[:IMAGES], digits.classes)
    recipes, check = [DigitRecipe()] * 2, partial(METHODS[name].check_data, knobs, batch_size=BATCH, num_images=IMAGES)
    try:
        check(num_views=3, steps=EPOCHS * (IMAGES // BATCH))
        recipes.append(DigitRecipe(size=6))
    except InputError:
        check(num_views=2, steps=EPOCHS * (IMAGES // BATCH))
    loader = TrainLoader(data, Typed(DigitViews(recipes), dtype), batch_size=BATCH, seed=0, device=CPU, epochs=EPOCHS)
    groups = parameter_groups(method, options.weight_decay)
    optimizer = build_optimizer(options.optimizer, groups, lr=options.lr, momentum=options.momentum)
    lr = warmup_cosine(
        options.lr,
        options.final_lr,
        warmup_start=options.warmup_start,
        warmup_epochs=1,
        epochs=EPOCHS,
        steps_per_epoch=len(loader),
    )
    return Trainer(method, optimizer, lr, loader=loader, device=CPU, labels=data.labels, accumulate=accumulate)


class StopAfter:
    """A request to stop that comes during the given step."""

    def __init__(self, trainer, step):
        self.trainer, self.at = trainer, step

    @property
    def number(self):
        return signal.SIGTERM if self.trainer.step + 1 == self.at else 0


def train(trainer: Trainer, stop_after: int | None = None) -> list[dict]:
    """Train to the end, or until after a step; return the summaries of the epochs that ended."""
    summaries = []
    trainer.stop_request = StopAfter(trainer, stop_after)
    try:
        while trainer.epoch < EPOCHS:
            summaries.append(trainer.train_epoch(Progress(1, 0, enabled=False)))
    except Interrupted:
        assert trainer.step == stop_after
    return summaries


def outcome(name: str, begun: dict | None = None, **how) -> dict[str, torch.Tensor]:
    """Return everything that a method holds at the end of training in float64, and the loss of the last epoch.

    Args:
        begun: state of a trainer to continue from.
    """
    trainer = make_trainer(name, dtype=torch.float64, **how)
    if begun:
        trainer.load_state_dict(begun)
    loss = train(trainer)[-1]["loss"]
    return {"loss": torch.tensor(loss, dtype=torch.float64), **trainer.method.saved_state()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two outcomes that differ by the rounding of sums in float64 alone."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


# ---- what a method declares -----------------------------------------------------------------------------------------


def test_names_are_those_of_files():
    assert sorted(METHODS) == method_names()


@each_method
def test_flags_can_be_read_without_the_class(name):
    assert {field.name for field in fields(METHODS[name].Config)} == {
        field.name for field in fields(read_method(name).config)
    }


@each_method
def test_embeddings_logits_and_summaries_are_as_evaluations_expect(name):
    trainer = make_trainer(name)
    (summary, *_) = train(trainer)
    method, images = trainer.method.double().eval(), torch.rand(5, 1, 8, 8).double()
    with torch.no_grad():
        embeddings, logits = method.embed(images), method.predict(images)
        assert embeddings.dim() == 2
        assert [tuple(z.shape) for z in logits] == [(5, size) for size in method.classes]
        # an image has its embedding whatever its batch
        torch.testing.assert_close(method.embed(images[2:3]), embeddings[2:3], rtol=1e-9, atol=1e-12)
    assert summary.get("classifier", 0) in range(max(len(method.classes), 1))
    assert bool(method.classes) == ("classifier" in summary)
    assert json.loads(json.dumps(summary)) == summary
    assert all(math.isfinite(value) for value in summary.values())
    assert isinstance(method.report(summary), str)
    assert method.diagnose([summary]) is None


# ---- training -------------------------------------------------------------------------------------------------------


@each_method
def test_one_step_changes_the_weights_and_has_a_finite_loss(name):
    trainer = make_trainer(name)
    before = copy.deepcopy(dict(trainer.method.named_parameters()))
    assert train(trainer, stop_after=1) == []
    assert trainer.totals["loss"].isfinite()
    after = dict(trainer.method.named_parameters())
    assert all(parameter.isfinite().all() for parameter in after.values())
    weights = [key for key, parameter in after.items() if key.startswith("backbone.") and parameter.dim() > 1]
    assert weights
    assert all(not torch.equal(after[key], before[key]) for key in weights)


@each_method
@pytest.mark.parametrize("stop_after", [3, 6])  # in the first epoch, and in the second
def test_stopping_within_an_epoch_and_going_on_changes_no_bit(name, stop_after, tmp_path):
    straight, first = make_trainer(name), make_trainer(name)
    expected, summaries = train(straight), train(first, stop_after)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_trainer(name, seed=1)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    summaries += train(second)

    timing = {"seconds", "images_per_second"}
    for a, b in zip(expected, summaries, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    a, b = straight.state_dict(), second.state_dict()
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    for own, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(own[key]), torch.as_tensor(other[key])) for key in own)
    assert torch.equal(a["generator"], b["generator"])


@each_method
@pytest.mark.parametrize(("world_size", "begun"), [(2, False), (4, True)])
def test_ranks_train_what_one_process_trains(name, world_size, begun, run_ranks, tmp_path):
    """From the start, or from where one process stopped within the first epoch."""
    if begun:
        first = make_trainer(name, dtype=torch.float64)
        train(first, stop_after=3)
        torch.save(first.state_dict(), tmp_path / "begun.pt")
    code = f"""
        from test_methods import outcome
        begun = torch.load(out / "begun.pt") if {begun} else None
        torch.save(outcome({name!r}, begun), out / f"{{rank}}.pt")
    """
    states = run_ranks(world_size, code)
    expected = outcome(name)
    for state in states:
        assert_close(state, expected)


@each_method
def test_parts_of_a_batch_train_what_the_whole_batch_trains(name):
    if any(isinstance(module, _BatchNorm) for module in make_trainer(name, batch_norm=False).method.modules()):
        pytest.skip(
            f"{name} has batch normalisation whatever its flags are, and parts of a batch have other statistics"
        )
    assert_close(outcome(name, batch_norm=False, accumulate=2), outcome(name, batch_norm=False))


@each_method
def test_digits_are_learned(name, run_program, tmp_path):
    """By the command line: far above chance, above the untrained network, and the checkpoint holds what was scored."""
    epochs = 15
    words = ["--method", name, "--epochs", epochs, "--warmup-epochs", 2, "--eval-every", epochs]
    if METHODS[name].earlier_stage:
        pytest.skip("a later stage starts from a trained network; see tests/test_scan.py")
    done = run_program("train.py", *words, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == epochs

    if not METHODS[name].classes and "knn" in lines[-1]:
        assert lines[-1]["knn"] > 0.9
        return
    digits = open_data("digits", "test")
    scores = []
    for path in (tmp_path / "checkpoint.pt", save_untrained(tmp_path / "untrained.pt", *map(str, words))):
        method, _ = load_method(path)
        how = {"batch_size": 128, "device": CPU, "classifier": lines[-1]["classifier"]}
        scores.append(evaluate(method, digits, DigitViews([DigitRecipe()]), **how))
    trained, untrained = scores
    assert {key: lines[-1][key] for key in trained} == pytest.approx(trained, abs=0.02)
    # of four seeds of each method, the worst had NMI 0.67 and ACC 0.64
    assert trained["nmi"] > max(0.5, untrained["nmi"] + 0.2)
    assert trained["acc"] > max(0.5, untrained["acc"] + 0.2)

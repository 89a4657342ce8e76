"""What tests of evaluations share: checkpoints, small folders of pictures, the programs in this process."""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from src import checkpoint, locks
from src.config import as_plain, parse_train
from src.data.datasets import open_data
from src.loading import load_method
from src.methods import Method, build_method

T = TypeVar("T")
FILES = Path(__file__).parent / "checkpoints"  # probe_*.pt are by commit 3af6889

# --------------------------------------------------------------------------------------------------------------------
# programs


@contextmanager
def global_state_kept():
    """Restore what programs change in their process, and leave their folders, as if the process had ended."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    generator, benchmark = torch.get_rng_state(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_rng_state(generator)
        torch.backends.cudnn.benchmark = benchmark
        locks.release()


def run_here(name: str, *words) -> None:
    """Run the `main` of one of the programs in this process."""
    with pytest.MonkeyPatch.context() as patch, global_state_kept():
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        importlib.import_module(name).main()


def read_json(folder: Path, name: str) -> dict:
    """Return what a program wrote into its folder."""
    return json.loads((folder / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_untrained(path: Path, *words, seed: int = 0, channels: int = 1, history=()) -> Path:
    """Write a checkpoint of a network with random weights, as train.py with these flags would have begun."""
    options, name, knobs = parse_train(["--data", "digits", *map(str, words)])
    settings = {"method": name, "channels": channels, **as_plain(options), **as_plain(knobs)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = build_method(name, knobs, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {"config": settings, "history": list(history), "epoch": 0, "model": method.state_dict()})
    return path


# flags of the probe in tests/checkpoints
EARLIER = ("--epochs", "3", "--batch-size", "500", "--weight-decay", "0.001", "--crop-flip", "--lr", "0.2")


def save_exact(path):
    """Write a checkpoint whose backbone every processor computes alike, bit for bit."""
    state = checkpoint.load(save_untrained(path, "--classes", "10", "10", "12"))
    for name, value in state["model"].items():
        if name.startswith("backbone.") and value.ndim == 4:
            value.copy_(((5 * torch.arange(value.numel())) % 13 - 6).view_as(value) / 32)
    checkpoint.save(path, {key: state[key] for key in ("config", "history", "epoch", "model")})
    return path


# flags of a network for small pictures
SMALL = (
    *("--arch", "small_convnet", "--global-crops-size", "16", "--local-crops-number", "0"),
    *("--classes", "3", "--hidden-dim", "32", "--queue-length", "0"),
)


def _of_digits(path: Path, split: str, function: Callable[[Method, Tensor], T]) -> list[T]:
    """Apply a function to a network and batches of digits as large as those of the programs, which then round alike."""
    method, _ = load_method(path)
    images = 2 * (open_data("digits", split).images.float() / 255) - 1
    with torch.no_grad():
        return [function(method, batch) for batch in images.split(256)]


def digit_features(path: Path, layer: str = "backbone") -> list[tuple[Tensor, np.ndarray]]:
    """Return the features of the training and the test split straight from a network, and their labels."""
    found = []
    for split in ("train", "test"):
        parts = _of_digits(
            path, split, lambda method, x: method.backbone(x) if layer == "backbone" else method.embed(x)
        )
        found.append((torch.cat(parts), open_data("digits", split).labels.numpy()))
    return found


def digit_probabilities(path: Path) -> list[Tensor]:
    """Return what each classifier predicts for the test split, K × (N, C_k), straight from a network."""
    parts = _of_digits(path, "test", lambda method, x: [z / method.temperature for z in method.predict(x)])
    return [torch.cat(logits).softmax(dim=1) for logits in zip(*parts, strict=True)]


def undecided(bank, labels, queries, k: int, tau: float, error: float) -> int:
    """Count the queries whose k neighbours vote otherwise, perhaps, if similarities are off by `error`, as by rounding.

    They are those with another row about as near as the k-th, or with classes of about as many votes on both sides of
    the first place or of the fifth.
    """
    bank, labels, queries = (
        np.asarray(each, dtype=kind) for each, kind in ((bank, float), (labels, int), (queries, float))
    )
    similarity = queries @ bank.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(similarity, order, axis=1)
    weights = np.exp((near - near[:, :1]) / tau)
    votes = np.zeros((len(queries), max(labels.max() + 1, 6)))
    for row, (neighbors, weight) in enumerate(zip(order, weights, strict=True)):
        np.add.at(votes[row], labels[neighbors], weight)
    around = np.abs(similarity - near[:, -1:]) <= 2 * error  # about as near as the k-th
    exchanged = (around.sum(axis=1) - 1) * weights[:, -1]
    exchanged[[len(set(labels[row])) == 1 for row in around]] = 0  # of one class they vote alike
    ranked = -np.sort(-votes, axis=1)
    close = np.zeros(len(queries), dtype=bool)
    for place in (0, 4):
        ahead = ranked[:, place] - ranked[:, place + 1]
        close |= (ahead <= 2 * exchanged) & (exchanged > 0)
        close |= (ahead <= np.expm1(4 * error / tau) * ranked[:, place]) & (ranked[:, place] > 0)
    return int(close.sum())


# --------------------------------------------------------------------------------------------------------------------
# probes

# two logits of one image may come out in the other order where a processor rounds otherwise
CLOSE = 1.01 / 360


def same_history(found, expected):
    """Accuracies may differ by one image and losses in the last digits: another processor rounds otherwise."""
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert (one["top1"], one["top5"]) == pytest.approx((two["top1"], two["top5"]), abs=CLOSE)
        assert (one["epoch"], one["loss"], one["lr"]) == pytest.approx((two["epoch"], two["loss"], two["lr"]), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# networks of others, and pictures for them


def torchvision_trunk(name: str = "resnet18", seed: int = 0) -> torch.nn.Module:
    """Return a network of torchvision with random weights, without its classifier, in evaluation mode."""
    from torchvision import models  # slow to import

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = models.get_model(name, num_classes=1)
    network.fc = torch.nn.Identity()
    return network.eval()


def save_as_moco(path: Path, network: torch.nn.Module) -> Path:
    """Write a ResNet-18 as MoCo v2 leaves it."""
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state}, path)
    return path


def make_pictures(top: Path, classes, splits=(("train", 5), ("val", 2)), size=(40, 40), noise: int = 6) -> Path:
    """Make a folder of pictures; each class has one colour under some noise.

    Args:
        classes: {name: RGB colour}.
        splits: pairs of a folder and its number of pictures per class.
        noise: strength of the noise in grey levels.
    """
    rng = np.random.default_rng(0)
    for split, number in splits:
        for name, colour in classes.items():
            (top / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, noise + 1, (*size, 3)) + colour
                Image.fromarray(pixels.clip(max=255).astype(np.uint8)).save(top / split / name / f"{i}.png")
    return top

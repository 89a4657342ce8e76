"""Rows: mutated and hostile checkpoint files, read by each program."""

import collections
import io
import random
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.campaign.hostile import HOSTILE
from tests.campaign.mutants import mutant
from tests.campaign.reading import READERS, read_files
from tests.campaign.runs import inputs, intact
from tests.campaign.trials import ROWS, Row


def saved(content: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def of_the_authors() -> bytes:
    """Return a small file as Self-Classifier's authors write it, with the class of their queue."""
    module = types.ModuleType("utils")
    sys.modules["utils"] = module
    module.NNQueue = type("NNQueue", (), {"__module__": "utils"})
    queue = module.NNQueue()
    queue.__dict__ = {"queue_len": 3, "dim": 2, "queue": torch.rand(3, 2), "queue_targets": torch.tensor([2.0, 0, 1])}
    queue.__dict__ |= {"queue_indices": torch.tensor([7, 8, 9]), "ptr": 1, "full": True}
    names = ("module.backbone.w", "module.cls_0.weight_v", "module.cls_0.weight_g")
    state = {"epoch": 5, "state_dict": {name: torch.ones(1, 2) for name in names}, "nn_queue": queue}
    try:
        return saved({**state, "best_loss": np.float64(1.5)}, _use_new_zipfile_serialization=False)
    finally:
        del sys.modules["utils"]


@cache
def sources() -> tuple[bytes, ...]:
    """Return the intact files that are mutated: our checkpoints three times in four, and files of others.

    Of three of our checkpoints, two are of a run that is to train one more epoch.
    """
    own = tuple((inputs() / name).read_bytes() for name in ("intact.pt", "stopped.pt", "stopped.pt"))
    trunk = {name: torch.ones(2, 3) for name in ("conv1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias")}
    swav = {**trunk, "projection_head.0.weight": torch.ones(2, 2), "prototypes.weight": torch.ones(3, 2)}
    others = (
        *(saved(trunk), saved({"state_dict": swav, "epoch": 3}), of_the_authors()),
        *(saved(trunk, pickle_protocol=4), saved({"network": trunk}, _use_new_zipfile_serialization=False)),
        saved(collections.OrderedDict({f"module.encoder_q.{name}": value for name, value in trunk.items()})),
    )
    return own * len(others) + others


def make_mutant(rng: random.Random, number: int) -> bytes:
    """Return the mutated file of this number."""
    return mutant(rng, sources())


def make_hostile(rng: random.Random, number: int) -> bytes:
    """Return the hostile file of this number."""
    return [*HOSTILE.values()][number % len(HOSTILE)]((inputs() / "intact.pt").read_bytes())


def _register(reader: str) -> None:
    short = 3 if reader == "train.py resuming" else 0  # the workers of the others take seconds to start
    name = reader.removesuffix(".py").replace(".py ", "-").replace("_", "-").replace(" ", "-").replace("--", "-")

    def fuzz(numbers: Sequence[int], seed: int, place: Path) -> Iterator[tuple[int, str]]:
        intact()
        yield from read_files(reader, "tests.campaign.fuzzing:make_mutant", numbers, seed, place)

    def attack(numbers: Sequence[int], seed: int, place: Path) -> Iterator[tuple[int, str]]:
        intact()
        names = [*HOSTILE]
        for number, problem in read_files(reader, "tests.campaign.fuzzing:make_hostile", numbers, seed, place):
            yield number, f"{names[number % len(names)]}: {problem}" if problem else ""

    ROWS[f"fuzz-{name}"] = Row(f"fuzz-{name}", f"mutated files read by {reader}", 5000, short, fuzz)
    ROWS[f"hostile-{name}"] = Row(f"hostile-{name}", f"hostile files read by {reader}", len(HOSTILE), short, attack)


for each in READERS:
    _register(each)

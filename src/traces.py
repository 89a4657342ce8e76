"""Loss traces: the losses of the first training steps of every method, which the tests replay.

    python -m src.results traces              # compare the code with tests/traces
    python -m src.results traces --write      # renew the files whose traces have changed

A trace is the loss of 30 steps on 160 handwritten digits. Each method has four of them: one or two ranks, each with the batch
in one or two parts (`--accumulate`). The networks are small, and everything is computed in float64: in float32, processors
round differently, and the losses then drift apart by up to 1e-2 within twenty steps. In float64, other vector instructions
change these losses by less than 1e-13 of their value. The tolerance is 1e-8. A discrete choice, such as the nearest neighbour
in a queue, would change a loss by more, but that needs two candidates that are equal to about thirteen digits.

A file also holds the mean of each view in the first batch, because most losses do not change if two views are exchanged.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .config import as_plain, parse_train, read_method
from .data.datasets import MemoryImages, open_data
from .data.loaders import TrainLoader
from .data.views import build_views
from .errors import RunError, run_script
from .logs import Progress
from .methods import METHODS, build_method
from .optim import build_optimizer, parameter_groups, warmup_cosine
from .trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "traces"
TOLERANCE = 1e-8  # relative difference of two losses that count as equal
IMAGES, BATCH, EPOCHS = 160, 16, 3  # 30 steps
PARTS = (1, 2)
# Small networks. Everything that starts late in a normal run, such as a queue, starts within the 30 steps.
SHARED = (
    f"--data digits --preset digits --device cpu --batch-size {BATCH} --epochs {EPOCHS} --warmup-epochs 1 "
    "--lr 0.002 --warmup-start 0.0002 --final-lr 0.00002"
)
HEAD = "--hidden-dim 32 --dim 16"  # of the methods that have a projection head
LOCAL = "--local-crops-number 1 --local-crops-size 6"
FLAGS = {
    "self_classifier": f"{LOCAL} --classes 10 10 20 --queue-length 32",
    "self_classifier_simclr": "--classes 10 10 20 --contrast-dim 16",
    "self_classifier_v1": "--num-classifiers 3",
    "swav": f"{LOCAL} --queue-length 32 --queue-start 1 --freeze-prototypes 2",
    "deepcluster_v2": f"{LOCAL} --prototypes 10 12",
    "sela_v2": f"{LOCAL} --prototypes 10 12 --freeze-prototypes 2",
    "sela": f"--global-crops-number 2 {LOCAL} --classes 10 12 --updates 12",
    # These two start from a network with random weights.
    "scan": "--global-crops-number 2 --num-classifiers 2 --neighbors 5",
    "selflabel": "--threshold 0.105",
}


class _Losses(Progress):
    """Keeps the loss of every step, averaged over the ranks."""

    def __init__(self) -> None:
        super().__init__(1, 0, enabled=False)
        self.losses: list[float] = []

    def advance(self, images: int, epoch: int, loss: float | None) -> None:
        value = torch.tensor(float("nan") if loss is None else loss)
        self.losses.append(distributed.mean_over_ranks(value).item())


def follow(method: str, accumulate: int, *flags: str, epochs: int = EPOCHS) -> dict[str, list[float]]:
    """Train a method on this process's share of the batches, ten steps per epoch.

    Args:
        accumulate: number of parts of a batch.
        flags: further flags of train.py.
        epochs: number of epochs after which to stop; the run is planned for `EPOCHS` all the same.

    Returns:
        losses: the loss of each step.
        views: the mean of each view in the first batch of this rank.
    """
    head = HEAD if "hidden_dim" in read_method(method).comments else ""
    words = f"--method {method} {SHARED} {head} {FLAGS.get(method, '')} --accumulate {accumulate}".split()
    options, name, knobs = parse_train([*words, *flags])
    with _in_float64():
        torch.manual_seed(options.seed)
        digits = open_data(options.data, "train")
        assert isinstance(digits, MemoryImages)
        data = MemoryImages(digits.images[:IMAGES], digits.labels[:IMAGES], digits.classes)
        views = build_views(options.data, data, options.views)
        loader = TrainLoader(
            data, views, batch_size=BATCH, seed=options.seed, device=torch.device("cpu"), epochs=EPOCHS
        )
        network = build_method(name, knobs, {**as_plain(options), "channels": data.channels})
        groups = parameter_groups(network, options.weight_decay)
        trainer = Trainer(
            network,
            build_optimizer(options.optimizer, groups, lr=options.lr, momentum=options.momentum),
            warmup_cosine(
                options.lr,
                options.final_lr,
                warmup_start=options.warmup_start,
                warmup_epochs=options.warmup_epochs,
                epochs=EPOCHS,
                steps_per_epoch=len(loader),
            ),
            loader=loader,
            device=torch.device("cpu"),
            labels=data.labels,
            accumulate=accumulate,
        )
        progress = _Losses()
        while trainer.epoch < epochs:
            trainer.train_epoch(progress)
        # after the training, because a method may know the companions of a batch only then
        first: list[Tensor] = next(iter(loader.epoch(0, apart=True))).views
    return {"losses": progress.losses, "views": [view.mean().item() for view in first]}


@contextmanager
def _in_float64() -> Iterator[None]:
    """Make float64 the default dtype, and restore the default and the random state of the caller afterwards."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def run_cases(methods: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return {method: {name of the case: trace}} for the number of ranks in which this code runs."""
    ranks, traces = distributed.world_size(), {}
    for method in methods:
        found = {parts: follow(method, parts) for parts in PARTS}
        traces[method] = {f"ranks {ranks}, accumulate {parts}": found[parts]["losses"] for parts in PARTS}
        if ranks == 1:
            traces[method]["views"] = found[1]["views"]
    return traces


def run_on_ranks(file: str, *methods: str) -> None:
    """Run the cases on one of two ranks; rank 0 writes the traces to a JSON file."""
    distributed.start("cpu")
    traces = run_cases(list(methods))
    if distributed.is_main():
        Path(file).write_text(json.dumps(traces))
    distributed.stop()


# ---- files ----------------------------------------------------------------------------------------------------------


def read(method: str) -> dict[str, list[float]]:
    """Return the stored traces of a method: {name of the case: trace}."""
    path = FOLDER / f"{method}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(method: str, traces: dict[str, list[float]]) -> None:
    """Store the traces of a method, one per line, so that a commit shows which of them have changed."""
    FOLDER.mkdir(exist_ok=True)
    lines = [f" {json.dumps(name)}: [{', '.join(f'{x:.10g}' for x in trace)}]" for name, trace in traces.items()]
    (FOLDER / f"{method}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(found: dict[str, list[float]], stored: dict[str, list[float]]) -> list[str]:
    """Return one line for each case in which two sets of traces differ: the first step that differs, and both values."""
    lines = [f"{name}: not stored" for name in found if name not in stored]
    lines += [f"{name}: stored, but not found" for name in stored if name not in found]
    for name in (name for name in found if name in stored):
        if len(found[name]) != len(stored[name]):
            lines.append(f"{name}: {len(found[name])} numbers, {len(stored[name])} stored")
            continue
        for i, (new, old) in enumerate(zip(found[name], stored[name], strict=True)):
            if not abs(new - old) <= TOLERANCE * max(abs(old), 1e-3):
                where = f"mean of view {i}" if name == "views" else f"loss of step {i + 1}"
                lines.append(f"{name}: the {where} is {new:.10g}, stored {old:.10g}")
                break
    return lines


# ---- program --------------------------------------------------------------------------------------------------------


def run_all(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the traces of all methods. Two ranks are two more processes, which exchange a file in `folder`.

    Raises:
        RunError: if one of the processes fails.
    """
    file, methods = folder / "two_ranks.json", list(METHODS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "src.traces", str(file), *methods],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    alone = run_cases(methods)
    if any([rank.wait() for rank in ranks]):
        raise RunError("traces: a process of the traces of two ranks failed; see the lines above")
    together: dict[str, Any] = json.loads(file.read_text())
    return {method: alone[method] | together[method] for method in methods}


if __name__ == "__main__":
    run_script(lambda: run_on_ranks(*sys.argv[1:]))

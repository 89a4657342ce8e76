"""Write the checkpoints of the current format that tests/test_old_checkpoints.py reads.

    python -m tests.keep_checkpoints                  # all methods, after VERSION in src/checkpoint.py has been raised
    python -m tests.keep_checkpoints --method NAME    # one method that has just been added

The folders of earlier versions stay as they are: only the code of a version can write its checkpoints.
"""

import argparse
import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from src import logs
from src.checkpoint import VERSION
from src.config import read_method
from src.data.datasets import open_data
from src.loading import load_method
from src.methods import METHODS
from tests.evaluating import run_here

FOLDER = Path(__file__).parent / "checkpoints"
STOP = 10  # the step during which the signal comes, in the second of three epochs of seven steps
# What a preset gives today may change, so the flags name it.
SHARED = (
    "--data digits --preset digits --device cpu --batch-size 200 --epochs 3 --warmup-epochs 1 --warmup-start 0.0002 "
    "--lr 0.002 --final-lr 0.00002"
)
HEAD = "--dim 16 --hidden-dim 32"  # of the methods that have a projection head
# Adam needs two more numbers per weight. A backbone that is not trained keeps these files small.
FROZEN = "--freeze backbone"
FLAGS = {
    "self_classifier": "--classes 10 10 20 --queue-length 256 --optimizer lars --lr 0.1 --final-lr 0.001",
    "self_classifier_simclr": f"{FROZEN} --classes 10 10 20 --contrast-dim 16",
    "self_classifier_v1": f"{FROZEN} --num-classifiers 3",
    "swav": f"{FROZEN} --queue-length 256 --queue-start 0 --freeze-prototypes 2",
    "deepcluster_v2": f"{FROZEN} --prototypes 10 12",
    "sela_v2": f"{FROZEN} --prototypes 10 12 --freeze-prototypes 2",
    "sela": f"{FROZEN} --global-crops-number 1 --classes 10 12 --updates 8",
    "scan": f"{FROZEN} --num-classifiers 2 --neighbors 5 --pretrained simclr",
    "selflabel": f"{FROZEN} --threshold 0.11 --pretrained scan",
}


def logits_of(path: Path) -> list[list[float]]:
    """Return what the first classifier of a checkpoint gives for two images, in float64, (2, C), or their embeddings."""
    method, _ = load_method(path)
    images = 2 * (open_data("digits", "test").images[:2].double() / 255) - 1
    with torch.no_grad():
        if not method.classes:  # then the embeddings tell whether the network is the same
            return method.double().eval().embed(images).tolist()
        return method.double().eval().predict(images)[0].tolist()


def flags_of(method: str) -> list[str]:
    """Return the flags of the run of a method."""
    head = HEAD if "hidden_dim" in read_method(method).comments else ""
    return f"--method {method} {SHARED} {head} {FLAGS.get(method, FROZEN)}".split()


def earlier_stages(method: str) -> list[str]:
    """Return the methods that must run before a method, in their order."""
    earlier = METHODS[method].earlier_stage
    return [*earlier_stages(earlier), earlier] if earlier else []


def train(words: list[str], folder: str) -> float:
    """Run train.py to its end, and return the loss of the last epoch."""
    run_here("train", *words, "--output-dir", folder)
    return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.keep_checkpoints")
    parser.add_argument("--method", choices=METHODS, help="write the checkpoint of this method only (default: all)")
    method = parser.parse_args().method
    target = FOLDER / f"version_{VERSION}"
    target.mkdir(exist_ok=True)
    expected = read(target)
    for name in [method] if method else METHODS:
        if name in expected:
            parser.error(f"{target / name}.pt exists; raise VERSION before you write others")
        expected[name] = keep(name, target)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def read(folder: Path) -> dict[str, dict]:
    """Return {method: flags of its run, logits of its first classifier for two images, loss of its last epoch}."""
    path = folder / "expected.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(method: str, target: Path) -> dict:
    """Write the checkpoint of a run that is stopped in its second epoch, and return what its tests expect."""
    words = flags_of(method)
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.chdir(scratch),
    ):  # the checkpoint then holds no path of ours
        for stage in earlier_stages(method):
            train(flags_of(stage), stage)
        with stopped(), contextlib.suppress(SystemExit):
            train(words, "stopped")
        kept = target / f"{method}.pt"
        shutil.move("stopped/checkpoint.pt", kept)
        loss = train(words, "whole")
    return {"flags": words, "logits": logits_of(kept), "loss": loss}


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Send this process SIGTERM in step `STOP` of a run."""
    advance, steps = logs.Progress.advance, []

    def stop_in_time(self: logs.Progress, *arguments: object) -> None:
        advance(self, *arguments)
        steps.append(None)
        if len(steps) == STOP - 1:  # the run notices it in the next step
            signal.raise_signal(signal.SIGTERM)

    logs.Progress.advance = stop_in_time
    try:
        yield
    finally:
        logs.Progress.advance = advance


if __name__ == "__main__":
    main()

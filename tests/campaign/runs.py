"""A training run that takes a tenth of a second, and the comparison of its result with that of an undisturbed run."""

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import checkpoint
from tests import processes
from tests.campaign.injection import Plan, as_arguments, run_with_fault
from tests.campaign.trials import LIMIT, judge
from tests.processes import Forked, environment, run_words

EPOCHS, STEPS = 3, 4  # of the run
processes.PRELOADED = [*dict.fromkeys([*processes.PRELOADED, "tests.campaign.warm"])]
SHARED = "CAMPAIGN_INPUTS"  # variable of the environment that names the folder of the inputs
TIMES = ("seconds", "images_per_second", "waited")  # these differ between equal runs


@cache
def inputs() -> Path:
    """Return a folder with the data set of the run. Forked processes share it; it ends with the process that made it."""
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    os.environ[SHARED] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    arrays = {f"{split}_features": rng.normal(size=(n, 16)).astype("f4") for split, n in (("train", 64), ("test", 16))}
    arrays |= {f"{split}_labels": rng.integers(0, 4, n) for split, n in (("train", 64), ("test", 16))}
    np.savez(folder / "rows.npz", **arrays)
    return folder


@cache
def intact() -> Path:
    """Return the checkpoint of a finished run, and write that of its last epoch but one beside it, as stopped.pt."""
    path = inputs() / "intact.pt"
    if not path.exists():
        target = inputs() / "intact"
        run(command(target))
        (target / "checkpoint_2.pt").replace(inputs() / "stopped.pt")  # a run continues from it with the last epoch
        (target / "checkpoint.pt").replace(path)
    return path


def command(folder: Path | str, *words: str, width: int = 64) -> list[str]:
    """Return the words of the run: `python words...`.

    Args:
        width: width of the hidden layers, which decides the size of the checkpoint.
    """
    flags = f"--arch identity --epochs {EPOCHS} --warmup-epochs 1 --classes 4 --dim 8 --hidden-dim {width} --queue-length 16"
    flags += " --batch-size 16 --save-every 1 --device cpu"
    return ["train.py", "--data", str(inputs() / "rows.npz"), *flags.split(), "--output-dir", str(folder), *words]


def start(words: list[str], plan: Plan | None = None, **environ: str) -> Forked:
    """Start a program, with a fault if there is a plan."""
    if plan is None:
        return Forked(run_words, *words, environ=environment(**environ))
    return Forked(run_with_fault, as_arguments(plan), *words, environ=environment(**environ))


def run(words: list[str], plan: Plan | None = None, **environ: str) -> subprocess.CompletedProcess:
    """Run a program to its end; it raises TimeoutExpired if the program hangs."""
    return start(words, plan, **environ).finish(LIMIT)


@cache
def reference(*words: str, width: int = 64) -> dict[str, dict[str, Any]]:
    """Return the checkpoints of an undisturbed run, {name of the file: its content}."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(command(folder, *words, width=width))
        if problem := judge(done, allowed=[0], lines=0):
            raise RuntimeError(f"the undisturbed run failed: {problem}\n{done.stderr}")
        return {path.name: checkpoint.load(path) for path in Path(folder).glob("*.pt")}


def resume(folder: Path, *words: str, width: int = 64) -> str:
    """Run the command again without a fault, and return what differs from an undisturbed run."""
    done = run(command(folder, *words, width=width))
    return judge(done, allowed=[0], lines=0) or compare(folder, reference(*words, width=width))


def compare(folder: Path, expected: dict[str, dict[str, Any]]) -> str:
    """Return what differs between the files of a finished run and those of an undisturbed one."""
    for name, content in expected.items():
        if name == "checkpoint_previous.pt":  # may belong to another step
            continue
        try:
            found = checkpoint.load(folder / name)
        except ValueError as error:
            return f"{name} is lost: {error}"
        if where := difference(found, content):
            return f"{name} differs in {where}"
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return f"metrics.jsonl cannot be read: {error}"
    history = expected["checkpoint.pt"]["history"]
    if where := difference(lines, history):
        return f"metrics.jsonl differs in {where or 'its length'}"
    try:
        starts = [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"starts.jsonl cannot be read: {error}"
    if not starts:
        return "starts.jsonl is empty"
    left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    return f"left behind: {', '.join(left)}" if left else ""


def difference(one: Any, two: Any, path: str = "content") -> str:
    """Return the path of the first entry that differs, or ""."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return "" if same else path
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return f"the names of {path}"
        names = [key for key in one if key not in (*TIMES, "revision", "output_dir")]
        return next((found for key in names if (found := difference(one[key], two[key], f"{path}.{key}"))), "")
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        if len(one) != len(two):
            return f"the length of {path}"
        pairs = enumerate(zip(one, two, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{path}[{i}]"))), "")
    return "" if type(one) is type(two) and (one == two or one != one) else path

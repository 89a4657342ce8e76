"""What tests share: golden numbers of the authors' code, small networks, and ways to run programs and ranks."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Forked, environment, finish_ranks, run_words, start_ranks

from src.config import ViewSettings

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"  # the whole collection; tests/golden holds a selection of it

torch.set_num_threads(1)  # small tensors; and processes started by tests run beside this one


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks: starts several processes (set here, on tests that use run_ranks)")


# The files that take longest, in this order. Each goes to one process whole, and the last should not be the longest.
LONGEST = (
    *("test_scripts.py", "test_slurm.py", "test_methods.py", "test_cli.py", "test_traces.py"),
    *("test_evaluation_ranks.py", "test_kmeans.py", "test_session.py", "test_pretrained.py", "test_trainer.py"),
    "test_cls_eval.py",
)


def pytest_collection_modifyitems(items):
    """Mark the tests that start ranks, and run the longest files first."""
    for item in items:
        if "run_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def find_golden(name: str, *arrays: str) -> Path | None:
    """Return the first golden file of this name that holds these arrays, or None.

    tests/golden comes first. The collection beside the repository, which is not public, comes second.
    """
    for path in (ROOT / "tests" / "golden" / name, GOLDEN / name):
        if path.exists():
            with np.load(path) as data:
                if set(arrays) <= set(data.files):
                    return path
    return None


@pytest.fixture
def golden():
    """Load a file of golden numbers that holds these arrays, or skip the test."""

    def load(name: str, *arrays: str):
        path = find_golden(name, *arrays)
        if path is None:
            wanted = f"{', '.join(arrays)} of {name}" if arrays else name
            pytest.skip(
                f"the authors' numbers are missing: {wanted} is neither in tests/golden nor in ../shared/golden"
            )
        return np.load(path)

    return load


@pytest.fixture(autouse=True)
def same_start():
    """Give every test the same random numbers, and undo what it has changed in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder, environ, threads, dtype = os.getcwd(), dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries may use it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.chdir(folder)
    if os.environ != environ:
        os.environ.clear()
        os.environ.update(environ)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if "src.locks" in sys.modules:
        sys.modules["src.locks"].release()  # folders that programs keep until their process ends


def run_as_user(*words: str | Path, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess:
    """Run one of the programs as a user does, and return its exit status, output and errors."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def run_python():
    """Run one of the programs as a user does. `run_program` is faster where the start does not matter."""
    return run_as_user


@pytest.fixture
def start_program():
    """Start one of the programs beside this process, without the seconds that the import of torch takes."""
    started = []

    def start(*words: str, **environ: str) -> Forked:
        started.append(Forked(run_words, *map(str, words), environ=environment(**environ)))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def run_program(start_program):
    """Do what `run_python` does without the seconds that the import of torch takes."""

    def run(*words: str, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess:
        return start_program(*words, **environ).finish(timeout)

    return run


@pytest.fixture
def run_ranks(tmp_path):
    """Run code in W gloo processes, each of which saves to `out / f"{rank}.pt"`, and return what they saved."""

    def run(world_size: int, code: str) -> list:
        script = tmp_path / "ranks.py"
        head = "import sys\nfrom pathlib import Path\nimport torch\nfrom src import distributed\n"
        head += f"out = Path({str(tmp_path)!r})\ndistributed.start('cpu')\nrank = distributed.rank()\n"
        script.write_text(head + textwrap.dedent(code) + "\ndistributed.stop()\n")
        for rank in finish_ranks(start_ranks(world_size, run_words, str(script))):
            assert rank.returncode == 0, rank.stderr[-3000:]
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]

    return run


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run an evaluation in this process, with its results in `tmp_path / "out"`; return them and what it printed."""
    from evaluating import read_json, run_here

    def run(program: str, *words) -> tuple[dict, str]:
        run_here(program, *words, "--output-dir", tmp_path / "out")
        return read_json(tmp_path / "out", program), capsys.readouterr().out

    return run


# settings of a run from which `build_method` makes a small network for grey images of 8 pixels
SMALL = {
    "arch": "small_convnet",
    "channels": 1,
    "global_crops_size": 8,
    "patch_size": 16,
    "global_crops_number": 2,
}


def view_settings(
    num_global: int,
    num_local: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    augment: str = "dino",
) -> ViewSettings:
    """Return the settings of views in the order in which the tests name them."""
    return ViewSettings(
        global_crops_number=num_global,
        global_crops_size=global_size,
        global_crops_scale=global_scale,
        local_crops_number=num_local,
        local_crops_size=local_size,
        local_crops_scale=local_scale,
        augment=augment,
    )

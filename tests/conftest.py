"""Shared by the tests: where golden numbers of the authors' code may lie, and a way to run W processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"

torch.set_num_threads(1)  # small tensors; and processes started by tests run beside this one


@pytest.fixture
def golden():
    """Load a file of golden numbers, or skip: they are not part of the repository."""

    def load(name: str):
        path = GOLDEN / name
        if not path.exists():
            pytest.skip(f"the authors' numbers are not here: {path.name} is looked for beside the repository")
        return np.load(path)

    return load


@pytest.fixture
def run_python():
    """Run one of the programs as a user would; returns its exit status, output and errors."""

    def run(*words: str, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def run_ranks(tmp_path, run_python):
    """Run code in W gloo processes under torchrun; each may save to `out / f"{rank}.pt"`; returns what they saved."""

    def run(world_size: int, code: str) -> list:
        script = tmp_path / "ranks.py"
        head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch\ntorch.set_num_threads(1)\n"
        head += "from pathlib import Path\nfrom src import distributed\n"
        head += f"out = Path({str(tmp_path)!r})\ndistributed.start('cpu')\nrank = distributed.rank()\n"
        script.write_text(head + textwrap.dedent(code) + "\ndistributed.stop()\n")
        done = run_python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", script)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]

    return run

"""Processes for tests, forked from a server that has imported torch: a start takes milliseconds instead of seconds.

The server imports modules and computes nothing, so that no thread exists when it forks. A forked process has its own
memory, signals, environment and output. It differs from a program that a user starts in the interpreter's start and
end alone. Every program is also started for real by at least one test.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "pytest",
    "torch",
    "torch.distributed",
    "torch.utils.tensorboard",
    "torchvision",
    "sklearn.cluster",
    "sklearn.datasets",
    "src.trainer",
    "src.run",
    "src.loading",
    "src.data.views",
    "src.evaluation.clustering",
]

_context = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the server unless it runs, with the environment of a user who asks for one thread."""
    _context.set_forkserver_preload(PRELOADED)
    environ = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(environ)


class Forked:
    """A running process.

    Args:
        function: an importable function, called with the arguments in the process.
        environ: the whole environment of the process.

    Attributes:
        pid: number of the process.
    """

    def __init__(self, function: Callable, *arguments: object, environ: Mapping[str, str]):
        _start_server()
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self._paths = [self._folder / name for name in ("stdout", "stderr")]
        for path in self._paths:
            path.touch()
        self._process = _context.Process(
            target=_run, args=(function, arguments, dict(environ), [str(path) for path in self._paths])
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        """What the process has printed so far."""
        return self._paths[0].read_text()

    @property
    def stderr(self) -> str:
        return self._paths[1].read_text()

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs. Minus the signal, if one killed it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float) -> subprocess.CompletedProcess:
        """Wait for the end. A process that runs longer than `timeout` seconds is killed.

        Raises:
            TimeoutExpired: if it was killed.
        """
        self._process.join(timeout)
        stdout, stderr, status = self.stdout, self.stderr, self._process.exitcode
        self.close()
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, stdout, stderr)
        return subprocess.CompletedProcess([], status, stdout, stderr)

    def kill(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """End the process if it still runs, and remove what it has printed."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _run(function: Callable, arguments: tuple, environ: dict[str, str], paths: list[str]) -> None:
    """Run in the new process."""
    for number, path in enumerate(paths, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", "1")))
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter, which a forked process does not come to


def run_words(*words: str) -> None:
    """Do what `python words...` does: run a file, `-m` a module, or `-c` a text."""
    sys.path.insert(0, str(ROOT))
    if words[0] == "-c":
        sys.argv = list(words[:1] + words[2:])
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with changes, and with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def start_ranks(world_size: int, function: Callable, *arguments: object) -> list[Forked]:
    """Start W processes that can meet as ranks, as under a launcher that does not end the others when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(function, *arguments, environ=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place))
        for rank in range(world_size)
    ]


def finish_ranks(ranks: list[Forked], timeout: float = 240) -> list[subprocess.CompletedProcess]:
    """Wait for all ranks; if one fails, end the others, as a launcher does, and return what all of them said."""
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        for rank in ranks:
            stack.callback(lambda rank=rank: rank.poll() is None and rank.kill())
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > end:
                break
            time.sleep(0.005)
    return [rank.finish(1) for rank in ranks]

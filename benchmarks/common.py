"""Functions that all benchmarks use: description of the machine, timing in turns, peak memory, and JSON."""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median


def machine(*packages: str) -> dict[str, str | int]:
    """Return a description of the machine: CPU, GPU if there is one, and the versions of these packages."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
    }
    if "torch" in packages:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found | {package: version(package) for package in packages}


def in_words(where: dict) -> str:
    """Return the description of the machine as text."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


def seconds_in_turns(
    sides: dict[str, Callable[[], object]],
    turns: int,
    finish: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several functions, and return the seconds of each run of each function.

    The functions run in turns, so that a busy machine slows down all of them. One additional turn at the start is a warm-up
    and is not timed.

    Args:
        sides: {name: function}.
        turns: number of timed turns.
        finish: function that waits for work in the background.
        clock: function that returns the time in seconds. `time.process_time` counts the processor time of all threads, which
            compares sides with one thread also while other programs run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            finish()
            start = clock()
            run()
            finish()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float], digits: int = 4) -> str:
    """Return the median and the range of some values as text."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def peak_memory(run: Callable[[], object]) -> int:
    """Return the largest number of bytes by which this process grows during a run. Works on Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # release memory that earlier runs freed; the run could otherwise reuse it unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="use smaller sizes, to see the table quickly")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of every run to this file")
    return made


def add_threads(made: argparse.ArgumentParser) -> None:
    """Add the flags --threads, --turns and --cpu-time."""
    made.add_argument("--turns", type=int, default=3, help="number of timed runs of every side (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="number of threads of every side (default: %(default)s)")
    made.add_argument("--cpu-time", action="store_true", help="count processor time; for one thread on a busy machine")


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line."""
    arguments = made.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        made.error(f"--json {arguments.json}: its folder does not exist; create it first")
    return arguments


def write(path: Path | None, where: dict, results: list) -> None:
    """Write a card if there is a path: the command, the commit, the date, the machine and the results."""
    if path:
        made = {"command": _command(), "commit": _commit(), "date": date.today().isoformat()}
        path.write_text(json.dumps({**made, "machine": where, "results": results}, indent=1) + "\n")


def _command() -> str:
    """Return the command of this program without `--json FILE`, and without the folders of this machine."""
    words, given = [f"benchmarks/{Path(sys.argv[0]).name}"], iter(sys.argv[1:])
    for word in given:
        if word == "--json":
            next(given, None)
        elif not word.startswith("--json="):
            words.append("FOLDER" if Path(word).is_dir() else word)
    return " ".join(["python", *words])


def _commit() -> str:
    """Return the commit of this checkout, with a "+" if the code was changed; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("rev-parse", "--short=7", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed else commit

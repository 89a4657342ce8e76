"""What the benchmarks share: the machine in words, sides that take turns, peak memory, JSON."""

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median


def machine(*packages: str) -> dict[str, str | int]:
    """CPU, GPU if there is one, and the versions of these packages."""
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
    return ", ".join(f"{name} {value}" for name, value in where.items())


def seconds_in_turns(
    sides: dict[str, Callable[[], object]], turns: int, finish: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each run of each side. They take turns, so that a busy machine slows all of them down; one turn before
    the first is not counted. `finish` waits for what runs in the background."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            finish()
            start = time.perf_counter()
            run()
            finish()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int = 4) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which this process grew at most during a run. Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier runs freed: it would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="smaller sizes, for a look at the table")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers, every run, to this file")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = made.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        made.error(f"--json {arguments.json}: its folder does not exist")
    return arguments


def write(path: Path | None, where: dict, results: list) -> None:
    if path:
        path.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")

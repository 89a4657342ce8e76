"""Row: a long training whose memory must not grow."""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.campaign.runs import start
from tests.campaign.trials import LIMIT, ROWS, Row, judge

GROWTH = 32.0  # MiB by which the second half of the samples may exceed the first one; 4 hours have 240 samples
SECONDS = 60  # between two samples
FLAGS = "--classes 10 --dim 8 --hidden-dim 16 --queue-length 512 --batch-size 256 --eval-every 5 --device cpu --epochs 1000000"


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def watch(folder: Path, samples: int) -> tuple[list[float], str]:
    """Train and sample the memory; return the samples in MiB and what went wrong."""
    process = start(["train.py", *FLAGS.split(), "--output-dir", str(folder / "run")])
    found: list[float] = []
    try:
        while len(found) < samples and process.poll() is None:
            time.sleep(SECONDS)
            found.append(resident(process.pid))
        process.send_signal(signal.SIGTERM)
        problem = judge(process.finish(LIMIT), allowed=[128 + signal.SIGTERM])
    finally:
        process.close()
    early, late = max(found[: len(found) // 2 + 1]), max(found)
    if late > early + GROWTH:
        problem = problem or f"the memory grew from {early:.0f} to {late:.0f} MiB"
    return found, problem


def _minutes(numbers: Sequence[int], seed: int, place: Path) -> Iterator[tuple[int, str]]:
    """Yield each minute of one training; a problem is told with the last one."""
    _, problem = watch(place, len(numbers))
    for number in numbers[:-1]:
        yield number, ""
    yield numbers[-1], problem


ROWS["memory-growth"] = Row(
    "memory-growth", "minutes of one training on digits whose memory is watched", 240, 0, _minutes
)

"""What a row of the campaign is, and the oracle: what a program may do after a fault.

A row tries many faults. Fault number N of a row is a function of the row, the seed and N alone, apart from what depends on
the time at which a signal arrives. A fault has survived if

- the program ended within a minute, with status 0, 1, 2, 141 or 128 plus the signal that it got;
- it printed no traceback, and a failure is one line on standard error without control characters;
- no code from a file was executed: no file of the name `CANARY` appears;
- the same command resumes, and its final state equals that of an undisturbed run bit for bit.
"""

import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CANARY = "executed"
LIMIT = 60.0  # seconds after which a program hangs
KILLED = -signal.SIGKILL
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
ANY_ENDING = (0, 1, 2, 128 + signal.SIGPIPE, *STOPPED)


class NotHere(Exception):
    """The row cannot be tried on this machine. The text says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is tried, for the table.
        count: number of faults that a full campaign tries.
        short: number of faults that the fast tests try.
        run: takes the numbers of the faults, the seed and an empty folder. It yields each number with "" if the fault
            was survived, and otherwise with what went wrong.
    """

    name: str
    what: str
    count: int
    short: int
    run: Callable[[Sequence[int], int, Path], Iterator[tuple[int, str]]]


ROWS: dict[str, Row] = {}
Fault = Callable[[Path, random.Random, int], str]


def row(what: str, *, count: int, short: int) -> Callable[[Fault], Fault]:
    """Register a function that tries one fault as a row of the table.

    The function takes an empty folder, a random generator and the number of the fault. It returns "" or what went wrong.
    """

    def register(fault: Fault) -> Fault:
        name = fault.__name__.replace("_", "-")

        def run(numbers: Sequence[int], seed: int, place: Path) -> Iterator[tuple[int, str]]:
            for number in numbers:
                folder = Path(tempfile.mkdtemp(dir=place))
                try:
                    problem = fault(folder, random.Random(f"{seed} {name} {number}"), number)
                    yield number, problem or executed(folder)
                except subprocess.TimeoutExpired as slow:
                    yield number, f"no end after {slow.timeout:g} s"
                finally:
                    remove(folder)

        ROWS[name] = Row(name, what, count, short, run)
        return fault

    return register


def remove(folder: Path) -> None:
    """Delete a folder, also one that a fault has made read-only."""
    if shutil.which("chattr"):
        subprocess.run(["chattr", "-R", "-f", "-i", str(folder)], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def executed(folder: Path) -> str:
    """Return a problem if code from a file has run."""
    return "code from a file was executed" if any(folder.rglob(CANARY)) or Path(CANARY).exists() else ""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
CRASHES = ("Traceback", "Exception ignored", "Fatal Python error", "Segmentation fault", "terminate called")


def judge(done: subprocess.CompletedProcess, *, allowed: Sequence[int] = ANY_ENDING, lines: int = 1) -> str:
    """Return what is wrong with the end of a program, or "".

    Args:
        allowed: statuses with which it may end.
        lines: largest number of lines on standard error.
    """
    text = done.stdout + done.stderr
    crash = next((word for word in CRASHES if word in text), "")
    if crash:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        return f"{crash}: {last[:300]}"
    if done.returncode not in allowed:
        return f"status {done.returncode}, expected one of {sorted(allowed)}: {done.stderr.strip()[-300:]}"
    said = done.stderr.strip().splitlines()
    if len(said) > lines:
        return f"{len(said)} lines on standard error, expected at most {lines}: {' | '.join(said)[:300]}"
    silent = done.returncode not in (0, KILLED, 128 + signal.SIGPIPE) and not done.stderr.strip()
    if silent and (done.returncode not in STOPPED or "the same command continues" not in done.stdout):
        return f"ended silently with status {done.returncode}"
    if CONTROL.search(text):
        return f"control characters in the output: {CONTROL.search(text)[0]!r} in {text[:200]!r}"
    return ""


def first(*problems: str) -> str:
    """Return the first problem."""
    return next((problem for problem in problems if problem), "")

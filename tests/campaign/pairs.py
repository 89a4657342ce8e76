"""Rows: two processes at once, as two starts on one folder or as two ranks of one run."""

import random
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from src import checkpoint
from tests.campaign.folders import copy_of_half
from tests.campaign.kills import seconds
from tests.campaign.runs import command, compare, reference, resume, start
from tests.campaign.trials import ANY_ENDING, KILLED, LIMIT, first, judge, row
from tests.processes import Forked, run_words, start_ranks

NETWORK_LINES = 40  # lines of the network library above ours


def start_both(folder: Path, words: list[list[str]], offset: float) -> list[subprocess.CompletedProcess]:
    """Start two runs on one folder and return their ends.

    Args:
        words: further flags of each run.
        offset: seconds by which the second starts later; below 0: earlier.
    """
    order = [0, 1] if offset >= 0 else [1, 0]
    processes: dict[int, Forked] = {}
    for number in order:
        processes[number] = start(command(folder, *words[number]))
        if number == order[0]:
            time.sleep(abs(offset))
    return [processes[number].finish(2 * LIMIT) for number in (0, 1)]


@row("two starts on one new, stopped or finished folder, with equal or other options", count=120, short=0)
def two_starts(folder: Path, rng: random.Random, number: int) -> str:
    state, other = ("new", "stopped", "finished")[number % 3], number // 3 % 2 == 1
    words: list[list[str]] = [[], ["--weight-decay", "0.001"] if other else []]
    target = folder / "run" if state == "new" else copy_of_half(folder)
    if state == "finished" and (problem := resume(target)):
        return problem
    both = start_both(target, words, rng.uniform(-1, 1) * rng.choice([0.02, 0.1, 0.5]) * seconds())
    problem = first(*(judge(done, allowed=[0, 1, 2]) for done in both))
    finished = [words[i] for i, done in enumerate(both) if done.returncode == 0]
    if not problem and not finished:
        problem = "neither start finished"
    if not problem and len(finished) == 2 and other:
        problem = "two starts with other options both ended with status 0"
    problem = problem or compare(target, reference(*finished[0]))
    return f"two starts on a {state} folder, options {'differ' if other else 'equal'}: {problem}" if problem else ""


def run_both_ranks(folder: Path) -> list[Forked]:
    return start_ranks(2, run_words, *command(folder))


@cache
def reference_of_ranks() -> dict:
    """Return the checkpoints of an undisturbed run of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for done in [rank.finish(LIMIT) for rank in run_both_ranks(Path(folder))]:
            if done.returncode:
                raise RuntimeError(f"the undisturbed run failed: {done.stderr}")
        return {path.name: checkpoint.load(path) for path in Path(folder).glob("*.pt")}


@cache
def seconds_of_ranks() -> float:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for rank in run_both_ranks(Path(folder)):
            rank.finish(LIMIT)
    return time.monotonic() - began


@row("one of two ranks is killed, stopped or frozen for a second at a random moment", count=40, short=0)
def lost_rank(folder: Path, rng: random.Random, number: int) -> str:
    sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])
    lost, wait = number % 2, rng.uniform(0.2, 1.0) * seconds_of_ranks()
    target = folder / "run"
    ranks = run_both_ranks(target)
    time.sleep(wait)
    if ranks[lost].poll() is None:
        ranks[lost].send_signal(sent)
        if sent == signal.SIGSTOP:
            time.sleep(1)
            ranks[lost].send_signal(signal.SIGCONT)
    ended = [rank.finish(LIMIT) for rank in ranks]
    text = f"{signal.Signals(sent).name} to rank {lost} after {wait:.2f} s"
    quiet = [*ANY_ENDING, KILLED, -signal.SIGTERM, -signal.SIGINT]
    for done in ended:
        if not done.stderr.strip():  # another rank has said why
            done.stderr = "(quiet)"
    if problem := first(*(judge(done, allowed=quiet, lines=NETWORK_LINES) for done in ended)):
        return f"{text}: {problem}"
    again = [rank.finish(LIMIT) for rank in run_both_ranks(target)]
    problem = first(*(judge(done, allowed=[0], lines=0) for done in again), compare(target, reference_of_ranks()))
    return f"{text}: resumed: {problem}" if problem else ""

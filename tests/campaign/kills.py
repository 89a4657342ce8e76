"""Rows: processes that are killed or signalled, at random moments and at exact system calls."""

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from tests.campaign.injection import Plan
from tests.campaign.runs import command, resume, run, start
from tests.campaign.trials import KILLED, LIMIT, first, judge, row
from tests.processes import ROOT, environment

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}


@cache
def calls() -> tuple[str, ...]:
    """Return the file calls of an undisturbed run in their order, each as its function and the name of the file."""
    with tempfile.TemporaryDirectory() as folder:
        target, log = Path(folder) / "run", Path(folder) / "log"
        run(command(target), Plan(str(target), log=str(log)))
        return tuple(
            re.sub(r"\.\d+\.part", ".N.part", line.replace(str(target), "")) for line in log.read_text().splitlines()
        )


@cache
def seconds() -> float:
    """Return how long an undisturbed run takes; the first one also starts the server of the forked processes."""
    found = []
    for _ in range(3):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run(command(folder))
        found.append(time.monotonic() - began)
    return min(found)


MOMENTS = ("before", "within", "after")


@row("kill -9 before, within and after each file call of a run", count=450, short=1)
def kill_at_a_call(folder: Path, rng: random.Random, number: int) -> str:
    call = (
        number // len(MOMENTS) % len(calls()) if number < len(MOMENTS) * len(calls()) else rng.randrange(len(calls()))
    )
    when = MOMENTS[number % len(MOMENTS)]
    target = folder / "run"
    done = run(command(target), Plan(str(target), call, when, signal=signal.SIGKILL))
    problem = first(judge(done, allowed=[KILLED], lines=0), resume(target))
    return f"killed {when} call {call} ({calls()[call]}): {problem}" if problem else ""


@row("kill -9 at a random moment, up to three times in one run", count=150, short=0)
def kill_at_random(folder: Path, rng: random.Random, number: int) -> str:
    for _ in range(rng.randint(1, 3)):
        wait = rng.uniform(0, 1.1 * seconds())
        process = start(command(folder / "run"))
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        if problem := judge(process.finish(LIMIT), allowed=[0, KILLED], lines=0):
            return f"killed after {wait:.3f} s: {problem}"
    problem = resume(folder / "run")
    return f"last killed after {wait:.3f} s: {problem}" if problem else ""


def stopped(done: subprocess.CompletedProcess, number: int) -> str:
    """Return what is wrong with the end of a program that got a signal and may have finished before it."""
    problem = judge(done, allowed=[0, 128 + number])
    if not problem and done.returncode and NAMES[number] not in done.stdout + done.stderr:
        return f"the output does not name {NAMES[number]}: {done.stderr.strip()[-200:]}"
    return problem


@row("SIGTERM and SIGINT before and after each file call of a run", count=300, short=1)
def signal_at_a_call(folder: Path, rng: random.Random, number: int) -> str:
    sent, when = rng.choice([*NAMES]), rng.choice(["before", "after"])
    call = number % len(calls())
    target = folder / "run"
    done = run(command(target), Plan(str(target), call, when, signal=sent))
    problem = first(stopped(done, sent), resume(target))
    return f"{NAMES[sent]} {when} call {call} ({calls()[call]}): {problem}" if problem else ""


def handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return True  # it has ended
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


@row("SIGTERM and SIGINT at a random moment after the handlers are set", count=150, short=0)
def signal_at_random(folder: Path, rng: random.Random, number: int) -> str:
    sent, wait = rng.choice([*NAMES]), rng.uniform(0, 1.1 * seconds())
    process = start(command(folder / "run"))
    while process.poll() is None and not handles(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    time.sleep(wait)
    if process.poll() is None:
        process.send_signal(sent)
    problem = first(stopped(process.finish(LIMIT), sent), resume(folder / "run"))
    return f"{NAMES[sent]} after {wait:.3f} s: {problem}" if problem else ""


@row("SIGTERM and SIGINT while `python train.py` imports its modules and starts", count=30, short=0)
def signal_at_start(folder: Path, rng: random.Random, number: int) -> str:
    sent, wait = rng.choice([*NAMES]), rng.uniform(0, 3.0)
    words = [sys.executable, *command(folder / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, env=environment(), preexec_fn=default_signals, **pipes) as process:
        while process.poll() is None and not handles(process.pid, signal.SIGTERM):
            time.sleep(0.001)  # the interpreter itself cannot answer a signal
        time.sleep(wait)
        process.send_signal(sent)
        output, errors = process.communicate(timeout=LIMIT)
    done = subprocess.CompletedProcess(words, process.returncode, output, errors)
    problem = first(stopped(done, sent), resume(folder / "run"))
    return f"{NAMES[sent]} {wait:.3f} s after the start: {problem}" if problem else ""


def default_signals() -> None:
    """Undo that a shell ignores SIGINT for its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

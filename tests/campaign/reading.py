"""Programs that read untrusted files, many files per process, with limits on time and memory.

A worker is forked, reads one file after the other with a program's `main`, and writes one line per file to a report. If
the worker dies, the file that it was reading has killed it, and another worker goes on with the next file.
"""

import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.runs import command, inputs
from tests.campaign.trials import ANY_ENDING, CANARY, LIMIT, judge
from tests.processes import Forked, environment

FILES_PER_PROCESS = 400
ALLOWED = 2**30  # bytes above twice the file's size that reading may take
ROOM = 6 * 2**30  # bytes of address space that a worker may ask for in addition; this protects the machine

Make = Callable[[random.Random, int], bytes]  # takes the number of the file


def _resume(file: Path) -> tuple[str, list[str]]:
    folder = file.with_name(f"{file.name}.run")
    folder.mkdir()
    shutil.copyfile(file, folder / "checkpoint.pt")
    return "train", command(folder)[1:]


def _evaluate(program: str, *words: str) -> Callable[[Path], tuple[str, list[str]]]:
    def reader(file: Path) -> tuple[str, list[str]]:
        out = str(file.with_name(f"{file.name}.out"))
        return program, ["--checkpoint", str(file), "--device", "cpu", "--output-dir", out, *words]

    return reader


def _evaluate_packed(file: Path) -> tuple[str, list[str]]:
    return _evaluate("cls_eval", "--data", str(inputs() / "rows.npz"))(file.rename(file.with_suffix(".safetensors")))


READERS: dict[str, Callable[[Path], tuple[str, list[str]]]] = {  # file → program and its words
    "train.py resuming": _resume,
    "train.py --pretrained": lambda file: ("train", command(f"{file}.run", "--pretrained", str(file))[1:]),
    "cls_eval.py": _evaluate("cls_eval", "--data", str(inputs() / "rows.npz")),
    "knn_eval.py": _evaluate("knn_eval", "--data", str(inputs() / "rows.npz")),
    "lincls_eval.py": _evaluate("lincls_eval", "--data", str(inputs() / "rows.npz"), "--epochs", "1"),
    "cls_eval.py as safetensors": _evaluate_packed,
    "export": lambda file: ("src.pretrained", ["export", str(file), f"{file}.pth"]),
}


def read_files(reader: str, maker: str, numbers: Sequence[int], seed: int, place: Path) -> Iterator[tuple[int, str]]:
    """Read files with a program, and yield the number of each file with "" or what went wrong.

    Args:
        reader: name in `READERS`.
        maker: function that makes the files, as "module:name". It takes a random generator and the number.
    """
    left = list(numbers)
    report = place / "report"
    while left:
        report.write_text("")
        batch, told = left[:FILES_PER_PROCESS], 0
        worker = Forked(_work, reader, maker, batch, seed, str(place), environ=environment())
        try:
            while told < len(batch):
                status = worker.poll()  # first: after it has ended, the worker writes no more lines
                lines = report.read_text().splitlines()
                for line in map(json.loads, lines[told:]):
                    yield line["number"], line["problem"]
                told = len(lines)
                if status is not None:
                    break
                time.sleep(0.05)
            status, errors = worker.poll(), worker.stderr
        finally:
            worker.close()
        left = left[told:]
        if told < len(batch):
            hang = status == -signal.SIGALRM
            what = (
                f"no end after {LIMIT:g} s"
                if hang
                else f"the process died with status {status}: {errors.strip()[-200:]}"
            )
            yield left[0], what
            left = left[1:]


def _work(reader: str, maker: str, numbers: list[int], seed: int, place: str) -> None:
    """Read the files in a worker."""
    module, _, name = maker.partition(":")
    make: Make = getattr(importlib.import_module(module), name)
    folder = Path(place) / "files"
    canary = Path(CANARY).absolute()
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the worker, also inside C code
    gc.freeze()  # a collection does not look at what the server has imported
    for number in numbers:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        file = folder / "file.pt"
        file.write_bytes(make(random.Random(f"{seed} {maker} {number}"), number))
        gc.collect()
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        problem = _read(reader, file, Path(place) / "said")
        signal.setitimer(signal.ITIMER_REAL, 0)
        if canary.exists() or any(folder.rglob(CANARY)):
            problem = "code from the file was executed"
            canary.unlink(missing_ok=True)
        with open(Path(place) / "report", "a") as report:
            report.write(json.dumps({"number": number, "problem": problem}) + "\n")


def _memory(name: str) -> int:
    """Return the resident memory (VmRSS) or its peak (VmHWM) in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _read(reader: str, file: Path, said: Path) -> str:
    """Run the program on one file in this process, and return what went wrong."""
    size = file.stat().st_size
    program, words = READERS[reader](file)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _memory("VmRSS")
    status, output, errors = _run_main(program, words, said)
    grown, allowed = _memory("VmHWM") - before, 2 * size + ALLOWED
    problem = judge(subprocess.CompletedProcess([], status, output, errors), allowed=ANY_ENDING)
    if problem:
        return problem
    if grown > allowed:
        return f"{grown / 2**20:.0f} MiB of memory for a file of {size / 2**20:.1f} MiB"
    if re.search(r"allocate|MemoryError|out of memory", output + errors):
        return f"more memory was asked for than the file can need: {errors.strip()[-300:]}"
    return ""


def _run_main(program: str, words: list[str], said: Path) -> tuple[int, str, str]:
    """Run the `main` of a program and return its status, output and errors."""
    from src import locks
    from src.errors import run_script

    module = importlib.import_module(program)
    streams = [os.open(f"{said}.{i}", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for i in (1, 2)]
    kept = [os.dup(i) for i in (1, 2)]
    for i, stream in enumerate(streams, start=1):
        os.dup2(stream, i)
    sys.argv = [program, *words]
    status: Any = 0
    try:
        run_script(module.main)
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    for i, stream in enumerate(kept, start=1):
        os.dup2(stream, i)
    output, errors = (Path(f"{said}.{i}").read_text(errors="replace") for i in (1, 2))
    for number in (*streams, *kept):
        os.close(number)
    locks.release()
    return int(status or 0), output, errors

"""Rows: disks that are full or fail."""

import errno
import os
import random
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.campaign.injection import Plan
from tests.campaign.kills import calls
from tests.campaign.runs import EPOCHS, command, resume, run
from tests.campaign.trials import NotHere, first, judge, row

KILOBYTE = 1024
PAGE = 4096
WIDE = 320  # width of the hidden layers with which a checkpoint has about 100 kB
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EPERM", "ESTALE", "ENOENT", "EFBIG", "EMFILE", "ENOLCK")


def failed(done: subprocess.CompletedProcess) -> str:
    """Return what is wrong with the end of a program whose disk failed: it may have worked around it."""
    return judge(done, allowed=[0, 1, 2])


@cache
def size_of_checkpoint() -> int:
    """Return the size of the wide run's checkpoint in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run(command(folder, width=WIDE))
        return (Path(folder) / "checkpoint.pt").stat().st_size


@row("disk full after each kilobyte from 0 to twice the size of a checkpoint, in each epoch", count=600, short=1)
def disk_full_at_a_kilobyte(folder: Path, rng: random.Random, number: int) -> str:
    within = number * KILOBYTE % (2 * size_of_checkpoint())  # a checkpoint, and the one that is kept
    room = within + number * KILOBYTE // (2 * size_of_checkpoint()) % EPOCHS * 2 * size_of_checkpoint()
    target = folder / "run"
    done = run(command(target, width=WIDE), Plan(str(target), room=room))
    problem = first(failed(done), resume(target, width=WIDE))
    return f"disk full after {room} bytes: {problem}" if problem else ""


@row("a tmpfs of each size, in pages of 4 kB, that the run fills", count=150, short=1)
def full_tmpfs(folder: Path, rng: random.Random, number: int) -> str:
    if os.geteuid():
        raise NotHere("a tmpfs needs root")
    whole = (EPOCHS + 3) * size_of_checkpoint() // PAGE  # all files of a run
    pages = 1 + number % whole
    target = folder / "disk"
    target.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "campaign", str(target)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise NotHere("this machine mounts no tmpfs")
    try:
        done = run(command(target / "run", width=WIDE))
        subprocess.run(["mount", "-o", f"remount,size={64 << 20}", str(target)], check=True, capture_output=True)
        problem = first(failed(done), resume(target / "run", width=WIDE))
        return f"a disk of {pages} pages: {problem}" if problem else ""
    finally:
        subprocess.run(["umount", str(target)], check=True, capture_output=True)


@row("each file call of a run fails, once or from then on, with one of 11 errors", count=450, short=1)
def failing_call(folder: Path, rng: random.Random, number: int) -> str:
    name, on = rng.choice(ERRORS), rng.random() < 0.5
    call, when = number % len(calls()), rng.choice(["before", "within"])
    target = folder / "run"
    plan = Plan(str(target), call, when, error=getattr(errno, name), keeps_failing=on)
    done = run(command(target), plan)
    problem = first(failed(done), resume(target))
    return f"{name} {when} call {call} ({calls()[call]}{', from then on' if on else ''}): {problem}" if problem else ""


@row("a limit on the size of a file (RLIMIT_FSIZE) at each kilobyte of a checkpoint from 8 kB on", count=100, short=0)
def limited_file_size(folder: Path, rng: random.Random, number: int) -> str:
    limit = (8 + number) * KILOBYTE % size_of_checkpoint()  # standard output is a file too, of less than 8 kB
    words = command(folder / "run", width=WIDE)
    code = f"import resource, sys; sys.path.insert(0, '.'); resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1));"
    code += f"sys.argv = {words!r}; import runpy; runpy.run_path('train.py', run_name='__main__')"
    done = run(["-c", code])
    problem = first(failed(done), resume(folder / "run", width=WIDE))
    return f"files of at most {limit} bytes: {problem}" if problem else ""

"""Rows: folders that vanish or become read-only, names that are taken, and files of a run that are damaged."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.campaign.injection import Plan
from tests.campaign.kills import calls
from tests.campaign.runs import command, compare, reference, resume, run
from tests.campaign.trials import NotHere, first, judge, row

FAILED = (0, 1, 2)


@cache
def half() -> Path:
    """Return the folder of a run that was stopped in its third epoch. Its user copies it."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-half-")) / "run"
    saved = [i for i, line in enumerate(calls()) if line.startswith("replace /.checkpoint.pt")]
    plan = Plan(str(folder), saved[1], "after", signal=signal.SIGTERM)
    run(command(folder), plan)
    if not (folder / "checkpoint_previous.pt").exists():
        raise RuntimeError("the run was not stopped after two checkpoints")
    return folder


def copy_of_half(folder: Path) -> Path:
    """Return a copy of the stopped run in a folder."""
    return Path(shutil.copytree(half(), folder / "run"))


CHANGES = {  # of the folder {0}: what happens, and what undoes it
    "made immutable": ("chattr +i {0}", "chattr -i {0}"),
    "made immutable with its files": ("chattr -R +i {0}", "chattr -R -i {0}"),
    "made append-only": ("chattr +a {0}", "chattr -a {0}"),
    "mounted read-only": ("mount --bind {0} {0} && mount -o remount,bind,ro {0}", "umount {0}"),
    "deleted": ("rm -rf {0}", ""),
    "renamed": ("mv {0} {0}.moved", "rm -rf {0}; mv {0}.moved {0}"),
    "replaced by a file": ("mv {0} {0}.moved; touch {0}", "rm -rf {0}; mv {0}.moved {0}"),
    "replaced by another folder": ("mv {0} {0}.moved; mkdir {0}", "rm -rf {0}; mv {0}.moved {0}"),
    "replaced by a link to nothing": ("mv {0} {0}.moved; ln -s nothing {0}", "rm -rf {0}; mv {0}.moved {0}"),
}


@row("the folder of a run becomes read-only, vanishes or is replaced at a file call", count=270, short=1)
def changed_folder(folder: Path, rng: random.Random, number: int) -> str:
    if os.geteuid() or not shutil.which("chattr"):
        raise NotHere("immutable folders and mounts need root and chattr")
    what = [*CHANGES][number % len(CHANGES)]
    call = rng.randrange(len(calls()))
    target = folder / "run"
    before, after = (text.format(target) for text in CHANGES[what])
    done = run(command(target), Plan(str(target), call, rng.choice(["before", "after"]), shell=before))
    if after:
        subprocess.run(["sh", "-c", after], capture_output=True)
    problem = first(judge(done, allowed=FAILED), resume(target))
    return f"folder {what} at call {call} ({calls()[call]}): {problem}" if problem else ""


NAMES = (
    *("checkpoint.pt", "checkpoint_previous.pt", ".checkpoint.pt.part", ".checkpoint_previous.pt.part"),
    *("checkpoint_1.pt", "checkpoint_3.pt", ".checkpoint_3.pt.part", "checkpoint_damaged.pt"),
    *("metrics.jsonl", ".metrics.jsonl.part", "config.json", ".config.json.part", ".lock"),
)
SECRET = "a file of the user outside of the run\n"


def occupy(path: Path, kind: str, outside: Path) -> None:
    """Put something else under the name of a file of a run."""
    if path.is_file():
        path.unlink()
    if "folder" in kind:
        path.mkdir()
    if kind == "folder with a file":
        (path / "file").write_text("text")
    if kind == "named pipe":
        os.mkfifo(path)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{os.open(path.parent, os.O_RDONLY)}/{path.name}")
    links = {"link to a file": str(outside), "link to nothing": "nothing", "link to itself": path.name}
    links |= {"link to a full disk": "/dev/full", "link to the terminal": "/dev/tty", "link to zeros": "/dev/zero"}
    if kind in links:
        path.symlink_to(links[kind])


KINDS = (
    *("folder", "folder with a file", "named pipe", "socket", "link to a file", "link to nothing", "link to itself"),
    *("link to a full disk", "link to zeros", "empty file"),
)


@row("a folder, pipe, socket or link under the name of each file of a run, new or stopped", count=260, short=1)
def occupied_name(folder: Path, rng: random.Random, number: int) -> str:
    pairs = len(NAMES) * len(KINDS)
    name, kind = NAMES[number % len(NAMES)], KINDS[number // len(NAMES) % len(KINDS)]
    new = number // pairs % 2 == 0
    target = folder / "run" if new else copy_of_half(folder)
    target.mkdir(exist_ok=True)
    outside = folder / "outside"
    outside.write_text(SECRET)
    occupy(target / name, kind, outside)
    if kind == "empty file":
        (target / name).write_bytes(b"")
    done = run(command(target))
    problem = judge(done, allowed=FAILED, lines=1)
    if not problem and outside.read_text() != SECRET:
        problem = "a file outside of the run was overwritten through a link"
    if (target / name).is_symlink() or not (target / name).is_file():
        if (target / name).is_dir() and not (target / name).is_symlink():
            shutil.rmtree(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    elif kind == "empty file" and done.returncode:
        (target / name).unlink()
    problem = first(problem, resume(target))
    return f"{kind} called {name} in a {'new' if new else 'stopped'} run: {problem}" if problem else ""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file as a crash, a bad disk or an editor leaves it."""
    at = rng.randrange(len(content) + 1)
    kind = rng.randrange(9)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes(len(content) - at)  # a file system may restore the length, but not the content
    if kind == 2:
        return content + bytes(rng.randrange(1, 5000))
    if kind == 3:
        return rng.randbytes(len(content))
    if kind == 4:
        return content[:at] + rng.randbytes(16) + content[at:]
    if kind == 5:
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 6:
        return content + content[:at]
    if kind == 7:
        return rng.choice(
            [b"", b"\n", b"[]\n", b"null\n", b'"text"\n', b"{}\n", b"1e999\n", b"\xff\xfe", b"[" * 100000]
        )
    return content[at:]


@row(
    "metrics.jsonl of a stopped run cut at any byte, with zeros, binary, of other JSON, or missing", count=150, short=2
)
def damaged_log(folder: Path, rng: random.Random, number: int) -> str:
    target = copy_of_half(folder)
    log = target / "metrics.jsonl"
    content = log.read_bytes()
    if number % 10 == 9:
        log.unlink()
    else:
        log.write_bytes(content[: number * 7 % len(content)] if number % 2 else damaged(content, rng))
    return resume(target)


@row(
    "checkpoints of a stopped run cut, flipped, zeroed or missing: the last, the one before, or both",
    count=150,
    short=2,
)
def damaged_checkpoint(folder: Path, rng: random.Random, number: int) -> str:
    target = copy_of_half(folder)
    names = (("checkpoint.pt",), ("checkpoint_previous.pt",), ("checkpoint.pt", "checkpoint_previous.pt"))[number % 3]
    for name in names:
        changed = damaged((target / name).read_bytes(), rng)
        (target / name).write_bytes(changed)
        if rng.random() < 0.1:
            (target / name).unlink()
    done = run(command(target))
    problem = judge(done, allowed=[0] if len(names) == 1 else [0, 2])
    if not problem and not done.returncode:
        problem = compare(target, reference())
    elif not problem:
        for name in names:
            (target / name).unlink(missing_ok=True)
        problem = resume(target)
    return f"damaged {' and '.join(names)}: {problem}" if problem else ""

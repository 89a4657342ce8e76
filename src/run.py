"""The folder of one run: configuration, checkpoints, one line per epoch. It is written by rank 0 only."""

import fcntl
import os
import shutil
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

from . import checkpoint, distributed
from .config import FREE_TO_CHANGE, InputError, flag
from .logs import EpochLog, write_json
from .trainer import Trainer

LAST, BEFORE, DAMAGED = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_damaged.pt"
SECONDS_TO_LEAVE = 100.0  # a network disk gives up the locks of a host that died after some 90
_held: dict[Path, TextIO] = {}  # by this process


def choose_folder(output_dir: str, fresh: bool, name: str) -> Path:
    """Where a run lives: `--output-dir`, with `--fresh` the first free name beside it, or a new dated folder in `runs/`.

    Nothing is created yet. Raises InputError if the folder could not be written.
    """
    if not output_dir:
        folder = _first_free(Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
    else:
        folder = _first_free(Path(output_dir)) if fresh else Path(output_dir)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--output-dir {folder}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output-dir {folder}: no permission to write in {existing}")
    return folder


def results_folder(checkpoint: str, output_dir: str, below: str = "") -> Path:
    """Where an evaluation writes: `--output-dir`, else `below` the checkpoint's folder, of a released model's name runs/NAME."""
    given = Path(checkpoint)
    beside = given.parent if given.is_file() else Path("runs") / given.name
    return choose_folder(output_dir or str(beside / below), False, "")


def make_folder(folder: Path) -> None:
    """Create a folder for results. Raises InputError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: cannot be created ({error.strerror}); give another") from None


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def find_checkpoint(folder: Path, config: dict) -> dict | None:
    """The checkpoint to continue from, if the folder holds one. Where the last one is gone or damaged, as a network disk can
    leave a file that was written whole, the one before is taken, which is said.

    Raises:
        InputError: if it belongs to a run with other options, which are named; if none can be read; if the ranks do not find the
            same one.
    """
    if distributed.is_main() and folder.is_dir():
        _hold(folder)
    state = _read_checkpoint(folder, config)
    steps = distributed.from_all(None if state is None else (state["epoch"], state["done"]))
    for rank, step in enumerate(steps):
        if step != steps[0]:
            found = ["none" if at is None else f"one of epoch {at[0]}, step {at[1]}" for at in (steps[0], step)]
            raise InputError(
                f"{folder} is not the same for all ranks: of checkpoints, rank 0 finds {found[0]}, rank {rank} {found[1]}; "
                "--output-dir must lie on a disk that all hosts share"
            )
    return state


def _hold(folder: Path) -> None:
    """Keep other runs out of a folder for as long as this process lives.

    One that is there is given some time to leave: the job that this one continues may have ended with its host.

    Raises:
        InputError: if it does not, with its process, host and job; or if nothing can be written there.
    """
    if folder in _held:
        return
    try:
        file = open(folder / ".lock", "a+")  # noqa: SIM115  it stays open
    except OSError as error:
        raise InputError(f"--output-dir {folder}: cannot be written ({error.strerror}); give another") from None
    began, told = time.monotonic(), False
    while not _lock(file):
        file.seek(0)
        other = file.read().strip()
        if time.monotonic() - began >= SECONDS_TO_LEAVE:
            file.close()
            raise InputError(
                f"--output-dir {folder}: another run is writing there ({other}): give another folder, or end that run"
            )
        if not told:
            print(f"{folder}: waiting for the run that is writing there ({other}) to leave", flush=True)
        told = True
        time.sleep(1)
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else ""))
    file.flush()
    _held[folder] = file


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system can; then nothing is kept out
        pass
    return True


def _read_checkpoint(folder: Path, config: dict) -> dict | None:
    last, previous = folder / LAST, folder / BEFORE
    if last.is_dir():
        raise InputError(f"{last} is a folder, expected a checkpoint: move it away")
    if not last.exists() and not previous.exists():
        return None
    try:
        state = checkpoint.load(last)
    except InputError as damage:
        if not previous.exists():
            raise InputError(f"{damage}; delete it to start over, or give --fresh") from None
        state = checkpoint.load(previous)
        if distributed.is_main():
            print(f"{damage}; going on from the one before it, {BEFORE}", flush=True)
        state["fell_back"] = True
    before = state["config"]
    if before.get("method") != config.get("method"):
        raise InputError(
            f"{folder} holds a run of --method {before.get('method')}: give another --output-dir, or --fresh"
        )
    differing = [
        f"{flag(name)} {before.get(name)} (now {config.get(name)})"
        for name in sorted(before.keys() | config.keys())
        if name not in FREE_TO_CHANGE and before.get(name) != config.get(name)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with other options: {', '.join(differing)}; give the same, another --output-dir, or --fresh"
        )
    return state


def _keep(last: Path, before: Path) -> None:
    """Give the last checkpoint a second name, under which it stays when the next one replaces it."""
    if not last.exists():
        return
    aside = before.with_name(f".{before.name}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(last, aside)
    except OSError:  # not every file system has links
        shutil.copyfile(last, aside)
    os.replace(aside, before)


class Run:
    """Saves and logs one run.

    Attributes:
        history: the summaries of the finished epochs.
    """

    def __init__(self, folder: Path, config: dict, found: dict | None, save_every: int):
        self.folder, self.config, self.save_every = folder, config, save_every
        self.history: list[dict] = found["history"] if found else []
        self.revision = checkpoint.code_revision()
        self.log = None
        if distributed.is_main():
            make_folder(folder)
            _hold(folder)
            if found and found.get("fell_back") and (folder / LAST).exists():
                os.replace(folder / LAST, folder / DAMAGED)  # else it would take the place of the good one
            write_json(folder / "config.json", config)
            self.log = EpochLog(folder)
            self.log.keep_until(len(self.history))

    def finish_epoch(self, trainer: Trainer, summary: dict) -> None:
        """Record an epoch's summary and save."""
        self.history.append(summary)
        if self.log:
            self.log.write(summary)
        self.save(trainer)
        if self.log and (trainer.epoch % self.save_every == 0):
            shutil.copyfile(self.folder / LAST, self.folder / f"checkpoint_{trainer.epoch}.pt")

    def save(self, trainer: Trainer) -> None:
        """Write the last checkpoint. To be called on all ranks."""
        state = {"config": self.config, "history": self.history, "revision": self.revision, **trainer.state_dict()}
        if distributed.is_main():
            _keep(self.folder / LAST, self.folder / BEFORE)
            checkpoint.save(self.folder / LAST, state)
        distributed.barrier()

    def close(self) -> None:
        if self.log:
            self.log.close()

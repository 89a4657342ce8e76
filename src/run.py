"""The folder of a run: configuration, checkpoints, and one line per epoch. Only rank 0 writes into it."""

import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import checkpoint, distributed
from .config import FREE_TO_CHANGE, flag
from .errors import InputError, drop_output, printable
from .logs import EpochLog, Progress, write_json
from .stopping import Interrupted
from .trainer import Trainer

SECONDS_TO_LEAVE = 100.0  # when a host dies, a network disk releases its locks after about 90 seconds
_held: dict[Path, TextIO] = {}  # the lock files that this process holds


def choose_folder(output_dir: str, *, fresh: bool, name: str) -> Path:
    """Return the folder of a run; nothing is created yet.

    Args:
        output_dir: the folder; "": a new dated folder in `runs/`.
        fresh: return the first unused name beside `output_dir` instead.
        name: last part of the name of a dated folder.

    Raises:
        InputError: if the folder cannot be examined or written.
    """
    folder = Path(output_dir or Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
    try:
        if fresh or not output_dir:
            folder = _first_free(folder)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        is_folder, is_writable = existing.is_dir(), os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        raise _unusable(folder, "cannot be examined", error) from None
    if not is_folder:
        raise InputError(f"--output-dir {folder}: {existing} is a file, expected a folder")
    if not is_writable:
        raise InputError(f"--output-dir {folder}: no permission to write in {existing}; give another folder")
    return folder


def results_folder(checkpoint: str, *, output_dir: str, below: str = "") -> Path:
    """Return the folder for the results of an evaluation; nothing is created yet.

    It is `output_dir` if that is given, otherwise the subfolder `below` of the checkpoint's folder. For a released model
    that is given by its name, it is the subfolder `below` of runs/NAME.

    Raises:
        InputError: if the folder cannot be examined or written.
    """
    if not output_dir:
        given = Path(checkpoint)
        try:
            beside = given if given.is_dir() else given.parent if given.is_file() else Path("runs") / given.name
        except OSError as error:
            raise InputError(
                f"--checkpoint {given}: cannot be examined ({error.strerror}); give another path"
            ) from None
        output_dir = str(beside / below)
    return choose_folder(output_dir, fresh=False, name="")


def make_folder(folder: Path) -> None:
    """Create a folder for results. Raises InputError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, "cannot be created", error) from None


def _unusable(folder: Path, what: str, error: OSError) -> InputError:
    return InputError(f"--output-dir {folder}: {what} ({error.strerror}); give another folder")


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def find_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    name: str = "checkpoint",
    irrelevant: Collection[str] = (),
    replace_finished: bool = False,
) -> dict[str, Any] | None:
    """Return the checkpoint from which a run continues, or None if the folder holds no checkpoint.

    If the last checkpoint is missing or damaged, for example on a failing network disk, the function returns the previous
    one and prints a line.

    Args:
        config: the configuration of this run. It must equal that of the checkpoint, apart from `FREE_TO_CHANGE`.
        name: name of the checkpoint file without its suffix.
        irrelevant: further options that may differ.
        replace_finished: return None instead of raising if a finished run with other options is found.

    Raises:
        InputError: if the checkpoint belongs to a run with other options (the message names them), if no checkpoint can be
            read, or if the ranks find different checkpoints.
    """
    if distributed.is_main() and folder.is_dir():
        _hold(folder, name)
    state = _read_checkpoint(folder, name)
    if state is not None:
        differing = _differing(state["config"], config, FREE_TO_CHANGE | set(irrelevant))
        finished = state["epoch"] == state["config"].get("epochs")
        if differing and replace_finished and finished:
            state = None
        elif differing:
            _refuse(folder, name, before=state["config"], now=config, differing=differing)
    steps = distributed.from_all(None if state is None else (state["epoch"], state["done"]))
    for rank, step in enumerate(steps):
        if step != steps[0]:
            found = ["no checkpoint" if at is None else f"epoch {at[0]}, step {at[1]}" for at in (steps[0], step)]
            raise InputError(
                f"{folder} differs between ranks: rank 0 finds {found[0]}, rank {rank} finds {found[1]}; "
                "--output-dir must be on a disk that all hosts share"
            )
    return state


def _differing(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> list[str]:
    """Return the names of the options that differ."""
    return [
        name for name in sorted(before.keys() | now.keys()) if name not in free and before.get(name) != now.get(name)
    ]


def _refuse(folder: Path, name: str, *, before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> NoReturn:
    if "method" in differing:
        raise InputError(
            f"{folder} holds a run of --method {before.get('method')}: give another --output-dir, or give --fresh"
        )
    options = ", ".join(f"{flag(option)} {before.get(option)} (now {now.get(option)})" for option in differing)
    if name != "checkpoint":
        raise InputError(
            f"{folder} holds an unfinished probe with other options: {options}; "
            "give the same options or another --output-dir, or discard it with --fresh"
        )
    raise InputError(
        f"{folder} holds a run with other options: {options}; "
        "give the same options or another --output-dir, or give --fresh"
    )


def _hold(folder: Path, name: str = "checkpoint") -> None:
    """Lock a folder for as long as this process lives.

    If another run holds the lock, wait up to `SECONDS_TO_LEAVE` seconds: when the host of an earlier job dies, its lock
    stays for a while.

    Raises:
        InputError: if the other run keeps the lock (the message names its process, host and job), or if the folder cannot be
            written.
    """
    lock = folder / (
        ".lock" if name == "checkpoint" else f".{name}.lock"
    )  # a probe may run at the same time as training
    if lock in _held:
        return
    try:
        file = open(lock, "a+")  # noqa: SIM115  closing the file would release the lock
    except OSError as error:
        raise _unusable(folder, "cannot be written", error) from None
    began, told = time.monotonic(), False
    while not _lock(file):
        file.seek(0)
        other = file.read().strip()
        if time.monotonic() - began >= SECONDS_TO_LEAVE:
            file.close()
            raise InputError(
                f"--output-dir {folder}: another run is writing there ({other}); give another folder, or end that run"
            )
        if not told:
            print(f"{printable(folder)}: waiting for another run to end ({printable(other)})", flush=True)
        told = True
        time.sleep(1)
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else ""))
    file.flush()
    _held[lock] = file


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks; go on without one
        pass
    return True


def _read_checkpoint(folder: Path, name: str) -> dict[str, Any] | None:
    last, previous = folder / f"{name}.pt", folder / f"{name}_previous.pt"
    if last.is_dir():
        raise InputError(f"{last} is a folder, expected a checkpoint: move the folder away")
    if not last.exists() and not previous.exists():
        return None
    try:
        return checkpoint.load_run(last)
    except InputError as damage:
        if not previous.exists():
            raise InputError(f"{damage}; delete the file to start over, or give --fresh") from None
        state = checkpoint.load_run(previous)
        if distributed.is_main():
            print(f"{printable(damage)}; resuming from the previous checkpoint, {previous.name}", flush=True)
        state["fell_back"] = True
        return state


def _keep(last: Path, before: Path) -> None:
    """Give the last checkpoint a second name, so that it remains when the next checkpoint replaces it."""
    if not last.exists():
        return
    aside = before.with_name(f".{before.name}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(last, aside)
    except OSError:  # this file system has no links
        shutil.copyfile(last, aside)
    os.replace(aside, before)


class Run:
    """Saves and logs one run, on rank 0.

    Args:
        found: the checkpoint that `find_checkpoint` returned.
        save_every: epochs between the checkpoints that are kept; 0: keep only the last checkpoint.
        name: name of the checkpoint file without its suffix.
        log: also write config.json, metrics.jsonl and TensorBoard events.

    Attributes:
        history: the summaries of the finished epochs.
        revision: the revision of the code.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        found: dict[str, Any] | None,
        *,
        save_every: int = 0,
        name: str = "checkpoint",
        log: bool = True,
    ):
        self.folder, self.config, self.save_every, self.name = folder, config, save_every, name
        self.history: list[dict[str, Any]] = found["history"] if found else []
        self.revision = checkpoint.code_revision()
        self.log = None
        if not distributed.is_main():
            return
        make_folder(folder)
        _hold(folder, name)
        if found and found.get("fell_back") and self.last.exists():
            os.replace(self.last, folder / f"{name}_damaged.pt")  # otherwise `_keep` would copy it over the good one
        if log:
            write_json(folder / "config.json", config)
            self.log = EpochLog(folder)
            self.log.keep_until(len(self.history))

    @property
    def last(self) -> Path:
        """The file of the last checkpoint."""
        return self.folder / f"{self.name}.pt"

    def train(
        self,
        trainer: Trainer,
        epochs: int,
        progress: Progress,
        *,
        score: Callable[[dict[str, Any]], dict[str, Any]],
        comment: Callable[[dict[str, Any]], Iterable[str]] = lambda summary: (),
    ) -> None:
        """Train until `epochs` epochs are finished, and save after each epoch.

        If SIGINT or SIGTERM asks the run to stop, or if standard output is closed, it stops after the current step and saves.

        Args:
            score: takes the summary of an epoch and returns further numbers for it.
            comment: takes the summary with these numbers and returns lines for the log.

        Raises:
            SystemExit: 128 + the signal, after saving; the signal is SIGPIPE if standard output was closed.
        """
        request = trainer.stop_request
        request.listen()

        def output_closed() -> None:
            drop_output()
            request.ask(signal.SIGPIPE)

        progress.when_closed = output_closed
        try:
            while trainer.epoch < epochs:
                summary = trainer.train_epoch(progress)
                summary |= score(summary)
                self.finish_epoch(trainer, summary)
                advice = trainer.loader.advice(summary) if trainer.epoch == 1 else ""
                for line in (trainer.method.diagnose(self.history), advice, *comment(summary)):
                    if line:
                        progress.say(line)
        except Interrupted as stopped:
            self.save(trainer)
            line = (
                f"{stopped}: saved {printable(self.last)} at step {trainer.step}; the same command continues from there"
            )
            if stopped.signal == signal.SIGPIPE and progress.enabled:
                print(line, file=sys.stderr)
            progress.say(line)
            raise SystemExit(128 + stopped.signal) from None
        finally:
            trainer.loader.close()
            progress.close()
            progress.when_closed = None
            if self.log:
                self.log.close()

    def finish_epoch(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        """Record the summary of an epoch and save the checkpoint."""
        self.history.append(summary)
        if self.log:
            self.log.write(summary)
        self.save(trainer)
        if distributed.is_main() and self.save_every and trainer.epoch % self.save_every == 0:
            shutil.copyfile(self.last, self.folder / f"{self.name}_{trainer.epoch}.pt")

    def save(self, trainer: Trainer, *, extra: str = "") -> None:
        """Write the last checkpoint, or with `extra` another file of this name. All ranks must call it."""
        state = {"config": self.config, "history": self.history, "revision": self.revision, **trainer.state_dict()}
        if distributed.is_main():
            if not extra:
                _keep(self.last, self.folder / f"{self.name}_previous.pt")
            checkpoint.save(self.folder / extra if extra else self.last, state)
        distributed.barrier()

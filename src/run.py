"""The folder of one run: configuration, checkpoints, one line per epoch. It is written by rank 0 only."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import checkpoint, distributed
from .config import FREE_TO_CHANGE, flag
from .errors import InputError
from .logs import EpochLog, Progress, write_json
from .stopping import Interrupted
from .trainer import Trainer

SECONDS_TO_LEAVE = 100.0  # a network disk gives up the locks of a host that died after some 90
_held: dict[Path, TextIO] = {}  # by this process


def choose_folder(output_dir: str, *, fresh: bool, name: str) -> Path:
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


def results_folder(checkpoint: str, *, output_dir: str, below: str = "") -> Path:
    """Return where an evaluation writes: `--output-dir`, else `below` the checkpoint's folder, or runs/NAME.

    The last is for a released model that was given by its NAME.
    """
    given = Path(checkpoint)
    beside = given if given.is_dir() else given.parent if given.is_file() else Path("runs") / given.name
    return choose_folder(output_dir or str(beside / below), fresh=False, name="")


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


def find_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    name: str = "checkpoint",
    irrelevant: Collection[str] = (),
    replace_finished: bool = False,
) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, if the folder holds one.

    If the last one is gone or damaged, as on a failing network disk, the one before is taken, and a line says so.

    Args:
        config: the configuration of this run; it must be that of the checkpoint, apart from `FREE_TO_CHANGE`.
        name: of the checkpoint's file, without its suffix.
        irrelevant: more options that may differ.
        replace_finished: start anew, instead of an error, if a finished run with other options is found.

    Raises:
        InputError: if it belongs to a run with other options, which are named; if none can be read; if the ranks do not
            find the same one.
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
            found = ["none" if at is None else f"one of epoch {at[0]}, step {at[1]}" for at in (steps[0], step)]
            raise InputError(
                f"{folder} is not the same for all ranks: of checkpoints, rank 0 finds {found[0]}, rank {rank} {found[1]}; "
                "--output-dir must lie on a disk that all hosts share"
            )
    return state


def _differing(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> list[str]:
    """Return the names of the options that are not the same."""
    return [
        name for name in sorted(before.keys() | now.keys()) if name not in free and before.get(name) != now.get(name)
    ]


def _refuse(folder: Path, name: str, *, before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> NoReturn:
    if "method" in differing:
        raise InputError(
            f"{folder} holds a run of --method {before.get('method')}: give another --output-dir, or --fresh"
        )
    options = ", ".join(f"{flag(option)} {before.get(option)} (now {now.get(option)})" for option in differing)
    if name != "checkpoint":
        raise InputError(
            f"{folder} holds an unfinished probe with other options: {options}; "
            "give the same, another --output-dir, or --fresh, which drops it"
        )
    raise InputError(
        f"{folder} holds a run with other options: {options}; give the same, another --output-dir, or --fresh"
    )


def _hold(folder: Path, name: str = "checkpoint") -> None:
    """Keep other runs out of a folder for as long as this process lives.

    One that is there is given some time to leave: the job that this one continues may have ended with its host.

    Raises:
        InputError: if it does not, with its process, host and job; or if nothing can be written there.
    """
    lock = folder / (".lock" if name == "checkpoint" else f".{name}.lock")  # a probe may run beside the training
    if lock in _held:
        return
    try:
        file = open(lock, "a+")  # noqa: SIM115  it stays open
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
    _held[lock] = file


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system can; then nothing is kept out
        pass
    return True


def _read_checkpoint(folder: Path, name: str) -> dict[str, Any] | None:
    last, previous = folder / f"{name}.pt", folder / f"{name}_previous.pt"
    if last.is_dir():
        raise InputError(f"{last} is a folder, expected a checkpoint: move it away")
    if not last.exists() and not previous.exists():
        return None
    try:
        return checkpoint.load(last)
    except InputError as damage:
        if not previous.exists():
            raise InputError(f"{damage}; delete it to start over, or give --fresh") from None
        state = checkpoint.load(previous)
        if distributed.is_main():
            print(f"{damage}; going on from the one before it, {previous.name}", flush=True)
        state["fell_back"] = True
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
    """Saves and logs one run, on rank 0.

    Args:
        found: what `find_checkpoint` returned.
        save_every: epochs between the checkpoints that are kept; 0: only the last one is.
        name: of the checkpoint's file, without its suffix.
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
            os.replace(self.last, folder / f"{name}_damaged.pt")  # else it would replace the good one
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
        """Train to the last epoch, saving after each; stop and save when a signal asks for it.

        Args:
            score: from the summary of an epoch to more numbers for it.
            comment: from the completed summary to lines for the log.

        Raises:
            SystemExit: 128 + the signal, after saving.
        """
        trainer.stop_request.listen()
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
            progress.say(f"{stopped}: saved {self.last} at step {trainer.step}; the same command goes on from there")
            raise SystemExit(128 + stopped.signal) from None
        finally:
            trainer.loader.close()
            progress.close()
            if self.log:
                self.log.close()

    def finish_epoch(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        """Record an epoch's summary and save."""
        self.history.append(summary)
        if self.log:
            self.log.write(summary)
        self.save(trainer)
        if distributed.is_main() and self.save_every and trainer.epoch % self.save_every == 0:
            shutil.copyfile(self.last, self.folder / f"{self.name}_{trainer.epoch}.pt")

    def save(self, trainer: Trainer, *, extra: str = "") -> None:
        """Write the last checkpoint, or the extra file of this name beside it. All ranks must call it."""
        state = {"config": self.config, "history": self.history, "revision": self.revision, **trainer.state_dict()}
        if distributed.is_main():
            if not extra:
                _keep(self.last, self.folder / f"{self.name}_previous.pt")
            checkpoint.save(self.folder / extra if extra else self.last, state)
        distributed.barrier()

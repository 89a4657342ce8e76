"""The folder of a run: configuration, checkpoints, and one line per epoch. Only rank 0 writes into it."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from . import checkpoint, distributed, files, locks
from .config import FREE_TO_CHANGE, flag, stored_path
from .errors import InputError, RunError, drop_output, explain, print_line, printable
from .logs import EpochLog, Progress, write_json
from .stopping import Interrupted
from .trainer import Trainer


class SaveError(RunError):
    """A file of a run cannot be written. The message names the last checkpoint."""


# Options of the first steps. A recipe derives them from the number of epochs, and a finished run is past them.
OVER_AT_THE_END = {"warmup_epochs", "warmup_start", "freeze_prototypes"}


def choose_folder(output_dir: str, *, fresh: bool, name: str) -> Path:
    """Return the folder of a run. A new folder is created at once, so that two runs never choose the same one.

    Args:
        output_dir: the folder, which may not exist yet; "": a new dated folder in `runs/`.
        fresh: return a new folder beside `output_dir`, with the first unused name, instead.
        name: last part of the name of a dated folder.

    Raises:
        InputError: if the folder cannot be examined or written.
    """
    folder = Path(output_dir or Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
    new = fresh or not output_dir
    try:
        if new:
            folder = files.first_free(folder)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        is_folder, is_writable = existing.is_dir(), os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        raise _unusable(folder, "cannot be examined", error) from None
    if not is_folder:
        raise InputError(f"--output-dir {folder}: {existing} is a file, expected a folder")
    if not is_writable:
        raise InputError(f"--output-dir {folder}: no permission to write in {existing}; give another folder")
    return _create_new(folder) if new else folder


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


def _create_new(folder: Path) -> Path:
    """Create a folder, under the next unused name if another process is faster."""
    while True:
        try:
            locks.create(folder, new=True)
            return folder
        except OSError as error:
            if not folder.is_dir():
                raise _unusable(folder, "cannot be created", error) from None
            folder = files.first_free(folder)


def find_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    name: str = "checkpoint",
    irrelevant: Collection[str] = (),
    replace_finished: bool = False,
) -> dict[str, Any] | None:
    """Return the checkpoint from which a run continues, or None if the folder holds no checkpoint.

    Rank 0 locks the folder, then looks and decides. The other ranks read the same file after it. If the last checkpoint is
    missing or damaged, for example on a failing network disk, the function returns the previous one and prints a line.

    A finished run may continue with more epochs. The entry `extended` of the checkpoint then holds the former numbers.

    Args:
        config: the configuration of this run. It must equal that of the checkpoint, apart from `FREE_TO_CHANGE`.
        name: name of the checkpoint file without its suffix.
        irrelevant: further options that may differ.
        replace_finished: return None instead of raising if a finished run with other options is found.

    Raises:
        InputError: if another run holds the folder, if the checkpoint belongs to a run with other options (the message names
            them), if no checkpoint can be read, or if the ranks find different checkpoints.
    """
    found: dict[str, Any] | None = None

    def decide() -> str:
        """Return the name of the file to continue from, or ""."""
        nonlocal found
        locks.hold(folder, name)
        found, file = _read_checkpoint(folder, name)
        if found is None:
            return ""
        before = found["config"]
        differing = _differing(before, config, FREE_TO_CHANGE | set(irrelevant))
        finished = found["epoch"] == before.get("epochs")
        if differing and replace_finished and finished:
            found = None
            return "replaced"
        longer = finished and config.get("epochs", 0) > before.get("epochs", 0)
        if differing and longer and set(differing) <= {"epochs", *OVER_AT_THE_END}:
            found["extended"] = [*found.get("extended", []), before["epochs"]]
        elif differing:
            _refuse(folder, name, before=before, now=config, differing=differing)
        return file

    file = distributed.on_main(decide)
    extended = distributed.from_main(found.get("extended") if found else None)
    trouble = ""
    if not distributed.is_main() and file != "replaced":
        try:
            found, _ = _read_checkpoint(folder, name, only=file)
        except InputError as error:
            trouble = str(error)
        if found and extended:
            found["extended"] = extended
    _compare(folder, trouble or ("no checkpoint" if found is None else f"epoch {found['epoch']}, step {found['done']}"))
    return found


def _compare(folder: Path, found: str) -> None:
    """Raise InputError unless all ranks have found the same."""
    everywhere = distributed.from_all(found)
    for rank, there in enumerate(everywhere):
        if there != everywhere[0]:
            raise InputError(
                f"{folder} differs between ranks: rank 0 finds {everywhere[0]}, rank {rank} finds {there}; "
                "--output-dir must be on a disk that all hosts share"
            )


def _differing(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> list[str]:
    """Return the names of the options that differ. Options that earlier code did not have are `checkpoint.LATER_OPTIONS`.

    The data are compared by their fingerprint, if the checkpoint has one, so their folder may have moved. Otherwise they are
    compared by their path.
    """
    if "data_fingerprint" in before:
        free = free | {"data"}
    else:
        free = free | ({"data_fingerprint"} if before.get("data") else {"data_fingerprint", "data"})
        before = {**before, "data": stored_path(before.get("data", ""))}
    return [
        name for name in sorted(before.keys() | now.keys()) if name not in free and before.get(name) != now.get(name)
    ]


def _refuse(folder: Path, name: str, *, before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> NoReturn:
    if "method" in differing:
        raise InputError(
            f"{folder} holds a run of --method {before.get('method')}: give another --output-dir, or give --fresh"
        )
    if "data_fingerprint" in differing:
        raise InputError(
            f"{folder} holds a run on other images: those of --data {before.get('data')}, now --data {now.get('data')} (files were "
            "added, removed or renamed, or the labels differ); give the same images or another --output-dir, or give --fresh"
        )
    options = ", ".join(f"{flag(option)} {before.get(option)} (now {now.get(option)})" for option in differing)
    if differing == ["epochs"] and name == "checkpoint":
        raise InputError(
            f"{folder} holds a run with {options}; the learning rate of every epoch depends on --epochs, so that only a finished "
            "run can get more epochs: give the same number, another --output-dir, or --fresh"
        )
    if name != "checkpoint":
        raise InputError(
            f"{folder} holds an unfinished probe with other options: {options}; "
            "give the same options or another --output-dir, or discard it with --fresh"
        )
    raise InputError(
        f"{folder} holds a run with other options: {options}; "
        "give the same options or another --output-dir, or give --fresh"
    )


def _read_checkpoint(folder: Path, name: str, *, only: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """Return the last checkpoint that can be read, and the name of its file, or None and "".

    Args:
        only: name of the file that rank 0 has read; "": rank 0 has found none; None: this is rank 0.
    """
    last, previous = folder / f"{name}.pt", folder / f"{name}_previous.pt"
    if only:
        return (checkpoint.load_run(folder / only), only) if (folder / only).exists() else (None, "")
    for path in (last, previous):
        if path.is_dir():
            raise InputError(f"{path} is a folder, expected a checkpoint: move the folder away")
    if not last.exists() and not previous.exists():
        return None, ""
    try:
        return checkpoint.load_run(last), last.name
    except InputError as damage:
        if not previous.exists():
            raise InputError(f"{damage}; delete the file to start over, or give --fresh") from None
        state = checkpoint.load_run(previous)
        print(f"{printable(damage)}; resuming from the previous checkpoint, {previous.name}", flush=True)
        state["fell_back"] = True
        return state, previous.name


def continuing_command(folder: Path, *, output_dir: str, fresh: bool) -> str:
    """Return the command that continues the run in a folder: "the same command" if it names the folder.

    Args:
        output_dir, fresh: the values of these flags.
    """
    if output_dir and not fresh:
        return "the same command"
    if distributed.world_size() > 1:  # this process does not know the launcher
        return f"the same command with --output-dir {shlex.quote(str(folder))}{' and without --fresh' if fresh else ''}"
    words, given = [], iter(sys.argv)
    for word in given:
        if word == "--output-dir":
            next(given, None)
        elif word != "--fresh" and not word.startswith("--output-dir="):
            words.append(word)
    return f"`{shlex.join(['python', *words, '--output-dir', str(folder)])}`"


class Run:
    """Saves and logs one run, on rank 0.

    Args:
        found: the checkpoint that `find_checkpoint` returned.
        save_every: epochs between the checkpoints that are kept; 0: keep only the last checkpoint.
        name: name of the checkpoint file without its suffix.
        log: also write config.json, metrics.jsonl and TensorBoard events.
        continuation: the command that continues this run after a stop; see `continuing_command`.

    Attributes:
        history: the summaries of the finished epochs.
        extended: the former numbers of epochs, if this run was finished and got more.
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
        continuation: str = "the same command",
    ):
        self.folder, self.config, self.save_every, self.name = folder, config, save_every, name
        self.continuation = continuation
        self.best = folder / f"{name}_best.pt"  # the epoch with the lowest `selection_loss`, if the method computes one
        self.history: list[dict[str, Any]] = found["history"] if found else []
        self.extended: list[int] = found.get("extended", []) if found else []
        self.revision = checkpoint.code_revision()
        self.saved = f"epoch {found['epoch']}, step {found['done']}" if found else ""
        self.log: EpochLog | None = None

        def prepare() -> None:
            locks.hold(folder, name)
            try:
                self._prepare(found, log=log)
            except OSError as error:
                raise _unusable(folder, f"{error.filename or 'a file'} cannot be written", error) from None

        distributed.on_main(prepare)

    def _prepare(self, found: dict[str, Any] | None, *, log: bool) -> None:
        """Bring the files of the folder into the state of the checkpoint."""
        files.remove_leftovers(self.folder, self.name)
        if found and found.get("fell_back") and self.last.exists():
            # otherwise `save` would give it the name of the good one
            os.replace(self.last, self.folder / f"{self.name}_damaged.pt")
        if found and self.save_every:
            self._restore_milestone(found)
        if found and not found.get("fell_back") and not found["done"]:
            self._keep_best()  # the process may have ended before it did so
        if not log:
            return
        metrics = self.folder / "metrics.jsonl"
        for path in (metrics, self.folder / "config.json", self.folder / "starts.jsonl"):
            files.remove_leftovers(self.folder, path.name)
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is no file, but a folder or a device: move it away")
        if not found and metrics.exists() and metrics.stat().st_size:
            # of a run whose checkpoints are gone
            os.replace(metrics, files.first_free(self.folder / "metrics_earlier.jsonl"))
        write_json(self.folder / "config.json", self.config)
        self.log = EpochLog(self.folder)
        self.log.restore(self.history)

    def _restore_milestone(self, found: dict[str, Any]) -> None:
        """Write the newest checkpoint that is to be kept again if it is missing or has another size.

        The last checkpoint may be the same, or the one before it.
        """
        epoch = found["epoch"] // self.save_every * self.save_every
        if not epoch:
            return
        milestone, previous = self._milestone(epoch), self.folder / f"{self.name}_previous.pt"
        source, state = (previous if found.get("fell_back") else self.last), found
        if state["epoch"] != epoch or state["done"]:
            if milestone.exists() or source == previous:
                return
            try:
                source, state = previous, checkpoint.load_run(previous)
            except InputError:
                return
        if (state["epoch"], state["done"]) != (epoch, 0):
            return
        if not milestone.exists() or milestone.stat().st_size != source.stat().st_size:
            files.copy(source, milestone)

    def _keep_best(self) -> None:
        """Copy the last checkpoint if its epoch has the lowest `selection_loss`; the first of equal ones stays."""
        losses = [epoch.get("selection_loss", float("inf")) for epoch in self.history]
        if losses and losses[-1] < min(losses[:-1], default=float("inf")):
            files.copy(self.last, self.best)

    def _milestone(self, epoch: int) -> Path:
        return self.folder / f"{self.name}_{epoch}.pt"

    def _write(self, write: Callable[[], None]) -> None:
        """Write files on rank 0. All ranks must call it. Raises SaveError on all of them if a file cannot be written."""

        def explained() -> None:
            try:
                write()
            except (OSError, RunError) as error:
                raise SaveError(f"{explain(error)}; {self._kept()}") from None

        distributed.on_main(explained)

    def _kept(self) -> str:
        """Return which checkpoint is left, after a failure."""
        if not self.saved:
            return "no checkpoint has been saved yet"
        if self.last.exists():
            return f"the last checkpoint, {self.last} ({self.saved}), is kept"
        return f"{self.last} ({self.saved}) is gone: if its folder was renamed, the checkpoint is still in it"

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
            RunError: if the training fails, or if a file cannot be written. The message names the last checkpoint.
        """
        request = trainer.stop_request
        request.listen()

        def output_closed() -> None:
            drop_output()
            request.ask(signal.SIGPIPE)

        def acknowledge(number: int) -> None:
            hint = "; press Ctrl-C again to end at once without saving" if number == signal.SIGINT else ""
            progress.say(f"{signal.Signals(number).name}: finishing step {trainer.last_step}, then saving{hint}")

        def give_up() -> None:
            if distributed.is_main():
                print_line(f"interrupted again, ended at once; {self._kept()}")

        progress.when_closed = output_closed
        try:
            with request.announced(acknowledge, give_up):
                self._train_until(epochs, trainer, progress, score=score, comment=comment)
        except SaveError:
            raise
        except (OSError, RuntimeError, MemoryError) as error:
            explained = explain(error)
            if not isinstance(explained, RunError):
                raise
            raise RunError(f"{explained}; {self._kept()}", speaks=explained.speaks) from None
        finally:
            trainer.loader.close()
            progress.close()
            progress.when_closed = None
            if self.log:
                self.log.close()
            request.stop_listening()

    def _train_until(
        self,
        epochs: int,
        trainer: Trainer,
        progress: Progress,
        *,
        score: Callable[[dict[str, Any]], dict[str, Any]],
        comment: Callable[[dict[str, Any]], Iterable[str]],
    ) -> None:
        try:
            while trainer.epoch < epochs and not trainer.method.ended(self.history):
                summary = trainer.train_epoch(progress)
                summary |= score(summary)
                self.finish_epoch(trainer, summary)
                advice = trainer.loader.advice(summary) if trainer.epoch == 1 else ""
                method = trainer.method
                for line in (method.diagnose(self.history), method.ended(self.history), advice, *comment(summary)):
                    if line:
                        progress.say(line)
        except Interrupted as stopped:
            trainer.check_weights()
            self.save(trainer)
            line = f"{stopped}: saved {printable(self.last)} at step {trainer.step}; {self.continuation} continues from there"
            if stopped.signal == signal.SIGPIPE and progress.enabled:
                print(line, file=sys.stderr)
            progress.say(line)
            raise SystemExit(128 + stopped.signal) from None

    def finish_epoch(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        """Record the summary of an epoch and save the checkpoint."""
        self.history.append(summary)
        self.save(trainer)

        def write() -> None:
            if self.save_every and trainer.epoch % self.save_every == 0:
                files.copy(self.last, self._milestone(trainer.epoch))
            self._keep_best()
            if self.log:
                self.log.write(self.history)

        self._write(write)

    def save(self, trainer: Trainer, *, extra: str = "") -> None:
        """Write the last checkpoint, or with `extra` another file of this name. All ranks must call it.

        Raises:
            SaveError: on all ranks, if it cannot be written.
        """
        state = {"config": self.config, "history": self.history, "revision": self.revision, **trainer.state_dict()}
        if self.extended:
            state["extended"] = self.extended

        def write() -> None:
            if not extra and self.last.exists():
                files.second_name(self.last, self.folder / f"{self.name}_previous.pt")
            checkpoint.save(self.folder / extra if extra else self.last, state)

        self._write(write)
        if not extra:
            self.saved = f"epoch {state['epoch']}, step {state['done']}"

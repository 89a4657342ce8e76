"""Progress lines, one JSON line per epoch, TensorBoard events, and tables."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import files
from .errors import printable


class Progress:
    """Shows how far the work is: a bar on a terminal, and one line every few seconds elsewhere.

    Both show the images per second and the time left.

    Args:
        total: number of images of the whole work.
        done: number of images that an earlier process has already processed.
        enabled: print at all; only rank 0 should.
        seconds_between_lines: seconds between two lines where there is no bar.

    Attributes:
        when_closed: called in place of `BrokenPipeError` if standard output is closed.
    """

    def __init__(self, total: int, done: int, *, enabled: bool, seconds_between_lines: float = 10.0):
        self.total, self.done, self.enabled = total, done, enabled
        self.first, self.began = done, time.monotonic()
        self.seconds, self.printed = seconds_between_lines, time.monotonic()
        self.has_stepped = False
        self.when_closed: Callable[[], None] | None = None
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)

    def advance(self, images: int, epoch: int, loss: float | None) -> None:
        """Count the images of a training step. `loss` is None if the trainer did not read it."""
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
            if loss is not None:
                self.bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}", refresh=False)
        elif loss is not None and (pace := self._pace(at_once=not self.has_stepped)):
            self.has_stepped = True
            self.say(f"epoch {epoch}  {pace[0]}  loss {loss:.3f}  {pace[1]}")

    def count(self, images: int, what: str) -> None:
        """Count the images of other work, which `what` names."""
        images = min(images, self.total - self.done)  # another rank may have one image less than this one
        self.done += images
        if self.bar is not None:
            self.bar.set_description_str(what, refresh=False)
            self.bar.update(images)
        elif pace := self._pace():
            self.say(f"{what}  {'  '.join(pace)}")

    def _pace(self, *, at_once: bool = False) -> tuple[str, str] | None:
        """Return the share of the images that is done, and the speed, or None if it is too early for another line."""
        if not self.enabled or (time.monotonic() - self.printed < self.seconds and not at_once):
            return None
        self.printed = time.monotonic()
        rate = (self.done - self.first) / max(self.printed - self.began, 1e-9)
        left = (self.total - self.done) / rate
        return f"{self.done / self.total:4.0%}", f"{rate:,.0f} images/s  {clock(left)} left"

    def say(self, line: str) -> None:
        """Print a line above the bar, if there is a bar. Of what cannot be printed, only line breaks are kept."""
        line = "\n".join(map(printable, line.split("\n")))
        try:
            if self.bar is not None:
                self.bar.write(line, file=sys.stdout)
            elif self.enabled:
                print(line, flush=True)
        except BrokenPipeError:
            if self.when_closed is None:
                raise
            self.when_closed()

    def close(self) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.close()


class SlowStep:
    """Says once, while a step runs, that it takes longer than a minute, and which flags make it cheaper.

    A thread watches the steps, because the main thread may be in one call of C++ code for the whole step.

    Args:
        cheaper: the flags, as the message names them. If it is empty, there is no message.
        limit: seconds from which on a step is slow.
    """

    def __init__(self, cheaper: str, limit: float = 60.0):
        self.cheaper, self.limit = cheaper, limit
        self.number, self.began = 0, math.inf

    @contextlib.contextmanager
    def watched(self, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
        """Watch the steps that run in the block. The block calls the function that it gets with the number of each step."""
        if not self.cheaper:
            yield lambda number: None
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(self.limit / 4, 1.0)):
                if self.cheaper and time.monotonic() - self.began > self.limit:
                    say(
                        f"step {self.number} takes longer than {self.limit:g} seconds; steps get cheaper with {self.cheaper}"
                    )
                    self.cheaper = ""

        thread = threading.Thread(target=watch, name="slow step", daemon=True)
        thread.start()
        try:
            yield self._begin
        finally:
            self.began = math.inf
            ended.set()
            thread.join()

    def _begin(self, number: int) -> None:
        self.number, self.began = number, time.monotonic()


class EpochLog:
    """Writes `metrics.jsonl`, one object per epoch, and TensorBoard events into the same folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / "metrics.jsonl"
        threading.excepthook = _print_unless_told
        self.board = SummaryWriter(folder)

    def restore(self, history: Sequence[dict[str, float | int]]) -> None:
        """Write the summaries of a checkpoint, from which a run continues, again.

        The file may hold later epochs than the checkpoint, or fewer, or half a line after a full disk. The events get only the
        epochs that the file does not have.
        """
        known = set(_intact_lines(self.path))
        self._write_lines(history)
        for summary in history:
            if json.dumps(summary) not in known:
                self._add_events(summary)
        self.board.flush()

    def write(self, history: Sequence[dict[str, float | int]]) -> None:
        """Write the summaries of all epochs. The last one is new."""
        self._write_lines(history)
        self._add_events(history[-1])
        self.board.flush()

    def _write_lines(self, history: Sequence[dict[str, float | int]]) -> None:
        files.write_text(self.path, "".join(json.dumps(summary) + "\n" for summary in history))

    def _add_events(self, summary: dict[str, float | int]) -> None:
        for name, value in summary.items():
            if name not in ("epoch", "step"):
                # loss_3 → loss/3, so that the classifiers share one chart
                tag = "/".join(name.rsplit("_", 1)) if name.rsplit("_", 1)[-1].isdigit() else name
                self.board.add_scalar(tag, value, summary["epoch"])

    def close(self) -> None:
        """Close the file of the events. What the full disk of a failed run refuses does not hide the failure."""
        with contextlib.suppress(OSError):
            self.board.close()


def _print_unless_told(failure: threading.ExceptHookArgs) -> None:
    """Print the exception that has ended a thread, unless it is the refusal of a disk.

    TensorBoard writes its events in a thread, and raises what has ended the thread again at the next event.
    """
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _intact_lines(path: Path) -> list[str]:
    """Return the lines of a file as far as it is text, or nothing if there is no file."""
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def write_json(path: Path, content: dict) -> None:
    """Write readable JSON. The file is always complete."""
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal. The first column is aligned to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def percent(fraction: float) -> str:
    """Return a fraction in percent with one decimal: 0.123 → 12.3."""
    return f"{100 * fraction:.1f}"


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, or with hours: 75 → 1:15, 3675 → 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""Writing numbers: a progress line, one JSON line per epoch, TensorBoard, and tables."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class Progress:
    """A bar with images per second and time left on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, total: int, done: int, *, enabled: bool, seconds_between_lines: float = 10.0):
        self.total, self.done, self.enabled = total, done, enabled
        self.first, self.began = done, time.monotonic()
        self.seconds, self.printed = seconds_between_lines, time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)

    def advance(self, images: int, epoch: int, loss: float | None) -> None:
        """Count a step's images; `loss` is None where it was not looked at."""
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
            if loss is not None:
                self.bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}", refresh=False)
        elif loss is not None and (pace := self._pace()):
            self.say(f"epoch {epoch}  {pace[0]}  loss {loss:.3f}  {pace[1]}")

    def count(self, images: int, what: str) -> None:
        """Count images of work other than training."""
        images = min(images, self.total - self.done)  # ranks may have one image less than others
        self.done += images
        if self.bar is not None:
            self.bar.set_description_str(what, refresh=False)
            self.bar.update(images)
        elif pace := self._pace():
            self.say(f"{what}  {'  '.join(pace)}")

    def _pace(self) -> tuple[str, str] | None:
        """The share that is done, and how fast it goes, if it is time for another line."""
        if not self.enabled or time.monotonic() - self.printed < self.seconds:
            return None
        self.printed = time.monotonic()
        rate = (self.done - self.first) / (self.printed - self.began)
        left = (self.total - self.done) / rate
        return f"{self.done / self.total:4.0%}", f"{rate:,.0f} images/s  {clock(left)} left"

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif self.enabled:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class EpochLog:
    """`metrics.jsonl`, one object per epoch, and TensorBoard events beside it."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / "metrics.jsonl"
        self.board = SummaryWriter(folder)

    def keep_until(self, epoch: int) -> None:
        """Drop lines of epochs after `epoch`: the run goes on from there and writes them again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["epoch"] <= epoch]
            self.path.write_text("".join(line + "\n" for line in lines))

    def write(self, summary: dict[str, float | int]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(summary) + "\n")
        for name, value in summary.items():
            if name not in ("epoch", "step"):
                # loss_3 → loss/3, so that the classifiers share one chart
                tag = "/".join(name.rsplit("_", 1)) if name.rsplit("_", 1)[-1].isdigit() else name
                self.board.add_scalar(tag, value, summary["epoch"])
        self.board.flush()

    def close(self) -> None:
        self.board.close()


def write_json(path: Path, content: dict) -> None:
    """Write readable JSON aside, then rename."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def clock(seconds: float) -> str:
    """75 → 1:15, 3675 → 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

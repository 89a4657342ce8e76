"""Estimate the operations and the time of a run from a few of its steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError, RunError
from .logs import Progress
from .trainer import Trainer

FIRST = 8  # images in the first steps that are measured
FACTOR = 8  # the next steps have this many times as many
LONG_ENOUGH = 1.0  # seconds of a step from which on no larger step is measured


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimated cost of a run.

    Attributes:
        operations: floating-point operations of the whole run.
        per_epoch: floating-point operations of one epoch.
        seconds: time of the whole run on this machine.
        batch: number of images in the step that was measured.
        step: seconds of this step.
        rate: operations per second in this step.
    """

    operations: float
    per_epoch: float
    seconds: float
    batch: int
    step: float
    rate: float

    def __str__(self) -> str:
        return (
            f"{self.operations / 1e15:.3g} PFLOP, {self.per_epoch / 1e15:.3g} per epoch; {self.seconds / 3600:.2g} hours "
            f"on this machine, where a step of {self.batch:,} images took {self.step:.2g} s ({self.rate / 1e9:,.0f} GFLOP/s)"
        )


def estimate(build: Callable[[int], Trainer], *, images: int, batch_size: int, epochs: int) -> Cost:
    """Train small copies of a run for two epochs of two steps, and scale what they cost to the whole run.

    The copies have more and more images per step, until a step takes a second or has the batch of the run. The cost of an epoch
    and of the preparation of a run is taken to be proportional to the number of images.

    Args:
        build: builds a trainer whose data set has twice the given number of images, and whose steps have that number.
        images: number of images of the run.
        batch_size: images per step of the run.
        epochs: number of epochs of the run.

    Raises:
        InputError, RunError: if the run cannot be trained on few images.
    """
    most = min(batch_size, images // 2)
    batch = min(FIRST, most)
    while True:
        try:
            found = _measured(build(batch), batch=batch, images=images, epochs=epochs)
        except (InputError, RunError):
            if batch == most:
                raise
        else:
            if found.step >= LONG_ENOUGH or batch == most:
                return found
        batch = min(batch * FACTOR, most)


def _measured(trainer: Trainer, *, batch: int, images: int, epochs: int) -> Cost:
    """Train two epochs, and scale the cost of the second one. The first one also has the preparation of the run."""
    marks = _Marks(trainer)
    try:
        trainer.train_epoch(marks)
        first = trainer.operations.total
        trainer.train_epoch(marks)
    finally:
        trainer.loader.close()
    second = trainer.operations.total - first
    (began, before), (ended, after) = marks.found[-2:]
    step, rate = ended - began, (after - before) / (ended - began)
    scale = images / (2 * batch)
    operations = scale * (max(first - second, 0) + epochs * second)
    return Cost(
        operations=operations,
        per_epoch=scale * second,
        seconds=operations / rate,
        batch=batch,
        step=step,
        rate=rate,
    )


class _Marks(Progress):
    """Shows nothing, and notes the time and the operations after each step."""

    def __init__(self, trainer: Trainer):
        super().__init__(1, 0, enabled=False)
        self.trainer = trainer
        self.found: list[tuple[float, int]] = []

    def advance(self, images: int, epoch: int, loss: float | None) -> None:
        self.found.append((time.monotonic(), self.trainer.operations.total))

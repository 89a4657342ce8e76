"""The training loop: steps, log, checkpoints, and stopping at a signal."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from . import distributed
from .data import Example
from .errors import RunError, Stopped, printable
from .files import write_text


class Trainer:
    """Trains a detector step by step.

    Args:
        model: the detector on its device.
        optimizer: its learning rate is set before each step.
        rate: learning rate of a step, counted from 0.
        steps: of the whole training.
        folder: for metrics.jsonl and TensorBoard.
        device: of the model.
        autocast: type of the convolutions; None: float32.
        save: called with the number of finished steps.
        log_every, save_every: steps.

    Attributes:
        step: number of finished steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rate: Callable[[int], float],
        *,
        steps: int,
        folder: Path,
        device: torch.device,
        autocast: torch.dtype | None,
        save: Callable[[int], None],
        log_every: int,
        save_every: int,
    ):
        self.optimizer, self.rate, self.steps, self.folder = optimizer, rate, steps, folder
        self.device, self.autocast, self.save = device, autocast, save
        self.log_every, self.save_every = log_every, save_every
        self.step, self.asked, self.damaged = 0, 0, set[str]()
        self.model = model
        if distributed.world_size() > 1:
            devices = [device] if device.type == "cuda" else None
            # the buffers are equal on all ranks already
            self.model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        self.sums: dict[str, Tensor] = {}
        self.summed, self.began, self.first = 0, time.monotonic(), 0

    def train(self, batches: Any) -> None:
        """Do the steps for which there are batches. SIGTERM and SIGINT stop it after a step, with a checkpoint.

        Raises:
            Stopped: after a signal on any rank.
            RunError: if a loss is not finite. Nothing is saved then.
        """
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self.began, self.first = time.monotonic(), self.step
        if distributed.rank() == 0:
            self._forget_later_lines()
        self.model.train()
        try:
            with (
                SummaryWriter(str(self.folder), purge_step=self.step)
                if distributed.rank() == 0
                else _Nothing() as writer
            ):
                for examples in batches:
                    self.update(examples)
                    asked = self._agree()
                    last = self.step == self.steps
                    if last or asked or self.step % self.log_every == 0 or self.step == self.first + 1:
                        self._log(writer)
                    if last or asked or self.step % self.save_every == 0:
                        self._log(writer)  # also checks that the losses since the last line are finite
                        self.save(self.step)
                    if asked and not last:
                        raise Stopped(asked)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def update(self, examples: list[Example]) -> None:
        """Do one step on the examples of this rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        images, targets = self.on_device(examples)
        with torch.autocast(self.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            losses = self.model(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + loss.detach()
        self.summed += 1
        self.step += 1

    def on_device(self, examples: list[Example]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return images and targets on the device, and name files that could not be used."""
        for name in (name for *_, names in examples for name in names):
            if name not in self.damaged:
                self.damaged.add(name)
                print(f"image replaced by another one, it cannot be used: {printable(name)}", flush=True)
        images = [image.to(self.device, non_blocking=True) for image, *_ in examples]
        targets = [
            {
                name: value if name == "seed" else value.to(self.device, non_blocking=True)
                for name, value in target.items()
            }
            for _, target, _ in examples
        ]
        return images, targets

    def _ask(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.asked:
            signal.default_int_handler(number, None)
        self.asked = number

    def _agree(self) -> int:
        """Return the number of a signal that any rank has received, or 0."""
        if distributed.world_size() == 1:
            return self.asked
        asked = torch.zeros(2, dtype=torch.int64)
        asked[0], asked[1] = self.asked == signal.SIGTERM, self.asked == signal.SIGINT
        term, interrupt = distributed.sum_counts(asked).tolist()
        return int(signal.SIGTERM) if term else int(signal.SIGINT) if interrupt else 0

    def _forget_later_lines(self) -> None:
        """Remove the lines of metrics.jsonl whose steps will be done again, because no checkpoint has them."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [
                line
                for line in lines
                if line.startswith("{") and line.endswith("}") and json.loads(line)["step"] <= self.step
            ]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def _log(self, writer: Any) -> None:
        """Write the mean losses since the last line: to the screen, metrics.jsonl and TensorBoard."""
        if not self.summed:
            return
        means = distributed.sum_counts(torch.stack(list(self.sums.values()))) / self.summed / distributed.world_size()
        losses = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.summed = {}, 0
        total = sum(losses.values())
        if not torch.isfinite(means).all():
            parts = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            raise RunError(
                f"a loss is not finite by step {self.step} ({parts}): use a smaller --lr or a longer --warmup-steps"
            )
        if distributed.rank():
            return
        lr = self.optimizer.param_groups[0]["lr"]
        pace = (time.monotonic() - self.began) / (self.step - self.first)
        left = pace * (self.steps - self.step)
        parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        print(
            f"step {self.step:,} of {self.steps:,}  loss {total:.4f}  ({parts})  lr {lr:.3g}  {pace:.2f} s per step  "
            f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d} left",
            flush=True,
        )
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "loss": total, **losses, "lr": lr}) + "\n")
        for name, value in {"loss": total, **losses, "lr": lr}.items():
            writer.add_scalar(f"train/{name}", value, self.step)


class _Nothing:
    """Stands for the writer of TensorBoard on other ranks than 0."""

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

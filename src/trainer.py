"""The loop: the order of operations in a step, precision, when to look at the loss, how to stop and go on.

It does not know which method it runs.
"""

import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed
from .config import RunError
from .logs import Progress
from .methods.base import Step
from .models.memory import statistics_kept
from .optim import clip_gradients


class Interrupted(Exception):
    """A signal asked the run to stop; all ranks finished the same step. `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopRequest:
    """Remembers SIGINT and SIGTERM until the step is done; a second SIGINT ends the program at once."""

    def __init__(self):
        self.number = 0

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number, frame) -> None:
        if number == signal.SIGINT and self.number:
            signal.default_int_handler(number, frame)
        self.number = number


class Trainer:
    """Trains a method epoch by epoch and can be stopped and continued after any step.

    Args:
        method: on its device, wrapped by `distributed.parallel`.
        lr: learning rate as a function of the step.
        loader: gives `epoch(epoch, start)`, an iterator of batches, and has a length.
        labels: (N,) of the data set, -1 where unknown; only to log how often paired images agree. Never shown to the method.
        autocast: dtype of the networks in mixed precision, or None. With float16 the loss is scaled before backward.
        accumulate: parts that a rank's batch is taken in; see `_forward_in_parts`.
        clip_grad: largest norm of each tensor's gradient; 0: not clipped.
        log_every: steps between looks at the loss on a GPU, where each look waits for the device. On a CPU every step is looked at.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        loader,
        labels: Tensor,
        device: torch.device,
        autocast: torch.dtype | None = None,
        log_every: int = 16,
        stop_request: StopRequest | None = None,
        accumulate: int = 1,
        clip_grad: float = 0.0,
    ):
        self.method, self.optimizer, self.lr, self.loader = method, optimizer, lr, loader
        self.labels = labels.to(device)
        self.device, self.autocast = device, autocast
        self.look_every = 1 if device.type == "cpu" else log_every
        self.stop_request = stop_request or StopRequest()
        self.accumulate, self.clip_grad = accumulate, clip_grad
        # The authors start at 2^14. Without float16 it does nothing.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14, enabled=autocast is torch.float16)
        self.epoch = 0  # finished epochs
        self.done = 0  # finished steps of the current epoch
        self.totals: dict[str, Tensor] = {}  # sums over these steps
        self.seconds = 0.0  # spent in them

    @property
    def step(self) -> int:
        """Optimiser updates so far."""
        return self.epoch * len(self.loader) + self.done

    def train_epoch(self, progress: Progress) -> dict[str, float | int]:
        """Run to the end of the current epoch and return its summary.

        Raises:
            Interrupted: after a whole step, when this or another rank was told to stop.
            RunError: if a loss is not finite or too many images are damaged; no further update was made on a CPU, up to
                `log_every` more on a GPU.
        """
        method = distributed.unwrap(self.method)
        self._training_mode()
        if self.done == 0:
            method.prepare_epoch(self.epoch, self.loader)
        unchecked: list[Tensor] = []
        for batch in self._timed(self.loader.epoch(self.epoch, start=self.done)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.step)
            (loss, numbers, neighbors), backward = self._forward(batch)
            unchecked.append(loss.detach())
            look = (self.done + 1) % self.look_every == 0 or self.done + 1 == len(self.loader)
            stop = self._agree(unchecked if look else [])
            self.optimizer.zero_grad(set_to_none=True)
            backward()
            self.scaler.unscale_(self.optimizer)
            method.after_backward(self.step)
            if self.clip_grad:
                clip_gradients(self.optimizer, self.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            method.after_step(batch)
            self._add(loss, numbers, neighbors, batch.indices)
            self.done += 1
            progress.advance(
                len(batch.indices) * distributed.world_size(), self.epoch + 1, loss.item() if look else None
            )
            if look:
                unchecked.clear()
            if stop:
                raise Interrupted(stop)
        return self._finish_epoch(method)

    def _training_mode(self) -> None:
        self.method.train()
        for module in self.method.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
                module.eval()  # frozen: its statistics too

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _forward(self, batch) -> tuple[Step, Callable[[], None]]:
        """The step's numbers, and a function that computes the gradients."""
        if self.accumulate > 1:
            return self._forward_in_parts(batch)
        with self._autocast():
            step = self.method(batch)
        return step, lambda: self.scaler.scale(step.loss).backward()

    def _forward_in_parts(self, batch) -> tuple[Step, Callable[[], None]]:
        """The same step with the memory of a part of the batch.

        The loss couples all images of a batch, so that the mean of the parts' losses would be another objective. Instead
        the whole batch is embedded part by part without a graph; the loss and its gradient with respect to the embeddings
        are those of the whole batch; then each part is embedded again and takes its share of that gradient. Exact,
        except that batch normalisation sees parts; its running statistics count them once.
        """
        method = distributed.unwrap(self.method)
        parts = list(zip(*(view.chunk(self.accumulate) for view in batch.views), strict=True))  # of V views each
        idle = method.idle_views()  # asked now: the objective changes what is remembered
        with torch.no_grad(), self._autocast(), statistics_kept(method):
            embedded = [method.embed_views(list(part)) for part in parts]
        whole = [torch.cat(view).requires_grad_() for view in zip(*embedded, strict=True)]
        with self._autocast():
            step = method.objective(whole, batch.indices)

        def backward() -> None:
            self.scaler.scale(step.loss).backward()
            rows = [view.grad.chunk(self.accumulate) if view.grad is not None else None for view in whole]
            for i, part in enumerate(parts):
                with self._autocast():
                    again = method.embed_views(list(part), idle)
                pairs = [(e, r[i]) for e, r in zip(again, rows, strict=True) if r is not None and e.requires_grad]
                torch.autograd.backward(*zip(*pairs, strict=True))
            distributed.average_gradients(method)

        return step, backward

    def _timed(self, batches):
        """Batches, counting the seconds of everything between them as the epoch's."""
        began = time.monotonic()
        for batch in batches:
            yield batch
            now = time.monotonic()
            self.seconds += now - began
            began = now

    def _agree(self, losses: list[Tensor]) -> int:
        """Whether any rank must end the run now (raises on all of them) or after this step (returns the signal)."""
        trouble, number = 0, self.stop_request.number
        if losses:
            trouble = 1 if not torch.stack(losses).isfinite().all() else 0
        trouble = 2 if self.loader.too_many_damaged else trouble
        if distributed.world_size() > 1:
            # The higher trouble wins, then the lower rank, so that all name the same culprit.
            mine = torch.tensor([trouble * 10**6 + (10**6 - 1 - distributed.rank()), number])
            code, number = distributed.max_over_ranks(mine).tolist()
            trouble, rank = code // 10**6, 10**6 - 1 - code % 10**6
        else:
            rank = 0
        if trouble == 1:
            first = self.step - len(losses) + 1
            where = f"step {self.step}" if len(losses) == 1 else f"steps {first} to {self.step}"
            raise RunError(
                f"the loss is not finite in {where} on rank {rank}; the last checkpoint is kept. Try a smaller --lr or --precision float32"
            )
        if trouble == 2:
            raise RunError(
                f"more than 1 % of the images are damaged (rank {rank}, step {self.step}); repair or remove the reported files"
            )
        return number

    @torch.no_grad()
    def _add(self, loss: Tensor, numbers: dict[str, Tensor], neighbors: Tensor | None, indices: Tensor) -> None:
        """Add a step to the epoch's totals, on the device and without waiting for it."""
        add = {"loss": loss.detach(), **numbers}
        if neighbors is not None:
            here, there = self.labels[indices], self.labels[neighbors]
            known = (here >= 0) & (there >= 0)
            add |= {"neighbor_known": known.sum().float(), "neighbor_agree": ((here == there) & known).sum().float()}
        for name, value in add.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value.clone()

    def _finish_epoch(self, method) -> dict[str, float | int]:
        averages = {name: distributed.mean_over_ranks(total) / self.done for name, total in self.totals.items()}
        images = self.done * self.loader.batch_size
        summary = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": averages["loss"].item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }
        if self.loader.waited:
            summary["waited"] = self.loader.waited / max(self.seconds, 1e-9)
            self.loader.waited = 0.0
        if averages.get("neighbor_known", torch.zeros(())) > 0:
            summary["neighbor_agreement"] = (averages["neighbor_agree"] / averages["neighbor_known"]).item()
        summary |= method.summarize(averages)
        self.epoch, self.done, self.totals, self.seconds = self.epoch + 1, 0, {}, 0.0
        return summary

    def state_dict(self) -> dict:
        """Everything that the next step depends on. To be called on all ranks."""
        return {
            "model": distributed.unwrap(self.method).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "totals": {name: distributed.mean_over_ranks(total) for name, total in self.totals.items()},
            "seconds": self.seconds,
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict) -> None:
        method = distributed.unwrap(self.method)
        method.make_room(state["model"])
        method.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.done, self.seconds = state["epoch"], state["done"], state["seconds"]
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        torch.set_rng_state(state["generator"])
        if self.device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self.device)

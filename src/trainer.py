"""The only training loop: the order of operations in a step, precision, reading of the loss, stopping and resuming.

The loop does not know which method it runs. The linear probe is a method too.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed
from .data.loaders import DAMAGED_SHARE, Batch, TrainLoader
from .data.training import TrainingData
from .errors import InputError, RunError
from .flops import OperationCounter
from .logs import Progress, SlowStep
from .methods.base import Method, Step
from .models.memory import statistics_kept
from .optim import clip_gradients, load_optimizer
from .stopping import Interrupted, StopRequest

NOT_FINITE, DAMAGED = 1, 2  # reasons for which a rank must end the run
RANKS = 10**6  # larger than any number of ranks


class TrainingStep(nn.Module):
    """Runs the forward pass of one step. DistributedDataParallel wraps this module and sees one call per step."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> Step:
        return self.method.objective(self.method.embed_views(batch.views, self.method.idle_views()), batch.indices)


class Trainer:
    """Trains a method epoch by epoch.

    Training can stop and resume after any step. On a CPU the result is then the same bit for bit.

    Args:
        method: on its device.
        optimizer: the `lr_scale` of a group, if there is one, multiplies the learning rate of its parameters.
        lr: learning rate as a function of the step.
        labels: (N,) label of every image, -1 where unknown. They only serve to log how often paired images have the same
            label; the method does not see them.
        autocast: dtype of the networks in mixed precision, or None. With float16 the loss is scaled before backward.
        accumulate: number of parts in which a rank processes its batch; see `_forward_in_parts`.
        clip_grad: largest norm of the gradient of each tensor; 0: no clipping.
        sync_bn_group: consecutive ranks that share batch-norm statistics; 0: all ranks.
        log_every: steps between readings of the loss on a GPU, where each reading waits for the device. On a CPU the
            trainer reads it in every step.
        cheaper: flags that make a step cheaper, for a line that the log gets if a step takes longer than a minute; "": no
            line.

    Attributes:
        epoch: number of finished epochs.
        done: number of finished steps of the current epoch.
        skipped: number of finished steps of the current epoch that changed nothing; see `Step.skip`.
        totals: sums of the logged numbers over the finished steps that were not skipped.
        seconds: seconds spent in the current epoch.
        operations: floating-point operations of this rank.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        *,
        loader: TrainLoader,
        device: torch.device,
        labels: Tensor | None = None,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        clip_grad: float = 0.0,
        sync_bn_group: int = 0,
        log_every: int = 16,
        cheaper: str = "",
        stop_request: StopRequest | None = None,
    ):
        if loader.per_rank % accumulate:
            raise InputError(
                f"--accumulate {accumulate} does not divide the {loader.per_rank} images per rank and step: give a divisor"
            )
        loader.companions = method.companions
        self.method, self.optimizer, self.lr, self.loader = method, optimizer, lr, loader
        self.forward = distributed.parallel(TrainingStep(method), device, sync_bn_group)
        self.operations = OperationCounter()
        self.data = TrainingData(loader, count=self.operations.run)
        self.labels = None if labels is None else labels.to(device)
        self.device, self.autocast = device, autocast
        self.slow = SlowStep(cheaper)
        self.read_every = 1 if device.type == "cpu" else log_every
        self.stop_request = stop_request or StopRequest()
        self.accumulate, self.clip_grad = accumulate, clip_grad
        self.lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        # The authors start at 2^14. Without float16 the scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14, enabled=autocast is torch.float16)
        self.epoch, self.done, self.skipped = 0, 0, 0
        self.totals: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.asked = False  # in the current step, the ranks have already agreed whether to stop after it
        self.stops_after = 0  # the step after which they stop, if this rank has asked for it

    @property
    def last_step(self) -> int:
        """Number of the step after which the run stops if it is asked to stop now, counted from 1."""
        return self.stops_after or self.step + (2 if self.asked else 1)

    @property
    def step(self) -> int:
        """Number of finished steps of the run."""
        return self.epoch * len(self.loader) + self.done

    @property
    def images(self) -> int:
        """Number of images seen in the run, over all ranks."""
        return self.epoch * self.loader.images + self.loader.images_until(self.done)

    def train_epoch(self, progress: Progress) -> dict[str, Any]:
        """Run to the end of the current epoch and return its summary.

        Raises:
            Interrupted: at the end of a step, if this rank or another one was asked to stop.
            RunError: if a loss is not finite, if too many images are damaged, or if every step was skipped. When a loss is not
                finite, a CPU run stops before it updates the weights; a GPU run may have updated them up to `log_every` times.
        """
        self._training_mode()
        if self.step == 0:
            self.operations.run(self.method.prepare_run, self.data)
        if self.done == 0:
            self.operations.run(self.method.prepare_epoch, self.epoch, self.data)
        with self.slow.watched(progress.say) as begin:
            self._run_steps(progress, begin)
        return self._finish_epoch()

    def _run_steps(self, progress: Progress, begin: Callable[[int], None]) -> None:
        """Run the remaining steps of the epoch. `begin` is told the number of each step before its batch is loaded."""
        unread: list[Tensor] = []
        begin(self.step + 1)
        for batch in self._timed(self.loader.epoch(self.epoch, start=self.done)):
            self.method.prepare_step(self.step, self.data)
            for group, scale in zip(self.optimizer.param_groups, self.lr_scales, strict=True):
                group["lr"] = scale * self.lr(self.step)
            alike = (self.method.idle_views(), *(view.shape for view in batch.views))
            step, backward = self.operations.run(self._forward, batch, like=alike)
            skip = self._all_skip(step)
            unread += [] if skip else [step.loss.detach()]
            read = (self.done + 1) % self.read_every == 0 or self.done + 1 == len(self.loader)
            stop = self._agree(unread if read else [])
            if skip:
                self.skipped += 1
            else:
                self.operations.run(self._update, batch, step, backward, like=alike)
            before, self.done, self.asked = self.images, self.done + 1, False
            progress.advance(self.images - before, self.epoch + 1, step.loss.item() if read and not skip else None)
            if read:
                unread.clear()
            if stop:
                raise Interrupted(stop)
            begin(self.step + 1)

    def _update(self, batch: Batch, step: Step, backward: Callable[[], None]) -> None:
        """Compute the gradients, update the weights, and add the step to the epoch's totals."""
        self.optimizer.zero_grad(set_to_none=True)
        backward()
        self.scaler.unscale_(self.optimizer)
        self.method.after_backward(self.step)
        if self.clip_grad:
            clip_gradients(self.optimizer, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(batch)
        self._add(step, batch.indices)

    @staticmethod
    def _all_skip(step: Step) -> bool:
        """Return True if every rank asks to skip this step."""
        if step.skip is None:
            return False
        return not bool(distributed.max_over_ranks((~step.skip).long()))

    def _training_mode(self) -> None:
        self.method.train()
        for module in self.method.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
                module.eval()  # its weights are frozen, so its statistics stay as they are

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _forward(self, batch: Batch) -> tuple[Step, Callable[[], None]]:
        """Return the result of the step, and a function that computes the gradients."""
        if self.accumulate > 1:
            return self._forward_in_parts(batch)
        with self._autocast():
            step = self.forward(batch)
        return step, lambda: self.scaler.scale(step.loss).backward()

    def _forward_in_parts(self, batch: Batch) -> tuple[Step, Callable[[], None]]:
        """Do what `_forward` does, with the memory that one part of the batch needs.

        The loss couples all images of a batch, so the mean of the losses of the parts would be another objective. Instead,
        the network first embeds the batch part by part without a graph. The loss and its gradient with respect to the embeddings are
        those of the whole batch. Then the network embeds each part again, and the part receives its share of that
        gradient. The result is exact, except that batch normalisation sees one part at a time; its running statistics
        count each part once.
        """
        method = self.method
        parts = list(zip(*(view.chunk(self.accumulate) for view in batch.views), strict=True))  # each part has V views
        idle = method.idle_views()  # before the objective, which changes the state of the method
        with torch.no_grad(), self._autocast(), statistics_kept(method):
            embedded = [method.embed_views(list(part)) for part in parts]
        whole = [torch.cat(view).requires_grad_() for view in zip(*embedded, strict=True)]
        with self._autocast():
            step = method.objective(whole, batch.indices)

        def backward() -> None:
            self.scaler.scale(step.loss).backward()
            grads = [view.grad.chunk(self.accumulate) if view.grad is not None else None for view in whole]
            for i, part in enumerate(parts):
                with self._autocast():
                    again = method.embed_views(list(part), idle)
                pairs = [(e, g[i]) for e, g in zip(again, grads, strict=True) if g is not None and e.requires_grad]
                torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
            distributed.average_gradients(method)

        return step, backward

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and add the time between them to `seconds`."""
        began = time.monotonic()
        for batch in batches:
            yield batch
            now = time.monotonic()
            self.seconds += now - began
            began = now

    def _agree(self, losses: list[Tensor]) -> int:
        """Return the signal that asked any rank to stop, or 0. All ranks get the same answer.

        Raises:
            RunError: on all ranks, if any rank must end the run now.
        """
        trouble, number = 0, self.stop_request.number
        self.asked, self.stops_after = True, self.step + 1 if number else 0
        if losses and not torch.stack(losses).isfinite().all():
            trouble = NOT_FINITE
        if self.loader.too_many_damaged:
            trouble = DAMAGED
        rank = 0
        if distributed.world_size() > 1:
            # The higher reason wins, then the lower rank, so that all ranks name the same rank.
            mine = torch.tensor([trouble * RANKS + (RANKS - 1 - distributed.rank()), number])
            code, number = distributed.max_over_ranks(mine).tolist()
            trouble, rank = code // RANKS, RANKS - 1 - code % RANKS
        if trouble == NOT_FINITE:
            first = self.step - len(losses) + 1
            where = f"step {self.step}" if len(losses) == 1 else f"steps {first} to {self.step}"
            raise RunError(
                f"the loss is not finite in {where} on rank {rank}; try a smaller --lr or --precision float32"
            )
        if trouble == DAMAGED:
            raise RunError(
                f"more than {100 * DAMAGED_SHARE:g} % of the images are damaged (rank {rank}, step {self.step}); "
                "repair or remove the files that the log names"
            )
        return number

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raise RunError, on all ranks, unless all weights are finite. The loss shows it only in the next step."""
        finite = torch.stack([p.isfinite().all() for p in self.method.parameters()]).all()
        if distributed.max_over_ranks((~finite).long()):
            raise RunError(
                f"the weights are not finite after step {self.step}; try a smaller --lr or --precision float32"
            )

    @torch.no_grad()
    def _add(self, step: Step, indices: Tensor) -> None:
        """Add a step to the totals of the epoch. This happens on the device, and the host does not wait for it."""
        add = {"loss": step.loss.detach(), **step.numbers}
        if step.neighbors is not None and self.labels is not None:
            here, there = self.labels[indices], self.labels[step.neighbors]
            known = (here >= 0) & (there >= 0)
            add |= {"neighbor_known": known.sum().float(), "neighbor_agree": ((here == there) & known).sum().float()}
        for name, value in add.items():
            before = self.totals.get(name)
            if before is not None and before.shape != value.shape:  # from a checkpoint
                raise RunError(
                    f"the checkpoint does not fit this run: its total {name} has the shape {tuple(before.shape)}, expected "
                    f"{tuple(value.shape)}; give another --output-dir, or start over with --fresh"
                )
            self.totals[name] = value.clone() if before is None else before + value

    def _finish_epoch(self) -> dict[str, Any]:
        taken = self.done - self.skipped
        if not taken:
            raise RunError(f"every step of epoch {self.epoch + 1} was skipped: {self.method.why_skipped}")
        self.check_weights()
        measured = self.operations.run(self.method.measure, self.data)
        averages = {name: distributed.mean_over_ranks(total) / taken for name, total in self.totals.items()}
        summary: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": averages["loss"].item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self.loader.images_until(self.done) / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "pflop": self.operations.end_epoch() * distributed.world_size() / 1e15,
            "total_pflop": self.operations.total * distributed.world_size() / 1e15,
        }
        if self.skipped:
            summary["skipped_steps"] = self.skipped
        if self.loader.waited:
            summary["waited"] = self.loader.waited / max(self.seconds, 1e-9)
            self.loader.waited = 0.0
        if averages.get("neighbor_known", torch.zeros(())) > 0:
            summary["neighbor_agreement"] = (averages["neighbor_agree"] / averages["neighbor_known"]).item()
        summary |= self.method.summarize(averages) | measured
        self.epoch, self.done, self.skipped, self.totals, self.seconds = self.epoch + 1, 0, 0, {}, 0.0
        return summary

    def state_dict(self) -> dict[str, Any]:
        """Return everything on which the next step depends. All ranks must call it."""
        return {
            "model": self.method.saved_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "skipped": self.skipped,
            "totals": {name: distributed.mean_over_ranks(total) for name, total in self.totals.items()},
            "seconds": self.seconds,
            "operations": self.operations.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            InputError: if an entry is missing or does not fit this run.
        """
        advice = "give another --output-dir, or start over with --fresh"
        try:
            if "history" in state and len(state["history"]) != state["epoch"]:
                raise InputError(f"its history has {len(state['history'])} epochs, expected {state['epoch']}")
            if not 0 <= state["done"] <= len(self.loader):
                raise InputError(f"it stopped after step {state['done']} of an epoch of {len(self.loader)}")
            self._load(state)
        except InputError as error:
            raise InputError(f"the checkpoint does not fit this run: {error}; {advice}") from None
        except KeyError as error:
            raise InputError(f"the checkpoint does not fit this run: it has no {error}; {advice}") from None
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
        ) as error:  # torch explains what does not fit
            detail = " ".join(str(error).split())[:300]
            raise InputError(f"the checkpoint does not fit this run: {detail}; {advice}") from None

    def _load(self, state: dict[str, Any]) -> None:
        self.method.load_saved_state(state["model"])
        self.method.check_positions(len(self.loader.data))
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.done, self.seconds = state["epoch"], state["done"], state["seconds"]
        self.skipped = state.get("skipped", 0)  # checkpoints of earlier versions lack this entry and `operations`
        if "operations" in state:
            self.operations.load_state_dict(state["operations"])
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
        if self.done > self.skipped:
            self.method.summarize({"loss": self.totals["loss"], **self.totals})  # raises if a total is missing
        torch.set_rng_state(state["generator"])
        if self.device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self.device)

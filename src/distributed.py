"""Distributed training: start-up of the ranks, and collectives.

There are three ways to start, all with the same flags: `python train.py` (one process), `torchrun ... train.py`, and
`srun python train.py`. Every function also works without a process group. Then rank() is 0, world_size() is 1, and a sum or
a gather over ranks returns its input.
"""

import inspect
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError, RunError

Value = TypeVar("Value")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

TIMEOUT = timedelta(minutes=10)  # of collectives; it covers the time in which rank 0 lists a large folder
ROLL_CALL = timedelta(seconds=5)  # time for the other ranks to answer after a collective has failed

_store: dist.Store | None = None  # key-value store of all ranks, in the process of rank 0 or torchrun


# --------------------------------------------------------------------------------------------------------------------
# start-up


@dataclass(frozen=True)
class Launch:
    """What the launcher tells a process.

    Attributes:
        rank: position of this process among all ranks, from 0.
        world_size: number of ranks.
        local_rank: position of this process among the ranks of its host, from 0.
        address: host on which rank 0 listens.
        port: port on which rank 0 listens.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Read the variables that torchrun or srun sets. Return None for a single process.

    Raises:
        InputError: if only some variables of a launcher are set, or if a value is not a valid number.
    """
    environ = {name: value for name, value in environ.items() if value}  # an empty value counts as unset
    if any(name in environ for name in TORCHRUN[:3]):
        _require(environ, TORCHRUN, "torchrun")
        rank, world_size, local_rank, port = (
            _read_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        return _validated(Launch(rank, world_size, local_rank, address=environ["MASTER_ADDR"], port=port))
    if _read_number(environ, "SLURM_NTASKS", 1) > 1 or "SLURM_PROCID" in environ:
        _require(environ, SLURM, "srun")
        rank, world_size, local_rank = (_read_number(environ, name) for name in SLURM)
        if world_size == 1:
            return None
        if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
            # The batch script itself has SLURM_PROCID=0. Without this check it would wait for ranks that never start.
            raise InputError(
                f"the Slurm job has {world_size} tasks, but this process is not one of them: start it with srun"
            )
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not hosts and "MASTER_ADDR" not in environ:
            raise InputError(
                "MASTER_ADDR and SLURM_STEP_NODELIST are unset, expected one of them to name the host of rank 0: set MASTER_ADDR"
            )
        job, step = _read_number(environ, "SLURM_JOB_ID", 0), _read_number(environ, "SLURM_STEP_ID", 0)
        port = _read_number(environ, "MASTER_PORT", 20000 + (job * 16 + step) % 20000)
        address = environ.get("MASTER_ADDR") or first_host(hosts or "")
        return _validated(Launch(rank, world_size, local_rank, address=address, port=port))
    return None


def _read_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environ:
        return default
    if not re.fullmatch("[0-9]+", environ[name]):
        raise InputError(
            f"{name} is {environ[name]!r}, expected a number: start with a launcher, or unset the variable"
        )
    return int(environ[name])


def _validated(launch: Launch) -> Launch:
    if not 0 < launch.port < 2**16:
        raise InputError(f"MASTER_PORT is {launch.port}, expected 1 to 65535: set another port")
    if launch.rank >= launch.world_size:
        raise InputError(
            f"the rank is {launch.rank}, expected 0 to {launch.world_size - 1}: check the variables that the launcher sets"
        )
    return launch


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        present = [name for name in names if name in environ]
        raise InputError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: start with {launcher}, or unset the variables"
        )


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: "gpu[007-010,12],login1" gives "gpu007"."""
    match = re.match(r"(\[[^\]]*\]|[^\[,])*", nodelist)
    first = match[0] if match else ""  # everything before the first comma outside brackets
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first)


def start(device: str = "auto") -> torch.device:
    """Join the process group of the launcher, if there is one, and choose the device of this rank.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Returns:
        The device.

    Raises:
        InputError: if the launcher's variables are incomplete, or if `device` is "cuda" and there is no GPU.
    """
    launch = read_launch(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device: use --device auto or cpu")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    local_rank = launch.local_rank if launch else 0
    chosen = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if launch and launch.world_size > 1:
        # torch reads these variables. torchrun has set them already, srun has not.
        os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
        os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size))
        # A GPU rank has both backends: each tensor is sent from its own device, so a flag on the CPU never waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        global _store
        _store, rank, size = next(dist.rendezvous("env://"))
        _store.set_timeout(TIMEOUT)
        group = dist.PrefixStore("group", _store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=TIMEOUT)
    return chosen


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def explain(error: RuntimeError) -> RuntimeError:
    """Explain a failed collective.

    Every rank that still runs must call this function. Only the first of them reports the error.

    Returns:
        A RunError that names the ranks that no longer answer, if there are any; otherwise `error` itself.
    """
    broken = isinstance(error, dist.DistError) or re.search(r"gloo|nccl", str(error), flags=re.IGNORECASE)
    if world_size() == 1 or _store is None or not broken:
        return error
    missing = []
    try:
        _store.set(f"roll call {rank()}", "here")
        for other in range(world_size()):
            try:
                _store.wait([f"roll call {other}"], ROLL_CALL)
            except dist.DistStoreError:
                missing.append(other)
    except dist.DistNetworkError:
        missing = [0]  # rank 0 hosts the store
    if not missing:
        return error
    first = min(set(range(world_size())) - set(missing))
    names = ", ".join(map(str, missing))
    subject, verb = ("rank", "answers") if len(missing) == 1 else ("ranks", "answer")
    return RunError(
        f"{subject} {names} of {world_size()} no longer {verb}: see the reason in "
        "the output of these ranks or of the launcher",
        speaks=rank() == first,
    )


def speaks_first() -> bool:
    """Return whether this rank is the first to report an error.

    The other ranks wait for a second, so that rank 0 is the first if it has an error to report.
    """
    try:
        if rank():
            time.sleep(1.0)
        return _store is None or _store.add("said", 1) == 1
    except RuntimeError:  # the process that hosted the store has ended, and has reported its error
        return False


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks have called this function."""
    if world_size() > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------------------------
# collectives


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, with gradient.

    The input of each rank contributes to the losses of all ranks. So the backward pass sums the gradients over ranks too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of `x` over the ranks of `group`, with gradient. By default it is over all ranks.

    The gradient of `x` is the gradient of the *sum* of the losses of all ranks. DistributedDataParallel then averages the
    gradients of the parameters over the ranks. So the parameters get the gradient of the mean loss.
    """
    return _SumOverRanks.apply(x, group) if world_size() > 1 else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over all ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous().clone()
    dist.all_reduce(x)
    return x / world_size()


@torch.no_grad()
def max_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum of `x` over all ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def gather_no_grad(x: Tensor) -> Tensor:
    """Concatenate the (B, ...) `x` of all W ranks in rank order, (W*B, ...), without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def average_gradients(method: nn.Module) -> None:
    """Average the gradients of the parameters over ranks in one collective.

    DistributedDataParallel does this in each backward pass. The function serves passes that bypass the wrapper.
    """
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def from_main(value: Value) -> Value:
    """Return rank 0's value on every rank. It may be any small picklable object."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], Value]) -> Value:
    """Run a function on rank 0 and return its result on every rank. It may be any small picklable object.

    Raises:
        InputError, RunError: on every rank, if the function raises it on rank 0.
    """
    if world_size() == 1:
        return function()
    failure: InputError | RunError | None = None
    value: Any = None
    if is_main():
        try:
            value = function()
        except (InputError, RunError) as error:
            failure = error
    failure, value = from_main((failure, value))
    if failure is not None:
        raise failure
    return value


def from_all(value: Value) -> list[Value]:
    """Return the values of all ranks, in rank order, on every rank. A value may be any small picklable object."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------------------------------------------------
# modules over ranks


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of several ranks, on any backend.

    torch's SyncBatchNorm works only with CUDA tensors. With this class, W gloo processes on CPUs compute the same as one
    process on the whole batch. Every rank must have the same number of rows.

    Attributes:
        group: the ranks that share statistics; None: all ranks.
        group_size: number of ranks in the group.
    """

    group: dist.ProcessGroup | None = None
    group_size: int = 1
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"the input has {x.dim()} dimensions, expected at least 2")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return nn.functional.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                weight=self.weight,
                bias=self.bias,
                training=False,
                momentum=self.momentum,
                eps=self.eps,
            )
        rows = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        reduced = [axis for axis in range(x.dim()) if axis != 1]
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * self.group_size
        # Two passes: the mean of the squares minus the square of the mean would lose precision by cancellation in float32.
        mean = sum_over_ranks(rows.sum(reduced), self.group) / count
        centred = rows - mean.view(per_channel)
        variance = sum_over_ranks(centred.square().sum(reduced), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(per_channel) + self.bias.view(per_channel)).to(x.dtype)


def _convert_batch_norm(module: nn.Module, group: dist.ProcessGroup, group_size: int) -> nn.Module:
    """Replace every BatchNorm of a module by a CrossRankBatchNorm with the same parameters and buffers."""
    for name, child in module.named_children():
        setattr(module, name, _convert_batch_norm(child, group, group_size))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module
    with torch.device("meta"):
        converted = CrossRankBatchNorm(module.num_features, module.eps, module.momentum)
    converted._parameters, converted._buffers = module._parameters, module._buffers
    converted.group, converted.group_size = group, group_size
    return converted.train(module.training)


def check_sync_bn_group(size: int) -> None:
    """Raise InputError if the size of a batch normalisation group does not divide the number of ranks."""
    if size and world_size() % size:
        raise InputError(
            f"--sync-bn-group {size} does not divide the {world_size()} ranks: pass a divisor, or 0 for all ranks"
        )


def parallel(method: nn.Module, device: torch.device, sync_bn_group: int = 0) -> nn.Module:
    """Wrap a method for training over ranks. Without a process group, return the method unchanged.

    The wrapper does not broadcast buffers, because sending a long queue at every step would take longer than the step. Queues
    are equal on all ranks by construction. The running statistics of batch normalisation are equal only if all ranks share
    them; otherwise a checkpoint holds those of rank 0.

    Args:
        sync_bn_group: number of consecutive ranks that share the statistics of batch normalisation; 0: all ranks, 1: each
            rank has its own statistics.

    Raises:
        InputError: if the group size does not divide the number of ranks.
    """
    check_sync_bn_group(sync_bn_group)
    if world_size() == 1:
        return method
    size = sync_bn_group or world_size()
    if size > 1:
        # Every rank must call new_group for every group, including the groups that it does not belong to.
        groups = [dist.new_group(range(first, first + size)) for first in range(0, world_size(), size)]
        group = cast(dist.ProcessGroup, groups[rank() // size])
        if device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method, group)
        else:
            method = _convert_batch_norm(method, group, size)
    devices = [device.index] if device.type == "cuda" else None
    # Newer versions of torch rename the argument.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(method, device_ids=devices, **no_buffers)


def unwrap(method: nn.Module) -> nn.Module:
    """Return the method inside the wrapper of `parallel`."""
    return method.module if isinstance(method, DistributedDataParallel) else method

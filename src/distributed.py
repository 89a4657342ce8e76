"""Ranks: how a process learns its place among others, and the collectives the rest of the code uses.

Three ways to start, all with the same flags: `python train.py` (one process), `torchrun ... train.py`, and
`srun python train.py`. Every helper also works without a process group: then rank() is 0, world_size() is 1,
and a sum or a gather over ranks returns its input.
"""

import inspect
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError, RunError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

TIMEOUT = timedelta(minutes=10)  # of collectives: the others may wait while rank 0 lists a large folder
ROLL_CALL = timedelta(seconds=5)  # in which ranks answer after a collective has failed

_store: dist.Store | None = None  # keys and values that all ranks see, kept where rank 0 or torchrun runs


# --------------------------------------------------------------------------------------------------------------------
# start-up


@dataclass(frozen=True)
class Launch:
    """The place of this process: `rank` among `world_size`, `local_rank` on its host, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """What the launcher wrote into the environment; None for a single process without a launcher.

    Raises:
        InputError: if a launcher's variables are only half set, or no numbers where there must be.
    """
    environ = {name: value for name, value in environ.items() if value}  # empty is unset
    if any(name in environ for name in TORCHRUN[:3]):
        _require(environ, TORCHRUN, "torchrun")
        rank, world_size, local_rank, port = (
            _number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        return _checked(Launch(rank, world_size, local_rank, environ["MASTER_ADDR"], port))
    if _number(environ, "SLURM_NTASKS", 1) > 1 or "SLURM_PROCID" in environ:
        _require(environ, SLURM, "srun")
        rank, world_size, local_rank = (_number(environ, name) for name in SLURM)
        if world_size == 1:
            return None
        if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
            # The batch script itself carries SLURM_PROCID=0: it would wait for ranks that nobody starts.
            raise InputError(
                f"the Slurm job has {world_size} tasks, but this process is not one of them: start with srun"
            )
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not hosts and "MASTER_ADDR" not in environ:
            raise InputError("MASTER_ADDR and SLURM_STEP_NODELIST are both unset: cannot tell where rank 0 listens")
        job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
        port = _number(environ, "MASTER_PORT", 20000 + (job * 16 + step) % 20000)
        return _checked(Launch(rank, world_size, local_rank, environ.get("MASTER_ADDR") or first_host(hosts), port))
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environ:
        return default
    if not re.fullmatch("[0-9]+", environ[name]):
        raise InputError(f"{name} is {environ[name]!r}: expected a number, as the launcher sets it")
    return int(environ[name])


def _checked(launch: Launch) -> Launch:
    if not 0 < launch.port < 2**16:
        raise InputError(f"MASTER_PORT is {launch.port}: expected 1 to 65535")
    if launch.rank >= launch.world_size:
        raise InputError(f"rank {launch.rank} is not among {launch.world_size} ranks, which count from 0")
    return launch


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        present = [name for name in names if name in environ]
        raise InputError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: start with {launcher} or unset them"
        )


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: "gpu[007-010,12],login1" gives "gpu007"; each bracket's first number counts."""
    first = re.match(r"(\[[^\]]*\]|[^\[,])*", nodelist)[0]  # up to the first comma outside brackets
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first)


def start(device: str = "auto") -> torch.device:
    """Join the process group that the launcher prepared, if any, and choose this rank's device.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        InputError: if the environment is half set, or "cuda" was asked for and there is none.
    """
    launch = read_launch(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device: use --device auto or cpu")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    local_rank = launch.local_rank if launch else 0
    chosen = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if launch and launch.world_size > 1:
        # torch reads these names; under torchrun they are there already.
        os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
        os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size))
        # Both backends on a GPU: tensors travel where they lie, and a flag on the CPU never waits for the GPU.
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
    """If a collective failed because other ranks no longer answer: one line that names them. Any other error as it is.

    To be called by every rank that is left; the first of them speaks.
    """
    broken = isinstance(error, dist.DistError) or re.search(r"gloo|nccl", str(error), flags=re.IGNORECASE)
    if world_size() == 1 or not broken:
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
        missing = [0]  # it kept the store
    if not missing:
        return error
    first = min(set(range(world_size())) - set(missing))
    names = ", ".join(map(str, missing))
    return RunError(
        f"rank{'s' * (len(missing) > 1)} {names} of {world_size()} no longer answer{'s' * (len(missing) == 1)}; what was said there, "
        "or by the launcher, tells why. The last checkpoint is kept; the same command goes on from it",
        speaks=rank() == first,
    )


def speaks_first() -> bool:
    """Whether this rank is the first to say what is wrong; rank 0 is given a second's start."""
    try:
        if rank():
            time.sleep(1.0)
        return _store is None or _store.add("said", 1) == 1
    except RuntimeError:  # rank 0, or torchrun, kept the store and has ended; not without a word
        return False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------------------------
# collectives


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose backward sums the gradients over ranks too: every rank's output feeds every rank's loss."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of every rank's `x`, with gradient; of the ranks of `group`, if there is one.

    The gradient that reaches `x` is that of the *sum* of all ranks' losses. DistributedDataParallel averages the
    parameters' gradients, which turns it into that of the mean loss.
    """
    return _SumOverRanks.apply(x, group) if world_size() > 1 else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of every rank's `x`, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous().clone()
    dist.all_reduce(x)
    return x / world_size()


@torch.no_grad()
def max_over_ranks(x: Tensor) -> Tensor:
    """Largest of every rank's `x`, elementwise, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def gather_no_grad(x: Tensor) -> Tensor:
    """Every rank's (B, ...) `x` in rank order, (W*B, ...), without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def average_gradients(method: nn.Module) -> None:
    """What DistributedDataParallel does behind a backward pass, for passes that bypass its wrapper: one collective."""
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def from_main(value):
    """Rank 0's value of any small picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value) -> list:
    """Every rank's value of a small picklable object, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------------------------------------------------
# modules over ranks


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of several ranks' rows, on any backend.

    torch's own SyncBatchNorm insists on CUDA tensors; this one lets W gloo processes on CPUs compute what one process
    computes on the joined batch. Every rank must hold the same number of rows.

    Attributes:
        group: the ranks that share statistics; None: all of them.
        group_size: how many they are.
    """

    group: dist.ProcessGroup | None = None
    group_size: int = 1

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps
            )
        rows = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        reduced = [axis for axis in range(x.dim()) if axis != 1]
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * self.group_size
        # Two passes, mean first: the mean of squares minus the square of the mean cancels in float32.
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
    """The same module with every BatchNorm replaced by CrossRankBatchNorm, parameters and buffers shared."""
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
    """Refuse, with an InputError, a group size that does not divide the ranks."""
    if size and world_size() % size:
        raise InputError(f"--sync-bn-group {size} does not divide the {world_size()} ranks")


def parallel(method: nn.Module, device: torch.device, sync_bn_group: int = 0) -> nn.Module:
    """Wrap a method for training over ranks; without a process group it is returned as it is.

    Batch normalisation then sees the rows of `sync_bn_group` consecutive ranks; 0: of all ranks; 1: of its own only.
    Buffers are not broadcast, since sending a long queue at every step would cost more than the step. Queues are equal on
    all ranks by construction; the running statistics of batch normalisation only if all ranks share them, otherwise a
    checkpoint holds those of rank 0.

    Raises:
        InputError: if the group size does not divide the ranks.
    """
    check_sync_bn_group(sync_bn_group)
    if world_size() == 1:
        return method
    size = sync_bn_group or world_size()
    if size > 1:
        # Every rank must take part in making every group, also of those it does not belong to.
        groups = [dist.new_group(range(first, first + size)) for first in range(0, world_size(), size)]
        group = groups[rank() // size]
        if device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method, group)
        else:
            method = _convert_batch_norm(method, group, size)
    devices = [device.index] if device.type == "cuda" else None
    # torch is renaming the argument
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_buffers = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(method, device_ids=devices, **no_buffers)


def unwrap(method: nn.Module) -> nn.Module:
    """The method inside `parallel`'s wrapper."""
    return method.module if isinstance(method, DistributedDataParallel) else method

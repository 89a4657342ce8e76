"""Start of the ranks under torchrun or Slurm, and collectives. Every function also works in a single process."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
TIMEOUT = timedelta(minutes=30)  # rank 0 writes results while the others wait


@dataclass(frozen=True)
class Launch:
    """What the launcher tells a process: its rank, the number of ranks, its rank on its host, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Read the variables that torchrun or srun sets. Return None for a single process.

    Raises:
        InputError: if only some variables of a launcher are set, or if a value is not a number.
    """
    environ = {name: value for name, value in environ.items() if value}
    if any(name in environ for name in TORCHRUN[:3]):
        _require(environ, TORCHRUN, "torchrun")
        rank, size, local, port = (
            _number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        return Launch(rank, size, local, address=environ["MASTER_ADDR"], port=port)
    if "SLURM_PROCID" not in environ and _number(environ, "SLURM_NTASKS", 1) <= 1:
        return None
    _require(environ, SLURM, "srun")
    rank, size, local = (_number(environ, name) for name in SLURM)
    if size == 1:
        return None
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:  # the batch script itself has SLURM_PROCID=0
        raise InputError(f"the Slurm job has {size} tasks, but this process is not one of them: start it with srun")
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    address = environ.get("MASTER_ADDR") or first_host(hosts)
    if not address:
        raise InputError("MASTER_ADDR and SLURM_STEP_NODELIST are unset, expected one of them: set MASTER_ADDR")
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    port = _number(environ, "MASTER_PORT", 20000 + (job * 16 + step) % 20000)
    return Launch(rank, size, local, address=address, port=port)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: "gpu[007-010,12],login1" gives "gpu007"."""
    match = re.match(r"(\[[^\]]*\]|[^\[,])*", nodelist)
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", match[0] if match else "")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environ:
        return default
    if not re.fullmatch("[0-9]+", environ[name]):
        raise InputError(
            f"{name} is {environ[name]!r}, expected a number: start with a launcher, or unset the variable"
        )
    return int(environ[name])


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        present = [name for name in names if name in environ]
        raise InputError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: start with {launcher}, or unset the variables"
        )


def start(device: str = "auto") -> torch.device:
    """Join the process group of the launcher, if there is one, and return the device of this rank.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        InputError: if the launcher's variables are incomplete, or if `device` is "cuda" and there is no GPU.
    """
    launch = read_launch(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device: use --device auto or cpu")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    chosen = torch.device("cpu")
    if on_gpu:
        chosen = torch.device("cuda", (launch.local_rank if launch else 0) % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if launch and launch.world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"tcp://{launch.address}:{launch.port}" if "RANK" not in os.environ else "env://",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=TIMEOUT,
        )
    return chosen


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all ranks have called this function."""
    if world_size() > 1:
        dist.barrier()


def sum_counts(counts: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without gradient."""
    counts = counts.detach().clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks, with gradient: the input of a rank contributes to the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_counts(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_counts(grad.contiguous())

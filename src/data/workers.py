"""The worker processes that read files: how many a rank gets, and what they do with signals."""

import contextlib
import os
import signal
from pathlib import Path

import torch


def available_workers(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return the number of CPU cores for the workers of this rank, at least 1.

    The process may use the cores that it is bound to. The CPUs of its Slurm task and the CPU quota of a container may limit
    this number further. Ranks that share these cores get equal parts.

    Args:
        quota_file: file with the CPU quota of the control group.
    """
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota, which reads "max 100000"
        quota, period = Path(quota_file).read_text().split()
        cores = min(cores, int(quota) / int(period))
    of_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if of_task:
        cores = min(cores, float(of_task))
    # The ranks of torchrun share the cores of their host or Slurm task. A rank of srun has cores of its own if
    # SLURM_CPUS_PER_TASK is set.
    sharing = os.environ.get("LOCAL_WORLD_SIZE") or (not of_task and os.environ.get("SLURM_NTASKS_PER_NODE")) or 1
    return max(int(cores) // int(sharing), 1)


def ignore_signals(worker: int) -> None:
    """Let a worker process ignore signals, and compute on one thread."""
    # Ctrl-C and Slurm send signals to the whole process group. The main process handles them and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)

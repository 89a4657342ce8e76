"""Record on what a run runs: the revision of the code, the versions of the libraries, the processor, and the data."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import distributed, fingerprints
from .data.datasets import Images

LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn")


def record_start(folder: Path, data: Images, *, revision: str, step: int, device: torch.device) -> None:
    """Add a line to `starts.jsonl` in the folder of a run. Only rank 0 writes.

    A run that stops and continues has one line per start. `src.results` makes the record of a run from these lines.

    Args:
        data: the training images.
        revision: revision of the code.
        step: number of the finished steps.
    """
    if not distributed.is_main():
        return
    start = {
        "step": step,
        "revision": revision,
        "versions": versions(),
        "processor": processor(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "images": len(data),
        "fingerprint": fingerprints.of_data(data),
    }
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries on which numbers depend."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}


def processor() -> str:
    """Return the name of the processor, the number of its cores that this process may use, and its vector instructions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {capability}"

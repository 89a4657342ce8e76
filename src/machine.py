"""What the processor offers: the fastest precision, and memory that stays with the process."""

import contextlib
import ctypes
from typing import Any

import torch

from . import distributed

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt in glibc's malloc.h


def fastest_precision(device: torch.device) -> str:
    """Return the precision in which a device computes matrix products fastest: "bfloat16" or "float32".

    A processor computes in bfloat16 with AMX or AVX512-BF16. Other processors emulate it, which is slower than float32. The
    same holds for GPUs before Ampere.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return "bfloat16" if native else "float32"


def resolve_precision(asked: str, device: torch.device, found: dict[str, Any] | None = None) -> str:
    """Return the precision of a run: "float32", "bfloat16" or "float16".

    Args:
        asked: value of `--precision`; "auto": the precision that the run has so far, or else the fastest one of rank 0.
        found: checkpoint from which the run continues; None: a new run.
    """
    if asked != "auto":
        return asked
    return found["config"]["precision"] if found else distributed.from_main(fastest_precision(device))


def keep_freed_memory() -> None:
    """Make glibc keep the memory that the process frees, instead of returning it to the system at once.

    By default, each tensor of more than 32 MB gets new pages, and the system clears each page before its first use. Small
    images make steps so short that this takes a considerable share of their time. Without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)

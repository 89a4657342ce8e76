"""Stream the evaluation views of image files whose list is not in memory. Files that cannot be decoded are left out."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..inspection import first_line
from .base import Views
from .decoding import decode
from .workers import available_workers, ignore_signals

Request = list[tuple[int, str]]  # number and path of each image of a batch


class Streamed(NamedTuple):
    """A batch of evaluation views.

    Attributes:
        images: (B, C, H, W), ready for the network; None if no file of the batch can be decoded.
        numbers: B numbers of the images.
        damaged: number and reason of each file that cannot be decoded.
    """

    images: Tensor | None
    numbers: list[int]
    damaged: list[tuple[int, str]]


def stream(requests: Iterable[Request], views: Views, *, device: torch.device, workers: int = -1) -> Iterator[Streamed]:
    """Yield the batches of the requests, in their order. The requests are read only a few batches ahead.

    Args:
        views: their `single_cut` runs in the workers, their `single_finish` on the device.
        workers: processes that decode image files; -1: one per available core.
    """
    workers = available_workers() if workers < 0 else workers
    loader = DataLoader(
        _Reader(views),
        batch_size=None,  # a request already stands for a whole batch
        sampler=requests,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        collate_fn=_unchanged,
    )
    iterator: Any = iter(loader)
    try:
        for crops, numbers, damaged in iterator:
            finished = None if crops is None else views.single_finish(crops.to(device, non_blocking=True))
            yield Streamed(finished, numbers, damaged)
    finally:
        if workers:
            processes = iterator._workers
            iterator._shutdown_workers()  # waits some seconds for each worker
            for process in processes:
                if process.is_alive():  # it hangs, for example in a read from a disk that does not respond
                    process.kill()


class _Reader(Dataset[tuple[Tensor | None, list[int], list[tuple[int, str]]]]):
    """Data set of the worker processes: it turns a request into a batch."""

    def __init__(self, views: Views):
        self.views = views

    def __getitem__(self, request: Request) -> tuple[Tensor | None, list[int], list[tuple[int, str]]]:
        crops: list[Tensor] = []
        numbers: list[int] = []
        damaged: list[tuple[int, str]] = []
        for number, path in request:
            try:
                crops.append(self.views.single_cut(decode(path)))
                numbers.append(number)
            # Pillow raises many kinds of errors on damaged files, such as SyntaxError and struct.error.
            except Exception as error:
                damaged.append((number, _reason(error, path)))
        return torch.stack(crops) if crops else None, numbers, damaged


def _reason(error: Exception, path: str) -> str:
    """Return the first line of an error without the path, which stands beside it anyway."""
    text = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return f"cannot be decoded ({text.replace(repr(path), 'the file').replace(path, os.path.basename(path))})"


def _unchanged(batch: Sequence) -> Sequence:
    return batch  # torch's default function would convert the numbers to tensors

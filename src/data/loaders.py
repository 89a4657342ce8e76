"""Batches: which images a step sees, and on which rank.

The order of an epoch is a function of (seed, epoch), and every rank takes its own stretch of each batch. So a batch over
all ranks holds the same images whatever the number of ranks, and an epoch can be continued at any step.
"""

import atexit
import contextlib
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import distributed
from ..errors import InputError, RunError
from .datasets import ImageFiles, Images, MemoryImages
from .decoding import Kept, decode_on, encoded, packed, unpacked

DAMAGED_SHARE = 0.01  # of the images; more of them stop a run
TOGETHER = 2**23  # bytes of decoded images, some 15 of ImageNet's, before their views are cut in one go
WAITED_SHARE = 0.1  # of an epoch's time, spent waiting for files; more of it is worth a word


class Batch(NamedTuple):
    """This rank's part of a step, without labels.

    views: V × (B, C, H, W), ready for the network. If the images have M companions each, the V views of the first
        companions follow, then those of the second, and so on.
    indices: (B,) positions of the images in the data set.
    companions: (B, M) positions of the companions, or None.
    """

    views: list[Tensor]
    indices: Tensor
    companions: Tensor | None = None


Companions = Callable[[np.ndarray, int], np.ndarray | None]  # (B,) positions and the epoch to (B, M) positions


class Views(Protocol):
    """What a recipe of views offers; `cut` and `finish` only where images come from files."""

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """All views of images in memory: V × (B, C, H, W), ready for a network."""

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """In a worker: the crops of B decoded images, each (C, H, W), as V × (B, C, size, size) uint8."""

    def finish(self, crops: list[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """On the device: everything photometric, on whole batches."""

    def single(self, images: Tensor) -> Tensor:
        """The view for evaluation of images in memory."""

    def single_cut(self, image: Tensor) -> Tensor:
        """In a worker: the evaluation crop of one decoded image, (C, size, size) uint8."""

    def single_finish(self, crops: Tensor) -> Tensor:
        """On the device: evaluation crops, ready for a network."""


class TrainLoader:
    """Augmented batches of one rank, epoch by epoch. The last partial batch of an epoch is dropped.

    Args:
        batch_size: images per step over all ranks.
        keep_last: keep it instead, shared out as evenly as possible, unless some rank would get no image of it.
        workers: processes that decode image files; -1 takes the cores this process may use, shared with the other
            ranks of this host.
        equal_shares: with `keep_last`, drop images of the last batch until the ranks divide it.
        decode_on_device: JPEG files are decoded, and crops cut, on the device; workers only read them.

    Attributes:
        images: number of images in an epoch, over all ranks.
        companions: names the images to load together with those of a batch; see `methods.base.Method.companions`.
        damaged: path → reason, of the files that could not be decoded so far. Each was replaced by the next one that could.
        waited: seconds in which this rank had to wait for files since this was last set to 0; of a GPU, those in which it
            had nothing to compute.

    Raises:
        InputError: if the batch is larger than the data set or not divisible by the ranks.
    """

    def __init__(
        self,
        data: Images,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int = -1,
        keep_last: bool = False,
        equal_shares: bool = False,
        decode_on_device: bool = False,
    ):
        ranks = distributed.world_size()
        if batch_size > len(data) and not keep_last:
            raise InputError(f"--batch-size {batch_size} is larger than the data set ({len(data)} images): lower it")
        if batch_size % ranks:
            raise InputError(
                f"--batch-size {batch_size} counts images over all ranks, but {ranks} ranks do not divide it"
            )
        self.data, self.views, self.seed, self.device = data, views, seed, device
        self.batch_size, self.per_rank = batch_size, batch_size // ranks
        self.images = (
            len(data) if keep_last and len(data) % batch_size >= ranks else len(data) // batch_size * batch_size
        )
        if equal_shares:
            self.images -= self.images % batch_size % ranks
        self.companions: Companions | None = None
        self.workers, self._decode_on_device = workers, decode_on_device
        self.damaged: dict[str, str] = {}
        self._waited = 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._files = self._open_files()

    def _open_files(self) -> "_FileBatches | None":
        if not isinstance(self.data, ImageFiles):
            return None
        return _FileBatches(self.data, self.views, self.seed, workers=self.workers, encoded=self._decode_on_device)

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.images // self.batch_size)

    @property
    def too_many_damaged(self) -> bool:
        return len(self.damaged) > DAMAGED_SHARE * len(self.data)

    def images_until(self, step: int) -> int:
        """Return the number of images in the first steps of an epoch, over all ranks."""
        return min(step * self.batch_size, self.images)

    def epoch(self, epoch: int, *, start: int = 0, apart: bool = False) -> Iterator[Batch]:
        """Yield the batches of an epoch, from its step `start` on.

        Args:
            apart: read files with worker processes of its own, so that another epoch may be under way.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        batches = [order[: self.images][s * self.batch_size :][: self.batch_size] for s in range(start, len(self))]
        parts = [np.array_split(batch, distributed.world_size())[distributed.rank()] for batch in batches]
        files = self._open_files() if apart else self._files
        try:
            found = self._from_files(files, parts, epoch) if files else self._from_memory(parts, epoch)
            yield from _beside_the_steps(found, self._stream) if self._stream else found
        finally:
            if files and apart:
                files.close()

    def _with_companions(self, part: np.ndarray, epoch: int) -> np.ndarray:
        """Return the positions to load for (B,) images: theirs, then those of each one's first companion, and so on."""
        named = self.companions(part, epoch) if self.companions else None
        return part if named is None else np.concatenate([part, named.T.reshape(-1)])

    def _batch(self, views: list[Tensor], indices: Tensor, num_images: int) -> Batch:
        """Return the batch of this rank, with companions if there are more views than images."""
        if len(indices) == num_images:
            return Batch(views, indices)
        groups = zip(
            *(view.split(num_images) for view in views), strict=True
        )  # the images, then each set of companions
        first, *others = indices.split(num_images)
        return Batch([view for group in groups for view in group], first, torch.stack(others, dim=1))

    def close(self) -> None:
        """End the worker processes; without it they end when this loader does."""
        if self._files:
            self._files.close()

    def _from_memory(self, parts: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        for part in parts:
            wanted = self._with_companions(part, epoch)
            indices = torch.from_numpy(wanted)
            images = self.data.images[indices]
            images = images.pin_memory().to(self.device, non_blocking=True) if self._stream else images
            views = self.views(images, wanted, seed=self.seed, epoch=epoch)
            yield self._batch(views, indices.to(self.device, non_blocking=True), len(part))

    def _from_files(self, files: "_FileBatches", parts: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        requests = [(epoch, self._with_companions(part, epoch)) for part in parts]
        batches = files.read(requests, pin=self.device.type == "cuda")
        if files.reader.encoded:
            batches = (files.cut_on(self.device, *batch, epoch=epoch) for batch in batches)
        for part, (crops, read, damaged) in zip(parts, self._timed(batches), strict=True):
            for path, reason in damaged:
                if path not in self.damaged:
                    readable = os.fsencode(path).decode(errors="replace")
                    print(f"damaged image, replaced by the next one: {readable} ({reason})", flush=True)
                self.damaged[path] = reason
            if not crops:
                raise RunError("more than 1 % of the images are damaged; repair or remove those reported")
            crops = [crop.to(self.device, non_blocking=True) for crop in crops]
            indices = torch.from_numpy(read).to(self.device, non_blocking=True)
            yield self._batch(self.views.finish(crops, read, seed=self.seed, epoch=epoch), indices, len(part))

    def _timed(self, batches: Iterator) -> Iterator:
        """Count the waiting."""
        while True:
            began = time.monotonic()
            # A GPU has waited if its steps were done before the batch came. When that is, it says later itself.
            asked = self._mark(torch.cuda.default_stream(self.device)) if self._stream else None
            batch = next(batches, None)
            if batch is None:
                return
            if asked is None:
                self._waited += time.monotonic() - began
            else:
                self._waits.append((asked, self._mark(self._stream)))
            yield batch

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    @property
    def waited(self) -> float:
        for asked, came in self._waits:
            asked.synchronize()
            came.synchronize()
            self._waited += max(asked.elapsed_time(came), 0) / 1000
        self._waits.clear()
        return self._waited

    @waited.setter
    def waited(self, seconds: float) -> None:
        self._waits.clear()
        self._waited = seconds

    def advice(self, summary: dict) -> str:
        """A sentence if an epoch's training, of which this is the summary, waited for files too long; else ""."""
        share = summary.get("waited", 0.0)
        if share <= WAITED_SHARE:
            return ""
        rate = summary["images_per_second"]
        return (
            f"{share:.0%} of epoch {summary['epoch']} were spent waiting for images: files come at {rate:,.0f} images/s, "
            f"training could take {rate / max(1 - share, 0.01):,.0f}. More --workers help where there are cores for them (now "
            f"{self._files.workers}), a smaller copy everywhere: python -m src.data.shrink"
        )


def _beside_the_steps(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """The same batches, copied to a GPU and finished on a stream of their own.

    A step's kernels are only queued when the next batch is asked for, so that this one is made while they are computed.
    """
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        steps = torch.cuda.current_stream(stream.device)
        steps.wait_stream(stream)
        companions = () if batch.companions is None else (batch.companions,)
        for tensor in (*batch.views, batch.indices, *companions):
            tensor.record_stream(steps)  # or its memory could be given away before the steps have read it
        yield batch


def single_views(
    data: Images, views: Views, *, batch_size: int, device: torch.device, workers: int = -1
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Unaugmented images for evaluation, with their indices, each image once; every rank reads its own share.

    Raises:
        InputError: if a file cannot be decoded: a score over the rest would not be comparable.
    """
    mine = np.arange(distributed.rank(), len(data), distributed.world_size())
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    if isinstance(data, MemoryImages):
        for part in parts:
            yield views.single(data.images[torch.from_numpy(part)].to(device)), part
    else:
        files = _FileBatches(data, views, seed=None, workers=workers)
        try:
            for crops, part, damaged in files.read([(0, part) for part in parts], pin=device.type == "cuda"):
                for path, reason in damaged:
                    raise InputError(f"{path}: cannot be decoded ({reason}): repair or remove it")
                yield views.single_finish(crops[0].to(device, non_blocking=True)), part
        finally:
            files.close()


class _FileBatches:
    """Decodes whole batches of files in worker processes, in the order they were asked for; if `encoded`, only reads them."""

    def __init__(self, data: ImageFiles, views: Views, seed: int | None, *, workers: int, encoded: bool = False):
        self.data, self.views, self.seed = data, views, seed
        self.reader = _Reader(data, views, seed, encoded=encoded)
        self.refused = ""  # why the device did not decode a batch that the host did
        self.requests = _Requests()
        self.workers = available_workers() if workers < 0 else workers
        self.loader: DataLoader | None = None

    def read(self, requests: list[tuple[int, np.ndarray]], pin: bool = False):
        """For each (epoch, indices): crops V × (B, C, H, W) uint8, or none if too many images are damaged, the indices really read, and
        [(path, reason)] of damage."""
        self.requests.wanted = requests
        if self.loader is None:
            self.loader = DataLoader(
                self.reader,
                batch_size=None,  # a request is a whole batch already
                sampler=self.requests,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=pin,
                worker_init_fn=_ignore_signals,
                collate_fn=_as_it_is,
                multiprocessing_context=Kept.fork if self.workers and self.data.kept else None,
            )
            # At exit Python sends SIGTERM to processes that still run and waits for them. Ours ignore it (see below), so
            # they are told to end before that. A weak reference: being registered must not keep them alive.
            atexit.register(_close_if_alive, weakref.ref(self))
        return iter(self.loader)

    def cut_on(self, device: torch.device, images: tuple, indices: np.ndarray, damaged: list, *, epoch: int):
        """Crops, indices and damage, as `read` gives them, of `packed` images."""
        try:
            decoded = decode_on(device, unpacked(*images))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Damage, perhaps; which file it is in is found by decoding all once more on the host.
            images, indices, more = self.reader.images(indices, self.data.decode)
            decoded, damaged = [image.to(device) for image in images], damaged + more
            if not more and not self.refused:
                self.refused = str(error).partition("\n")[0]
                print(f"images that the device cannot decode are decoded on the host ({self.refused})", flush=True)
        return (self.views.cut(decoded, indices, seed=self.seed, epoch=epoch) if decoded else []), indices, damaged

    def close(self) -> None:
        if self.loader is not None and self.loader._iterator is not None:
            workers = self.loader._iterator._workers
            self.loader._iterator._shutdown_workers()  # which gives each some seconds
            for worker in workers:
                if worker.is_alive():  # reading a disk that no longer answers, say; python would wait for it for ever
                    worker.kill()


def _close_if_alive(batches: weakref.ref) -> None:
    if (alive := batches()) is not None:
        alive.close()


class _Requests:
    """The sampler of a loader that lives through all epochs: whatever was asked for last."""

    def __init__(self):
        self.wanted: list[tuple[int, np.ndarray]] = []

    def __iter__(self):
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)


class _Reader(Dataset):
    """What a worker does with a request."""

    def __init__(self, data: ImageFiles, views: Views, seed: int | None, *, encoded: bool):
        self.data, self.views, self.seed, self.encoded = data, views, seed, encoded

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, request: tuple[int, np.ndarray]):
        epoch, indices = request
        if self.encoded:
            images, read, damaged = self.images(indices, lambda index: encoded(self.data.paths[index]))
            return packed(images), read, damaged
        read, damaged, parts, few = [], [], [], []
        for wanted in indices.tolist():
            index, image = self._next_readable(wanted, self.data.decode, damaged)
            if image is None:
                return [], np.array(read), damaged
            read.append(index)
            few.append(image)
            if len(read) == len(indices) or sum(image.numel() for image in few) > TOGETHER:
                parts.append(self._cut(few, np.array(read[-len(few) :]), epoch))
                few = []
        return [torch.cat(view) for view in zip(*parts, strict=True)], np.array(read), damaged

    def images(self, indices: np.ndarray, read: Callable[[int], Tensor]):
        """All images of a batch, uncut, as `read` gives them; none if too many are damaged."""
        damaged = []
        found = [self._next_readable(wanted, read, damaged) for wanted in indices.tolist()]
        images = [image for _, image in found if image is not None]
        complete = len(images) == len(found)
        return images if complete else [], np.array([index for index, _ in found]), damaged

    def _cut(self, images: list[Tensor], indices: np.ndarray, epoch: int) -> list[Tensor]:
        if self.seed is None:
            return [torch.stack([self.views.single_cut(image) for image in images])]
        return self.views.cut(images, indices, seed=self.seed, epoch=epoch)

    def _next_readable(self, index: int, read: Callable[[int], Tensor], damaged: list[tuple[str, str]]):
        """Position and content of an image, or of the next one that can be read; None after more failures in a row than a run
        may have."""
        for _ in range(int(DAMAGED_SHARE * len(self.data)) + 2):
            try:
                return index, read(index)
            # Pillow raises many kinds on damaged files, SyntaxError and struct.error among them.
            except Exception as error:
                damaged.append((self.data.paths[index], f"{type(error).__name__}: {error}"))
            index = (index + 1) % len(self.data)
        return index, None


def _as_it_is(batch):
    return batch  # torch's own conversion would turn the indices into tensors


def available_workers(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """The cores that this process may use: those it is bound to, at most what Slurm gave its task or a container's quota
    allows; shared with the other ranks that have the same."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota: "max 100000"
        quota, period = Path(quota_file).read_text().split()
        cores = min(cores, int(quota) / int(period))
    of_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if of_task:
        cores = min(cores, float(of_task))
    # torchrun's ranks share what their host or task has; of srun's each has its own, where it says how much
    sharing = os.environ.get("LOCAL_WORLD_SIZE") or (not of_task and os.environ.get("SLURM_NTASKS_PER_NODE")) or 1
    return max(int(cores) // int(sharing), 1)


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and Slurm signal the whole group; the main process decides what happens and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)

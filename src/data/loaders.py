"""Loaders: the batches of each step and rank.

The order of the images in an epoch is a function of (seed, epoch). Each rank takes a contiguous part of each batch. So a
batch over all ranks holds the same images for any number of ranks, and a run can resume an epoch at any step.
"""

import atexit
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import distributed
from ..errors import InputError, RunError, printable
from .base import Views
from .datasets import ImageFiles, Images, MemoryImages
from .decoding import Kept, decode_on, encoded, packed, unpacked
from .workers import available_workers, ignore_signals

DAMAGED_SHARE = 0.01  # largest share of damaged images; a run with more of them stops
TOGETHER = 2**23  # bytes of decoded images whose views a worker cuts in one call; about 15 images of ImageNet
WAITED_SHARE = 0.1  # share of an epoch's time spent waiting for files, above which the log gives advice


class Batch(NamedTuple):
    """The images of one step on this rank, without labels.

    Attributes:
        views: V × (B, C, H, W), ready for the network. If each image has M companions, the list goes on with the V views of
            the first companions, then with the V views of the second companions, and so on.
        indices: (B,) positions of the images in the data set.
        companions: (B, M) positions of the companions in the data set, or None.
    """

    views: list[Tensor]
    indices: Tensor
    companions: Tensor | None = None


Companions = Callable[[np.ndarray, int], np.ndarray | None]  # maps (B,) positions and the epoch to (B, M) positions
Damage = list[tuple[str, str]]  # path and reason of each damaged file
FileBatch = tuple[Any, np.ndarray, Damage]  # see `_FileBatches.read`


class TrainLoader:
    """Load augmented batches for one rank, epoch by epoch.

    Args:
        batch_size: images per step over all ranks.
        workers: processes that decode image files; -1: one per core available to this rank (see `available_workers`).
        keep_last: keep the last partial batch of an epoch and split it as evenly as possible, if every rank gets at least
            one image of it. By default this batch is dropped.
        equal_shares: with `keep_last`, drop images of the last batch until all ranks get the same number.
        decode_on_device: decode JPEG files and cut the crops on the device; the workers only read the files.
        epochs: number of epochs for which the run is planned; 0: unknown.

    Attributes:
        images: number of images in an epoch, over all ranks.
        companions: function that names the images to load together with those of a batch; see
            `methods.base.Method.companions`.
        held_out: images that are not trained on; see `TrainingData.embed`.
        damaged: {path: reason} of the files that could not be decoded so far. The next readable file replaces each of them.
        waited: seconds that this rank has waited for files since the attribute was last set to 0. On a GPU, only the time
            in which the GPU had nothing to compute counts.

    Raises:
        InputError: if the batch is larger than the data set, or if the number of ranks does not divide the batch.
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
        epochs: int = 0,
    ):
        ranks = distributed.world_size()
        if batch_size > len(data) and not keep_last:
            raise InputError(
                f"--batch-size {batch_size} is larger than the data set ({len(data)} images): lower the batch size"
            )
        if batch_size % ranks:
            raise InputError(
                f"--batch-size {batch_size} is not divisible by the {ranks} ranks that share it: use a multiple of {ranks}"
            )
        self.data, self.views, self.seed, self.device = data, views, seed, device
        self.epochs = epochs
        self.batch_size, self.per_rank = batch_size, batch_size // ranks
        self.images = (
            len(data) if keep_last and len(data) % batch_size >= ranks else len(data) // batch_size * batch_size
        )
        if equal_shares:
            self.images -= self.images % batch_size % ranks
        self.companions: Companions | None = None
        self.held_out: Images | None = None
        self.workers, self._decode_on_device = workers, decode_on_device
        self.damaged: dict[str, str] = {}
        self._waited = 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._files = self._open_files()

    def _open_files(self) -> "_FileBatches | None":
        """Return a new reader of the image files, or None if the images are in memory."""
        if not isinstance(self.data, ImageFiles):
            return None
        return _FileBatches(self.data, self.views, self.seed, workers=self.workers, encoded=self._decode_on_device)

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return -(-self.images // self.batch_size)

    @property
    def too_many_damaged(self) -> bool:
        """Whether more images are damaged than a run tolerates."""
        return len(self.damaged) > DAMAGED_SHARE * len(self.data)

    def images_until(self, step: int) -> int:
        """Return the number of images in the first steps of an epoch, over all ranks."""
        return min(step * self.batch_size, self.images)

    def epoch(self, epoch: int, *, start: int = 0, apart: bool = False) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step `start` on.

        Args:
            apart: use separate worker processes, so that another epoch can be in progress at the same time.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        batches = [order[: self.images][s * self.batch_size :][: self.batch_size] for s in range(start, len(self))]
        parts = [np.array_split(batch, distributed.world_size())[distributed.rank()] for batch in batches]
        files = self._open_files() if apart else self._files
        try:
            found = self._from_files(files, parts, epoch) if files else self._from_memory(parts, epoch)
            yield from _on_stream(found, self._stream) if self._stream else found
        finally:
            if files and apart:
                files.close()

    def _with_companions(self, part: np.ndarray, epoch: int) -> np.ndarray:
        """Return the positions to load for (B,) images, ((1 + M) · B,).

        The positions of the images come first, then those of their first companions, and so on.
        """
        named = self.companions(part, epoch) if self.companions else None
        if named is not None and (named.min() < 0 or named.max() >= len(self.data)):
            raise ValueError(
                f"companions must be positions from 0 to {len(self.data) - 1}, got {named.min()} to {named.max()}"
            )
        return part if named is None else np.concatenate([part, named.T.reshape(-1)])

    def _batch(self, views: list[Tensor], indices: Tensor, num_images: int) -> Batch:
        """Return the batch of this rank. It has companions if there are more indices than images."""
        if len(indices) == num_images:
            return Batch(views, indices)
        # The first group holds the views of the images; each further group holds the views of one set of companions.
        groups = zip(*(view.split(num_images) for view in views), strict=True)
        first, *others = indices.split(num_images)
        return Batch([view for group in groups for view in group], first, torch.stack(others, dim=1))

    def close(self) -> None:
        """End the worker processes. Without this call they end together with the loader."""
        if self._files:
            self._files.close()

    def _from_memory(self, parts: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        assert isinstance(self.data, MemoryImages)
        for part in parts:
            wanted = self._with_companions(part, epoch)
            indices = torch.from_numpy(wanted)
            images = self.data.images[indices]
            images = images.pin_memory().to(self.device, non_blocking=True) if self._stream else images
            views = self.views(images, wanted, seed=self.seed, epoch=epoch)
            yield self._batch(views, indices.to(self.device, non_blocking=True), len(part))

    def _from_files(self, files: "_FileBatches", parts: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        requests = [(epoch, self._with_companions(part, epoch)) for part in parts]
        batches: Iterator[FileBatch] = files.read(requests, pin=self.device.type == "cuda")
        if files.reader.encoded:
            batches = (files.cut_on(self.device, batch, epoch=epoch) for batch in batches)
        for part, (crops, read, damaged) in zip(parts, self._timed(batches), strict=True):
            for path, reason in damaged:
                if path not in self.damaged:
                    print(
                        f"damaged image {printable(path)} ({printable(reason)}): replaced by the next readable image",
                        flush=True,
                    )
                self.damaged[path] = reason
            if not crops:
                raise RunError(
                    "more than 1 % of the images are damaged: repair or remove the files that the log reports"
                )
            crops = [crop.to(self.device, non_blocking=True) for crop in crops]
            indices = torch.from_numpy(read).to(self.device, non_blocking=True)
            yield self._batch(self.views.finish(crops, read, seed=self.seed, epoch=epoch), indices, len(part))

    def _timed(self, batches: Iterator[FileBatch]) -> Iterator[FileBatch]:
        """Yield the batches, and measure the time that this rank waits for them."""
        stream = self._stream
        while True:
            began = time.monotonic()
            # A GPU waits only if its steps end before the batch arrives. Two events record both times on the GPU, and
            # `waited` reads them later, so that the host does not have to wait here.
            asked = self._mark(torch.cuda.default_stream(self.device)) if stream else None
            batch = next(batches, None)
            if batch is None:
                return
            if asked is None or stream is None:
                self._waited += time.monotonic() - began
            else:
                self._waits.append((asked, self._mark(stream)))
            yield batch

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Record an event that tells when a stream has reached this point."""
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    @property
    def waited(self) -> float:
        """Seconds spent waiting for files; see the class."""
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

    def advice(self, summary: dict[str, Any]) -> str:
        """Return advice on loading files faster if an epoch with this summary was data-bound, and "" otherwise."""
        share = summary.get("waited", 0.0)
        if share <= WAITED_SHARE or self._files is None:
            return ""
        rate = summary["images_per_second"]
        return (
            f"training is data-bound: {share:.0%} of epoch {summary['epoch']} was spent waiting for images. Files arrive at "
            f"{rate:,.0f} images/s, and training could use {rate / max(1 - share, 0.01):,.0f} images/s. Raise --workers (now "
            f"{self._files.workers}) if there are free cores, or make a smaller copy: python -m src.data.shrink"
        )


def _on_stream(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """Yield the same batches, copied to a GPU and finished on a stream of their own.

    The host asks for the next batch as soon as it has queued the kernels of a step. The separate stream lets the GPU
    prepare that batch while it computes the step.
    """
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        steps = torch.cuda.current_stream(stream.device)
        steps.wait_stream(stream)
        companions = [] if batch.companions is None else [batch.companions]
        for tensor in [*batch.views, batch.indices, *companions]:
            tensor.record_stream(steps)  # else its memory could be reused before the steps have read it
        yield batch


def single_views(
    data: Images, views: Views, *, batch_size: int, device: torch.device, workers: int = -1
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield the evaluation views of a data set with the indices of the images. Every rank yields its own share.

    Each image appears exactly once.

    Args:
        batch_size: images per batch on this rank.
        workers: processes that decode image files; -1: one per core available to this rank (see `available_workers`).

    Raises:
        InputError: if a file cannot be decoded. A score over the remaining images would not be comparable.
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
                    raise InputError(f"{path}: cannot be decoded ({reason}): repair or remove the file")
                yield views.single_finish(crops[0].to(device, non_blocking=True)), part
        finally:
            files.close()


class _FileBatches:
    """Decode batches of files in worker processes, in the order of the requests.

    Args:
        seed: seed of the run; None: the worker cuts evaluation views.
        workers: number of processes; -1: one per core available to this rank.
        encoded: only read the files in the workers, and leave decoding to `cut_on`.
    """

    def __init__(self, data: ImageFiles, views: Views, seed: int | None, *, workers: int, encoded: bool = False):
        self.data, self.views, self.seed = data, views, seed
        self.reader = _Reader(data, views, seed, encoded=encoded)
        self.refused = ""  # the first reason for which the device failed to decode a batch that the host could decode
        self.requests = _Requests()
        self.workers = available_workers() if workers < 0 else workers
        self.loader: DataLoader | None = None

    def read(self, requests: list[tuple[int, np.ndarray]], pin: bool = False) -> Iterator[FileBatch]:
        """Return an iterator over the batches of the requests, each given as (epoch, indices).

        Args:
            pin: put the batches into pinned memory, for a GPU.

        Returns:
            For each request a tuple of three: the crops, V × (B, C, H, W) uint8, or an empty list if too many images are
            damaged; the indices of the images that were read; and [(path, reason)] of the damaged files. With `encoded`,
            the result of `packed` takes the place of the crops.
        """
        self.requests.wanted = requests
        if self.loader is None:
            self.loader = DataLoader(
                self.reader,
                batch_size=None,  # a request already stands for a whole batch
                sampler=self.requests,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=pin,
                worker_init_fn=ignore_signals,
                collate_fn=_unchanged,
                multiprocessing_context=Kept.fork if self.workers and self.data.kept else None,
            )
            # At exit Python sends SIGTERM to the processes that still run, and waits for them. Our workers ignore SIGTERM
            # (see `ignore_signals`), so this function ends them first. It gets a weak reference, because a registered
            # function must not keep the loader alive.
            atexit.register(_close_if_alive, weakref.ref(self))
        return iter(self.loader)

    def cut_on(self, device: torch.device, batch: FileBatch, *, epoch: int) -> FileBatch:
        """Decode the files of a batch on the device and cut the crops. The batch must come from `read` with `encoded`."""
        content, indices, damaged = batch
        try:
            decoded = decode_on(device, unpacked(*content))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A file may be damaged. The host decodes all of them again to find out which one.
            images, indices, more = self.reader.images(indices, self.data.decode)
            decoded, damaged = [image.to(device) for image in images], damaged + more
            if not more and not self.refused:
                self.refused = str(error).partition("\n")[0]
                print(
                    f"the device cannot decode some images ({printable(self.refused)}): the host decodes them",
                    flush=True,
                )
        return (self.reader.cut(decoded, indices, epoch) if decoded else []), indices, damaged

    def close(self) -> None:
        """End the worker processes."""
        iterator: Any = None if self.loader is None else self.loader._iterator
        if iterator is not None:
            workers = iterator._workers
            iterator._shutdown_workers()  # waits some seconds for each worker
            for worker in workers:
                # A worker may hang, for example in a read from a disk that does not respond. Python would wait for ever.
                if worker.is_alive():
                    worker.kill()


def _close_if_alive(batches: "weakref.ref[_FileBatches]") -> None:
    if (alive := batches()) is not None:
        alive.close()


class _Requests:
    """Sampler for a loader that serves all epochs: it yields the requests that were set last."""

    def __init__(self) -> None:
        self.wanted: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)


class _Reader(Dataset[FileBatch]):
    """Data set of the worker processes: it turns a request into a batch."""

    def __init__(self, data: ImageFiles, views: Views, seed: int | None, *, encoded: bool):
        self.data, self.views, self.seed, self.encoded = data, views, seed, encoded

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> FileBatch:
        """Return one batch; see `_FileBatches.read`."""
        epoch, indices = request
        damaged: Damage
        if self.encoded:
            images, found, damaged = self.images(indices, self._encoded)
            return packed(images), found, damaged
        damaged = []
        read: list[int] = []
        parts: list[list[Tensor]] = []
        few: list[Tensor] = []  # decoded images whose views are cut in one call
        for wanted in indices.tolist():
            index, image = self._next_readable(wanted, self.data.decode, damaged)
            if image is None:
                return [], np.array(read), damaged
            read.append(index)
            few.append(image)
            if len(read) == len(indices) or sum(image.numel() for image in few) > TOGETHER:
                parts.append(self.cut(few, np.array(read[-len(few) :]), epoch))
                few = []
        return [torch.cat(view) for view in zip(*parts, strict=True)], np.array(read), damaged

    def _encoded(self, index: int) -> Tensor:
        return encoded(self.data.paths[index], upright=self.data.upright)

    def images(self, indices: np.ndarray, read: Callable[[int], Tensor]) -> tuple[list[Tensor], np.ndarray, Damage]:
        """Return all images of a batch as `read` returns them, with the indices and the damage.

        The list of images is empty if too many images are damaged.
        """
        damaged: Damage = []
        found = [self._next_readable(wanted, read, damaged) for wanted in indices.tolist()]
        images = [image for _, image in found if image is not None]
        complete = len(images) == len(found)
        return images if complete else [], np.array([index for index, _ in found]), damaged

    def cut(self, images: list[Tensor], indices: np.ndarray, epoch: int) -> list[Tensor]:
        """Cut the crops of decoded images for training, or for evaluation if there is no seed."""
        if self.seed is None:
            return [torch.stack([self.views.single_cut(image) for image in images])]
        return self.views.cut(images, indices, seed=self.seed, epoch=epoch)

    def _next_readable(self, index: int, read: Callable[[int], Tensor], damaged: Damage) -> tuple[int, Tensor | None]:
        """Return position and content of an image, or of the next image that can be read.

        The content is None after more failures in a row than a run tolerates. Failures are added to `damaged`.
        """
        for _ in range(int(DAMAGED_SHARE * len(self.data)) + 2):
            try:
                return index, read(index)
            # Pillow raises many kinds of errors on damaged files, such as SyntaxError and struct.error.
            except Exception as error:
                damaged.append((self.data.paths[index], f"{type(error).__name__}: {error}"))
            index = (index + 1) % len(self.data)
        return index, None


def _unchanged(batch: Any) -> Any:
    return batch  # torch's default function would convert the indices to tensors

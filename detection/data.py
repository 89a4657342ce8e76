"""Batches of pictures. What a step sees is a function of the seed and the step, whatever the ranks, workers and restarts."""

import hashlib
import random
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import distributed
from .annotations import Annotations
from .errors import RunError
from .transforms import Unreadable, new_size, open_image, transform

Example = tuple[Tensor, dict[str, Tensor], list[str]]  # image, target, names of files that could not be used


def seed_of(*parts: int) -> int:
    """Return a seed below 2⁵⁶ that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class TrainingPictures(Dataset):
    """Pictures in a random size, mirrored at random.

    Args:
        annotations: see `Annotations.for_training`.
        sizes: lengths of the shorter side, one of which is drawn.
        longest: limit of the longer side.
        masks: with masks.
    """

    def __init__(self, annotations: Annotations, *, sizes: tuple[int, ...], longest: int, masks: bool):
        self.pictures = annotations.pictures
        self.sizes, self.longest, self.masks = sizes, longest, masks

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """Return the picture at a position, for a seed. A file that cannot be used is replaced by the next one.

        Raises:
            RunError: if ten files in a row cannot be used.
        """
        index, seed = key
        generator = random.Random(seed)
        shorter, mirror = generator.choice(self.sizes), generator.random() < 0.5
        unusable: list[str] = []
        for place in range(index, index + 10):
            picture = self.pictures[place % len(self.pictures)]
            try:
                image = open_image(picture)
            except Unreadable as error:
                unusable.append(str(error))
                continue
            size = new_size(image.width, image.height, shorter=shorter, longer=self.longest)
            pixels, target = transform(image, picture.things, size=size, mirror=mirror, masks=self.masks)
            return pixels, {**target, "seed": torch.tensor(seed)}, unusable
        raise RunError(f"ten images in a row cannot be read, the first is {unusable[0]}: check the image files")


class Stream(Sampler):
    """The positions and seeds of the batches of this rank: one permutation of the pictures after the other, without end.

    Args:
        length: number of pictures.
        batch_size: over all ranks; divisible by their number.
        seed: of the permutations, and of what is drawn for each picture.
        steps: the first step, and the step after the last.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, steps: tuple[int, int]):
        self.length, self.batch_size, self.seed, self.steps = length, batch_size, seed, steps

    def __len__(self) -> int:
        return self.steps[1] - self.steps[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = self.batch_size // distributed.world_size()
        order: list[int] = []
        current = -1
        for step in range(*self.steps):
            first = step * self.batch_size + distributed.rank() * own
            keys = []
            for position in range(first, first + own):
                epoch, place = divmod(position, self.length)
                if epoch != current:
                    current = epoch
                    generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                keys.append((order[place], seed_of(self.seed, epoch, place)))
            yield keys


def training_batches(pictures: TrainingPictures, stream: Stream, *, workers: int) -> DataLoader:
    """Return a loader of lists of examples."""
    return DataLoader(
        pictures,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_ignore_signals,
        pin_memory=False,  # images of different sizes are copied one by one
    )


def _ignore_signals(_worker: int) -> None:
    """Let the main process decide what a signal means, and keep a worker to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class TestPictures(Dataset):
    """Every picture in one size, for this rank: (position, image or None, name of a file that could not be used)."""

    __test__ = False  # pytest takes a class with this name for a test

    def __init__(self, annotations: Annotations, *, shorter: int, longest: int):
        self.pictures, self.shorter, self.longest = annotations.pictures, shorter, longest
        self.own = range(distributed.rank(), len(self.pictures), distributed.world_size())

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, str]:
        index = self.own[place]
        try:
            image = open_image(self.pictures[index])
        except Unreadable as error:
            return index, None, str(error)
        size = new_size(image.width, image.height, shorter=self.shorter, longer=self.longest)
        return index, transform(image, [], size=size, mirror=False, masks=False)[0], ""


def test_batches(pictures: TestPictures, *, workers: int) -> DataLoader:
    """Return a loader of single test pictures."""
    return DataLoader(pictures, batch_size=None, num_workers=workers, collate_fn=None, worker_init_fn=_ignore_signals)


test_batches.__test__ = False  # type: ignore[attr-defined]

"""Keep past embeddings in buffers of fixed size. The buffers work for any vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributed import gather_no_grad
from .errors import InputError
from .losses import IGNORED

CHUNK = 32768  # rows of the queue that are compared at once


class _Queue(nn.Module):
    """Base class of the queues, with their buffers and the write position. See `EmbeddingQueue`."""

    embeddings: Tensor
    _pointer: Tensor
    _full: Tensor

    def __init__(self, length: int, dim: int):
        super().__init__()
        if length < 1:
            raise ValueError(f"the length of the queue is {length}: expected at least 1 row")
        self.register_buffer("embeddings", torch.zeros(length, dim))
        # These two are in the checkpoint. Their copies on the host save each step from waiting for the device.
        self.register_buffer("_pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("_full", torch.zeros((), dtype=torch.bool))
        self.pointer, self.full = 0, False
        self.register_load_state_dict_post_hook(lambda module, _: module._read_back())

    def _read_back(self) -> None:
        """Copy the loaded buffers to the host."""
        self.pointer, self.full = int(self._pointer), bool(self._full)

    def check(self, num_images: int) -> None:
        """Check that what was loaded from a checkpoint can be used as positions.

        Args:
            num_images: number of images of the data set.

        Raises:
            InputError: naming the buffer and the value that lies outside.
        """
        if not 0 <= self.pointer < len(self.embeddings):
            raise InputError(
                f"its queue of {len(self.embeddings)} rows writes next to row {self.pointer}, which does not exist"
            )

    @torch.no_grad()
    def _append(self, embeddings: Tensor) -> Tensor:
        """Overwrite the oldest rows with this step's (B, D) embeddings of every rank and return the positions of the rows.

        Raises:
            ValueError: if all ranks together push more rows than the queue has.
        """
        embeddings = gather_no_grad(embeddings)
        length, count = len(self.embeddings), len(embeddings)
        if count > length:
            raise ValueError(f"{count} embeddings do not fit into a queue of {length}: expected at most {length}")
        rows = torch.arange(self.pointer, self.pointer + count, device=self.embeddings.device) % length
        self.embeddings[rows] = embeddings.to(self.embeddings.dtype)
        self.full = self.full or self.pointer + count >= length
        self.pointer = (self.pointer + count) % length
        self._pointer.fill_(self.pointer)
        self._full.fill_(self.full)
        return rows


class EmbeddingQueue(_Queue):
    """Store the last `length` embeddings of all ranks, first in, first out.

    Every rank holds the same queue, because the embeddings of all ranks are gathered in rank order. So a run can
    continue on another number of ranks.

    Args:
        length: number of rows Q.
        dim: size D of an embedding.

    Attributes:
        embeddings: (Q, D) float32 buffer, zeros at first.
        pointer: row that is written next.
        full: True once every row has been written.
    """

    def push(self, embeddings: Tensor) -> Tensor:
        """Overwrite the oldest rows with this step's (B, D) embeddings of every rank and return the positions of the rows.

        Raises:
            ValueError: if all ranks together push more rows than the queue has.
        """
        return self._append(embeddings)


class NearestNeighborQueue(_Queue):
    """Store past embeddings with the indices of their images, and look up nearest neighbours.

    Self-Classifier, arXiv:2103.10994v3: the nearest past embedding of *another* image may replace a view. The rows hold
    meaningful embeddings once the queue is full. Every rank holds the same queue.

    Args:
        length: number of rows Q, at least 2.
        dim: size D of an embedding.

    Attributes:
        embeddings: (Q, D) float32 buffer, zeros at first.
        indices: (Q,) long buffer, the position in the data set of the image of each row.
        labels: (Q,) long buffer, human labels for monitoring, -1 where unknown.
        pointer: row that is written next.
        full: True once every row has been written.
    """

    indices: Tensor
    labels: Tensor

    def __init__(self, length: int, dim: int):
        if length < 2:
            raise ValueError(f"the length of the queue is {length}: expected at least 2 rows")
        super().__init__(length, dim)
        self.register_buffer("indices", torch.zeros(length, dtype=torch.long))
        self.register_buffer("labels", torch.full((length,), -1, dtype=torch.long))

    def check(self, num_images: int) -> None:
        super().check(num_images)
        _check_range("indices of its queue", self.indices, low=0, high=num_images)

    @torch.no_grad()
    def push(self, embeddings: Tensor, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Overwrite the oldest rows with this step's (B, D) embeddings of every rank and return the positions of the rows.

        Args:
            indices: (B,) positions of the images in the data set.
            labels: (B,) human labels; None: unknown.

        Raises:
            ValueError: if all ranks together push more rows than the queue has.
        """
        rows = self._append(embeddings)
        self.indices[rows] = gather_no_grad(indices)
        if labels is None:
            self.labels.index_fill_(0, rows, -1)
        else:
            self.labels[rows] = gather_no_grad(labels).long()
        return rows

    @torch.no_grad()
    def nearest_rows(self, embeddings: Tensor, indices: Tensor) -> Tensor:
        """Return the row of the nearest stored embedding of another image, (B,) long.

        The similarity is the dot product of the unit vectors. If the best match has the index of the query, it is the
        query's own image, and the second best match is returned. The second match is not checked, as in the authors'
        code: shortly after the start of an epoch, a long queue can hold two embeddings of the same image.

        Args:
            embeddings: (B, D) unit vectors.
            indices: (B,) positions of their images in the data set.
        """
        best, second = self._two_nearest(embeddings.to(self.embeddings.dtype)).unbind(dim=1)
        return torch.where(self.indices[best] == indices, second, best)

    def _two_nearest(self, embeddings: Tensor) -> Tensor:
        """Return the rows of the two most similar stored embeddings, (B, 2) long.

        Compares one chunk of the queue at a time, so that no B × Q matrix is held.
        """
        similarity = embeddings.new_empty(len(embeddings), 0)
        rows = torch.empty(len(embeddings), 0, dtype=torch.long, device=embeddings.device)
        for first in range(0, len(self.embeddings), CHUNK):
            stored = self.embeddings[first : first + CHUNK]
            with torch.autocast(embeddings.device.type, enabled=False):  # in half precision, distinct matches can tie
                found, at = (embeddings @ stored.T).topk(min(2, len(stored)), dim=1)
            if first == 0:
                similarity, rows = found, at
            else:
                # Earlier chunks come first, so that they win ties, as they would in one chunk.
                similarity, at_best = torch.cat([similarity, found], dim=1).topk(2, dim=1)
                rows = torch.cat([rows, at + first], dim=1).gather(1, at_best)
        return rows

    def nearest(self, embeddings: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, D) and labels (B,) of the rows that `nearest_rows` returns."""
        rows = self.nearest_rows(embeddings, indices)
        return self.embeddings[rows], self.labels[rows]


def _check_range(what: str, values: Tensor, *, low: int, high: int) -> None:
    """Raise InputError unless all values are at least `low` and below `high`."""
    if not len(values):
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most >= high:
        raise InputError(f"the {what} go from {least} to {most}, expected {low} to {high - 1}")


class MemoryBank(nn.Module):
    """Store the last embedding and the cluster of every image of a data set.

    DeepCluster-v2, arXiv:2006.09882v5, appendix D. There is one bank for each of A views. Every rank holds all banks.
    The banks are empty until `make_room` is called.

    Args:
        num_banks: number of banks A.
        num_heads: number of heads H.
        dim: size D of an embedding.

    Attributes:
        embeddings: (A, N, D) float32 buffer.
        written: (N,) bool buffer, True for images with embeddings since it was last cleared.
        clusters: (H, N) long buffer, the cluster of each image for each head, `IGNORED` for none.
    """

    embeddings: Tensor
    written: Tensor
    clusters: Tensor

    def __init__(self, num_banks: int, num_heads: int, dim: int):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_banks, 0, dim))
        self.register_buffer("written", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("clusters", torch.zeros(num_heads, 0, dtype=torch.long))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.written)

    def make_room(self, num_images: int) -> None:
        """Resize the buffers to a number of images and clear them."""
        (num_banks, _, dim), num_heads = self.embeddings.shape, len(self.clusters)
        self.embeddings = self.embeddings.new_zeros(num_banks, num_images, dim)
        self.written = self.written.new_zeros(num_images)
        self.clusters = self.clusters.new_full((num_heads, num_images), IGNORED)

    def check(self, num_images: int, sizes: Sequence[int]) -> None:
        """Check that what was loaded from a checkpoint fits a data set.

        Args:
            num_images: number of images of the data set.
            sizes: number of clusters of each head.

        Raises:
            InputError: if the bank has another number of images, or an image has a cluster that does not exist.
        """
        if len(self) != num_images:
            raise InputError(f"its memory bank has {len(self)} images, expected {num_images}")
        for head, size in enumerate(sizes):
            clusters = self.clusters[head]
            _check_range(f"clusters of its head {head}", clusters[clusters != IGNORED], low=0, high=size)

    @torch.no_grad()
    def fill(self, embeddings: Tensor, indices: Tensor) -> None:
        """Store (A, M, D) embeddings of M images with the (M,) positions `indices`. All ranks must pass the same values."""
        self.embeddings[:, indices] = embeddings.to(self.embeddings.dtype)
        self.written.index_fill_(0, indices, True)

    @torch.no_grad()
    def write(self, embeddings: Tensor, indices: Tensor) -> None:
        """Store every rank's (A, B, D) embeddings of the images with the (B,) positions `indices`, on all ranks."""
        indices = gather_no_grad(indices)
        together = gather_no_grad(embeddings.transpose(0, 1)).transpose(0, 1)
        self.fill(together, indices)

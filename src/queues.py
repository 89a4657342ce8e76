"""Fixed-size buffers of past embeddings. They do not know what the vectors mean."""

import torch
from torch import Tensor, nn

from .distributed import gather_no_grad

CHUNK = 32768  # rows of the queue that are compared at once


class EmbeddingQueue(nn.Module):
    """The last `length` embeddings of all ranks, first in first out.

    Every rank holds the same queue: what is pushed is gathered in rank order. So it can be continued on another number of
    ranks.

    Attributes (buffers, so that a checkpoint holds them):
        embeddings: (Q, D) float32, zeros until written.
        pointer: next row to be written.
        full: whether every row was written once.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        if length < 1:
            raise ValueError(f"a queue needs at least one row, got {length}")
        self.register_buffer("embeddings", torch.zeros(length, dim))
        self.register_buffer("_pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("_full", torch.zeros((), dtype=torch.bool))
        # Mirrors on the host, so that a step does not wait for the device to learn where to write.
        self.pointer, self.full = 0, False
        self.register_load_state_dict_post_hook(lambda module, _: module._read_back())

    def _read_back(self) -> None:
        self.pointer, self.full = int(self._pointer), bool(self._full)

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> Tensor:
        """Append this step's (B, D) embeddings of every rank, overwriting the oldest rows. Returns which rows those were.

        Raises:
            ValueError: if the ranks together push more rows than the queue has.
        """
        embeddings = gather_no_grad(embeddings)
        length, count = len(self.embeddings), len(embeddings)
        if count > length:
            raise ValueError(f"{count} embeddings do not fit into a queue of {length}")
        rows = torch.arange(self.pointer, self.pointer + count, device=self.embeddings.device) % length
        self.embeddings[rows] = embeddings.to(self.embeddings.dtype)
        self.full = self.full or self.pointer + count >= length
        self.pointer = (self.pointer + count) % length
        self._pointer.fill_(self.pointer)
        self._full.fill_(self.full)
        return rows


class NearestNeighborQueue(EmbeddingQueue):
    """A queue that knows which image each row shows, with a nearest-neighbour look-up.

    Self-Classifier, arXiv:2103.10994v3: a view may be replaced by the nearest past embedding of *another* image. Look-ups
    make sense once the queue is full.

    Attributes (buffers, besides those of every queue):
        indices: (Q,) position in the data set of the image behind each row.
        labels: (Q,) long, human labels for monitoring, -1 where none was given.
    """

    def __init__(self, length: int, dim: int):
        if length < 2:
            raise ValueError(f"a queue needs at least 2 rows, got {length}")
        super().__init__(length, dim)
        self.register_buffer("indices", torch.zeros(length, dtype=torch.long))
        self.register_buffer("labels", torch.full((length,), -1, dtype=torch.long))

    @torch.no_grad()
    def push(self, embeddings: Tensor, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Append this step's (B, D) embeddings with their (B,) indices; see `EmbeddingQueue.push`."""
        rows = super().push(embeddings)
        self.indices[rows] = gather_no_grad(indices)
        if labels is None:
            self.labels.index_fill_(0, rows, -1)
        else:
            self.labels[rows] = gather_no_grad(labels).long()
        return rows

    @torch.no_grad()
    def nearest_rows(self, embeddings: Tensor, indices: Tensor) -> Tensor:
        """Row of the nearest stored embedding of another image, (B,) long.

        Similarity is the dot product of the unit vectors. If the best match is the query's own image (known by its
        index in the data set), the second best is taken. Only one level is excluded, as in the authors' code: right
        after an epoch boundary a long queue can hold two copies of an image.
        """
        best, second = self._two_nearest(embeddings.to(self.embeddings.dtype)).unbind(dim=1)
        return torch.where(self.indices[best] == indices, second, best)

    def _two_nearest(self, embeddings: Tensor) -> Tensor:
        """Rows of the two most similar stored embeddings, (B, 2). A chunk of the queue at a time: no B × Q matrix."""
        similarity, rows = None, None
        for first in range(0, len(self.embeddings), CHUNK):
            stored = self.embeddings[first : first + CHUNK]
            with torch.autocast(embeddings.device.type, enabled=False):  # in half precision the two best may tie
                found, at = (embeddings @ stored.T).topk(min(2, len(stored)), dim=1)
            if rows is None:
                similarity, rows = found, at
            else:
                # the earlier chunks stand first, so that they win ties as they would without chunks
                similarity, at_best = torch.cat([similarity, found], dim=1).topk(2, dim=1)
                rows = torch.cat([rows, at + first], dim=1).gather(1, at_best)
        return rows

    def nearest(self, embeddings: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and labels (B,) of the nearest stored rows; see `nearest_rows`."""
        rows = self.nearest_rows(embeddings, indices)
        return self.embeddings[rows], self.labels[rows]


class MemoryBank(nn.Module):
    """The last embedding of every image of a data set, one bank for each of several views, and the clusters made of them.

    DeepCluster-v2, arXiv:2006.09882v5, appendix D. Every rank holds all of it. It starts without room for any image.

    Attributes (buffers):
        embeddings: (A, N, D) float32, A banks.
        written: (N,) bool, which images have embeddings that count.
        clusters: (H, N) long, the cluster of every image for each of H heads, -100 for none.
    """

    def __init__(self, num_banks: int, num_heads: int, dim: int):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_banks, 0, dim))
        self.register_buffer("written", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("clusters", torch.zeros(num_heads, 0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.written)

    def make_room(self, num_images: int) -> None:
        (num_banks, _, dim), num_heads = self.embeddings.shape, len(self.clusters)
        self.embeddings = self.embeddings.new_zeros(num_banks, num_images, dim)
        self.written = self.written.new_zeros(num_images)
        self.clusters = self.clusters.new_full((num_heads, num_images), -100)

    @torch.no_grad()
    def fill(self, embeddings: Tensor, indices: Tensor) -> None:
        """Store (A, M, D) embeddings of (M,) images, which are the same on all ranks."""
        self.embeddings[:, indices] = embeddings.to(self.embeddings.dtype)
        self.written.index_fill_(0, indices, True)

    @torch.no_grad()
    def write(self, embeddings: Tensor, indices: Tensor) -> None:
        """Store (A, B, D) embeddings of this rank's (B,) images, and likewise those of the other ranks."""
        indices = gather_no_grad(indices)
        together = gather_no_grad(embeddings.transpose(0, 1)).transpose(0, 1)
        self.embeddings[:, indices] = together.to(self.embeddings.dtype)
        self.written.index_fill_(0, indices, True)

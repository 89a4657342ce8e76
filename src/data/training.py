"""The training data as a method sees it: without labels."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from .datasets import Images
from .labels import arrange, names_of, read_labels
from .loaders import Batch, TrainLoader, single_views

PIECE = 1 << 26  # bytes of rows that one exchange between ranks sends


class Rows(NamedTuple):
    """One row per image.

    Attributes:
        values: (M, ...) rows of any shape.
        indices: (M,) positions of the images in the data set, ascending.
    """

    values: Tensor
    indices: Tensor


class TrainingData:
    """The images of a run without their labels. The hooks of `methods.base.Method` get this object.

    Args:
        count: calls a function with arguments and counts its operations, see `flops.OperationCounter.run`; None: do not
            count the operations of `embed`.
    """

    def __init__(self, loader: TrainLoader, count: Callable[..., Tensor] | None = None):
        self._loader, self._count = loader, count or (lambda function, *arguments: function(*arguments))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._loader.data)

    @property
    def num_held_out(self) -> int:
        """Number of images that are not trained on, and on which a method may select a model; see `embed`."""
        return 0 if self._loader.held_out is None else len(self._loader.held_out)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._loader.seed

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return len(self._loader)

    @property
    def steps(self) -> int:
        """Number of steps for which the run is planned. It grows if a finished run gets more epochs.

        Raises:
            ValueError: if the number of epochs is unknown.
        """
        if not self._loader.epochs:
            raise ValueError("the number of epochs is unknown: pass epochs to TrainLoader")
        return self._loader.epochs * len(self._loader)

    def labels_in(self, path: str) -> Tensor:
        """Return the pseudo-labels that a file holds for these images, (H, N) long.

        Raises:
            InputError: if it is no file of labels, or the file of other images.
        """
        names, labels = read_labels(path)
        return torch.from_numpy(arrange(path, names, labels, images=names_of(self._loader.data)).copy())

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch, the same as in training.

        This also works while an epoch of training is in progress.
        """
        return self._loader.epoch(epoch, apart=True)

    @torch.no_grad()
    def embed(
        self,
        function: Callable[[list[Tensor]], Tensor],
        *,
        epoch: int | None = None,
        sharded: bool = False,
        held_out: bool = False,
    ) -> Rows:
        """Apply a function to the views of every image and return its rows, ordered by image. All ranks must call it.

        Args:
            function: maps the V views of a batch, V × (B, C, H, W), to rows (B, ...) of any shape. It runs without
                gradients. It sets training or evaluation mode and the precision itself.
            epoch: None: the function gets one view, the evaluation view of the image. A number: it gets the training views
                of that epoch, without the images of the last partial batch that the epoch drops.
            held_out: embed the images that are held out instead of the training images. They have evaluation views only.
            sharded: return only the rows that this rank computed. By default every rank gets the rows of all ranks.

        Returns:
            The rows, on the device of the function's output, and the positions of their images.

        Raises:
            ValueError: if this rank has no image and gets no rows from other ranks.
        """
        images_of = self._loader.held_out if held_out else self._loader.data
        if images_of is None:
            raise ValueError("no images are held out: pass held_out=False")
        values, indices, filled = torch.empty(0), [], 0
        device = self._loader.device
        for views, batch_indices in self._views(images_of, epoch):
            rows = self._count(function, views)
            if not filled:
                # Memory for all rows at once, because a list of them and their concatenation would take twice as much.
                most = -(-len(images_of) // distributed.world_size())
                values = rows.new_empty(most, *rows.shape[1:])
            if filled + len(rows) > len(values):
                values = torch.cat([values, values.new_empty(len(rows), *rows.shape[1:])])
            values[filled : filled + len(rows)] = rows
            indices.append(batch_indices.to(device))
            filled += len(rows)
        own = None
        if filled:
            values, positions = values[:filled], torch.cat(indices)
            if (positions.diff() > 0).all():
                own = Rows(values, positions)
            else:
                # The loader replaces a damaged image by another one, which may then appear twice.
                unique, place = positions.unique(return_inverse=True)
                own = Rows(values.new_zeros(len(unique), *values.shape[1:]).index_copy_(0, place, values), unique)
        if distributed.world_size() == 1 or sharded:
            if own is None:
                raise ValueError("this rank has no image, expected at least one per rank: start fewer ranks")
            return own
        return self._from_all(own, len(images_of))

    def _views(self, images: Images, epoch: int | None) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield the views of this rank's images and the positions of the images; see `embed`."""
        if epoch is not None:
            for batch in self.batches(epoch):
                yield batch.views, batch.indices
            return
        loader = self._loader
        how: dict[str, Any] = {"batch_size": loader.per_rank, "device": loader.device, "workers": loader.workers}
        for batch_images, indices in single_views(images, loader.views, **how):
            yield [batch_images], torch.from_numpy(indices)

    def _from_all(self, own: Rows | None, number: int) -> Rows:
        """Return the rows of all ranks for a data set of `number` images. The ranks exchange them in pieces, to save memory."""
        shapes = distributed.from_all(None if own is None else (tuple(own.values.shape[1:]), own.values.dtype))
        shape, dtype = next(known for known in shapes if known is not None)
        device = self._loader.device
        values = torch.zeros(number, *shape, dtype=dtype, device=device)
        counts = torch.zeros(number, dtype=torch.long, device=device)
        if own is not None:
            values[own.indices], counts[own.indices] = own.values, 1
        rows_per_piece = max(PIECE // max(values[0].numel() * values.element_size(), 1), 1)
        for piece in values.split(rows_per_piece):
            piece.copy_(distributed.sum_over_ranks(piece))
        counts = distributed.sum_over_ranks(counts)
        indices = counts.nonzero().flatten()
        # Two ranks may have read the same image in place of damaged images. Its row is the mean of theirs.
        copies = counts[indices].clamp(min=1).view(-1, *[1] * len(shape))
        return Rows(values[indices] / copies if (copies > 1).any() else values[indices], indices)

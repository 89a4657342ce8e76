"""The interface between views and loaders."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


class Views:
    """Base class of views.

    For images in memory, a loader calls the views themselves for training and `single` for evaluation. For image files, it
    calls the other four methods, which split the work between worker processes and the device. A class implements the
    methods that its data need.
    """

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Return all views of images in memory, V × (B, C, H, W), ready for a network."""
        raise NotImplementedError

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Cut the crops of B decoded images, each (C, H, W), to V × (B, C, size, size) uint8. Runs in a worker."""
        raise NotImplementedError

    def finish(self, crops: list[Tensor], indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        """Apply the photometric operations to the crops of a whole batch. Runs on the device."""
        raise NotImplementedError

    def single(self, images: Tensor) -> Tensor:
        """Return the evaluation view of images in memory."""
        raise NotImplementedError

    def single_cut(self, image: Tensor) -> Tensor:
        """Return the evaluation crop of one decoded image, (C, size, size) uint8. Runs in a worker."""
        raise NotImplementedError

    def single_finish(self, crops: Tensor) -> Tensor:
        """Make evaluation crops ready for a network. Runs on the device."""
        raise NotImplementedError

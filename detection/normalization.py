"""Batch normalisation over all ranks, and its statistics for evaluation."""

from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import distributed

Model = TypeVar("Model", bound=nn.Module)


class BatchNormOverRanks(nn.BatchNorm2d):
    """Batch normalisation over the rows of all ranks, also on CPUs, where torch's SyncBatchNorm does not work.

    In a single process and in evaluation mode this is torch's BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        rows = x.float()
        count = rows.new_tensor([rows.numel() / rows.shape[1]])
        sums = torch.cat((rows.sum((0, 2, 3)), rows.square().sum((0, 2, 3)), count))
        sums = distributed.SumOverRanks.apply(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked += 1
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = variance * (sums[-1] / (sums[-1] - 1).clamp(min=1))
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(unbiased, momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], rows, scale[:, None, None]).to(x.dtype)


def over_ranks(model: Model, device: torch.device) -> Model:
    """Replace the batch normalisation of a model by torch's SyncBatchNorm if there are several ranks with GPUs."""
    if device.type == "cuda" and distributed.world_size() > 1:
        return cast(Model, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    return model


@torch.no_grad()
def update_statistics(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> int:
    """Set the running statistics of all batch normalisations to their mean over batches ("precise BN").

    Running statistics lag behind the weights, because they are moving averages. This function computes them anew with the
    final weights: the mean of the statistics of the batches, each of which is computed as in training.

    Args:
        model: takes images and targets in training mode. Its mode is restored.
        batches: images and targets.

    Returns:
        The number of batches.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta, mode, count = [layer.momentum for layer in layers], model.training, 0
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the cumulative mean
    for images, targets in batches:
        model(images, targets)
        count += 1
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(mode)
    return count

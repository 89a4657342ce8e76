"""The optimiser and the learning rate of detectron2's configurations."""

from collections.abc import Sequence

from torch import nn
from torch.optim import SGD


def learning_rate(
    step: int, *, base: float, decay_steps: Sequence[int], gamma: float, warmup_steps: int, warmup_factor: float
) -> float:
    """Return the learning rate of a step, counted from 0.

    Args:
        base: after the warm-up.
        decay_steps: the rate is multiplied by `gamma` from each of these steps on.
        warmup_steps: the rate rises linearly from `warmup_factor` × base to the base.
    """
    rate = base * gamma ** sum(step >= decay for decay in decay_steps)
    if step < warmup_steps:
        rise = step / warmup_steps
        rate *= warmup_factor * (1 - rise) + rise
    return rate


def build_optimizer(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> SGD:
    """Return SGD with weight decay on everything but the parameters of normalisations, as in detectron2."""
    norms = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for parameter in layer.parameters()
    }
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": 0.0},
    ]
    return SGD(groups, lr=lr, momentum=momentum)

"""The linear probe as a method of the trainer: a backbone and a linear layer that learns from labels.

Legend: B images on this rank, F features, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed
from ..errors import RunError
from ..fingerprints import of_weights
from ..methods.base import Method, Step
from ..optim import build_optimizer


class LinearProbe(Method):
    """A backbone and a fresh linear layer `fc`, (B, channels, H, W) → (B, C) logits.

    If the backbone is frozen, the layer starts normal with standard deviation 0.01 and biases of 0, as in both
    protocols. With `finetune` it keeps nn.Linear's own start.

    Args:
        labels: (N,) class of every training image; needed to train.
        finetune: train the backbone too.
        train_bn: its batch normalisation then uses the statistics of the batch; otherwise always those of pre-training.
        num_features: F of the backbone; None: its width. See `pool_windows` in src/models/backbones.py.
        feature_bn: put batch normalisation `bn` of the backbone's channels before the linear layer and train it too.
            The windows of one channel share their statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        labels: Tensor | None = None,
        *,
        finetune: bool = False,
        train_bn: bool = False,
        num_features: int | None = None,
        feature_bn: bool = False,
    ):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(num_features or backbone.width, num_classes)
        self.bn = nn.BatchNorm1d(backbone.width) if feature_bn else None
        self.finetune, self.train_bn = finetune, train_bn
        self.register_buffer("labels", labels, persistent=False)
        backbone.requires_grad_(finetune)
        if not finetune:
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        self.before = of_weights(backbone)

    @property
    def shares_statistics(self) -> bool:
        """Whether batch normalisation uses the statistics of a step's batch, of all ranks."""
        return self.train_bn or self.bn is not None

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        if not self.finetune:
            self.backbone.eval()
        elif not self.train_bn:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.to(self.fc.weight.dtype)
            if self.bn is not None:
                features = self.bn(features.unflatten(1, (self.bn.num_features, -1))).flatten(1)
            return self.fc(features)

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Return the logits of the only view, [(B, C)]."""
        (images,) = views
        return [self(images)]

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """Return the cross-entropy with the labels; the mean of the ranks' losses is that of the joined batch."""
        (logits,) = embeddings
        total = F.cross_entropy(logits, self.labels[indices], reduction="sum")
        images = total.new_tensor(float(len(logits)))
        # DistributedDataParallel averages gradients over ranks, whose shares of a last batch may differ by one image.
        loss = total / distributed.mean_over_ranks(images)
        return Step(loss, {"loss_sum": total.detach(), "images": images})

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Return the mean loss over the images of the epoch: its last batch may be smaller."""
        return {"loss": (averages["loss_sum"] / averages["images"]).item()}

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not the backbone's."""
        return [*self.fc.parameters(), *(self.bn.parameters() if self.bn is not None else ())]

    def saved_state(self) -> dict[str, Tensor]:
        """Return what was learned: the whole network, or without the backbone if it is frozen."""
        state = self.state_dict()
        return state if self.finetune else {key: v for key, v in state.items() if not key.startswith("backbone.")}

    def load_saved_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict({**self.state_dict(), **state})

    def check_unchanged(self) -> None:
        """Raise RunError if the backbone changed although it is frozen."""
        after = of_weights(self.backbone)
        if not self.finetune and after != self.before:
            raise RunError(
                f"the backbone changed while it should have been frozen (SHA-256 {self.before[:12]} before, {after[:12]} now): "
                "the accuracy is not that of the checkpoint and is not reported"
            )


def rate_factor(
    schedule: str, epochs: int, *, decay_epochs: Sequence[int] = (), gamma: float = 0.1
) -> Callable[[int], float]:
    """Return the factor of the learning rates as a function of the epoch, counted from 0.

    "cosine": ½(1 + cos(π · epoch / epochs)), which starts at 1 and does not reach 0. "step": gamma for each of
    `decay_epochs` that has begun. "constant": 1.
    """
    if schedule == "cosine":
        return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "step":
        return lambda epoch: gamma ** sum(epoch >= begun for begun in decay_epochs)
    if schedule == "constant":
        return lambda epoch: 1.0
    raise ValueError(f"schedule must be cosine, step or constant, got {schedule}")


def build_probe_optimizer(
    probe: LinearProbe,
    name: str,
    *,
    lr: float,
    backbone_lr: float | None = None,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimiser; the trainer multiplies each group's rate with the factor of the epoch.

    Args:
        name: "lars", "sgd" or "adamw".
        lr: rate of the linear layer.
        backbone_lr: rate of the backbone if it is fine-tuned; None: `lr`.
    """
    rates = [(probe.own_parameters(), lr)]
    if probe.finetune:
        rates.append((list(probe.backbone.parameters()), lr if backbone_lr is None else backbone_lr))
    groups = [
        {"params": params, "lr": rate, "lr_scale": rate, "weight_decay": weight_decay}
        | ({"nesterov": True} if nesterov else {})
        for params, rate in rates
    ]
    return build_optimizer(name, groups, lr=lr, momentum=momentum)

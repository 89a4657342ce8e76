"""The linear probe, a method for the trainer: a backbone, and a linear layer that learns from labels.

Legend: B images on this rank, F features, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed
from ..errors import InputError, RunError
from ..fingerprints import of_weights
from ..methods.base import Method, Step, feature_width
from ..models.sela_networks import AlexNet
from ..optim import build_optimizer


class LinearProbe(Method):
    """A backbone and a new linear layer `fc`, (B, channels, H, W) → (B, C) logits.

    If the backbone is frozen, the weights of the layer start from a normal distribution with standard deviation 0.01, and its
    biases from 0, as in both protocols. With `finetune` the layer keeps the initialisation of nn.Linear.

    Args:
        labels: (N,) class of every training image; only training needs them.
        finetune: also train the backbone.
        train_bn: with `finetune`, batch normalisation uses the statistics of the batch instead of those of pre-training.
        num_features: number of features F of the backbone; None: its width. See `pool_windows` in src/models/backbones.py.
        feature_bn: put a batch normalisation `bn` of the channels of the backbone before the linear layer, and train it. The
            windows of one channel share their statistics.

    Attributes:
        before: fingerprint of the weights of the backbone at the start.
        layers: names of the layers that are probed; (): only the features.
    """

    layers: tuple[str, ...] = ()

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
        width = feature_width(backbone)
        self.num_features = num_features or width
        self.backbone, self.fc = backbone, nn.Linear(self.num_features, num_classes)
        self.bn = nn.BatchNorm1d(width) if feature_bn else None
        self.finetune, self.train_bn = finetune, train_bn
        self.labels: Tensor | None
        self.register_buffer("labels", labels, persistent=False)
        backbone.requires_grad_(finetune)
        if not finetune:
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        self.before = of_weights(backbone)

    @property
    def shares_statistics(self) -> bool:
        """True if batch normalisation uses the statistics of the batch of a step, over all ranks."""
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
        """Return the logits of the only view, in a list, [(B, C)]."""
        (images,) = views
        return [self(images)]

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """Return the cross-entropy with the labels. The mean of the losses of the ranks is the loss of the joined batch."""
        (logits,) = embeddings
        assert self.labels is not None  # a probe without labels is not trained
        total = F.cross_entropy(logits, self.labels[indices], reduction="sum")
        images = total.new_tensor(float(len(logits)))
        # DistributedDataParallel averages gradients over the ranks, whose parts of the last batch may differ by one image.
        loss = total / distributed.mean_over_ranks(images)
        return Step(loss, {"loss_sum": total.detach(), "images": images})

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Return the mean loss over the images of the epoch, whose last batch may be smaller."""
        return {"loss": (averages["loss_sum"] / averages["images"]).item()}

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the layers after the backbone."""
        own = list(self.fc.parameters())
        return own if self.bn is None else own + list(self.bn.parameters())

    def saved_state(self) -> dict[str, Tensor]:
        """Return the weights that were trained: those of the whole network, or without the backbone if it is frozen."""
        state = self.state_dict()
        return state if self.finetune else {key: v for key, v in state.items() if not key.startswith("backbone.")}

    def load_saved_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict({**self.state_dict(), **state})

    def check_unchanged(self) -> None:
        """Raise RunError if a frozen backbone has changed."""
        after = of_weights(self.backbone)
        if not self.finetune and after != self.before:
            raise RunError(
                f"the frozen backbone has changed (SHA-256 {self.before[:12]} before, {after[:12]} now): the accuracy is not that "
                "of the checkpoint and is not reported"
            )


class LayerProbes(LinearProbe):
    """A linear classifier on each of the five convolutions of a frozen AlexNet, trained together, (B, 3, H, W) → 5 × (B, C).

    SeLa, arXiv:1911.05371, after DeepCluster. A probe sees the map after the ReLU. Max-pooling reduces it to about 9,600
    numbers, which batch normalisation without scale and shift brings to unit variance. The loss is the sum over the layers.

    Args:
        labels: see `LinearProbe`.

    Raises:
        InputError: if the backbone is no AlexNet.
    """

    # kernel, stride and padding of the pooling of each map, for images of 224 pixels
    POOLING = ((6, 6, 3), (4, 4, 0), (3, 3, 1), (3, 3, 1), (2, 2, 0))
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5")

    def __init__(self, backbone: nn.Module, num_classes: int, labels: Tensor | None = None):
        super().__init__(backbone, num_classes, labels)
        del self.fc
        if not isinstance(backbone, AlexNet):
            raise InputError(f"--layers probes an AlexNet, but the backbone is a {type(backbone).__name__}: drop it")
        self.probes = nn.ModuleList()
        convolutions = [module for module in backbone.features if isinstance(module, nn.Conv2d)]
        for conv, pooling, side in zip(convolutions, self.POOLING, (10, 6, 5, 5, 6), strict=True):
            size, stride, padding = pooling
            linear = nn.Linear(conv.out_channels * side * side, num_classes)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            norm = nn.BatchNorm2d(conv.out_channels, affine=False)
            self.probes.append(
                nn.Sequential(nn.MaxPool2d(size, stride=stride, padding=padding), norm, nn.Flatten(), linear)
            )
        self.num_features = 0

    @property
    def shares_statistics(self) -> bool:
        return True

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the layers, (5, B, C)."""
        maps = []
        with torch.no_grad():
            x = images
            for module in cast(AlexNet, self.backbone).features:
                x = module(x)
                if isinstance(module, nn.ReLU):
                    maps.append(x)
        with torch.autocast(images.device.type, enabled=False):
            return torch.stack([probe(each.float()) for probe, each in zip(self.probes, maps, strict=True)])

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        (logits,) = embeddings
        steps = [super(LayerProbes, self).objective([each], indices) for each in logits]
        sums = [step.numbers["loss_sum"] for step in steps]
        total = torch.stack([step.loss for step in steps]).sum()
        return Step(total, {"loss_sum": torch.stack(sums).sum(), "images": steps[0].numbers["images"]})

    def own_parameters(self) -> list[nn.Parameter]:
        return list(self.probes.parameters())


def rate_factor(
    schedule: str, epochs: int, *, decay_epochs: Sequence[int] = (), gamma: float = 0.1
) -> Callable[[int], float]:
    """Return the factor of the learning rates as a function of the epoch, which counts from 0.

    "cosine": ½(1 + cos(π · epoch / epochs)), which starts at 1 and does not reach 0. "step": gamma to the power of the number
    of `decay_epochs` that are not above the epoch. "constant": 1.

    Raises:
        ValueError: if there is no such schedule.
    """
    if schedule == "cosine":
        return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "step":
        return lambda epoch: gamma ** sum(epoch >= start for start in decay_epochs)
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
    """Build the optimiser. The trainer multiplies the learning rate of each group by the factor of the epoch.

    Args:
        name: "lars", "sgd" or "adamw".
        lr: learning rate of the linear layer.
        backbone_lr: learning rate of the backbone if it is fine-tuned; None: `lr`.
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

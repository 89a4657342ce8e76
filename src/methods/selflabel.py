"""Self-labelling: train a clustering on the images of whose cluster it is most certain.

It is the third step of SCAN (Van Gansbeke et al., ECCV 2020, arXiv:2005.12320). View 0 of an image has no augmentation. If its
most probable cluster is certain, the strongly augmented view 1 is trained on that cluster. A batch without a certain image is
skipped and counted.

This step can make a clustering worse. So the run measures the loss without labels on held-out images, and counts the certain
images of each cluster. It keeps the best epoch (`checkpoint_best.pt`), and ends with a message if the loss stays above its
lowest value.

Departures from the authors' code:

- The images for the selection are held out from the training images by default. Theirs selects nothing and uses the last epoch.
- A batch without a certain image is skipped. Theirs ends with an error.
- `--ema averaged` is an averaged copy of the network, which evaluations use. `--ema published` is what their code does: each
  step is shortened to 1 - alpha of its length, and the statistics of batch normalisation stay as they were.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..config import require_at_least, require_positive
from ..data.loaders import Batch
from ..data.training import TrainingData
from ..errors import InputError
from ..losses import confident, confident_cross_entropy
from .base import Step
from .scan import LinearHeads, mined

WORSE = 0.1  # nats by which the label-free loss must exceed its lowest value to count as worse


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 10  # number of clusters, which must be that of the network of --pretrained
    threshold: float = 0.99  # smallest probability of a cluster from which on an image counts as certain
    balance: bool = True  # weight the images so that all clusters in a batch count equally
    ema: Literal["off", "published", "averaged"] = (
        "off"  # moving average of the weights: published shortens every step, averaged evaluates an averaged copy
    )
    ema_alpha: float = 0.999  # share of the old weights in the moving average
    select_on: Literal["train", "test"] = (
        "train"  # images on which the epoch is selected, without labels: held-out training images, or the test split
    )
    select_share: float = 0.1  # share of the training images that is held out for the selection (0: no selection)
    select_neighbors: int = 5  # number of nearest neighbours of each image in the selection
    patience: int = 5  # number of epochs with a worse loss on the held-out images after which the run ends (0: never)

    def __post_init__(self) -> None:
        require_at_least(self, num_classes=2, threshold=0, ema_alpha=0, select_share=0, select_neighbors=1, patience=0)
        require_positive(self, "threshold")
        for name in ("threshold", "ema_alpha", "select_share"):
            if getattr(self, name) >= 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected a fraction below 1")


class SelfLabel(LinearHeads, config=Config):
    """Train the self-labelling step of SCAN.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.

    Attributes:
        averaged: averaged copies of the backbone and of the classifiers, with `--ema averaged`.
        before: label-free loss on the held-out images before the first step; infinite if there are none.
    """

    config: Config
    before: Tensor
    earlier_stage = "scan"
    remedy = "a higher --threshold, or a longer SCAN step"
    why_skipped = "no image was certain of its cluster; lower --threshold, or train the SCAN step longer"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, 1)
        self.register_buffer("before", torch.full((1,), math.inf))
        self.averaged = nn.ModuleList()
        if config.ema == "averaged":
            self.averaged.extend(copy.deepcopy(part) for part in (self.backbone, self.classifiers))
            self.averaged.requires_grad_(False)
        self._kept: list[tuple[Tensor, Tensor]] = []  # tensors of the network, and their values before the step

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        LinearHeads.check_data(config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps)
        if num_views != 2:
            raise InputError(
                f"{num_views} views: self-labelling has a plain view and a strong view, give --global-crops-number 2 "
                "--local-crops-number 0"
            )

    @torch.no_grad()
    def start_after(self, earlier: nn.Module, chosen: int) -> None:
        """Copy the classifier that evaluations of the earlier network use."""
        heads = getattr(earlier, "classifiers", None)
        head = heads[chosen] if heads else None
        if not isinstance(head, nn.Linear):
            raise InputError(
                "--pretrained holds no linear classifiers: run the SCAN step first, train.py --method scan"
            )
        number = head.out_features
        if number != self.config.num_classes:
            raise InputError(
                f"--pretrained has {number} clusters, but --num-classes is {self.config.num_classes}: give --num-classes {number}"
            )
        self.classifiers.load_state_dict({"0.weight": head.weight, "0.bias": head.bias})

    def prepare_run(self, data: TrainingData) -> None:
        """Copy the network for the average, mine the neighbours of the held-out images, and measure the starting loss."""
        for copied, part in zip(self.averaged, (self.backbone, self.classifiers), strict=False):
            copied.load_state_dict(part.state_dict())
        if data.num_held_out:
            few = min(self.config.select_neighbors, data.num_held_out - 1)
            self.held_out_neighbors = mined(data, self.eval(), layer="backbone", k=few, held_out=True)
            (score,), _ = self.scores(data)
            self.before.fill_(score.loss)
        self.train()

    def idle_views(self) -> int:
        return 1

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the features of both views, 2 × (B, F). They pass separately, as in the authors' code."""
        return [
            embedded
            for i, view in enumerate(views)
            for embedded in super(SelfLabel, self).embed_views([view], int(i < idle))
        ]

    @torch.no_grad()
    def prepare_step(self, step: int, data: TrainingData) -> None:
        if self.config.ema == "published":
            self._kept = [(each, each.clone()) for each in self._network_tensors()]

    def _network_tensors(self) -> Iterator[Tensor]:
        for part in (self.backbone, self.classifiers):
            yield from part.parameters()
            yield from part.buffers()

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        self._restore_statistics()
        (head,) = self.classifiers
        strong = head(embeddings[1])
        with torch.no_grad():
            weak = head(embeddings[0])
            labels, sure = confident(weak, self.config.threshold)
            counts = strong.new_zeros(self.classes[0]).scatter_add_(0, labels, sure.to(strong.dtype))
        loss = confident_cross_entropy(weak, strong, self.config.threshold, self.config.balance)
        numbers = {"terms": loss.detach()[None], "confident": counts / len(weak), **self.occupancy([[strong, weak]])}
        return Step(loss, numbers, skip=~sure.any())

    @torch.no_grad()
    def _restore_statistics(self) -> None:
        """With `--ema published`, undo what the views of this step changed in the statistics of batch normalisation."""
        for tensor, old in self._kept:
            if not tensor.requires_grad:
                tensor.copy_(old)

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        alpha = self.config.ema_alpha
        for tensor, old in self._kept:
            if tensor.requires_grad:
                tensor.mul_(1 - alpha).add_(old, alpha=alpha)
        self._kept = []
        for copied, part in zip(self.averaged, (self.backbone, self.classifiers), strict=False):
            for average, new in zip(copied.parameters(), part.parameters(), strict=True):
                average.mul_(alpha).add_(new, alpha=1 - alpha)
            for buffer, now in zip(copied.buffers(), part.buffers(), strict=True):
                buffer.copy_(now)

    def embed(self, images: Tensor) -> Tensor:
        return self.averaged[0](images) if len(self.averaged) else self.backbone(images)

    def predict(self, images: Tensor) -> list[Tensor]:
        heads = cast(nn.ModuleList, self.averaged[1]) if len(self.averaged) else self.classifiers
        features = self.embed(images)
        return [head(features) for head in heads]

    def collapsed_loss(self, k: int) -> float:
        return math.inf  # a small loss is normal here, so the loss tells nothing about a collapse

    def measure(self, data: TrainingData) -> dict[str, Any]:
        """Also return how many held-out images each cluster is certain of: the share of all, and the clusters with any."""
        if not len(self.held_out_neighbors):
            return {}
        (score,), (p,) = self.scores(data)
        labels, sure = p.argmax(dim=1), p.amax(dim=1) > self.config.threshold
        return {
            "classifier": 0,
            "selection_loss": score.loss,
            "selection_consistency": score.consistency,
            "selection_entropy": score.entropy,
            "selection_loss_before": self.before.item(),
            "held_out_confident": sure.double().mean().item(),
            "held_out_confident_clusters": len(labels[sure].unique()),
        }

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Also return the share of the images of a batch that were certain, and the number of their clusters."""
        shares = averages["confident"]
        return super().summarize(averages) | {
            "confident": shares.sum().item(),
            "confident_clusters": int((shares > 0).sum()),
        }

    def ended(self, history: list[dict[str, Any]]) -> str | None:
        """End the run if the label-free loss has been worse than its lowest value for `patience` epochs."""
        losses = [epoch["selection_loss"] for epoch in history if "selection_loss" in epoch]
        patience = self.config.patience
        if not patience or len(losses) < patience:
            return None
        before = history[-1].get("selection_loss_before", math.inf)
        best, recent = min(before, *losses), losses[-patience:]
        if min(recent) <= best + WORSE:
            return None
        where = "before the first" if best == before else f"after epoch {losses.index(best) + 1}"
        advice = "keep the model of the SCAN step" if best == before else "checkpoint_best.pt holds that model"
        return (
            f"Self-labelling makes the clusters worse: the loss without labels on held-out images has been {min(recent):.3f} or "
            f"more for {patience} epochs, but was {best:.3f} {where}; the run ends here; {advice}."
        )

    def report(self, summary: dict[str, Any]) -> str:
        text = super().report(summary)
        if summary.get("selection_loss", 0.0) > summary.get("selection_loss_before", math.inf):
            text += (
                "\nThe loss without labels on held-out images was lower before self-labelling than after the last epoch: "
                "compare both models before you use this one."
            )
        return text


PRESETS = {
    # The authors' configuration for CIFAR-10.
    "published": {
        "arch": "cifar_resnet18",
        "global_crops_size": 32,
        "local_crops_number": 0,
        "augment": "scan_self_label",
        "epochs": 200,
        "batch_size": 1000,
        "optimizer": "adam",
        "lr": 0.0001,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0001,
        "weight_decay": 0.0001,
    },
    "cifar10": {"base": "published"},
    "cifar100-20": {"base": "published", "num_classes": 20},
    "stl10": {"base": "published", "arch": "stl_resnet18", "global_crops_size": 96, "epochs": 100},
    "imagenet-50": {
        "base": "published",
        "subset": "imagenet-50",
        "arch": "resnet50",
        "global_crops_size": 224,
        "num_classes": 50,
        "balance": False,
        "ema": "published",
        "epochs": 25,
        "batch_size": 512,
        "optimizer": "sgd",
        "lr": 0.03,
        "final_lr": 0.03,
        "weight_decay": 0.0,
    },
    "imagenet-100": {"base": "imagenet-50", "subset": "imagenet-100", "num_classes": 100},
    "imagenet-200": {"base": "imagenet-50", "subset": "imagenet-200", "num_classes": 200},
    # For own images; src/config/recipe.py has what all methods share.
    "small_images": {
        "augment": "scan_self_label",
        "threshold": 0.95,
        "epochs": 8,
        "batch_size": 256,
        "lr": 0.0003,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0003,
    },
    "photographs": {"base": "small_images"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "augment": "scan_self_label",
        "threshold": 0.95,
        "epochs": 30,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.0005,
        "warmup_epochs": 0,
        "warmup_start": 0.0005,
        "final_lr": 0.0005,
        "weight_decay": 0.0001,
    },
}

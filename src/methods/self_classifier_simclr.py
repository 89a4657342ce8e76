"""Self-Classifier's loss and SimCLR's loss together: two projection heads on one backbone.

This combination is our own; no paper describes it. Self-Classifier (arXiv:2103.10994v3, see self_classifier.py) learns the
classes. SimCLR (Chen et al., arXiv:2002.05709v3) learns to tell the images apart, which gives better features in a short
training. The loss is Self-Classifier's loss plus `contrast_weight` times SimCLR's loss. Each loss has a projection head of
its own, and both train the backbone from the first step.

With a queue, the nearest neighbour of view 0 in SimCLR's embedding space is one more view for Self-Classifier's loss. It has
no gradient. The classes of neighbours then agree, as in SCAN (arXiv:2005.12320).

Departures from the two papers:

- There are two heads and two losses.
- A neighbour is an additional view and does not replace view 0. Self-Classifier finds it among its own embeddings.
- SimCLR's loss compares the first two views. Further views only enter Self-Classifier's loss.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import require_at_least, require_positive, require_sizes
from ..distributed import gather_no_grad
from ..errors import InputError
from ..losses import nt_xent, self_classifier_terms
from ..models.heads import ProjectionHead, WeightNormClassifier
from ..queues import NearestNeighborQueue
from .base import ClassifierMethod, Step, feature_width


@dataclass(frozen=True, kw_only=True)
class Config:
    classes: tuple[int, ...] = (1000, 2000, 4000, 8000)  # number of classes of each classifier
    row_tau: float = 0.1  # temperature of p(class|image)
    col_tau: float = 0.05  # temperature of p(image|class)
    eps: float = 1e-12  # smallest sum that the loss divides by; it is also added inside the logarithm
    dim: int = 128  # size of an embedding for the classifiers
    hidden_dim: int = 4096  # width of the hidden layers of both projection heads
    head_layers: int = 2  # linear layers in both projection heads
    head_bn: bool = True  # batch normalisation after each hidden layer
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"  # activation of the hidden layers
    contrast_weight: float = 1.0  # factor of SimCLR's loss
    contrast_tau: float = 0.2  # temperature of SimCLR's loss
    contrast_dim: int = 128  # size of an embedding for SimCLR's loss
    queue_length: int = 0  # number of past embeddings of all ranks among which neighbours are found (0: no neighbours)

    def __post_init__(self) -> None:
        require_positive(self, "row_tau", "col_tau", "eps", "contrast_tau")
        require_at_least(self, dim=1, hidden_dim=1, head_layers=1, contrast_weight=0, contrast_dim=1)
        require_at_least(self, queue_length=0)
        require_sizes(self, "classes")


class SelfClassifierSimCLR(ClassifierMethod, config=Config):
    """Train Self-Classifier and SimCLR on one backbone.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views, which come first.

    Attributes:
        queue: past embeddings of view 0 for SimCLR's loss; None without --queue-length.
        stored: (Q, dim) embeddings for the classifiers, of the images in the queue.
    """

    stored: Tensor

    remedy = "a larger --lr, a lower --col-tau, or a larger --batch-size"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__()
        self.config = config
        self.num_global = num_global
        self.classes, self.temperature = config.classes, config.row_tau
        self.backbone = backbone
        self.projection_head, self.contrast_head = (
            ProjectionHead(
                feature_width(backbone),
                config.hidden_dim,
                dim,
                layers=config.head_layers,
                bn=config.head_bn,
                activation=config.activation,
            )
            for dim in (config.dim, config.contrast_dim)
        )
        self.classifiers = nn.ModuleList(WeightNormClassifier(config.dim, size) for size in config.classes)
        self.queue = NearestNeighborQueue(config.queue_length, config.contrast_dim) if config.queue_length else None
        self.register_buffer("stored", torch.zeros(config.queue_length, config.dim))

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if num_views < 2:
            raise InputError(f"{num_views} view: SimCLR's loss compares two views, raise --global-crops-number")
        length = config.queue_length
        if length and not batch_size <= length <= num_images:
            raise InputError(
                f"--queue-length {length}: expected 0 for no queue, or at least the {batch_size} images of a batch and at "
                f"most the {num_images} images of the data set"
            )

    def project(self, features: Tensor) -> Tensor:
        """Return the outputs of both heads, (B, dim + contrast_dim)."""
        return torch.cat([self.projection_head(features), self.contrast_head(features)], dim=1)

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        sizes = [self.config.dim, self.config.contrast_dim]
        ours, contrasted = torch.stack(embeddings).split(sizes, dim=2)
        num_global, neighbors = self.num_global, None
        if self.queue is not None:
            own, first = ours[0].detach(), contrasted[0].detach()
            if self.queue.full:
                rows = self.queue.nearest_rows(first, indices)
                neighbors = self.queue.indices[rows]
                ours, num_global = torch.cat([self.stored[rows][None].to(ours.dtype), ours]), num_global + 1
            self.stored[self.queue.push(first, indices)] = gather_no_grad(own).to(self.stored.dtype)
        logits = [classifier(ours) for classifier in self.classifiers]
        terms = self_classifier_terms(
            logits,
            row_tau=self.config.row_tau,
            col_tau=self.config.col_tau,
            eps=self.config.eps,
            num_global=num_global,
        )
        contrast = nt_xent(contrasted[:2], self.config.contrast_tau)
        numbers = {"terms": terms.detach(), "contrast": contrast.detach(), **self.occupancy(logits)}
        return Step(terms.mean() + self.config.contrast_weight * contrast, numbers, neighbors)

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Also return `contrast`, SimCLR's loss."""
        return super().summarize(averages) | {"contrast": averages["contrast"].item()}


PRESETS = {
    "published": {},  # not from a paper: Self-Classifier's recipe for ImageNet
    # For own images and small data sets; src/config/recipe.py has what all methods share.
    "small_images": {
        "classes": [10, 10, 10, 10, 10, 10, 10, 10, 20, 20, 100, 100],
        "hidden_dim": 512,
        "batch_size": 256,
    },
    "photographs": {"base": "small_images"},
    "cifar10": {"base": "small_images"},
    "cifar100-20": {"base": "cifar10", "classes": [20, 20, 20, 20, 20, 20, 20, 20, 40, 40, 200, 200]},
    "stl10": {"base": "photographs"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "classes": [10, 10, 10, 10, 10, 10, 10, 10, 20, 20, 20, 40, 40, 40],
        "row_tau": 0.15,
        "dim": 64,
        "hidden_dim": 256,
        "contrast_dim": 64,
        "epochs": 90,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.002,
        "warmup_epochs": 5,
        "warmup_start": 0.0002,
        "final_lr": 0.000002,
        "weight_decay": 0.0001,
    },
}

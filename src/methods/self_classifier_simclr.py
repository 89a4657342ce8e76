"""Self-Classifier's loss and SimCLR's loss together: two projection heads on one backbone.

This combination is our own; no paper describes it. Self-Classifier (arXiv:2103.10994v3, see self_classifier.py) learns the
classes. SimCLR (Chen et al., arXiv:2002.05709v3) learns to tell the images apart, which gives better features in a short
training. The loss is Self-Classifier's loss plus `contrast_weight` times SimCLR's loss. Each loss has a projection head of
its own, and both train the backbone from the first step.

Departures from the two papers:

- There is no queue of neighbours.
- SimCLR's loss compares the first two views. Further views only enter Self-Classifier's loss.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import require_at_least, require_positive, require_sizes
from ..errors import InputError
from ..losses import nt_xent, self_classifier_terms
from ..models.heads import ProjectionHead, WeightNormClassifier
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

    def __post_init__(self) -> None:
        require_positive(self, "row_tau", "col_tau", "eps", "contrast_tau")
        require_at_least(self, dim=1, hidden_dim=1, head_layers=1, contrast_weight=0, contrast_dim=1)
        require_sizes(self, "classes")


class SelfClassifierSimCLR(ClassifierMethod, config=Config):
    """Train Self-Classifier and SimCLR on one backbone.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views, which come first.
    """

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

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if num_views < 2:
            raise InputError(f"{num_views} view: SimCLR's loss compares two views, raise --global-crops-number")

    def project(self, features: Tensor) -> Tensor:
        """Return the outputs of both heads, (B, dim + contrast_dim)."""
        return torch.cat([self.projection_head(features), self.contrast_head(features)], dim=1)

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        sizes = [self.config.dim, self.config.contrast_dim]
        ours, contrasted = torch.stack(embeddings).split(sizes, dim=2)
        logits = [classifier(ours) for classifier in self.classifiers]
        terms = self_classifier_terms(
            logits,
            row_tau=self.config.row_tau,
            col_tau=self.config.col_tau,
            eps=self.config.eps,
            num_global=self.num_global,
        )
        contrast = nt_xent(contrasted[:2], self.config.contrast_tau)
        numbers = {"terms": terms.detach(), "contrast": contrast.detach(), **self.occupancy(logits)}
        return Step(terms.mean() + self.config.contrast_weight * contrast, numbers)

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Also return `contrast`, SimCLR's loss."""
        return super().summarize(averages) | {"contrast": averages["contrast"].item()}


PRESETS = {
    "published": {},
}

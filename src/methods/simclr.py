"""SimCLR: learn features by finding the other view of an image among all views of a batch.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv:2002.05709v3. It is the first step of SCAN (arXiv:2005.12320), and the presets are those of SCAN's authors. The method
has no classifiers: a k-NN score (`--eval-every`) monitors it, and `--method scan` learns the clusters.

Departures from SCAN's code:

- Both views are anchors by default, as in SimCLR's paper. `--anchors one` is the form in SCAN's code, with one anchor per image.
- The negatives are the images of all ranks. Their code uses one GPU.
- The learning rate follows the cosine in every step. Theirs changes once per epoch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import require_at_least, require_positive
from ..errors import InputError
from ..losses import nt_xent
from ..models.heads import ProjectionHead
from .base import Method, Step, check_head, feature_width


@dataclass(frozen=True, kw_only=True)
class Config:
    temperature: float = 0.1  # temperature of the similarities
    anchors: Literal["both", "one"] = "both"  # views that are anchors: both, as published, or one, as in SCAN's code
    dim: int = 128  # size of an embedding
    hidden_dim: int = 512  # width of the hidden layers of the projection head
    head_layers: int = 2  # number of linear layers in the projection head (0: only normalise the features)
    head_bn: bool = False  # batch normalisation after each hidden layer

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require_at_least(self, dim=1, hidden_dim=1, head_layers=0)


class SimCLR(Method, config=Config):
    """Train SimCLR.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.
    """

    projection_head: nn.Module

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__()
        self.config = config
        check_head(config.head_layers, dim=config.dim, width=feature_width(backbone))
        self.backbone = backbone
        self.projection_head = ProjectionHead(
            feature_width(backbone),
            config.hidden_dim,
            config.dim,
            layers=config.head_layers,
            bn=config.head_bn,
            activation="relu",
            std=None,
            eps=1e-12,
        )

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if num_views != 2:
            raise InputError(
                f"{num_views} views: SimCLR compares two views, give --global-crops-number 2 --local-crops-number 0"
            )

    def embed(self, images: Tensor) -> Tensor:
        return self.projection_head(self.backbone(images))

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the unit embeddings of two views, 2 × (B, D). Batch normalisation sees both views together."""
        return list(self.embed(torch.cat(views)).chunk(len(views)))

    def predict(self, images: Tensor) -> list[Tensor]:
        """Return no logits, because the method has no classifiers."""
        return []

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        return Step(nt_xent(torch.stack(embeddings), self.config.temperature, self.config.anchors), {})


PRESETS = {
    # SCAN's first step on CIFAR-10, from the authors' configuration. All three small data sets share it.
    "published": {
        "arch": "cifar_resnet18",
        "global_crops_size": 32,
        "global_crops_scale": (0.2, 1.0),
        "local_crops_number": 0,
        "augment": "simclr",
        "epochs": 500,
        "batch_size": 512,
        "optimizer": "sgd",
        "lr": 0.4,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0004,
        "weight_decay": 0.0001,
        "anchors": "one",
    },
    "cifar10": {"base": "published"},
    "cifar100-20": {"base": "published"},
    "stl10": {"base": "published", "arch": "stl_resnet18", "global_crops_size": 96},
    # For own images; src/config/recipe.py has what all methods share.
    "small_images": {"temperature": 0.2, "head_bn": True, "batch_size": 256},
    "photographs": {"base": "small_images"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "temperature": 0.2,
        "dim": 64,
        "hidden_dim": 256,
        "epochs": 60,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.002,
        "warmup_epochs": 5,
        "warmup_start": 0.0002,
        "final_lr": 0.000002,
        "weight_decay": 0.0001,
    },
}

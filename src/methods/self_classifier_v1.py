"""Self-Classifier, first generation: two views, many fixed classifiers and one temperature.

Amrani and Bronstein, "Self-Supervised Classification Network", arXiv:2103.10994v1. Authors' code:
github.com/elad-amrani/self-classifier before December 2021. K classifiers of equal size compare p(class|image) of each
view with p(image|class) of the other view. Their class vectors are orthonormal and by default not trained. In contrast to
the second generation, the predictions are not normalised over the batch, and there is no queue. The same recipe makes both
views, which pass through the network one after the other.

The defaults are the 800-epoch ImageNet recipe. Departures from the authors' code:

- The loss runs in float32 in mixed precision too.
- A fixed number of images shares a column softmax. In their code, the images of one GPU share it.
- The learning rate changes after every step, also on CIFAR. Theirs changes after every epoch there.
- The classifier to use is the one with the lowest training loss. The authors use the first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..config import require_at_least, require_positive
from ..errors import InputError
from ..losses import self_classifier_v1_terms
from ..models.heads import CosineClassifier, ProjectionHead
from .base import ClassifierMethod, Step, check_head, feature_width


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classifiers: int = 30  # number of classifiers, which have the same size
    num_classes: int = 1000  # number of classes of each classifier
    learnable: bool = False  # train the classifiers
    tau: float = 0.1  # temperature of both softmaxes
    normalize_targets: bool = False  # give all images the same weight; if off, all classes have the same weight
    softmax_group: int = 256  # images per column softmax; the authors' GPUs hold 256 (0: the batch of all ranks)
    dim: int = 128  # size of an embedding
    hidden_dim: int = 4096  # width of the hidden layers of the projection head
    head_layers: int = 3  # linear layers in the projection head (0: the backbone's features are the embedding)

    def __post_init__(self) -> None:
        require_positive(self, "tau")
        require_at_least(self, num_classifiers=1, num_classes=2, softmax_group=0, dim=1, hidden_dim=1, head_layers=0)
        if self.softmax_group == 1:
            raise InputError("--softmax-group is 1, and a softmax over one image is constant: expected 0 or at least 2")


class SelfClassifierV1(ClassifierMethod, config=Config):
    """Train the first generation of Self-Classifier.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.
    """

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__()
        width = feature_width(backbone)
        check_head(config.head_layers, dim=config.dim, width=width)
        self.config = config
        self.classes, self.temperature = (config.num_classes,) * config.num_classifiers, config.tau
        self.backbone = backbone
        self.projection_head = ProjectionHead(
            width,
            config.hidden_dim,
            config.dim,
            layers=config.head_layers,
            bn=True,
            activation="leaky_relu",
            std=None,
            eps=1e-12,
        )
        self.classifiers = nn.ModuleList(
            CosineClassifier(config.dim, config.num_classes, config.learnable) for _ in range(config.num_classifiers)
        )
        self.group = config.softmax_group  # images per column softmax; 0 until the first batch sets it

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if num_views != 2:
            raise InputError(
                f"--global-crops-number and --local-crops-number make {num_views} views, but self_classifier_v1 compares two: "
                "give two views in total"
            )
        per_rank = batch_size // distributed.world_size()
        if config.softmax_group and per_rank % config.softmax_group:
            raise InputError(
                f"--softmax-group {config.softmax_group} does not divide the {per_rank} images per rank and step: "
                "give a divisor, or 0 for the batch of all ranks"
            )

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the unit embeddings of two views, 2 × (B, D). Batch normalisation sees each view alone."""
        return [self.embed(view) for view in views]

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        logits = [[classifier(view) for view in embeddings] for classifier in self.classifiers]  # K × 2 × (B, C)
        terms = self_classifier_v1_terms(
            logits, self.config.tau, normalize_targets=self.config.normalize_targets, group=self.config.softmax_group
        )
        self.group = self.config.softmax_group or len(indices) * distributed.world_size()
        agreement = [(a.argmax(dim=1) == b.argmax(dim=1)).float().mean() for a, b in logits]
        numbers = {"terms": terms.detach(), "agreement": torch.stack(agreement), **self.occupancy(logits)}
        return Step(terms.mean(), numbers)

    def collapsed_loss(self, k: int) -> float:
        """Return the loss of classifier k if it predicts the same for all images.

        Without normalised targets, the targets of an image sum to C/G on average, for C classes and groups of G images.
        """
        weight = 1.0 if self.config.normalize_targets else self.config.num_classes / self.group
        return weight * super().collapsed_loss(k)

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Also return `agreement`: how often the classifier to use assigns both views of an image to the same class."""
        summary = super().summarize(averages)
        return summary | {"agreement": averages["agreement"][summary["classifier"]].item()}


PRESETS = {
    "published": {
        "global_crops_scale": (0.2, 1.0),
        "local_crops_number": 0,
        "augment": "moco_v2",
        "batch_size": 4096,
        "weight_decay": 1e-4,
        "precision": "float16",
        "save_every": 50,
    },
    # The authors' scripts under their names: train.sh, then the scripts in ablation/. They use 16 GPUs with batch statistics
    # over groups of 4.
    "800ep": {"base": "published", "sync_bn_group": 4},
    "100ep": {"base": "800ep", "epochs": 100, "lr": 4.8, "warmup_start": 0.3, "final_lr": 0.0048},
    "100ep_1x300": {"base": "100ep", "num_classifiers": 1, "num_classes": 300},
    "100ep_1x1000": {"base": "100ep", "num_classifiers": 1},
    "100ep_1x3000": {"base": "100ep", "num_classifiers": 1, "num_classes": 3000},
    "100ep_30x300": {"base": "100ep", "num_classes": 300},
    "100ep_30x3000": {"base": "100ep", "num_classes": 3000},
    "100ep_50x1000": {"base": "100ep", "num_classifiers": 50},
    "100ep_100x128": {"base": "100ep", "num_classifiers": 100, "num_classes": 128},
    "100ep_learnable_cls": {"base": "100ep", "learnable": True},
    "100ep_lr_0.05": {"base": "100ep", "lr": 0.8, "warmup_start": 0.05, "final_lr": 0.0008},
    "100ep_lr_0.1": {"base": "100ep", "lr": 1.6, "warmup_start": 0.1, "final_lr": 0.0016},
    "100ep_lr_0.2": {"base": "100ep", "lr": 3.2, "warmup_start": 0.2, "final_lr": 0.0032},
    "100ep_lr_0.4": {"base": "100ep", "lr": 6.4, "warmup_start": 0.4, "final_lr": 0.0064},
    "100ep_lr_0.5": {"base": "100ep", "lr": 8.0, "warmup_start": 0.5, "final_lr": 0.008},
    "100ep_dim_128_num_hidden_1x4096": {"base": "100ep", "head_layers": 2},
    "100ep_dim_128_num_hidden_3x4096": {"base": "100ep", "head_layers": 4},
    "100ep_dim_256_num_hidden_1x4096": {"base": "100ep", "dim": 256, "head_layers": 2},
    "100ep_dim_256_num_hidden_2x4096": {"base": "100ep", "dim": 256},
    "100ep_no_mlp": {"base": "100ep", "dim": 2048, "head_layers": 0},
    "100ep_wd_1e-3": {"base": "100ep", "weight_decay": 1e-3},
    "100ep_wd_1e-5": {"base": "100ep", "weight_decay": 1e-5},
    "100ep_wd_1e-6": {"base": "100ep", "weight_decay": 1e-6},
    "100ep_wd_1e-7": {"base": "100ep", "weight_decay": 1e-7},
    # The authors' recipe for CIFAR-10, with three clusters per class.
    "cifar10": {
        "base": "published",
        "arch": "cifar_resnet18",
        "global_crops_size": 32,
        "num_classes": 30,
        "tau": 0.3,
        "normalize_targets": True,
        "softmax_group": 0,
        "dim": 64,
        "hidden_dim": 256,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 3.2,
        "final_lr": 0.032,
        "warmup_epochs": 0,
        "weight_decay": 1e-6,
        "precision": "float32",
    },
    "cifar100-20": {"base": "cifar10", "num_classes": 60},
    # For own images and STL-10; src/config/recipe.py has what all methods share.
    "small_images": {
        "hidden_dim": 512,
        "num_classifiers": 16,
        "num_classes": 20,
        "normalize_targets": True,
        "softmax_group": 0,
    },
    "photographs": {"base": "small_images"},
    "stl10": {"base": "photographs"},
    # Our own recipe. With two clusters per class, ACC is 96 % on seed 0; with one cluster per class, it is 86 %.
    "digits": {
        "base": "cifar10",
        "arch": "small_convnet",
        "global_crops_size": 8,
        "num_classifiers": 16,
        "num_classes": 20,
        "tau": 0.1,
        "batch_size": 128,
        "epochs": 60,
        "optimizer": "adamw",
        "lr": 0.002,
        "final_lr": 0.000002,
        "weight_decay": 0.0001,
        "save_every": 25,
    },
}

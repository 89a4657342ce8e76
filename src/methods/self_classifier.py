"""Self-Classifier: learn the classes and the representation together, from two or more views of each image.

Amrani, Karlinsky and Bronstein, "Self-Supervised Classification Network", ECCV 2022, arXiv:2103.10994v3. Authors' code:
github.com/elad-amrani/self-classifier. A backbone, a projection head and K linear classifiers are trained so that each
view predicts the classes of the other views. The loss contains a uniform prior over the classes. This prior prevents
collapse without pseudo-labels, a second network or negative pairs. Once a queue of past embeddings is full, the nearest
neighbour in the queue replaces view 0.

The defaults are the 800-epoch ImageNet recipe. Departures from the authors' code:

- The ranks exchange column statistics instead of logits. Loss and gradient are the same.
- DistributedDataParallel sees one forward pass per step.
- The classifier to use is the one with the lowest training loss among classifiers of equal size. The authors always use the
  first.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import require_at_least, require_positive, require_sizes
from ..errors import InputError
from ..losses import self_classifier_terms
from ..models.heads import ProjectionHead, WeightNormClassifier
from ..queues import NearestNeighborQueue
from .base import ClassifierMethod, Step, check_head, feature_width


@dataclass(frozen=True, kw_only=True)
class Config:
    classes: tuple[int, ...] = (1000, 2000, 4000, 8000)  # number of classes of each classifier
    fixed_classifiers: bool = False  # do not train the classifiers
    row_tau: float = 0.1  # temperature of p(class|image)
    col_tau: float = 0.05  # temperature of p(image|class)
    eps: float = 1e-12  # smallest sum that the loss divides by; it is also added inside the logarithm
    dim: int = 128  # size of an embedding
    hidden_dim: int = 4096  # width of the hidden layers of the projection head
    head_layers: int = 2  # linear layers in the projection head (0: the backbone's features are the embedding)
    head_bn: bool = True  # batch normalisation after each hidden layer
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"  # activation of the hidden layers
    queue_length: int = 262144  # number of past embeddings of all ranks in the queue (0: no queue)
    use_neighbors: bool = True  # replace view 0 by its nearest neighbour in the queue; if off, only log its label

    def __post_init__(self) -> None:
        require_positive(self, "row_tau", "col_tau", "eps")
        require_at_least(self, dim=1, hidden_dim=1, head_layers=0, queue_length=0)
        require_sizes(self, "classes")
        if self.queue_length == 1:
            raise InputError(
                "--queue-length is 1: expected 0 for no queue, or at least 2 for a best and a second match"
            )


class SelfClassifier(ClassifierMethod, config=Config):
    """Train Self-Classifier.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views, which come first.

    Attributes:
        queue: past embeddings of view 0; None without --queue-length.
    """

    remedy = "a larger --lr, a lower --col-tau, or a larger --batch-size"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__()
        width = feature_width(backbone)
        check_head(config.head_layers, dim=config.dim, width=width)
        self.config = config
        self.num_global = num_global
        self.classes, self.temperature = config.classes, config.row_tau
        self.backbone = backbone
        self.projection_head = ProjectionHead(
            width,
            config.hidden_dim,
            config.dim,
            layers=config.head_layers,
            bn=config.head_bn,
            activation=config.activation,
        )
        self.classifiers = nn.ModuleList(
            WeightNormClassifier(config.dim, size, fixed=config.fixed_classifiers) for size in config.classes
        )
        self.queue = NearestNeighborQueue(config.queue_length, config.dim) if config.queue_length else None
        self._couples_images = any(isinstance(module, _BatchNorm) for module in self.modules())

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        length = config.queue_length
        if length and length < batch_size:
            raise InputError(
                f"--queue-length {length} is shorter than --batch-size {batch_size}: give at least {batch_size}, or 0 for no queue"
            )
        if length > num_images:
            raise InputError(
                f"--queue-length {length} is more than the {num_images} images of the data set, so the nearest neighbour of "
                f"an image could be the image itself: give {batch_size} to {num_images}, or 0 for no queue"
            )

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        # replace view 0 by its nearest neighbour among past images; the queue is read before the push
        neighbors = None
        first = embeddings[0].detach()
        if self.queue is not None:
            if self.queue.full:
                rows = self.queue.nearest_rows(first, indices)
                neighbors = self.queue.indices[rows]
                if self.config.use_neighbors:
                    embeddings = [self.queue.embeddings[rows].to(first.dtype), *embeddings[1:]]
            self.queue.push(first, indices)

        # all views pass through each classifier at once: K × (V, B, C_k)
        stacked = torch.cat(embeddings)
        logits = [classifier(stacked).unflatten(0, (len(embeddings), -1)) for classifier in self.classifiers]
        terms = self_classifier_terms(
            logits,
            row_tau=self.config.row_tau,
            col_tau=self.config.col_tau,
            eps=self.config.eps,
            num_global=self.num_global,
        )
        return Step(terms.mean(), {"terms": terms.detach(), **self.occupancy(logits)}, neighbors)

    def idle_views(self) -> int:
        """Return 1 if a neighbour replaces view 0, which then needs no gradient.

        With batch normalisation the result is 0: the gradient of the other views flows through the statistics of the
        batch into view 0.
        """
        replaced = self.queue is not None and self.queue.full and self.config.use_neighbors
        return int(replaced and not self._couples_images)


PRESETS = {
    "published": {},
    # The authors' scripts under their names. They use 66 GPUs with batch statistics over groups of 22.
    "800ep": {"base": "published", "sync_bn_group": 22},
    "100ep": {"base": "800ep", "epochs": 100, "lr": 4.8, "warmup_start": 0.3, "final_lr": 0.0048},
    "200ep": {"base": "100ep", "epochs": 200},
    "400ep": {"base": "100ep", "epochs": 400},
    # The authors' ablations differ from train_100ep.sh in more than the ablated setting.
    "100ep_ablation": {"base": "100ep", "head_bn": False, "precision": "float16"},
    "100ep_no_multicrop": {"base": "100ep_ablation", "local_crops_number": 0, "global_crops_scale": (0.14, 1.0)},
    "100ep_no_nn": {"base": "100ep_ablation", "use_neighbors": False},
    "100ep_no_nn_no_multicrop": {"base": "100ep_no_multicrop", "use_neighbors": False},
    "100ep_1x1k": {"base": "100ep_ablation", "classes": (1000,)},
    "100ep_1x2k": {"base": "100ep_ablation", "classes": (2000,)},
    "100ep_1x4k": {"base": "100ep_ablation", "classes": (4000,)},
    "100ep_1x8k": {"base": "100ep_ablation", "classes": (8000,)},
    "100ep_5x1k": {"base": "100ep_ablation", "classes": (1000, 1000, 1000, 1000, 1000)},
    "100ep_10x1k": {"base": "100ep_ablation", "classes": (1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000)},
    "100ep_15x1k": {
        "base": "100ep_ablation",
        "classes": (1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000),
    },
    "100ep_fixed_cls": {"base": "100ep_ablation", "fixed_classifiers": True},
    "100ep_base_lr_0.1": {"base": "100ep_ablation", "lr": 1.6, "warmup_start": 0.1, "final_lr": 0.0016},
    "100ep_base_lr_0.2": {"base": "100ep_ablation", "lr": 3.2, "warmup_start": 0.2, "final_lr": 0.0032},
    "100ep_base_lr_0.4": {"base": "100ep_ablation", "lr": 6.4, "warmup_start": 0.4, "final_lr": 0.0064},
    "100ep_dim_256": {"base": "100ep_ablation", "dim": 256},
    "100ep_hidden_dim_8192": {"base": "100ep_ablation", "hidden_dim": 8192},
    "100ep_hidden_dim_8192_dim_256": {"base": "100ep_ablation", "hidden_dim": 8192, "dim": 256},
    "100ep_num_hidden_3": {"base": "100ep_ablation", "head_layers": 3},
    "100ep_num_hidden_3_dim_256": {"base": "100ep_ablation", "head_layers": 3, "dim": 256},
    "100ep_no_mlp": {"base": "100ep_ablation", "head_layers": 0, "dim": 2048, "queue_length": 131072},
    "100ep_q_len_128K": {"base": "100ep_base_lr_0.2", "queue_length": 131072},  # also has another learning rate
    "100ep_q_len_512K": {"base": "100ep_ablation", "queue_length": 524288},
    "100ep_q_len_1M": {"base": "100ep_ablation", "queue_length": 1048576},
    "100ep_col_tau_3e-2_row_tau_1e-1": {"base": "100ep_ablation", "col_tau": 0.03},
    "100ep_col_tau_3e-2_row_tau_7e-2": {"base": "100ep_ablation", "col_tau": 0.03, "row_tau": 0.07},
    "100ep_col_tau_5e-2_row_tau_7e-2": {"base": "100ep_ablation", "row_tau": 0.07},
    "100ep_wd_5e-6": {"base": "100ep_ablation", "weight_decay": 5e-6},
    "100ep_wd_1e-5": {"base": "100ep_ablation", "weight_decay": 1e-5},
    "100ep_wd_5e-5": {"base": "100ep_ablation", "weight_decay": 5e-5},
    "100ep_bs_256": {
        "base": "100ep",
        "batch_size": 256,
        "sync_bn_group": 0,
        "lr": 0.3,
        "warmup_epochs": 0,
        "final_lr": 0.0003,
        "queue_length": 16384,
    },
    "100ep_bs_512": {
        "base": "100ep",
        "batch_size": 512,
        "sync_bn_group": 0,
        "lr": 0.6,
        "warmup_epochs": 0,
        "final_lr": 0.0006,
    },
    "100ep_bs_1024": {"base": "100ep", "batch_size": 1024, "sync_bn_group": 16, "lr": 1.2, "final_lr": 0.0012},
    "100ep_bs_2048": {"base": "100ep", "batch_size": 2048, "sync_bn_group": 32, "lr": 2.4, "final_lr": 0.0024},
    # Our own recipes. For own images and small data sets, src/config/recipe.py has what all methods share.
    "small_images": {
        "classes": [10, 10, 10, 10, 10, 10, 10, 10, 20, 20, 100, 100],
        "hidden_dim": 512,
        "queue_length": 0,
    },
    "photographs": {"base": "small_images"},
    "cifar10": {"base": "small_images"},
    "cifar100-20": {"base": "cifar10", "classes": [20, 20, 20, 20, 20, 20, 20, 20, 40, 40, 200, 200]},
    "stl10": {"base": "photographs"},
    "digits": {
        # Two views and no neighbours: with ten classes, the nearest image often shows another digit in the first epochs.
        # The larger classifiers only improve the representation. The classifier to use is one of the eight with ten classes.
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "classes": [10, 10, 10, 10, 10, 10, 10, 10, 20, 20, 20, 40, 40, 40],
        "row_tau": 0.15,
        "dim": 64,
        "hidden_dim": 256,
        "queue_length": 0,
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

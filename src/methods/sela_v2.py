"""SeLa-v2: self-labelling with SwAV's recipe. Labels that share the data set evenly are computed before every epoch.

Caron et al., arXiv:2006.09882v5, section 5.1 and appendix D, after Asano, Rupprecht and Vedaldi, arXiv:1911.05371. The loop of
DeepCluster-v2 with another assignment: instead of k-means, optimal transport between all images and the prototypes of a
head, whose argmax labels the image; and the prototypes are trained with the network, as in SwAV.

The authors published results but no code, and the paper leaves open what is our choice here: --lam, --tolerance and
--max-iterations (as in SeLa, which has no limit), --freeze-prototypes and their unit length after every step (as in SwAV),
hard labels, banks that the heads use in turn, and float32 (as in DeepCluster-v2).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..assignments import balanced_prototype_labels
from ..config import require_at_least, require_positive, require_sizes, require_views
from ..errors import RunError
from .deepcluster_v2 import DeepClusterV2


@dataclass(frozen=True, kw_only=True)
class Config:
    prototypes: tuple[int, ...] = (3000, 3000, 3000)  # number of clusters of each head
    temperature: float = 0.1  # of the predictions
    lam: float = 25.0  # sharpness of the transport; temperature / lam is what SwAV calls epsilon
    tolerance: float = 0.1  # when the transport counts as balanced; see src/assignments.py
    max_iterations: int = 1000  # of the transport, if it is not balanced before
    freeze_prototypes: int = 313  # steps during which the prototypes keep their start
    assign_views: tuple[int, ...] = (0, 1)  # views whose embeddings are labelled, by the heads in turn
    dim: int = 128  # embedding size
    hidden_dim: int = 2048  # width of the head's hidden layer
    head_bn: bool = True  # batch normalisation of it

    def __post_init__(self):
        require_positive(self, "temperature", "lam", "tolerance")
        require_at_least(self, max_iterations=1, freeze_prototypes=0, dim=1, hidden_dim=1)
        require_sizes(self, "prototypes")
        require_views(self, "assign_views")


class SeLaV2(DeepClusterV2):
    """See `DeepClusterV2`; the clusters are balanced labels, and the prototypes learn."""

    Config = Config
    remedy = "a larger --lam, more --freeze-prototypes steps, or softer views"

    def __init__(self, backbone: torch.nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, num_global)
        self.classifiers.requires_grad_(True)

    def assign(self, head: int, embeddings: Tensor, *, mine: Tensor, generator: np.random.Generator) -> Tensor:
        try:
            return balanced_prototype_labels(
                mine,
                self.classifiers[head].weight,
                self.temperature,
                lam=self.config.lam,
                tolerance=self.config.tolerance,
                max_iterations=self.config.max_iterations,
            )
        except ValueError as error:
            raise RunError(
                f"the labels of head {head} cannot be balanced ({error}): try a smaller --lam or --lr"
            ) from None


PRESETS = {
    # SwAV's recipe with the views of the released models; the authors published no script.
    "published": {
        "epochs": 400,
        "batch_size": 4096,
        "lr": 4.8,
        "warmup_epochs": 10,
        "warmup_start": 0.3,
        "final_lr": 0.0048,
        "weight_decay": 1e-6,
        "global_crops_size": 160,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 4,
        "local_crops_scale": (0.05, 0.14),
        "augment": "swav",
    },
    "400ep": {"base": "published", "sync_bn_group": 8},
    "400ep_2x224": {"base": "400ep", "global_crops_size": 224, "local_crops_number": 0},
    # ours; docs/training.md says what of it is whose advice, and what of it was run.
    "cifar10": {
        "arch": "cifar_resnet18",
        "global_crops_size": 32,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 0,
        "augment": "swav",
        "prototypes": (100, 100, 100),
        "hidden_dim": 512,
        "freeze_prototypes": 195,
        "epochs": 200,
        "batch_size": 256,
        "optimizer": "adamw",
        "lr": 0.002,
        "warmup_epochs": 10,
        "warmup_start": 0.0002,
        "final_lr": 0.000002,
        "weight_decay": 1e-6,
    },
    "digits": {
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "prototypes": (10, 10, 10, 10, 10, 10, 10, 10),
        "temperature": 0.2,
        "dim": 64,
        "hidden_dim": 256,
        "freeze_prototypes": 11,
        "max_iterations": 100,
        "epochs": 90,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.004,
        "warmup_epochs": 5,
        "warmup_start": 0.0004,
        "final_lr": 0.000004,
        "weight_decay": 0.0001,
    },
}

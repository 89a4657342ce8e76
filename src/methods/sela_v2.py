"""SeLa-v2: assign labels that divide the data set evenly before every epoch, then learn to predict them.

Caron et al., arXiv:2006.09882v5, section 5.1 and appendix D, after Asano, Rupprecht and Vedaldi, arXiv:1911.05371: SeLa
trained with the recipe of SwAV. The loop is that of DeepCluster-v2, with two differences. First, optimal transport between
all images and the prototypes of a head replaces k-means. The label of an image is the prototype with the largest entry in
its row of the transport plan. Second, the prototypes are trained with the network, as in SwAV.

The authors published results but no code. These choices are ours, because the paper does not specify them:

- --lam, --tolerance and --max-iterations are those of SeLa, which has no limit on the iterations.
- --freeze-prototypes and the unit length of the prototypes after every step are those of SwAV.
- The labels are hard.
- The heads use the banks of the assigned views in turn, as in DeepCluster-v2.
- The pass that fills the bank and the transport do not use --precision, as in DeepCluster-v2.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..assignments import balanced_prototype_labels
from ..config import require_at_least, require_positive, require_sizes, require_views
from ..errors import RunError
from .deepcluster_v2 import MemoryBankMethod


@dataclass(frozen=True, kw_only=True)
class Config:
    prototypes: tuple[int, ...] = (3000, 3000, 3000)  # number of clusters of each head
    temperature: float = 0.1  # temperature of the predictions
    lam: float = 25.0  # sharpness of the transport; SwAV's epsilon corresponds to temperature / lam
    tolerance: float = 0.1  # threshold of the convergence of the transport, see src/assignments.py
    max_iterations: int = 1000  # largest number of iterations of the transport
    freeze_prototypes: int = 313  # steps at the start of training in which the prototypes do not change
    assign_views: tuple[int, ...] = (0, 1)  # views whose embeddings are labelled; the heads use them in turn
    dim: int = 128  # size of an embedding
    hidden_dim: int = 2048  # width of the hidden layer of the projection head
    head_bn: bool = True  # batch normalisation after the hidden layer

    def __post_init__(self) -> None:
        require_positive(self, "temperature", "lam", "tolerance")
        require_at_least(self, max_iterations=1, freeze_prototypes=0, dim=1, hidden_dim=1)
        require_sizes(self, "prototypes")
        require_views(self, "assign_views")


class SeLaV2(MemoryBankMethod, config=Config):
    """Train SeLa-v2: the clusters are balanced labels, and the prototypes are trained.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.
    """

    config: Config
    remedy = "a larger --lam, more --freeze-prototypes steps, or softer views"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, config.prototypes)
        self.freeze_prototypes = config.freeze_prototypes

    def assign(self, head: int, embeddings: Tensor, *, mine: Tensor, generator: np.random.Generator) -> Tensor:
        """Compute labels that divide the embeddings evenly among the prototypes of the head."""
        try:
            return balanced_prototype_labels(
                mine,
                self.heads[head].weight,
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
    # The recipe of SwAV with the views of the released models. The authors published no script.
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
    # Our own recipes. docs/training.md gives the source of each setting and says what was run.
    "cifar10_200ep": {
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
    # For own images and small data sets; src/config/recipe.py has what all methods share.
    "small_images": {
        "hidden_dim": 512,
        "prototypes": (10, 10, 10, 10, 10, 10, 10, 10),
        "temperature": 0.2,
        "freeze_prototypes": 97,
        "max_iterations": 100,
    },
    "photographs": {"base": "small_images"},
    "cifar10": {"base": "small_images"},
    "cifar100-20": {"base": "cifar10", "prototypes": (20, 20, 20, 20, 20, 20, 20, 20)},
    "stl10": {"base": "photographs"},
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

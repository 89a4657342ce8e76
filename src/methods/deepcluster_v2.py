"""DeepCluster-v2: cluster the whole data set before every epoch, then learn to predict the clusters.

Caron et al., arXiv:2006.09882v5, section 5.1 and appendix D: DeepCluster trained with the recipe of SwAV. During an
epoch, a memory bank stores the embeddings of each image. Before the next epoch, spherical k-means clusters them, once for
every head. The centroids become the prototypes of the head, and every view predicts the cluster of its image.

The defaults are the authors' 800-epoch recipe. Departures from their code:

- Every rank holds the whole bank, so that a run can continue on another number of ranks.
- The initial centroids are drawn from all images, not from the images of rank 0.
- The loss is the mean over the clustered images of all ranks, so that W ranks compute the loss of one process.
- An image that has not appeared in the epoch before has no cluster. A batch of such images has the loss 0; in their code,
  the loss is not a number.
- The pass that fills the bank before the first epoch uses the views of the first epoch. Theirs draws other views in
  the same order.
- That pass and the clustering run in float32 for every --precision.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..assignments import spherical_kmeans
from ..config import require_at_least, require_positive, require_sizes, require_views
from ..data.training import TrainingData
from ..errors import InputError, RunError
from ..losses import IGNORED, assigned_cross_entropy
from ..queues import MemoryBank
from .base import PrototypeConfig, PrototypeMethod, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    prototypes: tuple[int, ...] = (3000, 3000, 3000)  # number of clusters of each head
    temperature: float = 0.1  # temperature of the predictions
    kmeans_iterations: int = 10  # number of k-means iterations in each clustering
    assign_views: tuple[int, ...] = (0, 1)  # views whose embeddings are clustered; the heads use them in turn
    dim: int = 128  # size of an embedding
    hidden_dim: int = 2048  # width of the hidden layer of the projection head
    head_bn: bool = True  # batch normalisation after the hidden layer

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require_at_least(self, kmeans_iterations=1, dim=1, hidden_dim=1)
        require_sizes(self, "prototypes")
        require_views(self, "assign_views")


class MemoryBankMethod(PrototypeMethod):
    """Base class of DeepCluster-v2 and SeLa-v2: assign all images to clusters before each epoch and predict the clusters.

    A subclass implements `assign`.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: the method's own `Config`.
        prototypes: number of prototypes of each head.

    Attributes:
        bank: the embeddings of the assigned views of every image, and the clusters of the images in this epoch. An
            embedding is from this epoch if the image has appeared in it, else from an earlier epoch.
    """

    def __init__(self, backbone: nn.Module, config: PrototypeConfig, prototypes: tuple[int, ...]):
        super().__init__(backbone, config, prototypes)
        self.bank = MemoryBank(len(config.assign_views), len(prototypes), config.dim)

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        PrototypeMethod.check_data(
            config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps
        )
        shown = num_images // batch_size * batch_size
        if max(config.prototypes) > shown:
            raise InputError(
                f"--prototypes {max(config.prototypes)} is more than the {shown} images of an epoch, and every cluster needs "
                "an image: lower it"
            )

    def make_room(self, state: dict[str, Tensor]) -> None:
        if "bank.written" in state:
            number, (banks, _, dim) = len(state["bank.written"]), self.bank.embeddings.shape
            found = tuple(state["bank.embeddings"].shape) if "bank.embeddings" in state else None
            if found != (banks, number, dim):  # before memory is allocated for them
                raise InputError(
                    f"the memory bank has embeddings of the shape {found}, expected {(banks, number, dim)}: use another file"
                )
            self.bank.make_room(number)

    def check_positions(self, num_images: int) -> None:
        self.bank.check(num_images, self.classes)

    def prepare_run(self, data: TrainingData) -> None:
        """Fill the bank with the embeddings of the views of the first epoch."""

        def embed(views: list[Tensor]) -> Tensor:
            # Each view passes alone, so that batch normalisation sees one view. Its running statistics are updated.
            return torch.stack([self.embed_views([views[v]])[0] for v in self.config.assign_views], dim=1)

        self.bank.make_room(len(data))
        rows = data.embed(embed, epoch=0)
        self.bank.fill(rows.values.transpose(0, 1), rows.indices)

    @torch.no_grad()
    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        """Assign the embeddings in the bank, which are from the epoch before, to clusters."""
        bank = self.bank
        written = bank.written.nonzero().flatten()
        mine = written[distributed.rank() :: distributed.world_size()]
        bank.clusters.fill_(IGNORED)
        for head in range(len(self.classes)):
            generator = np.random.default_rng([data.seed, epoch, head])
            embeddings = bank.embeddings[head % len(bank.embeddings)]
            bank.clusters[head, mine] = self.assign(
                head, embeddings[written], mine=embeddings[mine], generator=generator
            )
        bank.clusters.copy_(distributed.max_over_ranks(bank.clusters))  # every cluster is larger than IGNORED
        bank.written.zero_()

    def assign(self, head: int, embeddings: Tensor, *, mine: Tensor, generator: np.random.Generator) -> Tensor:
        """Assign embeddings to the prototypes of a head. A subclass may also change the prototypes.

        Args:
            head: number of the head.
            embeddings: (M, D) embeddings of all images with an embedding, the same on all ranks.
            mine: (B, D) this rank's share of `embeddings`.
            generator: random generator, in the same state on all ranks.

        Returns:
            (B,) long, the clusters of `mine`.
        """
        raise NotImplementedError

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        scores = self.scores(embeddings)  # H × (V, B, K_h)
        clusters = self.bank.clusters[:, indices]  # (H, B)
        terms = torch.stack(
            [assigned_cross_entropy(z, c, self.temperature) for z, c in zip(scores, clusters, strict=True)]
        )
        self.bank.write(torch.stack([embeddings[v].detach() for v in self.config.assign_views]), indices)
        return Step(terms.mean(), {"terms": terms.detach(), **self.occupancy(scores)})


class DeepClusterV2(MemoryBankMethod, config=Config):
    """Train DeepCluster-v2: the clusters are found by spherical k-means, and the prototypes are the centroids.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.
    """

    config: Config
    remedy = "a smaller --lr, fewer --prototypes, or softer views"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, config.prototypes)
        self.classifiers.requires_grad_(False)  # centroids are not trained

    def assign(self, head: int, embeddings: Tensor, *, mine: Tensor, generator: np.random.Generator) -> Tensor:
        """Cluster the embeddings by spherical k-means and copy the centroids to the prototypes of the head."""
        if len(embeddings) < self.classes[head]:
            raise RunError(
                f"--prototypes {self.classes[head]} is more than the {len(embeddings)} different images that could be read: "
                "lower it, or repair the reported files"
            )
        first = generator.choice(len(embeddings), self.classes[head], replace=False)
        start = embeddings[torch.from_numpy(first).to(embeddings.device)]
        clusters, centroids = spherical_kmeans(mine, start, self.config.kmeans_iterations)
        self.heads[head].weight.copy_(centroids)
        return clusters


PRESETS = {
    "published": {
        "epochs": 800,
        "batch_size": 4096,
        "lr": 4.8,
        "warmup_epochs": 10,
        "warmup_start": 0.3,
        "final_lr": 0.0048,
        "weight_decay": 1e-6,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_scale": (0.05, 0.14),
        "augment": "swav",
    },
    # The authors' scripts under their names. They use 64 GPUs with batch statistics over groups of 8.
    "800ep": {"base": "published", "sync_bn_group": 8},
    "400ep": {
        "base": "800ep",
        "epochs": 400,
        "global_crops_size": 160,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 4,
    },
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
        "temperature": 0.05,
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
        "temperature": 0.05,
        "dim": 64,
        "hidden_dim": 256,
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

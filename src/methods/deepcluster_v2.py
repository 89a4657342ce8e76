"""DeepCluster-v2: cluster the whole data set before every epoch, then learn to predict the clusters.

Caron et al., arXiv:2006.09882v5, section 5.1 and appendix D: DeepCluster with SwAV's recipe. Embeddings of an epoch's views are
kept in a memory bank by image; before the next one they are clustered by spherical k-means, once for every head, and the
centroids become the head's prototypes. Every view then predicts the cluster of its image.

Defaults are the authors' 800-epoch recipe. Departures from their code: every rank holds the whole bank, so that a run can be
continued on another number of ranks; initial centroids are drawn from all images, not from those of rank 0; the loss counts
the images with a cluster over all ranks, so that W ranks are one; an image that no epoch has shown yet has no cluster, and a
batch of such images costs nothing, where theirs is not a number; the pass that fills the bank at first shows the very views
of the first epoch, where theirs draws others in the same order. That pass and the clustering run in float32 whatever --precision is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..assignments import spherical_kmeans
from ..config import require_at_least, require_positive, require_sizes, require_views
from ..data.training import TrainingData
from ..errors import InputError, RunError
from ..losses import IGNORED, assigned_cross_entropy
from ..queues import MemoryBank
from .base import PrototypeMethod, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    prototypes: tuple[int, ...] = (3000, 3000, 3000)  # number of clusters of each head
    temperature: float = 0.1  # of the predictions
    kmeans_iterations: int = 10  # of each clustering
    assign_views: tuple[int, ...] = (0, 1)  # views whose embeddings are clustered, by the heads in turn
    dim: int = 128  # embedding size
    hidden_dim: int = 2048  # width of the head's hidden layer
    head_bn: bool = True  # batch normalisation of it

    def __post_init__(self):
        require_positive(self, "temperature")
        require_at_least(self, kmeans_iterations=1, dim=1, hidden_dim=1)
        require_sizes(self, "prototypes")
        require_views(self, "assign_views")


class DeepClusterV2(PrototypeMethod):
    """Args: backbone, a network with the attribute `width`, (B, 3, H, W) → (B, F); config; the number of global views.

    Attributes:
        bank: embeddings of the assigned views of every image, from the epoch so far or the one before, and the clusters
            that the images have in this epoch.
    """

    Config = Config
    remedy = "a smaller --lr, fewer --prototypes, or softer views"

    def __init__(self, backbone: torch.nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, config.prototypes)
        self.bank = MemoryBank(len(config.assign_views), len(config.prototypes), config.dim)
        self.classifiers.requires_grad_(False)  # they are centroids

    @staticmethod
    def check_data(
        config: Config, *, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None
    ) -> None:
        PrototypeMethod.check_data(
            config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps
        )
        shown = num_images // batch_size * batch_size
        if max(config.prototypes) > shown:
            raise InputError(
                f"--prototypes {max(config.prototypes)} is more than the {shown} images of an epoch, which they are made of: "
                "give fewer"
            )

    def make_room(self, state: dict[str, Tensor]) -> None:
        if "bank.written" in state:
            self.bank.make_room(len(state["bank.written"]))

    def prepare_run(self, data: TrainingData) -> None:
        """Fill the bank by one pass over the views of the first epoch."""

        def embed(views: list[Tensor]) -> Tensor:
            # each view alone, as batch normalisation will see it; its running statistics learn
            return torch.stack([self.embed_views([views[v]])[0] for v in self.config.assign_views], dim=1)

        self.bank.make_room(len(data))
        rows = data.embed(embed, epoch=0)
        self.bank.fill(rows.values.transpose(0, 1), rows.indices)

    @torch.no_grad()
    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        """Cluster the embeddings that the epoch before left in the bank."""
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
        bank.clusters.copy_(distributed.max_over_ranks(bank.clusters))  # IGNORED is the least
        bank.written.zero_()

    def assign(self, head: int, embeddings: Tensor, *, mine: Tensor, generator: np.random.Generator) -> Tensor:
        """The clusters of the embeddings `mine`, this rank's share of all `embeddings`; sets the head's prototypes."""
        if len(embeddings) < self.classes[head]:
            raise RunError(
                f"--prototypes {self.classes[head]} is more than the {len(embeddings)} different images that could be read: "
                "give fewer, or repair the reported files"
            )
        first = generator.choice(len(embeddings), self.classes[head], replace=False)
        start = embeddings[torch.from_numpy(first).to(embeddings.device)]
        clusters, centroids = spherical_kmeans(mine, start, self.config.kmeans_iterations)
        self.classifiers[head].weight.copy_(centroids)
        return clusters

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        scores = self.scores(embeddings)  # H × V × (B, K_h)
        clusters = self.bank.clusters[:, indices]
        terms = [assigned_cross_entropy(z, c, self.temperature) for z, c in zip(scores, clusters, strict=True)]
        terms = torch.stack(terms)
        self.bank.write(torch.stack([embeddings[v].detach() for v in self.config.assign_views]), indices)
        return Step(terms.mean(), {"terms": terms.detach(), **self.occupancy(scores)})


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
    # The authors' scripts by their names. 64 GPUs, batch statistics over groups of 8.
    "800ep": {"base": "published", "sync_bn_group": 8},
    "400ep": {
        "base": "800ep",
        "epochs": 400,
        "global_crops_size": 160,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 4,
    },
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

"""SwAV: predict the cluster assignment of one view from another view. The assignments are balanced and computed online.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020, arXiv:2006.09882v5. Authors' code: github.com/facebookresearch/swav. Embeddings and prototypes
have unit length. Sinkhorn turns the scores between them into codes that divide the batch evenly among the prototypes. Each
view predicts the codes of the other assigned views of its image. If the batch is small, a queue adds past embeddings to it
when the codes are computed.

The defaults are the authors' 800-epoch recipe. Departures from their code:

- Sinkhorn never overflows.
- Every rank holds the whole queue, so that a run can continue on another number of ranks.
- The queue may have any length of at least one batch. Theirs is rounded down to a multiple of the batch, and a queue that is
  shorter than a batch is dropped without a message.
- The prototypes are scaled to unit length after the update, as in the paper.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import distributed
from ..assignments import sinkhorn
from ..config import require_at_least, require_positive, require_views
from ..data.training import TrainingData
from ..errors import InputError
from ..losses import swapped_prediction
from ..queues import EmbeddingQueue
from .base import PrototypeMethod, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    prototypes: int = 3000  # number of clusters; on small data sets about ten per class
    temperature: float = 0.1  # temperature of the predictions
    epsilon: float = 0.05  # smoothness of the codes; a smaller value makes the codes harder and works against collapse
    sinkhorn_iterations: int = 3  # number of Sinkhorn iterations that balance the codes
    assign_views: tuple[int, ...] = (0, 1)  # views whose codes the other views predict; global views come first
    dim: int = 128  # size of an embedding
    hidden_dim: int = 2048  # width of the hidden layer of the projection head
    head_bn: bool = True  # batch normalisation after the hidden layer
    queue_length: int = 0  # past embeddings of all ranks that join the batch in Sinkhorn (0: no queue)
    queue_start: int = 15  # epochs before the queue is filled; the embeddings of earlier epochs do harm
    freeze_prototypes: int = 313  # steps at the start of training in which the prototypes do not change

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require_at_least(self, epsilon=1e-4, prototypes=2, sinkhorn_iterations=1, dim=1, hidden_dim=1)
        require_at_least(self, queue_length=0, queue_start=0, freeze_prototypes=0)
        require_views(self, "assign_views")


class SwAV(PrototypeMethod, config=Config):
    """Train SwAV.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.

    Attributes:
        queues: one queue of past embeddings for each assigned view; empty without --queue-length.
    """

    config: Config
    remedy = "a smaller --epsilon, more --freeze-prototypes steps, or softer views"
    queue_started: Tensor

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, (config.prototypes,))
        self.freeze_prototypes = config.freeze_prototypes
        number = len(config.assign_views) if config.queue_length else 0
        self.queues = nn.ModuleList(EmbeddingQueue(config.queue_length, config.dim) for _ in range(number))
        self.register_buffer("queue_started", torch.zeros((), dtype=torch.bool))
        self._started = False  # the same on the host, which saves each step from waiting for the device
        if self.queues:
            self.register_load_state_dict_post_hook(lambda module, _: module._read_back())

    def _read_back(self) -> None:
        """Copy the loaded buffer to the host."""
        self._started = bool(self.queue_started)

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        PrototypeMethod.check_data(
            config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps
        )
        if config.queue_length and config.queue_length < batch_size:
            raise InputError(
                f"--queue-length {config.queue_length} is shorter than --batch-size {batch_size}: give at least {batch_size}, "
                "or 0 for no queue"
            )
        full = config.queue_start * (num_images // batch_size) + -(-config.queue_length // batch_size)
        if config.queue_length and steps is not None and full >= steps:
            raise InputError(
                f"--queue-length {config.queue_length} with --queue-start {config.queue_start} is full after {full} steps, but "
                f"the run has {steps}: shorten the queue, start it earlier, or give 0 for no queue"
            )

    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        """Start filling the queues at the epoch `queue_start`."""
        self._started = epoch >= self.config.queue_start
        self.queue_started.fill_(self._started)

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        (scores,) = self.scores(embeddings)  # (V, B, K)
        terms = []
        for i, assigned in enumerate(self.config.assign_views):
            codes = self._codes(i, embeddings[assigned].detach(), scores[assigned].detach())
            others = [z for v, z in enumerate(scores) if v != assigned]
            terms += [swapped_prediction(z, codes, self.temperature) for z in others]
        loss = torch.stack(terms).mean()
        return Step(loss, {"terms": loss.detach()[None], **self.occupancy([scores])})

    @torch.no_grad()
    def _codes(self, i: int, embeddings: Tensor, scores: Tensor) -> Tensor:
        """Compute the codes (B, K) of the i-th assigned view and push its embeddings to its queue.

        Once the queue is full, the past embeddings and the batch are balanced together. The queue is read before the
        push, so that no image counts twice.
        """
        if self.queues and self._started:
            queue = cast(EmbeddingQueue, self.queues[i])
            if queue.full:
                # Sinkhorn sums over all ranks, so each rank adds a different part of the queue.
                past = queue.embeddings.tensor_split(distributed.world_size())[distributed.rank()]
                scores = torch.cat([self.heads[0](past), scores])
            queue.push(embeddings)
        return sinkhorn(scores, self.config.epsilon, self.config.sinkhorn_iterations)[-len(embeddings) :]


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
        "precision": "float16",
    },
    # The authors' scripts under their names. They use 64 GPUs with batch statistics over groups of 8.
    "800ep": {"base": "published", "sync_bn_group": 8},
    "100ep": {"base": "800ep", "epochs": 100},
    "200ep": {"base": "800ep", "epochs": 200},
    "400ep": {"base": "800ep", "epochs": 400},
    "400ep_2x224": {"base": "400ep", "local_crops_number": 0, "global_crops_scale": (0.08, 1.0)},
    "200ep_bs256": {
        "base": "200ep",
        "batch_size": 256,
        "sync_bn_group": 0,
        "lr": 0.6,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0006,
        "queue_length": 3840,
        "freeze_prototypes": 5005,
    },
    "400ep_bs256": {"base": "200ep_bs256", "epochs": 400},
    "RN50w2_400ep": {"base": "400ep", "arch": "resnet50w2", "hidden_dim": 8192, "local_crops_number": 4},
    "RN50w4_400ep": {
        "base": "RN50w2_400ep",
        "arch": "resnet50w4",
        "global_crops_scale": (0.08, 1.0),
        "local_crops_scale": (0.08, 0.14),
        "batch_size": 2560,
        "queue_length": 2560,
        "queue_start": 0,
    },
    "RN50w5_400ep": {
        "base": "RN50w2_400ep",
        "arch": "resnet50w5",
        "hidden_dim": 10240,
        "head_bn": False,
        "batch_size": 1536,
        "warmup_start": 0.1875,
        "final_lr": 0.0,
        "queue_length": 1536,
        "queue_start": 0,
    },
    # Our own recipes. docs/training.md gives the source of each setting and says what was run.
    "cifar10_200ep": {
        "arch": "cifar_resnet18",
        "global_crops_size": 32,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 0,
        "augment": "swav",
        "prototypes": 100,
        "epsilon": 0.03,
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
        "prototypes": 10,
        "epsilon": 0.03,
        "freeze_prototypes": 97,
    },
    "photographs": {"base": "small_images"},
    "cifar10": {"base": "small_images"},
    "cifar100-20": {"base": "cifar10", "prototypes": 20},
    "stl10": {"base": "photographs"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_size": 8,
        "local_crops_number": 0,
        "prototypes": 10,
        "epsilon": 0.03,
        "temperature": 0.2,
        "dim": 64,
        "hidden_dim": 256,
        "freeze_prototypes": 11,
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

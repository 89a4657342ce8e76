"""SwAV: predict the cluster assignment of one view from another, with assignments made online and in balance.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020, arXiv:2006.09882v5. Authors' code: github.com/facebookresearch/swav. Embeddings and prototypes have
unit length; the scores between them are turned into codes by Sinkhorn, which shares the batch evenly among the prototypes, and
each view predicts the codes of the assigned views of its image. With small batches a queue of past embeddings joins them.

Defaults are the authors' 800-epoch recipe. Departures from their code: Sinkhorn never overflows; every rank holds the whole
queue, so that it can be continued on other ranks, and it may have any length of at least a batch, where theirs is rounded down
to a multiple and one that is shorter silently dropped; prototypes get their unit length after the update, as in the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    prototypes: int = 3000  # number of clusters; on small data about ten for every class
    temperature: float = 0.1  # of the predictions
    epsilon: float = 0.05  # smoothness of the codes; smaller is harder, and against collapse
    sinkhorn_iterations: int = 3  # scalings that balance the codes
    assign_views: tuple[int, ...] = (0, 1)  # views that codes are made from; large ones, which come first
    dim: int = 128  # embedding size
    hidden_dim: int = 2048  # width of the head's hidden layer
    head_bn: bool = True  # batch normalisation of it
    queue_length: int = 0  # past embeddings over all ranks that join the batch in Sinkhorn; 0: none
    queue_start: int = 15  # epochs before the queue is filled; earlier it harms
    freeze_prototypes: int = 313  # steps during which the prototypes keep their start

    def __post_init__(self):
        require_positive(self, "temperature")
        require_at_least(self, epsilon=1e-4, prototypes=2, sinkhorn_iterations=1, dim=1, hidden_dim=1)
        require_at_least(self, queue_length=0, queue_start=0, freeze_prototypes=0)
        require_views(self, "assign_views")


class SwAV(PrototypeMethod):
    """Args: backbone, a network with the attribute `width`, (B, 3, H, W) → (B, F); config; the number of global views."""

    Config = Config
    remedy = "a smaller --epsilon, more --freeze-prototypes steps, or softer views"

    def __init__(self, backbone: torch.nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, (config.prototypes,))
        queues = len(config.assign_views) if config.queue_length else 0
        self.queues = torch.nn.ModuleList(EmbeddingQueue(config.queue_length, config.dim) for _ in range(queues))
        self.register_buffer("queue_started", torch.zeros((), dtype=torch.bool))
        self._started = False  # a mirror on the host, so that a step does not wait for the device
        if self.queues:
            self.register_load_state_dict_post_hook(lambda module, _: module._read_back())

    def _read_back(self) -> None:
        self._started = bool(self.queue_started)

    @staticmethod
    def check_data(
        config: Config, *, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None
    ) -> None:
        PrototypeMethod.check_data(
            config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps
        )
        if config.queue_length and config.queue_length < batch_size:
            raise InputError(
                f"--queue-length {config.queue_length} is shorter than --batch-size {batch_size}: lengthen it, or give 0 for none"
            )
        full = config.queue_start * (num_images // batch_size) + -(-config.queue_length // batch_size)
        if config.queue_length and steps is not None and full >= steps:
            raise InputError(
                f"--queue-length {config.queue_length}, filled from epoch {config.queue_start} on (--queue-start), would be full after "
                f"{full} steps, and the run has {steps}: shorten it, start it earlier, or give 0 for none"
            )

    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        self._started = epoch >= self.config.queue_start
        self.queue_started.fill_(self._started)

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        (scores,) = self.scores(embeddings)  # V × (B, K)
        terms = []
        for i, assigned in enumerate(self.config.assign_views):
            codes = self._codes(i, embeddings[assigned].detach(), scores[assigned].detach())
            others = [z for v, z in enumerate(scores) if v != assigned]
            terms += [swapped_prediction(z, codes, self.temperature) for z in others]
        loss = torch.stack(terms).mean()
        return Step(loss, {"terms": loss.detach()[None], **self.occupancy([scores])})

    @torch.no_grad()
    def _codes(self, i: int, embeddings: Tensor, scores: Tensor) -> Tensor:
        """Codes (B, K) of the i-th assigned view. Once its queue is full, past embeddings are balanced together with the
        batch; the look at the queue precedes the push, so that no image counts twice."""
        if self.queues and self._started:
            if self.queues[i].full:
                # Sinkhorn goes over all ranks: each brings its share of the queue
                past = self.queues[i].embeddings.tensor_split(distributed.world_size())[distributed.rank()]
                scores = torch.cat([self.classifiers[0](past), scores])
            self.queues[i].push(embeddings)
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
    # The authors' scripts by their names. 64 GPUs, batch statistics over groups of 8.
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
    # ours; docs/training.md says what of it is whose advice, and what of it was run.
    "cifar10": {
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

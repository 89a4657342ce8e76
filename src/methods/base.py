"""The contract between a method and the trainer and evaluations, and what several methods share."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loaders import Batch
from ..data.training import TrainingData
from ..errors import InputError
from ..logs import percent, table
from ..metrics import balance
from ..models.heads import ProjectionHead, Prototypes


class Step(NamedTuple):
    """What one training step returns.

    loss: scalar, with gradient.
    numbers: detached tensors of any fixed shape; the trainer averages them over the epoch's steps and all ranks.
    neighbors: (B,) index in the data set of the image that each sample was paired with, if the method pairs images.
        The trainer, which has the labels, logs how often the two agree.
    skip: bool scalar, True if this rank has nothing to learn from the batch. If every rank says so, the trainer updates
        nothing, counts the step and goes on. If only some do, their loss must be 0 with a gradient of 0. None: never.
    """

    loss: Tensor
    numbers: dict[str, Tensor]
    neighbors: Tensor | None = None
    skip: Tensor | None = None


class Method(nn.Module):
    """A network, an objective, and what it remembers between steps.

    A method is built from a backbone and its own frozen `Config`. It sees views and indices, never labels. State that
    must survive a restart is a parameter or a buffer, so that `state_dict` holds it. A training step has two halves:
    `embed_views`, the expensive one, and `objective`. Every other hook does nothing by default.
    """

    Config: type  # the frozen dataclass of the method's options
    temperature: float = 1.0  # softmax(logits / temperature) are the probabilities of the classes
    classes: tuple[int, ...] = ()  # the size of each classifier
    backbone: nn.Module
    why_skipped = "the method found nothing to learn from"  # for the error if a whole epoch is skipped

    # ---- before training ----

    @staticmethod
    def check_data(
        config: Any, *, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None
    ) -> None:
        """Refuse options that do not fit the views, the batch (over all ranks), the data set or the steps of the run.

        Raises:
            InputError: naming the flags.
        """

    def companions(self, indices: np.ndarray, epoch: int) -> np.ndarray | None:
        """Name the images to load together with those of a batch, such as their nearest neighbours.

        Args:
            indices: (B,) positions in the data set of this rank's images of a step.

        Returns:
            (B, M) positions of M companions of each image, or None. The views of the companions follow those of the
            images in `batch.views`: V views of the images, then V of their first companions, and so on. The answer must
            depend on the arguments alone, not on the number of ranks or restarts.
        """
        return None

    def prepare_run(self, data: TrainingData) -> None:
        """Before the first step of a run, not after a restart: mine neighbours, fill a memory bank."""

    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        """Before an epoch, in training mode: k-means, Sinkhorn over the data set."""

    def prepare_step(self, step: int, data: TrainingData) -> None:
        """Before a step, whose batch is already loaded: new labels in the middle of an epoch."""

    # ---- a training step ----

    def idle_views(self) -> int:
        """Return how many of the first views get no gradient in this step."""
        return 0

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Return the embeddings of V views, V × (B, D).

        This is the expensive half of a step, which `--accumulate` runs in parts. It must not change what the method
        remembers. The first `idle` views are embedded without a graph.
        """
        raise NotImplementedError

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """Return the loss of this rank's whole batch, and remember what later steps need.

        Args:
            embeddings: what `embed_views` returned.
            indices: (B,) positions of the images in the data set.
        """
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Between backward and the optimiser: keep prototypes fixed at first, and the like."""

    def after_step(self, batch: Batch) -> None:
        """After the optimiser: normalise prototypes, and the like."""

    # ---- the network ----

    def embed(self, images: Tensor) -> Tensor:
        """Return the (B, D) embeddings of single images, for k-NN and linear probes."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> list[Tensor]:
        """Return the (B, C_k) logits of each classifier k for single images, for clustering scores."""
        raise NotImplementedError

    # ---- checkpoints ----

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Resize buffers whose size depends on the data set to the sizes in `state`, before it is loaded."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the method."""
        return self.state_dict()

    def load_saved_state(self, state: dict[str, Tensor]) -> None:
        """Load what `saved_state` returned."""
        self.make_room(state)
        self.load_state_dict(state)

    # ---- the log ----

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Turn an epoch's averages of `numbers` into scalars to log. The key `classifier` names the classifier to use."""
        return {}

    def report(self, summary: dict[str, Any]) -> str:
        """Return the last epoch as a table for a person."""
        return ""

    def diagnose(self, history: list[dict[str, Any]]) -> str | None:
        """Return one plain sentence if the summaries of the epochs so far show that training went wrong."""
        return None


class ClassifierMethod(Method):
    """What methods share that train K classifiers on the embeddings of a projection head.

    A subclass sets `backbone`, `projection_head`, `classifiers`, `classes` and `temperature`. Its `numbers` hold `terms`, the
    (K,) losses of the classifiers, and what `occupancy` returns.
    """

    remedy = "a larger --lr or a larger --batch-size"  # what to try when it has collapsed

    def collapsed_loss(self, k: int) -> float:
        """What classifier k's loss settles at when all images get the same prediction."""
        return math.log(self.classes[k])

    def embed(self, images: Tensor) -> Tensor:
        return self.projection_head(self.backbone(images))

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Unit embeddings of V views, V × (B, D). Batch normalisation in the backbone sees views of one size together, in
        the head all of them."""
        if idle:
            with torch.no_grad():
                first = self.embed_views(views[:idle])
            return first + self.embed_views(views[idle:])
        features, first = [], 0
        for i in range(1, len(views) + 1):
            if i == len(views) or views[i].shape[-1] != views[first].shape[-1]:
                features.append(self.backbone(torch.cat(views[first:i])))
                first = i
        return list(self.projection_head(torch.cat(features)).chunk(len(views)))

    def predict(self, images: Tensor) -> list[Tensor]:
        embeddings = self.embed(images)
        return [classifier(embeddings) for classifier in self.classifiers]

    @torch.no_grad()
    def occupancy(self, logits) -> dict[str, Tensor]:
        """How view 1, which is never replaced, spreads over the classes: (C_k,) shares of the hard and the soft kind."""
        numbers = {}
        for k, views in enumerate(logits):
            z = views[1].float()
            # by scatter_add: torch.bincount would make the host wait for a GPU
            counts = z.new_zeros(z.shape[1]).scatter_add_(0, z.argmax(dim=1), z.new_ones(len(z)))
            numbers[f"share_{k}"] = counts / len(z)
            numbers[f"prediction_{k}"] = (z / self.temperature).softmax(dim=1).mean(dim=0)
        return numbers

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Names for use the classifier with the lowest loss among those with the size of the first."""
        terms = averages["terms"].tolist()
        comparable = [k for k, size in enumerate(self.classes) if size == self.classes[0]]
        summary = {"classifier": min(comparable, key=lambda k: terms[k])}
        for k in range(len(self.classes)):
            share, prediction = averages[f"share_{k}"], averages[f"prediction_{k}"]
            summary[f"loss_{k}"] = terms[k]
            summary[f"used_{k}"] = int((share > 0).sum())
            summary[f"entropy_{k}"] = -torch.special.xlogy(prediction, prediction).sum().item()
            summary[f"balance_hard_{k}"] = balance(share.cpu().numpy())
            summary[f"balance_soft_{k}"] = balance(prediction.cpu().numpy())
        return summary

    def report(self, summary: dict[str, Any]) -> str:
        """Return one row per classifier; see `metrics.balance` for the two balances, in percent."""
        rows = [
            [
                f"classifier {k}{' (chosen)' if k == summary['classifier'] else ''}",
                str(size),
                f"{summary[f'loss_{k}']:.3f}",
            ]
            + [str(summary[f"used_{k}"])]
            + [percent(summary[name]) if name in summary else "" for name in (f"balance_hard_{k}", f"balance_soft_{k}")]
            for k, size in enumerate(self.classes)
        ]
        return table(["last epoch", "clusters", "loss", "used", "balance (hard)", "balance (soft)"], rows)

    def diagnose(self, history: list[dict[str, Any]]) -> str | None:
        recent = history[-5:]
        if len(recent) < 5:
            return None
        chosen = recent[-1]["classifier"]
        size, collapsed = self.classes[chosen], self.collapsed_loss(chosen)
        if all(abs(epoch[f"loss_{chosen}"] / collapsed - 1) < 0.01 for epoch in recent):
            return (
                f"The model has collapsed: for five epochs the loss has stayed at {collapsed:.3g}, the cost of giving every image the "
                f"same prediction; try {self.remedy}."
            )
        if all(epoch[f"used_{chosen}"] <= size // 2 for epoch in recent):
            return (
                f"The model is collapsing: only {recent[-1][f'used_{chosen}']} of {size} clusters were used in the last epoch; try a "
                "smaller --lr, a larger --batch-size, or fewer classes."
            )
        return None


class PrototypeMethod(ClassifierMethod):
    """What SwAV, DeepCluster-v2 and SeLa-v2 share: a head of two layers and unit prototypes, one set for each head.

    arXiv:2006.09882v5. A subclass passes its number of prototypes for each head. Its config has `temperature`, `dim`, `hidden_dim`,
    `head_bn`, `assign_views`, and `freeze_prototypes` if prototypes learn.
    """

    def __init__(self, backbone: nn.Module, config, prototypes: tuple[int, ...]):
        super().__init__()
        self.config = config
        self.classes, self.temperature = tuple(prototypes), config.temperature
        self.backbone = backbone
        self.projection_head = ProjectionHead(
            backbone.width,
            config.hidden_dim,
            config.dim,
            layers=2,
            bn=config.head_bn,
            activation="relu",
            std=None,
            eps=1e-12,
        )
        self.classifiers = nn.ModuleList(Prototypes(config.dim, number) for number in prototypes)

    @staticmethod
    def check_data(
        config: Any, *, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None
    ) -> None:
        if max(config.assign_views) >= num_views:
            raise InputError(
                f"--assign-views names view {max(config.assign_views)}, but there are only views 0 to {num_views - 1}"
            )
        frozen = getattr(config, "freeze_prototypes", 0)
        if steps is not None and frozen >= steps:
            raise InputError(
                f"--freeze-prototypes {frozen} is not less than the {steps} steps of the run: they would never be trained"
            )

    def scores(self, embeddings: list[Tensor]) -> list[Tensor]:
        """Cosines with each head's prototypes, H × (V, B, K_h), of V views."""
        stacked = torch.cat(embeddings)
        return [prototypes(stacked).unflatten(0, (len(embeddings), -1)) for prototypes in self.classifiers]

    def after_backward(self, step: int) -> None:
        """Prototypes keep their start for a while: neither gradient nor momentum nor decay."""
        if step < getattr(self.config, "freeze_prototypes", 0):
            for parameter in self.classifiers.parameters():
                parameter.grad = None

    def after_step(self, batch) -> None:
        for prototypes in self.classifiers:
            if prototypes.weight.requires_grad:
                prototypes.normalize_()

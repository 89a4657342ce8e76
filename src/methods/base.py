"""What the trainer and the evaluations may call on a method; every hook does nothing by default."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import InputError
from ..logs import table
from ..models.heads import ProjectionHead, Prototypes


class Step(NamedTuple):
    """What one training step returns.

    loss: scalar, with gradient.
    numbers: detached tensors of any fixed shape; the trainer averages them over the epoch's steps and all ranks.
    neighbors: (B,) index in the data set of the image that each sample was paired with, if the method pairs images.
        The trainer, which has the labels, logs how often the two agree.
    """

    loss: Tensor
    numbers: dict[str, Tensor]
    neighbors: Tensor | None = None


class Method(nn.Module):
    """A network, an objective, and what it remembers between steps.

    A method is built from a backbone and its own frozen `Config`. It sees views and indices, never labels. State that
    must survive a restart is a parameter or a buffer, so that `state_dict` holds it.
    """

    Config: type  # the frozen dataclass of the method's knobs
    temperature: float = 1.0  # softmax(logits / temperature) are the probabilities of the classes
    classes: tuple[int, ...] = ()  # the size of each classifier

    @staticmethod
    def check_data(config, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None) -> None:
        """Refuse, with an InputError, knobs that do not go with the views, the batch (over all ranks), the data set or the
        number of steps of the whole run."""

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Before this state is loaded: give what depends on the data set the size that it has there."""

    def prepare_epoch(self, epoch: int, loader) -> None:
        """Before an epoch, in training mode: k-means, Sinkhorn over the data set, neighbour mining."""

    def forward(self, batch) -> Step:
        """The training step; called exactly once per step, through DistributedDataParallel's wrapper if there is one."""
        return self.objective(self.embed_views(batch.views, self.idle_views()), batch.indices)

    def idle_views(self) -> int:
        """How many of the first views this step forwards although no gradient will reach them."""
        return 0

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Embeddings of V views, V × (B, D): the expensive half of a step, which `--accumulate` takes in parts. Nothing is
        remembered here. The first `idle` views are embedded without a graph."""
        raise NotImplementedError

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """The other half: the loss of this rank's whole batch, and what is remembered of it."""
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Between backward and the optimiser: keep prototypes fixed at first, and the like."""

    def after_step(self, batch) -> None:
        """After the optimiser: normalise prototypes, and the like."""

    def embed(self, images: Tensor) -> Tensor:
        """(B, D) embeddings of single images, for k-NN and linear probes."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> list[Tensor]:
        """(B, C_k) logits of each classifier k for single images, for clustering scores."""
        raise NotImplementedError

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, float | int]:
        """One epoch's averages of `numbers` as scalars to log. The key `classifier` names the classifier to be used."""
        return {}

    def report(self, summary: dict) -> str:
        """The last epoch as a table for a person."""
        return ""

    def diagnose(self, history: list[dict]) -> str | None:
        """One plain sentence if the epochs so far (their summaries, oldest first) show that training went wrong."""
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

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, float | int]:
        """Names for use the classifier with the lowest loss among those with the size of the first."""
        terms = averages["terms"].tolist()
        comparable = [k for k, size in enumerate(self.classes) if size == self.classes[0]]
        summary = {"classifier": min(comparable, key=lambda k: terms[k])}
        for k in range(len(self.classes)):
            prediction = averages[f"prediction_{k}"]
            summary[f"loss_{k}"] = terms[k]
            summary[f"used_{k}"] = int((averages[f"share_{k}"] > 0).sum())
            summary[f"entropy_{k}"] = -torch.special.xlogy(prediction, prediction).sum().item()
        return summary

    def report(self, summary: dict) -> str:
        """One row per classifier; `balance` is the entropy of the mean prediction over ln C: 1 when all classes weigh alike."""
        rows = [
            [f"classifier {k}" + " (chosen)" * (k == summary["classifier"]), str(size), f"{summary[f'loss_{k}']:.3f}"]
            + [str(summary[f"used_{k}"]), f"{summary[f'entropy_{k}'] / math.log(size):.3f}"]
            for k, size in enumerate(self.classes)
        ]
        return table(["last epoch", "classes", "loss", "used", "balance"], rows)

    def diagnose(self, history: list[dict]) -> str | None:
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
            *(backbone.width, config.hidden_dim, config.dim, 2, config.head_bn, "relu"), std=None, eps=1e-12
        )
        self.classifiers = nn.ModuleList(Prototypes(config.dim, number) for number in prototypes)

    @staticmethod
    def check_data(config, batch_size: int, num_images: int, num_views: int = 2, steps: int | None = None) -> None:
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

"""What the trainer and the evaluations may call on a method; every hook does nothing by default."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..logs import table


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
    def check_data(config, batch_size: int, num_images: int, num_views: int = 2) -> None:
        """Refuse, with an InputError, knobs that do not go with the views, the batch (over all ranks) or the data set."""

    def prepare_epoch(self, epoch: int, loader) -> None:
        """Before an epoch: k-means, Sinkhorn over the data set, neighbour mining."""

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

    def predict(self, images: Tensor) -> list[Tensor]:
        embeddings = self.embed(images)
        return [classifier(embeddings) for classifier in self.classifiers]

    @torch.no_grad()
    def occupancy(self, logits) -> dict[str, Tensor]:
        """How view 1, which is never replaced, spreads over the classes: (C_k,) shares of the hard and the soft kind."""
        numbers = {}
        for k, views in enumerate(logits):
            z = views[1].float()
            numbers[f"share_{k}"] = torch.bincount(z.argmax(dim=1), minlength=z.shape[1]) / len(z)
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

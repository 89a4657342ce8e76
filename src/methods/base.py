"""Define the contract between methods, trainer and evaluations, and the code that several methods share.

Legend: B images on this rank, V views, K classifiers, C_k classes of classifier k, D embedding width, F backbone width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loaders import Batch
from ..data.training import TrainingData
from ..errors import InputError
from ..logs import percent, table
from ..metrics import balance
from ..models.heads import ProjectionHead, Prototypes
from ..queues import EmbeddingQueue, NearestNeighborQueue


class Step(NamedTuple):
    """Hold the results of one training step.

    Attributes:
        loss: scalar with gradient.
        numbers: detached tensors of any fixed shape. The trainer averages them over the steps of an epoch and all ranks.
        neighbors: (B,) positions in the data set of the images that the samples were paired with; None: the method does
            not pair images. The trainer, which has the labels, logs how often paired images have the same label.
        skip: bool scalar, True if this rank cannot learn from the batch; None: never. If it is True on all ranks, the
            trainer counts the step but does not update anything. If it is True only on some ranks, their loss must be 0
            with a gradient of 0.
    """

    loss: Tensor
    numbers: dict[str, Tensor]
    neighbors: Tensor | None = None
    skip: Tensor | None = None


class Method(nn.Module):
    """Base class of all methods: a network, an objective and the state that is kept between steps.

    A method is built from a backbone and its own frozen dataclass `Config`, which its class header names:
    `class MyMethod(Method, config=Config)`. It receives views and indices, never labels. State that must survive a
    restart is a parameter or a buffer, so that `state_dict` contains it. A training step has two halves: `embed_views`,
    the expensive half, and `objective`. Every other hook does nothing by default.
    """

    Config: ClassVar[type[Any]]  # the frozen dataclass of the method's options
    temperature: float = 1.0  # the probabilities of the classes are softmax(logits / temperature)
    classes: tuple[int, ...] = ()  # the size of each classifier
    backbone: nn.Module
    earlier_stage: ClassVar[str] = (
        ""  # the method whose network --pretrained must name; "": the method starts from any weights
    )
    why_skipped = "the method found nothing to learn from"  # reason in the error message if a whole epoch is skipped

    def __init_subclass__(cls, *, config: type[Any] | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if config is not None:
            cls.Config = config

    # ---- before training ----

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        """Check that the options fit the data and the run.

        Args:
            config: the method's own `Config`.
            batch_size: images per step over all ranks.
            num_images: images in the data set.
            num_views: views of every image.
            steps: steps of the whole run; None: unknown.

        Raises:
            InputError: naming the flags that do not fit.
        """

    def start_after(self, earlier: nn.Module, chosen: int) -> None:
        """Take over what this method needs of the network that `--pretrained` names, beyond the backbone.

        It runs before `prepare_run`, once the backbone has its weights. Only methods with an `earlier_stage` get this call.

        Args:
            earlier: the network: a `Method`, `LinearClassifiers`, or a bare backbone.
            chosen: number of the classifier that evaluations of that network use.

        Raises:
            InputError: if the network does not fit.
        """

    def receive_neighbors(self, train: Tensor, held_out: Tensor | None) -> None:
        """Take over neighbours that were mined before the run; see `src/mining.py`.

        Args:
            train: (N, 1 + k) positions of each training image and of its neighbours.
            held_out: (M, 1 + k) the same for the held-out images; None: there are none.
        """

    @staticmethod
    def check_files(config: Any, data: TrainingData) -> None:
        """Check that the files that the options name belong to the images of the run.

        Raises:
            InputError: naming the file and what to do.
        """

    def companions(self, indices: np.ndarray, epoch: int) -> np.ndarray | None:
        """Return the images to load together with the images of a batch, such as their nearest neighbours.

        `batch.views` contains the V views of the images, then the V views of their first companions, and so on.

        Args:
            indices: (B,) positions in the data set of this rank's images of a step.
            epoch: number of the epoch, from 0.

        Returns:
            (B, M) positions of M companions of each image, or None. The result must depend on the arguments alone, not
            on the number of ranks or restarts.
        """
        return None

    def prepare_run(self, data: TrainingData) -> None:
        """Run before the first step of a run, but not after a restart. Mine neighbours or fill a memory bank here."""

    def prepare_epoch(self, epoch: int, data: TrainingData) -> None:
        """Run before each epoch, in training mode. Assign clusters to the data set here."""

    def prepare_step(self, step: int, data: TrainingData) -> None:
        """Run before each step, whose batch is already loaded. Update labels within an epoch here."""

    def measure(self, data: TrainingData) -> dict[str, Any]:
        """Return further numbers for the summary of the epoch that has just ended. All ranks call it.

        The run keeps the model of the epoch with the lowest `selection_loss`, if there is such an entry. An entry
        `classifier` is the number of the classifier that evaluations use by default.
        """
        return {}

    # ---- a training step ----

    def idle_views(self) -> int:
        """Return how many views need no gradient in this step. They are the first ones."""
        return 0

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the embeddings of V views, V × (B, D).

        This is the expensive half of a step. `--accumulate` calls it several times, with parts of the batch. So it must
        not change the state that the method keeps between steps.

        Args:
            views: V views, (B, channels, H, W) each.
            idle: how many of the views, from the first one on, are embedded without gradient.
        """
        raise NotImplementedError

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """Compute the loss of this rank's whole batch and update the state that later steps need.

        Args:
            embeddings: V × (B, D), the result of `embed_views`.
            indices: (B,) positions of the images in the data set.
        """
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Run between backward and the update. Change gradients here."""

    def after_step(self, batch: Batch) -> None:
        """Run after the update. Normalise prototypes here."""

    # ---- the network ----

    def embed(self, images: Tensor) -> Tensor:
        """Compute the (B, D) embeddings of single images, for k-NN and linear probes."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> list[Tensor]:
        """Compute the (B, C_k) logits of each classifier k for single images, for clustering scores."""
        raise NotImplementedError

    # ---- checkpoints ----

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Resize the buffers whose size depends on the data set to their sizes in `state`, before it is loaded."""

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores."""
        return self.state_dict()

    def load_saved_state(self, state: dict[str, Tensor]) -> None:
        """Load tensors that `saved_state` returned."""
        self.make_room(state)
        self.load_state_dict(state)

    def check_positions(self, num_images: int) -> None:
        """Check that what the method remembers, as loaded from a checkpoint, can be used as positions.

        Args:
            num_images: number of images of the data set.

        Raises:
            InputError: naming the values that lie outside.
        """
        for module in self.modules():
            if isinstance(module, EmbeddingQueue | NearestNeighborQueue):
                module.check(num_images)

    # ---- the log ----

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Convert an epoch's averages of `Step.numbers` to scalars for the log.

        The key `classifier`, if present, is the number of the classifier that evaluations use by default.
        """
        return {}

    def report(self, summary: dict[str, Any]) -> str:
        """Format the summary of the last epoch as a table."""
        return ""

    def diagnose(self, history: list[dict[str, Any]]) -> str | None:
        """Return one plain sentence if the summaries of all epochs so far show a failure of the training."""
        return None

    def ended(self, history: list[dict[str, Any]]) -> str | None:
        """Return one plain sentence if the training should end before its last epoch, given the summaries of all epochs."""
        return None


def feature_width(backbone: nn.Module) -> int:
    """Return F, the number of features of a backbone. Every backbone has it as the attribute `width`."""
    return cast(int, backbone.width)


def check_head(layers: int, *, dim: int, width: int) -> None:
    """Check that a projection head without layers keeps the width of the backbone's features.

    Raises:
        InputError: naming --dim.
    """
    if layers == 0 and dim != width:
        raise InputError(
            f"--dim is {dim}, but with --head-layers 0 the embedding is the backbone's {width} features: give --dim {width}"
        )


class ClassifierMethod(Method):
    """Base class of methods that train K classifiers on the embeddings of a projection head.

    A subclass sets `backbone`, `projection_head`, `classifiers`, `classes` and `temperature`. The numbers of its steps
    contain `terms`, the (K,) losses of the classifiers, and the result of `occupancy`.
    """

    projection_head: nn.Module
    classifiers: nn.ModuleList
    remedy = "a larger --lr or a larger --batch-size"  # what the user should try after a collapse

    def collapsed_loss(self, k: int) -> float:
        """Return the loss of classifier k if it predicts the same for all images."""
        return math.log(self.classes[k])

    def embed(self, images: Tensor) -> Tensor:
        return self.projection_head(self.backbone(images))

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the unit embeddings of V views, V × (B, D).

        In the backbone, batch normalisation sees consecutive views of the same size together. In the head, it sees all
        views together. Idle views are always separate from the others.
        """
        if idle:
            with torch.no_grad():
                without_gradient = self.embed_views(views[:idle])
            return without_gradient + self.embed_views(views[idle:])
        features, first = [], 0
        for i in range(1, len(views) + 1):
            if i == len(views) or views[i].shape[-1] != views[first].shape[-1]:
                features.append(self.backbone(torch.cat(views[first:i])))
                first = i
        return list(self.project(torch.cat(features)).chunk(len(views)))

    def project(self, features: Tensor) -> Tensor:
        """Return what the objective needs of (B, F) features. By default these are the embeddings."""
        return self.projection_head(features)

    def predict(self, images: Tensor) -> list[Tensor]:
        embeddings = self.embed(images)
        return [classifier(embeddings) for classifier in self.classifiers]

    @torch.no_grad()
    def occupancy(self, logits: Sequence[Sequence[Tensor] | Tensor]) -> dict[str, Tensor]:
        """Compute the shares of the classes in view 1, which no neighbour replaces, or in the only view.

        Args:
            logits: logits[k][v] is the (B, C_k) output of classifier k for view v.

        Returns:
            share_k: (C_k,) shares of the images whose largest logit is that of the class.
            prediction_k: (C_k,) mean probabilities of the classes.
        """
        numbers = {}
        for k, views in enumerate(logits):
            z = views[min(1, len(views) - 1)].float()
            # scatter_add_ instead of torch.bincount, which makes the host wait for the GPU
            counts = z.new_zeros(z.shape[1]).scatter_add_(0, z.argmax(dim=1), z.new_ones(len(z)))
            numbers[f"share_{k}"] = counts / len(z)
            numbers[f"prediction_{k}"] = (z / self.temperature).softmax(dim=1).mean(dim=0)
        return numbers

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Return loss, used classes, entropy and balance of each classifier, and the classifier to use.

        The classifier to use is the one with the lowest loss among the classifiers that are as large as the first one.
        """
        terms = averages["terms"].tolist()
        comparable = [k for k, size in enumerate(self.classes) if size == self.classes[0]]
        summary: dict[str, Any] = {"classifier": min(comparable, key=lambda k: terms[k])}
        for k in range(len(self.classes)):
            share, prediction = averages[f"share_{k}"], averages[f"prediction_{k}"]
            summary[f"loss_{k}"] = terms[k]
            summary[f"used_{k}"] = int((share > 0).sum())
            summary[f"entropy_{k}"] = -torch.special.xlogy(prediction, prediction).sum().item()
            summary[f"balance_hard_{k}"] = balance(share.cpu().numpy())
            summary[f"balance_soft_{k}"] = balance(prediction.cpu().numpy())
        return summary

    def report(self, summary: dict[str, Any]) -> str:
        """Return a table with one row per classifier. `metrics.balance` explains the two balances, which are in percent."""
        rows = []
        for k, size in enumerate(self.classes):
            # The summary may come from a checkpoint of an earlier version, or from a damaged one.
            name = f"classifier {k} (chosen)" if k == summary.get("classifier") else f"classifier {k}"
            shown: dict[str, Callable[[Any], str]] = {f"loss_{k}": "{:.3f}".format, f"used_{k}": str}
            shown |= {f"balance_hard_{k}": percent, f"balance_soft_{k}": percent}
            rows.append(
                [name, str(size), *(form(summary[key]) if key in summary else "" for key, form in shown.items())]
            )
        return table(["last epoch", "clusters", "loss", "used", "balance (hard)", "balance (soft)"], rows)

    def diagnose(self, history: list[dict[str, Any]]) -> str | None:
        chosen = history[-1]["classifier"]
        recent = [epoch for epoch in history[-5:] if {f"loss_{chosen}", f"used_{chosen}"} <= epoch.keys()]
        if len(recent) < 5:
            return None
        size, collapsed = self.classes[chosen], self.collapsed_loss(chosen)
        if all(abs(epoch[f"loss_{chosen}"] / collapsed - 1) < 0.01 for epoch in recent):
            return (
                f"The model has collapsed: for five epochs the loss has been {collapsed:.3g}, as if all images had the same "
                f"prediction; try {self.remedy}."
            )
        if all(epoch[f"used_{chosen}"] <= size // 2 for epoch in recent):
            return (
                f"The model is collapsing: the last epoch used only {recent[-1][f'used_{chosen}']} of {size} clusters; try a "
                "smaller --lr, a larger --batch-size, or fewer classes."
            )
        return None


class PrototypeConfig(Protocol):
    """The options that `PrototypeMethod` reads."""

    @property
    def temperature(self) -> float: ...
    @property
    def dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def head_bn(self) -> bool: ...
    @property
    def assign_views(self) -> tuple[int, ...]: ...


class PrototypeMethod(ClassifierMethod):
    """Base class of SwAV, DeepCluster-v2 and SeLa-v2: a projection head of two layers, and heads of unit prototypes.

    arXiv:2006.09882v5. Each of H heads has its own prototypes.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: the method's own `Config`.
        prototypes: number of prototypes of each head.
    """

    config: PrototypeConfig
    freeze_prototypes: int = 0  # steps at the start of training in which the prototypes do not change

    def __init__(self, backbone: nn.Module, config: PrototypeConfig, prototypes: tuple[int, ...]):
        super().__init__()
        self.config = config
        self.classes, self.temperature = tuple(prototypes), config.temperature
        self.backbone = backbone
        self.projection_head = ProjectionHead(
            feature_width(backbone),
            config.hidden_dim,
            config.dim,
            layers=2,
            bn=config.head_bn,
            activation="relu",
            std=None,
            eps=1e-12,
        )
        self.classifiers = nn.ModuleList(Prototypes(config.dim, number) for number in prototypes)

    @property
    def heads(self) -> list[Prototypes]:
        """Return the classifiers, each with its prototypes as `weight`, (K_h, D)."""
        return [cast(Prototypes, head) for head in self.classifiers]

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        last = max(config.assign_views)
        if last >= num_views:
            raise InputError(
                f"--assign-views names view {last}, but there are only views 0 to {num_views - 1}: name existing views"
            )
        frozen = getattr(config, "freeze_prototypes", 0)
        if steps is not None and frozen >= steps:
            raise InputError(
                f"--freeze-prototypes {frozen} is not less than the {steps} steps of the run, so the prototypes would never "
                "be trained: lower it"
            )

    def scores(self, embeddings: list[Tensor]) -> list[Tensor]:
        """Compute the cosines of the embeddings of V views with the prototypes of each head, H × (V, B, K_h)."""
        stacked = torch.cat(embeddings)
        return [head(stacked).unflatten(0, (len(embeddings), -1)) for head in self.heads]

    def after_backward(self, step: int) -> None:
        """Remove the gradients of the prototypes in the first `freeze_prototypes` steps.

        Without a gradient, the optimiser changes neither the prototypes nor their momentum, and does not decay them.
        """
        if step < self.freeze_prototypes:
            for parameter in self.classifiers.parameters():
                parameter.grad = None

    def after_step(self, batch: Batch) -> None:
        """Scale the trained prototypes to unit length."""
        for head in self.heads:
            if head.weight.requires_grad:
                head.normalize_()

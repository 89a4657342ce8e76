"""SeLa: learn to predict labels that divide the data set evenly, and compute the labels again many times during training.

Asano, Rupprecht and Vedaldi, arXiv:1911.05371v3. Several linear classifiers (heads) on one backbone each have their own
label for every image. An update of the labels computes the features of all images once. Then it solves an optimal transport
problem for each head: the labels divide the images almost evenly among the classes, with the least cross-entropy. Most
updates come early in training.

The defaults are the authors' recipe for ImageNet. Departures from their code, of which docs/fidelity.md has the reasons:

- The features come from the network in evaluation mode and from the central view of each image. Theirs come from training
  mode and from a random view; `--label-mode train --label-view augmented` does the same.
- The transport is computed on logarithms, so nothing underflows for any --lam.
- An epoch drops its last partial batch, and a run of `--epochs` E has E epochs, not E + 1.
- The last update comes before the last step, so the labels in the checkpoint are those of the trained network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..assignments import balanced_prototype_labels
from ..config import require_at_least, require_positive, require_sizes
from ..data.training import TrainingData
from ..errors import InputError, RunError
from ..losses import IGNORED, assigned_cross_entropy
from .base import ClassifierMethod, Step, feature_width

TURNS = 4  # rotations by multiples of 90°
LABEL_EPOCH = 1 << 20  # the views of update k are those of the epoch LABEL_EPOCH + k, which no run trains on


@dataclass(frozen=True, kw_only=True)
class Config:
    classes: tuple[int, ...] = (3000, 3000, 3000, 3000, 3000, 3000, 3000, 3000, 3000, 3000)  # sizes of the heads
    lam: float = 25.0  # sharpness of the transport
    tolerance: float = 0.1  # threshold of the convergence of the transport, see src/assignments.py
    max_iterations: int = 0  # largest number of iterations of the transport (0: no limit)
    updates: int = 100  # number of label updates in the run; without them the labels stay random
    update_spacing: Literal["quadratic", "linear"] = "quadratic"  # quadratic: frequent updates early, rare ones late
    update_heads: Literal["all", "in_turn"] = "all"  # heads that an update labels: all, or one after the other
    label_mode: Literal["eval", "train"] = "eval"  # mode of the network in an update; train is published
    label_view: Literal["central", "augmented"] = "central"  # view of the images in an update; augmented is published
    labels: str = ""  # CSV file of fixed labels, for --updates 0; see docs/training.md (default: random labels)
    rotation: Literal["none", "add", "only"] = (
        "none"  # also predict by how many quarter turns views are rotated, or only this
    )
    label_memory: float = (
        4.0  # memory per rank in GiB for the logits of one head in an update; else computed repeatedly
    )

    fewest_views = 1

    def __post_init__(self) -> None:
        require_positive(self, "lam", "tolerance")
        require_at_least(self, max_iterations=0, updates=0, label_memory=0)
        require_sizes(self, "classes")
        if self.labels and self.updates:
            raise InputError(
                f"--labels {self.labels} gives the labels, and --updates {self.updates} would replace them: give --updates 0"
            )
        if self.rotation == "only" and (self.labels or self.updates):
            raise InputError(
                "--rotation only learns from rotations and needs no labels: drop --labels, and give --updates 0"
            )


class SeLa(ClassifierMethod, config=Config):
    """Train SeLa: several linear heads on a backbone, each with balanced labels of its own.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.

    Attributes:
        rotation_head: linear layer that predicts the rotation of a view, with `--rotation`.
        labels: (H, N) int buffer, the label of each image for each head.
        updates: (1,) long buffer, the number of updates so far.
        last_update: (H, 3) float64 buffer. For each head and its last update: the share of the images whose label has
            changed, and the numbers of images of its smallest and its largest class.
    """

    labels: Tensor
    updates: Tensor
    last_update: Tensor
    remedy = "more --updates, a smaller --lr, or softer views"

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 1):
        super().__init__()
        self.config, self.classes = config, tuple(config.classes)
        self.backbone, self.projection_head = backbone, nn.Identity()
        self.classifiers = nn.ModuleList(nn.Linear(feature_width(backbone), size) for size in self.classes)
        self.rotation_head = None if config.rotation == "none" else nn.Linear(feature_width(backbone), TURNS)
        std = getattr(backbone, "head_std", None)  # AlexNet has its own initialisation
        if std:
            for head in [*self.heads, *([self.rotation_head] if self.rotation_head else [])]:
                nn.init.normal_(head.weight, std=std)
                nn.init.zeros_(head.bias)
        self.register_buffer("labels", torch.zeros(len(self.classes), 0, dtype=torch.int32))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.long))
        self.register_buffer("last_update", torch.zeros(len(self.classes), 3, dtype=torch.float64))
        self._planned: tuple[int, dict[int, int]] = (0, {})

    @property
    def heads(self) -> list[nn.Linear]:
        """Return the classifiers of the labels."""
        return [cast(nn.Linear, head) for head in self.classifiers]

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if max(config.classes) > num_images:
            raise InputError(
                f"--classes {max(config.classes)} is more than the {num_images} images, and every class needs an image: lower it"
            )

    @staticmethod
    def check_files(config: Any, data: TrainingData) -> None:
        if config.labels:
            given_labels(config, data)

    def make_room(self, state: dict[str, Tensor]) -> None:
        if "labels" in state:
            found = tuple(state["labels"].shape)
            if len(found) != 2 or found[0] != len(self.classes):
                raise InputError(
                    f"the labels have the shape {found}, expected {len(self.classes)} heads × images: use another file"
                )
            self.labels = self.labels.new_zeros(found)

    # ---- labels ----

    def prepare_run(self, data: TrainingData) -> None:
        """Read the labels of `--labels`, or give every image a random label for each head, evenly over the classes."""
        if self.config.labels:
            self.labels = given_labels(self.config, data).to(self.labels)
            return
        rows = []
        for head, size in enumerate(self.classes):
            generator = np.random.default_rng([data.seed, head])
            rows.append(torch.from_numpy(generator.permutation(len(data)) % size))
        self.labels = torch.stack(rows).to(self.labels)

    def prepare_step(self, step: int, data: TrainingData) -> None:
        """Update the labels if an update is due before this step."""
        if self._planned[0] != data.steps:
            due = update_steps(self.config.updates, data.steps, spacing=self.config.update_spacing)
            self._planned = (data.steps, {at: number for number, at in enumerate(due)})
        number = self._planned[1].get(step)
        if number is not None:
            self.update_labels(number, data)

    @torch.no_grad()
    def update_labels(self, number: int, data: TrainingData) -> None:
        """Compute the features of all images, then the balanced labels of all heads or of one head.

        An image without features keeps its label. These are images of the last partial batch, with augmented views.

        Args:
            number: number of the update, from 0.
        """
        config = self.config
        epoch = LABEL_EPOCH + number if config.label_view == "augmented" else None
        with _mode(self, training=config.label_mode == "train"):
            rows = data.embed(lambda views: self.backbone(views[0]), epoch=epoch, sharded=True)
        heads = range(len(self.classes)) if config.update_heads == "all" else [number % len(self.classes)]
        for head in heads:
            labels = torch.full_like(self.labels[head], IGNORED)
            labels[rows.indices] = self._balanced(head, rows.values).to(labels)
            labels = distributed.max_over_ranks(labels)
            labels = torch.where(labels == IGNORED, self.labels[head], labels)
            sizes = torch.bincount(labels, minlength=self.classes[head])
            changed = (labels != self.labels[head]).double().mean()
            self.last_update[head] = torch.stack([changed, sizes.min().double(), sizes.max().double()])
            self.labels[head] = labels
        self.updates += 1

    def _balanced(self, head: int, features: Tensor) -> Tensor:
        """Return the balanced labels of this rank's (B, F) features for one head, (B,)."""
        classifier = self.heads[head]
        try:
            return balanced_prototype_labels(
                features,
                classifier.weight,
                self.temperature,
                bias=classifier.bias,
                lam=self.config.lam,
                tolerance=self.config.tolerance,
                max_iterations=self.config.max_iterations or None,
                memory=int(self.config.label_memory * 2**30),
            )
        except ValueError as error:
            raise RunError(
                f"the labels of head {head} cannot be balanced ({error}): try a smaller --lr or --lam"
            ) from None

    # ---- a training step ----

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the features of V views, V × (B, F). With `--rotation`, those of the views turned by 90°, 180° and 270° follow."""
        if self.rotation_head is not None:
            views = [torch.rot90(view, turn, dims=(2, 3)) for turn in range(TURNS) for view in views]
        return super().embed_views(views, idle)

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """Return the mean over the heads of the cross-entropy with their labels.

        With `--rotation`, the cross-entropy of the rotations of all turned views is added, or takes its place. Only views
        that are not turned predict labels, as in the authors' code.
        """
        V = len(embeddings) // (1 if self.rotation_head is None else TURNS)
        stacked = torch.cat(embeddings[:V])
        logits = [head(stacked).unflatten(0, (V, -1)) for head in self.heads]  # H × (V, B, K_h)
        labels = self.labels[:, indices].long()  # (H, B)
        terms = torch.stack(
            [assigned_cross_entropy(z, y, self.temperature) for z, y in zip(logits, labels, strict=True)]
        )
        loss, numbers = terms.mean(), {"terms": terms.detach(), **self.occupancy(logits)}
        if self.rotation_head is not None:
            rotation, correct = self._rotation_loss(self.rotation_head, embeddings)
            numbers |= {"rotation": rotation.detach(), "rotation_accuracy": correct}
            loss = rotation + (0 * loss if self.config.rotation == "only" else loss)
        return Step(loss, numbers)

    @staticmethod
    def _rotation_loss(head: nn.Linear, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the rotations of TURNS · V views, and the share that is predicted correctly."""
        logits = head(torch.cat(embeddings))
        turns = torch.arange(TURNS, device=logits.device).repeat_interleave(len(logits) // TURNS)
        loss = assigned_cross_entropy(logits[None], turns, 1.0)
        return loss, (logits.argmax(dim=1) == turns).float().mean()

    # ---- the log ----

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        summary = super().summarize(averages) | {"updates": int(self.updates)}
        for head, (changed, smallest, largest) in enumerate(self.last_update.tolist() if self.updates else []):
            summary |= {
                f"changed_{head}": changed,
                f"smallest_{head}": int(smallest),
                f"largest_{head}": int(largest),
            }
        for name in ("rotation", "rotation_accuracy"):
            if name in averages:
                summary[name] = averages[name].item()
        return summary


def given_labels(config: Any, data: TrainingData) -> Tensor:
    """Return the labels in the file of `--labels`, (H, N) long.

    Raises:
        InputError: if they do not fit the images or the heads.
    """
    labels, sizes = data.labels_in(config.labels), config.classes
    if len(labels) != len(sizes):
        raise InputError(
            f"--labels {config.labels}: labels of {len(labels)} heads, but --classes has {len(sizes)} sizes: give one size per head"
        )
    for head, (largest, size) in enumerate(zip(labels.amax(dim=1).tolist(), sizes, strict=True)):
        if largest >= size:
            raise InputError(
                f"--labels {config.labels}: head {head} has the label {largest}, but --classes gives it {size} classes, from 0: "
                f"give it at least {largest + 1}"
            )
    return labels


def update_steps(updates: int, steps: int, *, spacing: str) -> list[int]:
    """Return the steps, counted from 0, before which the labels are updated, in ascending order.

    Update k of n is due after the share (k / (n - 1))² of the training, or k / (n - 1) with linear spacing. There is at
    most one update per step. If more are due, the others follow before the next steps, as in the authors' code.

    Args:
        updates: number of updates n.
        steps: number of steps of the run.
        spacing: "quadratic" or "linear".
    """
    power = {"quadratic": 2, "linear": 1}[spacing]
    found: list[int] = []
    for k in range(updates):
        at = -(-(steps - 1) * k**power // max(updates - 1, 1) ** power)  # rounded up
        at = max(at, found[-1] + 1 if found else 0)
        if at < steps:
            found.append(at)
    return found


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the training or the evaluation mode of a module inside this context."""
    before = {each: each.training for each in module.modules()}
    if not training:
        module.eval()
    try:
        yield
    finally:
        for each, mode in before.items():
            each.training = mode


PRESETS = {
    # The authors' resnet.sh. Their option --epochs 400 runs 401 epochs.
    "published": {
        "arch": "sela_resnet50",
        "global_crops_number": 1,
        "global_crops_scale": (0.08, 1.0),
        "local_crops_number": 0,
        "augment": "sela_3",
        "epochs": 401,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.08,
        "lr_drops": (150, 300, 350),
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "weight_decay": 0.00001,
    },
    # The authors' scripts.
    "resnet": {"base": "published"},
    "alexnet": {"base": "published", "arch": "sela_alexnet"},
    "retrain": {  # the defaults of retrain_with_rotnet.py, with the labels of the script `alexnet`
        "base": "alexnet",
        "updates": 0,
        "rotation": "add",
        "epochs": 91,
        "batch_size": 64,
        "lr": 0.05,
        "lr_drops": (30, 60, 80),
    },
    "cifar": {
        "base": "alexnet",
        "global_crops_scale": (0.2, 1.0),
        "classes": (128, 128, 128, 128, 128, 128, 128, 128, 128, 128),
        "lam": 10.0,
        "tolerance": 0.01,
        "updates": 400,
        "update_spacing": "linear",
        "update_heads": "in_turn",
        "epochs": 400,
        "batch_size": 128,
        "lr": 0.03,
        "lr_drops": (240, 320),
        "weight_decay": 0.0005,
    },
    # For own images and small data sets; src/config/recipe.py has what all methods share.
    "small_images": {
        "global_crops_number": 1,
        "classes": (10, 10, 10, 10, 10, 10, 10, 10),
        "updates": 40,
        "max_iterations": 1000,
    },
    "photographs": {"base": "small_images"},
    "cifar10": {"base": "small_images"},
    "cifar100-20": {"base": "cifar10", "classes": (20, 20, 20, 20, 20, 20, 20, 20)},
    "stl10": {"base": "photographs"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_number": 1,
        "global_crops_size": 8,
        "local_crops_number": 0,
        "classes": (10, 10, 10, 10, 10, 10, 10, 10),
        "updates": 80,
        "max_iterations": 1000,
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

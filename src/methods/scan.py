"""SCAN: learn classes such that an image and its nearest neighbours have the same one.

Van Gansbeke, Vandenhende, Georgoulis, Proesmans and Van Gool, "SCAN: Learning to Classify Images without Labels", ECCV 2020,
arXiv:2005.12320. It is the second of three steps. The first one (`--method simclr`, or released weights such as MoCo v2's)
gives the features in which neighbours are found; the third one (`--method selflabel`) trains on confident predictions.

Every step draws one of the `neighbors` nearest images of each image, or the image itself, as the authors' code does. After
each epoch, the loss without labels on held-out images selects the head, and the run keeps the best epoch
(`checkpoint_best.pt`).

Departures from the authors' code:

- The images for the selection are held out from the training images by default. Theirs are the test images, which
  `--select-on test` uses.
- If the image itself is drawn, it has the same view twice. Theirs has two random views.
- The product of two probabilities is computed from their logarithms, so its gradient does not vanish below 1e-12.
- The entropy is that of the batch of all ranks.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config import require_at_least
from ..data.randomness import uniforms
from ..data.training import TrainingData
from ..errors import InputError
from ..losses import scan
from ..selection import Score, label_free_score, nearest_others
from .base import ClassifierMethod, Method, Step, feature_width

DRAW = 1 << 20  # number of the view whose random numbers choose the neighbour; no real view has it


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classifiers: int = 1  # number of heads, which are trained together; the one with the lowest loss is used
    num_classes: int = 10  # number of clusters of each head
    neighbors: int = 20  # number of nearest neighbours of each image from which one is drawn
    mine_from: Literal["embedding", "backbone"] = (
        "embedding"  # features of --pretrained in which neighbours are found; a file without an embedding has those of the backbone
    )
    neighbors_file: str = (
        ""  # file written by `python -m src.mining` (default: neighbors.npz beside --pretrained, if it exists)
    )
    entropy_weight: float = 5.0  # weight of the entropy; a larger value makes the clusters more equal in size
    select_on: Literal["train", "test"] = (
        "train"  # images on which the epoch and the head are selected, without labels: held-out training images, or the test split
    )
    select_share: float = 0.1  # share of the training images that is held out for the selection (0: no selection)
    select_neighbors: int = 5  # number of nearest neighbours of each image in the selection

    fewest_views = 1  # the neighbour has the second view

    def __post_init__(self) -> None:
        require_at_least(self, num_classifiers=1, num_classes=2, neighbors=1, entropy_weight=0, select_neighbors=1)
        require_at_least(self, select_share=0)
        if self.select_share >= 1:
            raise InputError(f"--select-share is {self.select_share}: expected a fraction below 1")


class SelectionConfig(Protocol):
    """The options that `LinearHeads` reads."""

    @property
    def num_classes(self) -> int: ...
    @property
    def select_neighbors(self) -> int: ...


class LinearHeads(ClassifierMethod):
    """Base class of SCAN and self-labelling: linear classifiers on a backbone, judged without labels on held-out images.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: the method's own `Config`.
        number: number of classifiers.

    Attributes:
        held_out_neighbors: (M, 1 + k) int32, each held-out image and its neighbours; empty if no images are held out.
    """

    config: SelectionConfig
    held_out_neighbors: Tensor

    def __init__(self, backbone: nn.Module, config: SelectionConfig, number: int):
        super().__init__()
        self.config = config
        self.classes = (config.num_classes,) * number
        self.backbone, self.projection_head = backbone, nn.Identity()
        width = feature_width(backbone)
        self.classifiers = nn.ModuleList(nn.Linear(width, config.num_classes) for _ in range(number))
        self.register_buffer("held_out_neighbors", torch.zeros(0, 0, dtype=torch.int32))

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        if config.num_classes > num_images:
            raise InputError(
                f"--num-classes {config.num_classes} is more than the {num_images} training images: give fewer classes"
            )

    def make_room(self, state: dict[str, Tensor]) -> None:
        for name in self.tables:
            if name in state:
                found = state[name]
                if found.dim() != 2 or found.dtype != torch.int32:
                    raise InputError(
                        f"{name} has shape {tuple(found.shape)}, expected a table of positions: use another file"
                    )
                setattr(self, name, torch.zeros(found.shape, dtype=torch.int32, device=getattr(self, name).device))

    tables: tuple[str, ...] = ("held_out_neighbors",)  # buffers whose size depends on the data set

    @torch.no_grad()
    def predict_held_out(self, data: TrainingData) -> list[Tensor]:
        """Return the probabilities of the held-out images by each classifier, K × (M, C) float64."""

        def probabilities(views: list[Tensor]) -> Tensor:
            return torch.stack([z.double().softmax(dim=1) for z in self.predict(views[0])], dim=1)

        self.eval()
        return list(data.embed(probabilities, held_out=True).values.unbind(dim=1))

    def scores(self, data: TrainingData) -> tuple[list[Score], list[Tensor]]:
        """Return the label-free score of each classifier on the held-out images, and their probabilities."""
        predicted = self.predict_held_out(data)
        return [label_free_score(p, self.held_out_neighbors) for p in predicted], predicted

    def measure(self, data: TrainingData) -> dict[str, Any]:
        """Return the label-free loss on the held-out images, and the classifier for which it is lowest."""
        if not len(self.held_out_neighbors):
            return {}
        scores, _ = self.scores(data)
        best = min(range(len(scores)), key=lambda k: scores[k].loss)
        return {
            "classifier": best,
            "selection_loss": scores[best].loss,
            "selection_consistency": scores[best].consistency,
            "selection_entropy": scores[best].entropy,
        }


class SCAN(LinearHeads, config=Config):
    """Train SCAN.

    Args:
        backbone: network with the attribute `width`, (B, channels, H, W) → (B, F).
        config: options of the method.
        num_global: number of global views; not used.

    Attributes:
        neighbors: (N, 1 + k) int32, each training image and its neighbours.
        draws: seed of the draws of neighbours.
    """

    config: Config
    neighbors: Tensor
    draws: Tensor
    earlier_stage = "simclr"
    remedy = "a larger --entropy-weight or a larger --batch-size"
    tables = ("held_out_neighbors", "neighbors")

    def __init__(self, backbone: nn.Module, config: Config, num_global: int = 2):
        super().__init__(backbone, config, config.num_classifiers)
        self.register_buffer("neighbors", torch.zeros(0, 0, dtype=torch.int32))
        self.register_buffer("draws", torch.zeros(1, dtype=torch.long))
        self._earlier: list[nn.Module] = []  # a list, so that the network is no part of this module
        self._host: tuple[np.ndarray, int] | None = None  # neighbours and seed on the host
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_host", None))

    @staticmethod
    def check_data(config: Any, *, batch_size: int, num_images: int, num_views: int, steps: int | None = None) -> None:
        LinearHeads.check_data(config, batch_size=batch_size, num_images=num_images, num_views=num_views, steps=steps)
        if config.neighbors >= num_images:
            raise InputError(
                f"--neighbors {config.neighbors}: expected fewer neighbours than the {num_images} training images"
            )

    def start_after(self, earlier: nn.Module, chosen: int) -> None:
        self._earlier = [earlier]

    def receive_neighbors(self, train: Tensor, held_out: Tensor | None) -> None:
        device = self.neighbors.device
        self.neighbors, self._host = train.to(device), None
        if held_out is not None:
            self.held_out_neighbors = held_out.to(device)

    def prepare_run(self, data: TrainingData) -> None:
        """Mine the neighbours with the network of `--pretrained`, unless they were mined before."""
        self.draws.fill_(data.seed)
        self._host = None
        if not len(self.neighbors):
            network = self._earlier[0].to(self.draws.device).eval() if self._earlier else self.eval()
            self.neighbors = mined(data, network, layer=self.config.mine_from, k=self.config.neighbors)
            if data.num_held_out:
                few = min(self.config.select_neighbors, data.num_held_out - 1)
                self.held_out_neighbors = mined(data, network, layer=self.config.mine_from, k=few, held_out=True)
        self._earlier = []
        self.train()

    def companions(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Draw one of the neighbours of each image, or the image itself, (B, 1)."""
        if self._host is None:
            self._host = self.neighbors.cpu().numpy(), int(self.draws)
        neighbors, seed = self._host
        u = uniforms(seed=seed, epoch=epoch, indices=indices, view=DRAW, count=1)
        columns = (u * neighbors.shape[1]).astype(np.int64)
        return np.take_along_axis(neighbors[indices], columns, axis=1).astype(np.int64)

    def embed_views(self, views: list[Tensor], idle: int = 0) -> list[Tensor]:
        """Compute the features of V views of the images and V views of their neighbours, 2V × (B, F).

        The images and the neighbours pass separately, so that batch normalisation does not mix them.
        """
        half = len(views) // 2
        return super().embed_views(views[:half]) + super().embed_views(views[half:])

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        anchors, neighbors = torch.stack(embeddings).chunk(2)  # (V, B, F) each
        totals, parts, logits = [], [], []
        for head in self.classifiers:
            z, n = head(anchors), head(neighbors)
            terms = [scan(a, b, self.config.entropy_weight) for a, b in zip(z, n, strict=True)]
            totals.append(torch.stack([total for total, _, _ in terms]).mean())
            parts.append(torch.stack([torch.stack([c, h]) for _, c, h in terms]).mean(dim=0).detach())
            logits.append([n[0], z[0]])  # `occupancy` reads the second entry
        consistency, entropy = torch.stack(parts).mean(dim=0)
        numbers = {"terms": torch.stack(totals).detach(), "consistency": consistency, "batch_entropy": entropy}
        return Step(torch.stack(totals).sum(), numbers | self.occupancy(logits))

    def collapsed_loss(self, k: int) -> float:
        """Return the loss of equal predictions for all images, which no other training reaches by chance."""
        return (1 - self.config.entropy_weight) * float(np.log(self.classes[k])) or float("inf")

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, Any]:
        """Also return the two parts of the loss, as means over the heads."""
        parts = {name: averages[name].item() for name in ("consistency", "batch_entropy")}
        return super().summarize(averages) | parts


def mined(data: TrainingData, network: nn.Module, *, layer: str, k: int, held_out: bool = False) -> Tensor:
    """Return each image and its k nearest neighbours in the features of a network, (N, 1 + k) int32.

    Args:
        network: a method or a bare backbone, on its device, in evaluation mode.
        layer: "embedding": the network's own embedding; "backbone": the features before the projection head. A bare backbone
            and linear classifiers have only these features.
        held_out: find neighbours among the held-out images instead of the training images.
    """
    function = features_of(network, layer)
    return nearest_others(data.embed(lambda views: function(views[0]), held_out=held_out).values, k)


def features_of(network: nn.Module, layer: str) -> Any:
    """Return the function that maps images to the features of a layer; see `mined`."""
    if layer == "embedding" and isinstance(network, Method):
        return network.embed
    return cast(nn.Module, getattr(network, "backbone", network))


PRESETS = {
    # The authors' configuration for CIFAR-10.
    "published": {
        "arch": "cifar_resnet18",
        "global_crops_number": 1,
        "global_crops_size": 32,
        "local_crops_number": 0,
        "augment": "scan_strong",
        "epochs": 50,
        "batch_size": 128,
        "optimizer": "adam",
        "lr": 0.0001,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0001,
        "weight_decay": 0.0001,
    },
    "cifar10": {"base": "published"},
    "cifar100-20": {"base": "published", "num_classes": 20, "epochs": 100, "batch_size": 512},
    "stl10": {"base": "published", "arch": "stl_resnet18", "global_crops_size": 96, "epochs": 100},
    # ImageNet: ten heads on a frozen backbone.
    "imagenet-50": {
        "base": "published",
        "subset": "imagenet-50",
        "arch": "resnet50",
        "global_crops_size": 224,
        "global_crops_scale": (0.2, 1.0),
        "augment": "simclr",
        "freeze": ("backbone",),
        "num_classifiers": 10,
        "num_classes": 50,
        "neighbors": 50,
        "mine_from": "backbone",
        "epochs": 100,
        "batch_size": 512,
        "optimizer": "sgd",
        "lr": 5.0,
        "final_lr": 5.0,
        "weight_decay": 0.0,
    },
    "imagenet-100": {"base": "imagenet-50", "subset": "imagenet-100", "num_classes": 100, "batch_size": 1024},
    "imagenet-200": {"base": "imagenet-100", "subset": "imagenet-200", "num_classes": 200},
    # The authors' answer to a question: a batch of about 4,000 images, so that every cluster appears in it.
    "imagenet": {"base": "imagenet-50", "subset": "", "num_classes": 1000, "batch_size": 4096},
    # For own images; src/config/recipe.py has what all methods share.
    "small_images": {
        "global_crops_number": 1,
        "augment": "scan_strong",
        "num_classifiers": 5,
        "epochs": 10,
        "batch_size": 128,
        "lr": 0.0003,
        "warmup_epochs": 0,
        "warmup_start": 0.0,
        "final_lr": 0.0003,
    },
    "photographs": {"base": "small_images"},
    "digits": {
        "arch": "small_convnet",
        "global_crops_number": 1,
        "global_crops_size": 8,
        "local_crops_number": 0,
        "num_classifiers": 5,
        "neighbors": 20,
        "epochs": 30,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.0005,
        "warmup_epochs": 0,
        "warmup_start": 0.0005,
        "final_lr": 0.0005,
        "weight_decay": 0.0001,
    },
}

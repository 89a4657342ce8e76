"""Linear classification: how good the features of a frozen backbone are for a classifier that sees labels.

Protocols: Self-Classifier, arXiv:2103.10994v3 (LARS, batch 4096), and SwAV, arXiv:2006.09882 (SGD, batch 256; also
semi-supervised, where the whole network is fine-tuned on few labels). In both the rate is set at the start of each
epoch, batch normalisation keeps the statistics of pre-training while the backbone is frozen, and the best epoch on the
test split is what the papers report.

Legend: N images, F features, C classes, S settings that are tried together.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoint, distributed
from ..config import FREE_TO_CHANGE, InputError, RunError, flag
from ..data.datasets import Images, open_data
from ..data.loaders import TrainLoader, Views
from ..data.subsets import draw_share
from ..data.views import build_views
from ..logs import Progress
from ..optim import build_optimizer
from ..trainer import Interrupted, StopRequest

LAST, BEST = "lincls_eval.pt", "lincls_eval_best.pt"
CROP_SHARE = (0.08, 1.0)  # of the image's area, in both protocols

# --------------------------------------------------------------------------------------------------------------------
# data


def open_labelled(name: str, root: str = "", download: bool = False, subset_file: str = "") -> tuple[Images, Images]:
    """The images with a label of the training and of the test split.

    Raises:
        InputError: if a split has none, or the two do not have the same classes.
    """
    train, test = (open_data(name, split, root, download, subset_file) for split in ("train", "test"))
    for split, data in (("train", train), ("test", test)):
        if not (data.labels >= 0).any():
            raise InputError(f"--data {name}: the {split} split has no labels; they are needed in both")
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"--data {name}: {len(train.classes)} classes in the train split, {len(test.classes)} in the test split; "
            f"not in both: {', '.join(only[:3])}{' ...' * (len(only) > 3)}; keep those of both with --subset-file"
        )
    return _labelled(train), _labelled(test)


def _labelled(data: Images) -> Images:
    rows = np.flatnonzero(data.labels.numpy() >= 0)
    return data if len(rows) == len(data) else keep_rows(data, rows)


def keep_rows(data: Images, rows: np.ndarray) -> Images:
    return data.keep(rows, data.labels.numpy()[rows], data.classes)


def training_views(name: str, data: Images, size: int, central: Views, augment: bool = True) -> Views:
    """What a probe is trained on, by both protocols: a random resized crop of `size` pixels and a flip; of digits, which no
    protocol knows, their own views. If not `augment`, the evaluation view of `central`."""
    if not augment:
        return _Unaugmented(central)
    return build_views(name, data, 1, 0, size, size, CROP_SHARE, CROP_SHARE, "crop_flip")


class _Unaugmented:
    """The evaluation view in the place of a training view; see `Views`."""

    def __init__(self, central: Views):
        self.central = central

    def __call__(self, images: Tensor, indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        return [self.central.single(images)]

    def cut(self, images: Sequence[Tensor], indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        return [torch.stack([self.central.single_cut(image) for image in images])]

    def finish(self, crops: list[Tensor], indices: np.ndarray, seed: int, epoch: int) -> list[Tensor]:
        return [self.central.single_finish(crop) for crop in crops]


# --------------------------------------------------------------------------------------------------------------------
# the network


class LinearProbe(nn.Module):
    """A backbone and a fresh linear layer `fc`, (B, channels, H, W) → (B, C) logits.

    Frozen, the layer starts normal with standard deviation 0.01 and biases of 0, as in both protocols; with `finetune` it
    keeps nn.Linear's own start.

    Args:
        finetune: train the backbone too.
        train_bn: its batch normalisation then takes the batch's statistics; otherwise always those of pre-training.
        num_features: F of the backbone; None: its width. See `pool_windows` in src/models/backbones.py.
        feature_bn: batch normalisation `bn` of the backbone's channels before the linear layer, trained with it. One
            channel's windows share their statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        finetune: bool = False,
        train_bn: bool = False,
        num_features: int | None = None,
        feature_bn: bool = False,
    ):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(num_features or backbone.width, num_classes)
        self.bn = nn.BatchNorm1d(backbone.width) if feature_bn else None
        self.finetune, self.train_bn = finetune, train_bn
        backbone.requires_grad_(finetune)
        if not finetune:
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @property
    def shares_statistics(self) -> bool:
        """Whether a step's batch normalisation looks at the batch, of all ranks."""
        return self.train_bn or self.bn is not None

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        if not self.finetune:
            self.backbone.eval()
        elif not self.train_bn:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.to(self.fc.weight.dtype)
            if self.bn is not None:
                features = self.bn(features.unflatten(1, (self.bn.num_features, -1))).flatten(1)
            return self.fc(features)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that are not the backbone's."""
        return [*self.fc.parameters(), *(self.bn.parameters() if self.bn is not None else ())]

    def trained_state(self) -> dict[str, Tensor]:
        """What was learned: the whole network, or what follows the backbone where that is as it was."""
        state = self.state_dict()
        return state if self.finetune else {key: v for key, v in state.items() if not key.startswith("backbone.")}


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_unchanged(backbone: nn.Module, before: str) -> None:
    """Raise a RunError if a backbone that should be frozen is not what `fingerprint` saw before."""
    after = fingerprint(backbone)
    if after != before:
        raise RunError(
            f"the backbone changed while it should have been frozen (SHA-256 {before[:12]} before, {after[:12]} now): "
            "the accuracy is not that of the checkpoint and is not reported"
        )


# --------------------------------------------------------------------------------------------------------------------
# optimisation


def rate_factor(
    schedule: str, epochs: int, decay_epochs: Sequence[int] = (), gamma: float = 0.1
) -> Callable[[int], float]:
    """What the learning rates are multiplied with in an epoch, counted from 0.

    "cosine": ½(1 + cos(π · epoch / epochs)), which starts at 1 and does not reach 0. "step": gamma for each of
    `decay_epochs` that has begun. "constant": 1.
    """
    if schedule == "cosine":
        return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "step":
        return lambda epoch: gamma ** sum(epoch >= begun for begun in decay_epochs)
    if schedule == "constant":
        return lambda epoch: 1.0
    raise ValueError(f"schedule must be cosine, step or constant, got {schedule}")


def build_probe_optimizer(
    probe: LinearProbe,
    name: str,
    lr: float,
    backbone_lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser of what follows the backbone with rate `lr` and, if it is fine-tuned, of that with rate `backbone_lr`."""
    if nesterov and (name != "sgd" or not momentum):
        raise InputError(f"--nesterov is for --optimizer sgd with momentum, not {name}: drop it")
    groups = [{"params": probe.own_parameters(), "lr": lr, "weight_decay": weight_decay}]
    if probe.finetune:
        rate = lr if backbone_lr is None else backbone_lr
        groups.append({"params": list(probe.backbone.parameters()), "lr": rate, "weight_decay": weight_decay})
    if nesterov:
        groups = [{**group, "nesterov": True} for group in groups]
    return build_optimizer(name, groups, lr, momentum)


class ProbeTrainer:
    """Trains a probe epoch by epoch and can be stopped and continued after any step, on a CPU bit for bit.

    Args:
        probe: on its device, wrapped by `distributed.parallel`.
        factor: see `rate_factor`.
        loader: keeps the last batch of an epoch.
        labels: (N,) of the loader's data.
        autocast: dtype of the backbone in mixed precision, or None.
        log_every: steps between looks at the loss on a GPU, where each look waits for the device.
    """

    def __init__(
        self,
        probe: nn.Module,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        loader: TrainLoader,
        labels: Tensor,
        device: torch.device,
        autocast: torch.dtype | None = None,
        log_every: int = 16,
        stop_request: StopRequest | None = None,
    ):
        if not len(loader):
            raise InputError(f"{len(labels)} labelled training images are fewer than the ranks: start fewer")
        self.probe, self.optimizer, self.factor, self.loader = probe, optimizer, factor, loader
        self.labels, self.device, self.autocast = labels.to(device), device, autocast
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.look_every = 1 if device.type == "cpu" else log_every
        self.stop_request = stop_request or StopRequest()
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14, enabled=autocast is torch.float16)
        self.epoch = 0  # finished epochs
        self.done = 0  # finished steps of the current epoch
        # of these steps, over this rank's images: the sum of their losses, and their number
        self.total = torch.zeros(2, device=device)

    def train_epoch(self, progress: Progress) -> dict[str, float | int]:
        """Run to the end of the current epoch; returns its number, mean loss and learning rate.

        Raises:
            Interrupted: after a whole step, when this or another rank was told to stop.
            RunError: if a loss is not finite or too many images are damaged.
        """
        ranks = distributed.world_size()
        inner = distributed.unwrap(self.probe)
        self.probe.train()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(self.epoch)
        unchecked: list[Tensor] = []
        for batch in self.loader.epoch(self.epoch, start=self.done):
            images, labels = batch.views[0], self.labels[batch.indices]
            together = min(self.loader.batch_size, self.loader.images - self.done * self.loader.batch_size)
            if inner.shares_statistics:  # shared statistics need as many rows on every rank
                each = together // ranks
                images, labels, together = images[:each], labels[:each], each * ranks
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                logits = self.probe(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            unchecked.append(loss.detach())
            look = (self.done + 1) % self.look_every == 0 or self.done + 1 == len(self.loader)
            stop = self._agree(unchecked if look else [])
            self.optimizer.zero_grad(set_to_none=True)
            # The ranks' gradients are averaged, and their shares of a last batch may differ by one image.
            self.scaler.scale(loss * (ranks / together)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.total += torch.stack([loss.detach(), loss.new_tensor(len(labels))])
            self.done += 1
            progress.advance(together, self.epoch + 1, loss.item() * ranks / together if look else None)
            if look:
                unchecked.clear()
            if stop:
                raise Interrupted(stop)
        loss, images = distributed.sum_over_ranks(self.total).tolist()
        self.epoch, self.done, self.total = self.epoch + 1, 0, torch.zeros_like(self.total)
        return {"epoch": self.epoch, "loss": loss / images, "lr": self.optimizer.param_groups[0]["lr"]}

    def _agree(self, losses: list[Tensor]) -> int:
        """Whether any rank must end the run now (raises on all of them) or after this step (returns the signal)."""
        wrong = bool(losses) and not torch.stack(losses).isfinite().all()
        mine = torch.tensor([wrong, self.loader.too_many_damaged, self.stop_request.number], dtype=torch.long)
        wrong, damaged, number = distributed.max_over_ranks(mine).tolist()
        if wrong:
            raise RunError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.done + 1}; try a smaller --lr or --precision float32"
            )
        if damaged:
            raise RunError("more than 1 % of the images are damaged; repair or remove the reported files")
        return number

    def state_dict(self) -> dict:
        """Everything that the next step depends on, the frozen backbone aside. To be called on all ranks."""
        total = distributed.sum_over_ranks(self.total)
        return {
            "model": distributed.unwrap(self.probe).trained_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "total": total if distributed.is_main() else torch.zeros_like(total),
        }

    def load_state_dict(self, state: dict) -> None:
        probe = distributed.unwrap(self.probe)
        probe.load_state_dict({**probe.state_dict(), **state["model"]})
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.done = state["epoch"], state["done"]
        total = state["total"].to(self.device)
        self.total = total if distributed.is_main() else torch.zeros_like(total)  # of all ranks, counted once


# --------------------------------------------------------------------------------------------------------------------
# scores


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of (B, C) logits have the label first and among the first five (all C, if fewer): (2,) long."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


@torch.no_grad()
def score(
    probe: nn.Module,
    batches: Iterable[tuple[Tensor, np.ndarray]],
    labels: Tensor,
    autocast: torch.dtype | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in evaluation mode, as fractions of all N images.

    Args:
        batches: images and their indices, this rank's share; every image is on one rank.
        labels: (N,) of all images.
    """
    probe = distributed.unwrap(probe)
    was_training = probe.training
    probe.eval()
    hits = torch.zeros(2, dtype=torch.long)
    for images, indices in batches:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = probe(images)
        hits += top_hits(logits, labels[torch.from_numpy(indices)].to(logits.device)).cpu()
    probe.train(was_training)
    first, five = (distributed.sum_over_ranks(hits) / len(labels)).tolist()
    return first, five


# --------------------------------------------------------------------------------------------------------------------
# going on with an unfinished probe

IRRELEVANT = {"checkpoint", "fresh", "val_batch_size", "fast", "fast_lrs", "fast_weight_decays", "held_out"}


def find_probe(folder: Path, settings: dict, fresh: bool = False) -> dict | None:
    """The probe to continue from, if the folder holds one with these settings; a finished one with others is done with.

    Raises:
        InputError: if it is an unfinished one with other settings, which are named.
    """
    if fresh or not (folder / LAST).exists():
        return None
    state = checkpoint.load(folder / LAST)
    before = state["config"]
    differing = [
        f"{flag(name)} {before.get(name)} (now {settings.get(name)})"
        for name in sorted(before.keys() | settings.keys())
        if name not in FREE_TO_CHANGE | IRRELEVANT and before.get(name) != settings.get(name)
    ]
    if not differing:
        return state
    if state["epoch"] == before["epochs"]:
        return None
    raise InputError(
        f"{folder} holds an unfinished probe with other options: {', '.join(differing)}; "
        "give the same, another --output-dir, or --fresh, which drops it"
    )


# --------------------------------------------------------------------------------------------------------------------
# many settings at once, on features computed once


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    momentum: float = 0.9,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train S linear classifiers together by SGD on cross-entropy, each with its own rate and decay; cosine per epoch.

    All see the same batches, so that the logits of a step are one product (B, F) × (F, S·C), and its gradient another.

    Args:
        features: (N, F) float.
        labels: (N,) long.
        settings: S pairs (learning rate, weight decay).

    Returns:
        Weights (F, S, C), which start at 0, and biases (S, C).
    """
    N, width = features.shape
    S, C = len(settings), num_classes
    weight, bias = features.new_zeros(width, S, C), features.new_zeros(S, C)
    parameters, buffers = (weight, bias), (torch.zeros_like(weight), torch.zeros_like(bias))
    rates, decays = (features.new_tensor(column)[:, None] for column in zip(*settings, strict=True))  # (S, 1)
    factor = rate_factor("cosine", epochs)
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(N)).to(features.device)
        for rows in order.split(batch_size):
            x, y = features[rows], F.one_hot(labels[rows], C)[:, None]
            error = ((x @ weight.flatten(1)).view(-1, S, C) + bias).softmax(dim=2) - y  # (B, S, C): d loss / d logits
            gradients = (x.T @ error.flatten(1)).view(width, S, C) / len(rows), error.mean(dim=0)
            for p, grad, buffer in zip(parameters, gradients, buffers, strict=True):
                buffer.mul_(momentum).add_(grad + decays * p)
                p -= rates * factor(epoch) * buffer
    return weight, bias


def search(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    held_out: float = 0.2,
    epochs: int = 30,
    batch_size: int = 128,
    momentum: float = 0.9,
    seed: int = 0,
) -> dict:
    """Choose a learning rate and a weight decay on a held-out part of the training images, fit on all of them, test.

    Every feature is first shifted and scaled to mean 0 and variance 1 over the images that are fitted on.

    Args:
        train, test: (N, F) and (M, F) features, on one device.
        held_out: share of each class's training images to choose on, drawn by `seed`.

    Returns:
        `settings`, a list of {lr, weight_decay, top1, top5} on the held-out images; `chosen`, the one of highest top1 (then
        top5, then the first); `top1` and `top5` on the test images; `held_out_images`.

    Raises:
        InputError: if no image would be held out, or none left to fit on.
    """
    chosen_on = draw_share(train_labels.numpy(), held_out, seed)
    sizes = torch.bincount(train_labels)[train_labels[chosen_on]].numpy()
    chosen_on = chosen_on[sizes > 1]  # the only image of a class is fitted on
    fitted_on = np.setdiff1d(np.arange(len(train)), chosen_on)
    if not len(chosen_on) or not len(fitted_on):
        raise InputError(
            f"--held-out {held_out} of {len(train)} training images leaves {len(chosen_on)} to choose on and "
            f"{len(fitted_on)} to fit on: give another share, or more --train-share"
        )
    settings = [(lr, decay) for lr in lrs for decay in weight_decays]
    recipe = {"epochs": epochs, "batch_size": batch_size, "momentum": momentum, "seed": seed}

    def fit_and_score(fit, fit_labels, other, other_labels, tried) -> list[tuple[float, float]]:
        """(top1, top5) of each setting."""
        mean, scale = fit.mean(dim=0), fit.std(dim=0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        weight, bias = fit_linear((fit - mean) / scale, fit_labels.to(fit.device), num_classes, tried, **recipe)
        hits = torch.zeros(len(tried), 2, dtype=torch.long)
        for rows in torch.arange(len(other)).split(4096):
            logits = torch.einsum("bf,fsc->sbc", (other[rows] - mean) / scale, weight) + bias[:, None]
            hits += torch.stack([top_hits(z, other_labels[rows].to(z.device)) for z in logits]).cpu()
        return [tuple(row) for row in (hits / len(other)).tolist()]

    scores = fit_and_score(
        train[fitted_on], train_labels[fitted_on], train[chosen_on], train_labels[chosen_on], settings
    )
    rows = [
        {"lr": lr, "weight_decay": decay, "top1": top1, "top5": top5}
        for (lr, decay), (top1, top5) in zip(settings, scores, strict=True)
    ]
    best = max(range(len(rows)), key=lambda s: scores[s])
    ((top1, top5),) = fit_and_score(train, train_labels, test, test_labels, [settings[best]])
    return {
        "settings": rows,
        "chosen": rows[best],
        "top1": top1,
        "top5": top5,
        "held_out_images": len(chosen_on),
    }

"""Many linear classifiers at once on features computed once: what `lincls_eval.py --fast` does.

Legend: N images, F features, C classes, S settings that are tried together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.subsets import draw_share
from ..errors import InputError
from .probe import rate_factor


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Count for (B, C) logits how often the label comes first and among the first five (all C if fewer): (2,) long."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int,
    momentum: float,
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
    *,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    held_out: float = 0.2,
    epochs: int = 30,
    batch_size: int = 128,
    momentum: float,
    seed: int = 0,
) -> dict[str, Any]:
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

    def fit_and_score(fit, fit_labels, other, other_labels, tried) -> list[tuple[float, float]]:
        """(top1, top5) of each setting."""
        mean, scale = fit.mean(dim=0), fit.std(dim=0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        weight, bias = fit_linear(
            (fit - mean) / scale,
            fit_labels.to(fit.device),
            num_classes,
            settings=tried,
            epochs=epochs,
            batch_size=batch_size,
            momentum=momentum,
            seed=seed,
        )
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

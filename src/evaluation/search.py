"""The search of `lincls_eval.py --fast`: fit many linear classifiers at once on features that are computed once.

Legend: N images, F features, C classes, S settings that are tried together.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.subsets import draw_share
from ..errors import InputError
from .probe import rate_factor


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Count how often the label is the most likely class, and how often it is among the five most likely, (2,) long.

    Args:
        logits: (B, C). With fewer than five classes, all of them are among the five.
        labels: (B,).
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train S linear classifiers together by SGD on cross-entropy, each with its own learning rate and weight decay.

    The learning rates follow a cosine and change once per epoch. All classifiers see the same batches, so one product
    (B, F) × (F, S·C) gives the logits of a step, and another one the gradient.

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
    """Choose a learning rate and a weight decay on held-out training images, fit on all training images, and test.

    Before each fit, every feature is shifted and scaled to mean 0 and variance 1 over the images of the fit.

    Args:
        train, test: (N, F) and (M, F) features, on one device.
        held_out: fraction of the training images of each class that is held out, drawn with `seed`.

    Returns:
        settings: list of {lr, weight_decay, top1, top5} on the held-out images.
        chosen: the setting with the highest top1. On a tie the higher top5 decides, then the earlier position.
        top1, top5: fractions on the test images.
        held_out_images: number of held-out images.

    Raises:
        InputError: if no image is held out, or no image is left to fit on.
    """
    chosen_on = draw_share(train_labels.numpy(), held_out, seed)
    sizes = torch.bincount(train_labels)[train_labels[chosen_on]].numpy()
    chosen_on = chosen_on[sizes > 1]  # the only image of a class is not held out
    fitted_on = np.setdiff1d(np.arange(len(train)), chosen_on)
    if not len(chosen_on) or not len(fitted_on):
        raise InputError(
            f"--held-out {held_out} of {len(train)} training images leaves {len(chosen_on)} to choose on and "
            f"{len(fitted_on)} to fit on: give another --held-out or a larger --train-share"
        )
    settings = [(lr, decay) for lr in lrs for decay in weight_decays]

    fit_and_score = partial(
        _fit_and_score, num_classes=num_classes, epochs=epochs, batch_size=batch_size, momentum=momentum, seed=seed
    )
    scores = fit_and_score(
        train[fitted_on],
        train_labels[fitted_on],
        other=train[chosen_on],
        other_labels=train_labels[chosen_on],
        tried=settings,
    )
    rows = [
        {"lr": lr, "weight_decay": decay, "top1": top1, "top5": top5}
        for (lr, decay), (top1, top5) in zip(settings, scores, strict=True)
    ]
    best = max(range(len(rows)), key=lambda s: scores[s])
    ((top1, top5),) = fit_and_score(train, train_labels, other=test, other_labels=test_labels, tried=[settings[best]])
    return {
        "settings": rows,
        "chosen": rows[best],
        "top1": top1,
        "top5": top5,
        "held_out_images": len(chosen_on),
    }


def _fit_and_score(
    fit: Tensor,
    fit_labels: Tensor,
    *,
    other: Tensor,
    other_labels: Tensor,
    tried: Sequence[tuple[float, float]],
    num_classes: int,
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> list[tuple[float, float]]:
    """Fit on some features, and return (top1, top5) of each setting on other features."""
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
    return [(top1, top5) for top1, top5 in (hits / len(other)).tolist()]

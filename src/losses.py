"""Every published objective on one page, in one notation.

Legend: B samples on this rank, N over all ranks, V views, C_k classes of classifier k, K classifiers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import max_over_ranks, sum_over_ranks, world_size


def self_classifier_terms(
    logits: Sequence[Sequence[Tensor] | Tensor], row_tau: float, col_tau: float, eps: float = 1e-12, num_global: int = 2
) -> Tensor:
    """Self-Classifier's loss of each classifier: the mean over its ordered pairs of views.

    Amrani, Karlinsky and Bronstein, "Self-Supervised Classification Network", arXiv:2103.10994v3. With the uniform
    priors p(x) = 1/N and p(y) = 1/C built in, view 1 predicts the class of view 2 of the same image:

        l(1, 2) = - sum_y  p(x2|y) / sum_y' p(x2|y')  *  log( N/C * p(y|x1) / sum_x p(y|x) )

    p(y|x) is a softmax over classes, p(x|y) a softmax over the batch *of all ranks*. Local views are paired with global
    views only, in both roles. There is no stop-gradient: the target is differentiated as well.

    Args:
        logits: logits[k][v] is the (B, C_k) output of classifier k for view v; global views come first.
        row_tau: temperature of p(y|x), > 0. The paper uses 0.1.
        col_tau: temperature of p(x|y), > 0. The paper uses 0.05.
        eps: guards both normalisations and the logarithm.
        num_global: how many of the views are global.

    Returns:
        (K,) means over the local B rows, in nats. The mean over ranks is the loss of the joined batch. Collapse (every
        image the same logits) costs ln C; a confident, consistent and balanced assignment costs 0.

    Raises:
        ValueError: if a temperature is not positive, or there are fewer than two views or no global one.

    Departs from the authors' code, which gathers every logit on every rank: only column statistics travel, two vectors
    of the classifiers' total width per view. Value and gradient are the same.
    """
    if row_tau <= 0 or col_tau <= 0:
        raise ValueError(f"temperatures must be positive, got row_tau={row_tau}, col_tau={col_tau}")
    num_views = len(logits[0])
    if num_views < 2 or not 1 <= num_global <= num_views:
        raise ValueError(f"need at least two views, one of them global, got {num_views} with num_global={num_global}")

    # All classifiers side by side: what follows works on columns, and a row softmax splits them again.
    widths = [views[0].shape[-1] for views in logits]
    z = torch.cat([torch.stack(tuple(views)) for views in logits], dim=-1)  # (V, B, sum C)
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    N = z.shape[1] * world_size()
    C = torch.cat([z.new_full((width,), width) for width in widths])  # (sum C,) classes of the column's classifier

    p_y_given_x = torch.cat([part.softmax(dim=-1) for part in (z / row_tau).split(widths, dim=-1)], dim=-1)
    scaled = z / col_tau
    peak = max_over_ranks(scaled.amax(dim=1, keepdim=True))  # the softmax does not depend on it: no gradient
    unnormalised = (scaled - peak).exp()
    mass = sum_over_ranks(torch.stack([unnormalised.sum(dim=1), p_y_given_x.sum(dim=1)]))  # (2, V, sum C)
    p_x_given_y = unnormalised / mass[0, :, None]  # (V, B, sum C) each class is a distribution over the N samples

    target = torch.cat(
        [part / part.sum(dim=-1, keepdim=True).clamp(min=eps) for part in p_x_given_y.split(widths, dim=-1)], dim=-1
    )
    log_prediction = (N / C * p_y_given_x / mass[1, :, None].clamp(min=eps) + eps).log()

    # A view predicts the targets of all views it is paired with, so their sum is all it needs.
    of_globals = target[:num_global].sum(dim=0)
    of_all = target.sum(dim=0)
    paired = torch.cat([of_all - target[:num_global], of_globals.expand_as(target[num_global:])])
    num_pairs = num_global * (num_views - 1) + (num_views - num_global) * num_global

    per_column = -(paired * log_prediction).sum(dim=(0, 1)) / (z.shape[1] * num_pairs)
    return torch.stack([part.sum() for part in per_column.split(widths)])


def self_classifier(
    logits: Sequence[Sequence[Tensor] | Tensor], row_tau: float, col_tau: float, eps: float = 1e-12, num_global: int = 2
) -> Tensor:
    """Self-Classifier's objective: the mean of `self_classifier_terms` over the classifiers, which weigh equally."""
    return self_classifier_terms(logits, row_tau, col_tau, eps, num_global).mean()


def self_classifier_v1_terms(
    logits: Sequence[Sequence[Tensor] | Tensor],
    tau: float,
    normalize_targets: bool = False,
    group: int = 0,
    eps: float = 1e-12,
) -> Tensor:
    """The first generation's loss of each classifier: the mean over both directions between two views.

    Amrani and Bronstein, arXiv:2103.10994v1. Both softmaxes have the temperature tau; S runs over the images of a group
    of G, p over the classes:

        l(1, 2) = - 1/G sum_x sum_y  S(x2|y)  *  log p(y|x1)

    With `normalize_targets` the row S(x2|.) of an image is divided by its sum, so that every image weighs alike; without
    it every class does. There is no stop-gradient.

    Args:
        logits: logits[k][v] is the (B, C) output of classifier k for view v of two; cosines, not yet divided by tau.
        tau: temperature, > 0. The authors use 0.1 on ImageNet, 0.3 on CIFAR.
        group: images per column softmax, consecutive rows of this rank; 0: the whole batch of all ranks.
        eps: guards the normalisation of the targets.

    Returns:
        (K,) means over the groups of this rank, in nats. The mean over ranks is the loss of the joined batch. If no logit
        depends on the image, it costs at least ln C with normalised targets, C/G ln C without.

    Raises:
        ValueError: if tau is not positive, there are not two views, or the group does not divide the rows.

    Departs from the authors' code, whose groups are what a GPU holds: here they stay as they are on any number of ranks.
    """
    if tau <= 0:
        raise ValueError(f"the temperature must be positive, got tau={tau}")
    z = torch.stack([torch.stack(tuple(views)) for views in logits])  # (K, V, B, C)
    K, V, B, C = z.shape
    if V != 2:
        raise ValueError(f"the loss is that of two views, got {V}")
    if group < 0 or (group and B % group):
        raise ValueError(f"a group of {group} does not divide the {B} rows")
    z = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z) / tau
    z = z.view(K, V, B // group if group else 1, group or B, C)
    if group:
        target = z.softmax(dim=3)
    else:
        peak = max_over_ranks(z.amax(dim=3, keepdim=True))  # the softmax does not depend on it: no gradient
        unnormalised = (z - peak).exp()
        target = unnormalised / sum_over_ranks(unnormalised.sum(dim=3, keepdim=True))
    if normalize_targets:
        target = target / target.sum(dim=-1, keepdim=True).clamp(min=eps)
    log_prediction = z.log_softmax(dim=-1)
    # Each view is the other's target: along V the target is turned by one.
    return -(target.flip(1) * log_prediction).sum(dim=-1).mean(dim=(1, 2, 3))


def self_classifier_v1(
    logits: Sequence[Sequence[Tensor] | Tensor],
    tau: float,
    normalize_targets: bool = False,
    group: int = 0,
    eps: float = 1e-12,
) -> Tensor:
    """The first generation's objective: the mean of `self_classifier_v1_terms` over the classifiers."""
    return self_classifier_v1_terms(logits, tau, normalize_targets, group, eps).mean()

"""Every published objective on one page, in one notation.

Legend: B samples on this rank, N over all ranks, V views, C_k classes of classifier k, K classifiers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distributed import max_over_ranks, sum_over_ranks, world_size


def self_classifier_terms(
    logits: Sequence[Sequence[Tensor] | Tensor],
    *,
    row_tau: float,
    col_tau: float,
    eps: float = 1e-12,
    num_global: int = 2,
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

    stacked = [views if isinstance(views, Tensor) else torch.stack(tuple(views)) for views in logits]
    stacked = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in stacked]
    return _PairTerms.apply(row_tau, col_tau, eps, num_global, *stacked)


class _PairTerms(torch.autograd.Function):
    """`self_classifier_terms` with its gradient by hand.

    Autograd would keep some twenty tensors of the size of the logits; this keeps two, p(x|y) and p(y|x), and goes through
    them view by view. The notation: T are targets, q the predictions inside the logarithm, both (B, C); m the sum of
    p(y|x) over the batch, (C,). Paired with a global view are all others, with a local view the globals.
    """

    @staticmethod
    def forward(ctx, row_tau: float, col_tau: float, eps: float, num_global: int, *logits: Tensor) -> Tensor:
        widths = [z.shape[-1] for z in logits]
        V, B, _ = logits[0].shape
        N = B * world_size()
        pairs = num_global * (V - 1) + (V - num_global) * num_global

        # softmax over the batch of all ranks; its largest logit cancels, but guards the exponential
        peak = max_over_ranks(torch.cat([z.amax(dim=1) for z in logits], dim=-1)).split(widths, dim=-1)
        p_x_given_y = [(z - top[:, None]).div_(col_tau).exp_() for z, top in zip(logits, peak, strict=True)]
        p_y_given_x = [(z / row_tau).softmax(dim=-1) for z in logits]
        sums = [torch.cat([p.sum(dim=1) for p in ps], dim=-1) for ps in (p_x_given_y, p_y_given_x)]
        shared = sum_over_ranks(torch.stack(sums)).split(widths, dim=-1)
        m = [part[1, :, None].clamp(min=eps) for part in shared]
        for p, part in zip(p_x_given_y, shared, strict=True):
            p /= part[0, :, None]

        terms = []
        for k, (px, py) in enumerate(zip(p_x_given_y, p_y_given_x, strict=True)):
            factor = N / widths[k] / m[k]
            own, of_all, of_globals, log_globals, log_locals = 0, 0, 0, 0, 0
            for v in range(V):
                T, log_q = _target(px[v], eps), _log_prediction(py[v], factor[v], eps)
                of_all = of_all + T
                if v < num_global:
                    own = own + (T * log_q).sum()  # a view is not paired with itself
                    of_globals = of_globals + T
                    log_globals = log_globals + log_q
                else:
                    log_locals = log_locals + log_q
            total = (of_all * log_globals).sum() - own
            total = total + ((of_globals * log_locals).sum() if num_global < V else 0)
            terms.append(-total / (B * pairs))
        ctx.save_for_backward(*p_x_given_y, *p_y_given_x, *m)
        ctx.settings = row_tau, col_tau, eps, num_global, widths, N, pairs
        return torch.stack(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, grads: Tensor):
        row_tau, col_tau, eps, num_global, widths, N, pairs = ctx.settings
        K = len(widths)
        p_x_given_y, p_y_given_x, m = ctx.saved_tensors[:K], ctx.saved_tensors[K : 2 * K], ctx.saved_tensors[2 * K :]
        V, B, _ = p_x_given_y[0].shape

        # through the targets' normalisation, and through the logarithm: what is left are the two softmaxes
        pulls = []
        for k, (px, py) in enumerate(zip(p_x_given_y, p_y_given_x, strict=True)):
            factor = N / widths[k] / m[k]
            scale = -grads[k] / (B * pairs)
            of_globals, log_globals = _sum_over_views(px[:num_global], py[:num_global], factor[:num_global], eps=eps)
            of_locals, log_locals = _sum_over_views(px[num_global:], py[num_global:], factor[num_global:], eps=eps)
            of_all, log_all = of_globals + of_locals, log_globals + log_locals
            through_target, through_log = torch.empty_like(px), torch.empty_like(py)
            for v in range(V):
                T, log_q = _target(px[v], eps), _log_prediction(py[v], factor[v], eps)
                G = log_all - log_q if v < num_global else log_globals
                moved = (T * G).sum(dim=-1, keepdim=True)
                moved = torch.where(px[v].sum(dim=-1, keepdim=True) > eps, moved, 0)  # a clamped sum is a constant
                torch.sub(G, moved, out=through_target[v]).mul_(T).mul_(scale)
                D = of_all - T if v < num_global else of_globals
                # d log q / d log p is q - eps over q
                torch.mul(py[v], factor[v], out=through_log[v]).mul_(D).div_(log_q.exp()).mul_(scale)
            pulls.append((through_target, through_log))
        sums = [torch.cat([pull[i].sum(dim=1) for pull in pulls], dim=-1) for i in (0, 1)]
        shared = sum_over_ranks(torch.stack(sums)).split(widths, dim=-1)

        found = []
        for k, (through_target, through_log) in enumerate(pulls):
            of_target, of_log = shared[k][0, :, None], shared[k][1, :, None]
            through_target.addcmul_(p_x_given_y[k], of_target, value=-1).div_(col_tau)
            of_log = torch.where(m[k] > eps, of_log / m[k], 0)  # a clamped sum is a constant
            through_log.addcmul_(p_y_given_x[k], of_log, value=-1)
            through_log.addcmul_(p_y_given_x[k], through_log.sum(dim=-1, keepdim=True), value=-1)
            found.append(through_target.add_(through_log, alpha=1 / row_tau))
        return None, None, None, None, *found


def _target(p_x_given_y: Tensor, eps: float) -> Tensor:
    """Rows that sum to 1, unless p(x|y) is next to nothing for every class."""
    return p_x_given_y / p_x_given_y.sum(dim=-1, keepdim=True).clamp(min=eps)


def _log_prediction(p_y_given_x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """log( N/C * p(y|x) / sum_x p(y|x) ), where factor is N/C over the sum, a row vector."""
    return (p_y_given_x * factor).add_(eps).log_()


def _sum_over_views(
    p_x_given_y: Tensor, p_y_given_x: Tensor, factor: Tensor, *, eps: float
) -> tuple[Tensor | int, Tensor | int]:
    """Sums of the targets and of the logarithms; 0 of no views."""
    targets, logs = 0, 0
    for px, py, f in zip(p_x_given_y, p_y_given_x, factor, strict=True):
        targets, logs = targets + _target(px, eps), logs + _log_prediction(py, f, eps)
    return targets, logs


def self_classifier(
    logits: Sequence[Sequence[Tensor] | Tensor],
    row_tau: float,
    col_tau: float,
    eps: float = 1e-12,
    *,
    num_global: int = 2,
) -> Tensor:
    """Self-Classifier's objective: the mean of `self_classifier_terms` over the classifiers, which weigh equally."""
    return self_classifier_terms(logits, row_tau=row_tau, col_tau=col_tau, eps=eps, num_global=num_global).mean()


def self_classifier_v1_terms(
    logits: Sequence[Sequence[Tensor] | Tensor],
    tau: float,
    *,
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
    *,
    normalize_targets: bool = False,
    group: int = 0,
    eps: float = 1e-12,
) -> Tensor:
    """The first generation's objective: the mean of `self_classifier_v1_terms` over the classifiers."""
    return self_classifier_v1_terms(logits, tau, normalize_targets=normalize_targets, group=group, eps=eps).mean()


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """SwAV's loss of one view: cross-entropy between another view's codes and its own prediction.

    arXiv:2006.09882v5, equation 2.

    Args:
        scores: (B, K), cosines of this view's embeddings and the prototypes.
        codes: (B, K) of another view of the same images, rows of which sum to 1; constants.

    Returns:
        Mean over the local rows, in nats; ln K for uniform scores.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return -(codes * torch.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


IGNORED = -100  # label of an image that belongs to no cluster


def assigned_cross_entropy(scores: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy with given clusters, in DeepCluster-v2 and SeLa-v2: every view predicts the cluster of its image.

    arXiv:2006.09882v5, appendix D.

    Args:
        scores: (V, B, K) of V views.
        labels: (B,) long; `IGNORED` rows do not count.

    Returns:
        Scalar whose mean over ranks is the mean over all counted rows of all ranks; 0 if there are none.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    V = len(scores)
    total = F.cross_entropy(
        (scores / temperature).flatten(0, 1), labels.repeat(V), ignore_index=IGNORED, reduction="sum"
    )
    counted = sum_over_ranks((labels != IGNORED).sum())
    return total * world_size() / (V * counted.clamp(min=1))

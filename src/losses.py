"""Compute the published objectives. All of them are on this page, in one notation.

Legend: B samples on this rank, N samples over all ranks, V views, C_k classes of classifier k, K classifiers.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distributed import max_over_ranks, rank, sum_over_ranks, world_size

EPS = 1e-12  # default of eps, which keeps divisions and logarithms finite
IGNORED = -100  # label of an image without a cluster


# ---- Self-Classifier ------------------------------------------------------------------------------------------------


def self_classifier(
    logits: Sequence[Sequence[Tensor] | Tensor],
    row_tau: float,
    col_tau: float,
    eps: float = EPS,
    *,
    num_global: int = 2,
) -> Tensor:
    """Compute Self-Classifier's objective, the mean of `self_classifier_terms` over the classifiers."""
    return self_classifier_terms(logits, row_tau=row_tau, col_tau=col_tau, eps=eps, num_global=num_global).mean()


def self_classifier_definition(views: Tensor, *, row_tau: float, col_tau: float, eps: float, num_global: int) -> Tensor:
    """Compute the loss of one classifier directly from the equation.

    This function is the definition of the loss. `self_classifier_terms` returns the same value and the same gradient
    with less memory. Training uses `self_classifier_terms`, and a test compares the two functions.

    Amrani, Karlinsky and Bronstein, "Self-Supervised Classification Network", arXiv:2103.10994v3. The uniform priors
    p(x) = 1/N and p(y) = 1/C are built in. View 1 of an image predicts the class of view 2 of the same image:

        l(1, 2) = - sum_y  p(x2|y) / sum_y' p(x2|y')  *  log( N/C * p(y|x1) / sum_x p(y|x) )

    p(y|x) is a softmax over the classes. p(x|y) is a softmax over the batch *of all ranks*. The loss is the mean of
    l(i, j) over all ordered pairs of different views of which at least one is global. The gradient flows through the
    target too: there is no stop-gradient.

    Args:
        views: (V, B, C) logits of V views; global views come first.
        row_tau, col_tau, eps, num_global: see `self_classifier_terms`.

    Returns:
        Scalar mean over the B samples of this rank, in nats.
    """
    V, B, C = views.shape
    N = B * world_size()
    exp = ((views - max_over_ranks(views.amax(dim=1, keepdim=True))) / col_tau).exp()  # the shift cancels in p(x|y)
    p_x_given_y = exp / sum_over_ranks(exp.sum(dim=1, keepdim=True))
    target = p_x_given_y / p_x_given_y.sum(dim=2, keepdim=True).clamp(min=eps)
    p_y_given_x = (views / row_tau).softmax(dim=2)
    sum_of_p = sum_over_ranks(p_y_given_x.sum(dim=1, keepdim=True)).clamp(min=eps)
    prediction = N / C * p_y_given_x / sum_of_p
    pairs = [(i, j) for i, j in permutations(range(V), 2) if min(i, j) < num_global]
    return torch.stack([-(target[j] * (prediction[i] + eps).log()).sum(dim=1).mean() for i, j in pairs]).mean()


def self_classifier_terms(
    logits: Sequence[Sequence[Tensor] | Tensor],
    *,
    row_tau: float,
    col_tau: float,
    eps: float,
    num_global: int,
) -> Tensor:
    """Compute `self_classifier_definition` for each of K classifiers with less memory.

    Args:
        logits: logits[k][v] is the (B, C_k) output of classifier k for view v; global views come first.
        row_tau: temperature of p(y|x), above 0. The paper uses 0.1.
        col_tau: temperature of p(x|y), above 0. The paper uses 0.05.
        eps: smallest sum that the two normalisations divide by; it is also added inside the logarithm.
        num_global: number of global views.

    Returns:
        (K,) means over the B samples of this rank, in nats. The mean over the ranks is the loss of the joined batch. A
        collapsed classifier, with the same logits for every image, costs ln C. A confident, consistent and balanced
        assignment costs 0.

    Raises:
        ValueError: if a temperature is not positive, or there are fewer than two views or no global view.

    Departs from the authors' code, which gathers all logits on every rank. Here the ranks exchange only column
    statistics: two vectors for each view, with one entry for each class of each classifier. Value and gradient are the
    same.
    """
    if row_tau <= 0 or col_tau <= 0:
        raise ValueError(f"row_tau={row_tau} and col_tau={col_tau}: expected positive temperatures")
    num_views = len(logits[0])
    if num_views < 2 or not 1 <= num_global <= num_views:
        raise ValueError(f"{num_views} views, {num_global} of them global: expected at least two views and one global")

    stacked = [views if isinstance(views, Tensor) else torch.stack(tuple(views)) for views in logits]
    stacked = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in stacked]
    return _PairTerms.apply(row_tau, col_tau, eps, num_global, *stacked)


class _PairTerms(torch.autograd.Function):
    """Compute `self_classifier_terms` with a hand-written gradient.

    Autograd would save about twenty tensors as large as the logits. This function saves two, p(x|y) and p(y|x), and
    processes one view at a time.

    Notation: T is the (B, C) target of a view and q its (B, C) prediction, the argument of the logarithm. m is the (C,)
    sum of p(y|x) over the batch. A global view forms pairs with all other views, a local view with the global views.
    """

    @staticmethod
    def forward(ctx, row_tau: float, col_tau: float, eps: float, num_global: int, *logits: Tensor) -> Tensor:
        widths = [z.shape[-1] for z in logits]
        V, B, _ = logits[0].shape
        N = B * world_size()
        pairs = num_global * (V - 1) + (V - num_global) * num_global

        # p(x|y) is a softmax over the batch of all ranks. Subtracting the largest logit prevents overflow and cancels.
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
            own = of_all = of_globals = log_globals = log_locals = px.new_zeros(())
            for v in range(V):
                T, log_q = _target(px[v], eps), _log_prediction(py[v], factor[v], eps)
                of_all = of_all + T
                if v < num_global:
                    own = own + (T * log_q).sum()  # a view does not form a pair with itself
                    of_globals = of_globals + T
                    log_globals = log_globals + log_q
                else:
                    log_locals = log_locals + log_q
            total = (of_all * log_globals).sum() - own
            if num_global < V:
                total = total + (of_globals * log_locals).sum()
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

        # First through the normalisation of the target and through the logarithm, down to the two softmaxes.
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
                moved = torch.where(px[v].sum(dim=-1, keepdim=True) > eps, moved, 0)  # a clamped sum has no gradient
                torch.sub(G, moved, out=through_target[v]).mul_(T).mul_(scale)
                D = of_all - T if v < num_global else of_globals
                # d(log q) / d(log p) = (q - eps) / q, where q contains eps
                torch.mul(py[v], factor[v], out=through_log[v]).mul_(D).div_(log_q.exp()).mul_(scale)
            pulls.append((through_target, through_log))
        sums = [torch.cat([pull[i].sum(dim=1) for pull in pulls], dim=-1) for i in (0, 1)]
        shared = sum_over_ranks(torch.stack(sums)).split(widths, dim=-1)

        # Then through the two softmaxes.
        found = []
        for k, (through_target, through_log) in enumerate(pulls):
            of_target, of_log = shared[k][0, :, None], shared[k][1, :, None]
            through_target.addcmul_(p_x_given_y[k], of_target, value=-1).div_(col_tau)
            of_log = torch.where(m[k] > eps, of_log / m[k], 0)  # a clamped sum has no gradient
            through_log.addcmul_(p_y_given_x[k], of_log, value=-1)
            through_log.addcmul_(p_y_given_x[k], through_log.sum(dim=-1, keepdim=True), value=-1)
            found.append(through_target.add_(through_log, alpha=1 / row_tau))
        return None, None, None, None, *found


def _target(p_x_given_y: Tensor, eps: float) -> Tensor:
    """Return p(x|y) / sum_y' p(x|y'). Rows sum to 1, except where the sum is below eps."""
    return p_x_given_y / p_x_given_y.sum(dim=-1, keepdim=True).clamp(min=eps)


def _log_prediction(p_y_given_x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """Return log( N/C * p(y|x) / sum_x p(y|x) + eps ). `factor` is the row vector N/C / sum_x p(y|x)."""
    return (p_y_given_x * factor).add_(eps).log_()


def _sum_over_views(p_x_given_y: Tensor, p_y_given_x: Tensor, factor: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the views' targets and the sum of their log-predictions. Without views, both sums are 0."""
    targets = logs = p_x_given_y.new_zeros(())
    for px, py, f in zip(p_x_given_y, p_y_given_x, factor, strict=True):
        targets, logs = targets + _target(px, eps), logs + _log_prediction(py, f, eps)
    return targets, logs


# ---- Self-Classifier, first generation ------------------------------------------------------------------------------


def self_classifier_v1(
    logits: Sequence[Sequence[Tensor] | Tensor],
    tau: float,
    *,
    normalize_targets: bool = False,
    group: int = 0,
    eps: float = EPS,
) -> Tensor:
    """Compute the objective of Self-Classifier's first generation, the mean of `self_classifier_v1_terms`."""
    return self_classifier_v1_terms(logits, tau, normalize_targets=normalize_targets, group=group, eps=eps).mean()


def self_classifier_v1_terms(
    logits: Sequence[Sequence[Tensor] | Tensor],
    tau: float,
    *,
    normalize_targets: bool,
    group: int,
    eps: float = EPS,
) -> Tensor:
    """Compute the loss of each classifier in the first generation of Self-Classifier, the mean of l(1, 2) and l(2, 1).

    Amrani and Bronstein, arXiv:2103.10994v1. The batch is divided into groups of G images. S is a softmax over the
    images of a group, p a softmax over the classes; both have the temperature tau:

        l(1, 2) = - 1/G sum_x sum_y  S(x2|y)  *  log p(y|x1)

    With `normalize_targets`, the targets S(x2|.) of an image are divided by their sum, so that all images have the same
    weight. Without it, all classes have the same weight. The gradient flows through S too: there is no stop-gradient.

    Args:
        logits: logits[k][v] is the (B, C) output of classifier k for view v of two: cosines before the division by tau.
        tau: temperature, above 0. The authors use 0.1 on ImageNet and 0.3 on CIFAR.
        normalize_targets: divide each image's targets by their sum.
        group: number of images G in a group, consecutive rows of this rank; 0: one group, the batch of all ranks.
        eps: smallest sum that `normalize_targets` divides by.

    Returns:
        (K,) means over the groups of this rank, in nats. The mean over the ranks is the loss of the joined batch. If the
        logits do not depend on the image, the loss is at least ln C with normalised targets and C/G ln C without.

    Raises:
        ValueError: if tau is not positive, there are not two views, or the group size does not divide the rows.

    Departs from the authors' code, where a group is the images of one GPU. Here the group size does not depend on the
    number of ranks.
    """
    if tau <= 0:
        raise ValueError(f"tau={tau}: expected a positive temperature")
    z = torch.stack([torch.stack(tuple(views)) for views in logits])  # (K, V, B, C)
    K, V, B, C = z.shape
    if V != 2:
        raise ValueError(f"{V} views: expected two views")
    if group < 0 or (group and B % group):
        raise ValueError(f"group={group} does not divide the {B} rows: expected a divisor, or 0 for the whole batch")
    z = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z) / tau
    z = z.view(K, V, B // group if group else 1, group or B, C)
    if group:
        target = z.softmax(dim=3)
    else:
        peak = max_over_ranks(z.amax(dim=3, keepdim=True))  # cancels in the softmax, so it needs no gradient
        unnormalised = (z - peak).exp()
        target = unnormalised / sum_over_ranks(unnormalised.sum(dim=3, keepdim=True))
    if normalize_targets:
        target = target / target.sum(dim=-1, keepdim=True).clamp(min=eps)
    log_prediction = z.log_softmax(dim=-1)
    # The target of each view is the other view: flip(1) exchanges the two views.
    return -(target.flip(1) * log_prediction).sum(dim=-1).mean(dim=(1, 2, 3))


# ---- SimCLR ---------------------------------------------------------------------------------------------------------


def nt_xent(embeddings: Tensor, temperature: float, anchors: Literal["both", "one"] = "both") -> Tensor:
    """Compute SimCLR's loss: the cross-entropy of finding the other view of an image among all views of a batch.

    Chen et al., arXiv:2002.05709v3, equation 1. For the view i of an image and its other view j:

        l(i, j) = - log( exp(z_i·z_j / t) / sum_{k≠i} exp(z_i·z_k / t) )

    The sum runs over the views of all images of all ranks, except i itself.

    Args:
        embeddings: (2, B, D) unit embeddings of two views.
        temperature: t, above 0.
        anchors: "both": the mean of l over all views; "one": the mean over the first views only, as in the authors' code of
            SCAN (arXiv:2005.12320).

    Returns:
        Scalar mean over the anchors of this rank, in nats. If all embeddings are equal, it is ln(2N - 1) for N images on
        all ranks.

    Raises:
        ValueError: if the temperature is not positive, or there are not two views.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive temperature")
    if len(embeddings) != 2:
        raise ValueError(f"{len(embeddings)} views: expected two views")
    z = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
    B, own = z.shape[1], rank()
    candidates = z
    if world_size() > 1:  # the other ranks add their embeddings at their places
        everywhere = z.new_zeros(world_size(), *z.shape)
        everywhere[own] = z
        candidates = sum_over_ranks(everywhere).transpose(0, 1)
    N = B * world_size()
    here = own * B + torch.arange(B, device=z.device)  # places of this rank's images among those of all ranks
    number = 2 if anchors == "both" else 1
    similarities = z[:number].flatten(0, 1) @ candidates.reshape(2 * N, -1).T / temperature
    itself = torch.cat([here, here + N])[: number * B]
    other = torch.cat([here + N, here])[: number * B]
    similarities = similarities.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarities, other)


# ---- SwAV, DeepCluster-v2, SeLa-v2 ----------------------------------------------------------------------------------


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Compute SwAV's loss of one view, the cross-entropy of its prediction with the codes of another view.

    arXiv:2006.09882v5, equation 2.

    Args:
        scores: (B, K) cosines of this view's embeddings and the prototypes.
        codes: (B, K) codes of another view of the same images, without gradient. Rows sum to 1.
        temperature: temperature of the prediction, above 0. The paper uses 0.1.

    Returns:
        Scalar mean over the B samples of this rank, in nats. Uniform scores cost ln K.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return -(codes * torch.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


def assigned_cross_entropy(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute the loss of DeepCluster-v2 and SeLa-v2, the cross-entropy of all views with the cluster of their image.

    arXiv:2006.09882v5, appendix D.

    Args:
        scores: (V, B, K) cosines of the embeddings of V views and the prototypes.
        labels: (B,) long, the cluster of each image. Images with the label `IGNORED` are left out.
        temperature: temperature of the prediction, above 0.

    Returns:
        Scalar. Its mean over the ranks is the mean over all views of the labelled images of all ranks, in nats. It is 0
        if no image has a label.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    V = len(scores)
    total = F.cross_entropy(
        (scores / temperature).flatten(0, 1), labels.repeat(V), ignore_index=IGNORED, reduction="sum"
    )
    counted = sum_over_ranks((labels != IGNORED).sum())
    return total * world_size() / (V * counted.clamp(min=1))


# ---- SCAN -----------------------------------------------------------------------------------------------------------

LARGEST_CONSISTENCY = 100.0  # of one pair, in nats; the bound of PyTorch's binary cross-entropy, which the authors use


def scan(anchor_logits: Tensor, neighbor_logits: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute SCAN's loss: an image and its neighbour have the same class, and all classes are used equally often.

    Van Gansbeke et al., "SCAN: Learning to Classify Images without Labels", arXiv:2005.12320, equation 2. With the
    probabilities p of an image, q of its neighbour, and the mean m of p over the batch of all ranks:

        consistency = - mean log( sum_c p_c q_c ),    entropy = - sum_c m_c log m_c
        total = consistency - entropy_weight * entropy

    Args:
        anchor_logits: (B, C) logits of the images.
        neighbor_logits: (B, C) logits of one neighbour of each image.
        entropy_weight: the paper uses 5.

    Returns:
        Total, consistency and entropy, scalars in nats. The total is at least -entropy_weight * ln C. The mean of the ranks'
        totals is the loss of the joined batch.
    """
    log_p, log_q = (
        (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).log_softmax(dim=1)
        for z in (anchor_logits, neighbor_logits)
    )
    consistency = -torch.logsumexp(log_p + log_q, dim=1).clamp(min=-LARGEST_CONSISTENCY).mean()
    m = sum_over_ranks(log_p.exp().mean(dim=0)) / world_size()
    entropy = entropy_of(m)
    return consistency - entropy_weight * entropy, consistency, entropy


def entropy_of(probabilities: Tensor) -> Tensor:
    """Compute the entropy of (..., C) probabilities, in nats. As in SCAN's code, a probability counts as at least 1e-8."""
    m = probabilities.clamp(min=1e-8)
    return -(m * m.log()).sum(dim=-1)


def confident(weak_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the most probable class of each image, (B,), and whether its probability is above the threshold, (B,) bool.

    Args:
        weak_logits: (B, C) logits.
        threshold: a probability; SCAN uses 0.99.
    """
    z = weak_logits.float() if weak_logits.dtype in (torch.float16, torch.bfloat16) else weak_logits
    probability, labels = z.softmax(dim=1).max(dim=1)
    return labels, probability > threshold


def confident_cross_entropy(weak_logits: Tensor, strong_logits: Tensor, threshold: float, balance: bool) -> Tensor:
    """Compute SCAN's loss of self-labelling: the cross-entropy of the confident images with their own most probable class.

    arXiv:2005.12320, section 3.3. The classes come from views without augmentation, and strongly augmented views are trained.

    Args:
        weak_logits: (B, C) logits of the views from which the classes come; they get no gradient.
        strong_logits: (B, C) logits of the views that are trained.
        threshold: an image counts if the probability of its class is above it.
        balance: weight the images so that all classes with confident images in the batch of all ranks count equally.

    Returns:
        Scalar in nats. The mean over the ranks is the weighted mean over the confident images of all ranks. It is 0, with a
        gradient of 0, if no image is confident.
    """
    labels, sure = confident(weak_logits.detach(), threshold)
    z = strong_logits.float() if strong_logits.dtype in (torch.float16, torch.bfloat16) else strong_logits
    weights = sure.to(z.dtype)
    counts = sum_over_ranks(z.new_zeros(z.shape[1]).scatter_add_(0, labels, weights))
    if balance:
        weights = weights / counts.clamp(min=1)[labels]
        total = (counts > 0).sum()
    else:
        total = counts.sum()
    losses = F.cross_entropy(z, labels, reduction="none")
    return (losses * weights).sum() * world_size() / total.clamp(min=1)

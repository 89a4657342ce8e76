"""Update rules and schedules."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .errors import InputError


class LARS(torch.optim.Optimizer):
    """Momentum SGD with a learning rate for each tensor: the rule of NVIDIA apex's LARC with clipping off.

    You, Gitman and Ginsburg, arXiv:1708.03888v3. For a tensor p with gradient g, both of norm above zero:

        g ← trust · ‖p‖ / (‖g‖ + wd · ‖p‖ + eps) · (g + wd · p)

    then buf ← momentum · buf + g and p ← p - lr · buf. If either norm is zero, g stays raw and gets no decay; so a bias
    that starts at zero takes a first step of lr · g. All tensors are updated together and nothing is read back from
    the device.

    Args:
        lr: learning rate, ≥ 0.
        trust_coefficient: share of a tensor's norm that one step of lr 1 may change.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        decay, trust, eps = group["weight_decay"], group["trust_coefficient"], group["eps"]
        norm = torch.stack(torch._foreach_norm(params))
        grad_norm = torch.stack(torch._foreach_norm(grads))
        # Where the parameter is zero its rate is 1; where the gradient is, it stays as it is, without decay.
        adapted = trust * norm / (grad_norm + decay * norm + eps)
        ratio = torch.where((norm > 0) & (grad_norm > 0), adapted, (grad_norm > 0).to(norm.dtype))
        if decay:
            updates = torch._foreach_add(grads, params, alpha=decay)
            torch._foreach_mul_(updates, list(ratio.unbind()))
        else:
            updates = torch._foreach_mul(grads, list(ratio.unbind()))
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            updates = buffers
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def parameter_groups(
    method: nn.Module, weight_decay: float, *, bias_decay: bool = True, backbone_decay: float | None = None
) -> list[dict]:
    """Group the parameters that are trained by weight decay.

    Args:
        bias_decay: if False, parameters called `bias` and all other vectors (the scales of normalisation layers) get none.
            The scales `weight_g` of weight-normalised classifiers have two dimensions and keep theirs, as in the authors' code.
        backbone_decay: decay of the other parameters of the backbone, if it differs.
    """
    decays: dict[float, list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        if not bias_decay and (name.endswith(".bias") or parameter.dim() == 1):
            decay = 0.0
        elif backbone_decay is not None and name.startswith("backbone."):
            decay = backbone_decay
        else:
            decay = weight_decay
        decays.setdefault(decay, []).append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in decays.items()]


def build_optimizer(name: str, groups: list[dict], *, lr: float, momentum: float) -> torch.optim.Optimizer:
    """Build an optimiser over `parameter_groups`. `momentum` is for "lars" and "sgd"."""
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum, weight_decay=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise ValueError(f"optimizer must be lars, sgd or adamw, got {name}")


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> None:
    """Scale down each tensor's gradient on its own, to a norm of at most `largest`; the others keep theirs.

    As in the authors' code: the factor is largest / (norm + 1e-6) where that is below 1.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if grads:
        factors = largest / (torch.stack(torch._foreach_norm(grads)) + 1e-6)
        torch._foreach_mul_(grads, list(factors.clamp(max=1.0).unbind()))


def freeze(method: nn.Module, beginnings: Sequence[str]) -> None:
    """Keep at their start the parameters whose names begin so: "backbone", "backbone.layer1", "classifiers.0".

    Batch normalisation with frozen parameters keeps its running statistics too; see `Trainer`.

    Raises:
        InputError: if no parameter begins so, or none would be left to train.
    """
    for beginning in beginnings:
        matched = [p for name, p in method.named_parameters() if f"{name}.".startswith(f"{beginning}.")]
        if not matched:
            parts = ", ".join(name for name, _ in method.named_children())
            raise InputError(
                f"--freeze {beginning}: no parameter begins so; expected the beginning of a name in {parts}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if beginnings and not any(p.requires_grad for p in method.parameters()):
        raise InputError(f"--freeze {' '.join(beginnings)}: no parameter is left to train")


def warmup_cosine(
    base: float, final: float, *, warmup_start: float, warmup_epochs: int, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step: linear warm-up, then a cosine.

    Both ends of the warm-up are included: its first step has `warmup_start`, its last has `base`, and so has the first
    step of the cosine, which approaches `final` without quite reaching it.
    """
    warmup = warmup_epochs * steps_per_epoch
    decay = epochs * steps_per_epoch - warmup

    def lr(step: int) -> float:
        if step < warmup:
            return warmup_start + (base - warmup_start) * step / max(warmup - 1, 1)
        return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / decay))

    return lr

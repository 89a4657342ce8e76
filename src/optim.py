"""Update rules and schedules."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


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
        scaled = (norm > 0) & (grad_norm > 0)
        ratio = torch.where(scaled, trust * norm / (grad_norm + decay * norm + eps), 1.0)
        updates = torch._foreach_mul(grads, list(ratio.unbind()))
        if decay:
            pulls = torch._foreach_mul(params, list(torch.where(scaled, ratio * decay, 0.0).unbind()))
            torch._foreach_add_(updates, pulls)
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            updates = buffers
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def build_optimizer(
    name: str, method: nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of all parameters that require a gradient. `momentum` is for "lars" and "sgd"."""
    params = [p for p in method.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"optimizer must be lars, sgd or adamw, got {name}")


def warmup_cosine(
    base: float, final: float, warmup_start: float, warmup_epochs: int, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Learning rate as a function of the step: linear warm-up, then a cosine.

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

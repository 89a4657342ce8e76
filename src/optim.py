"""Update parameters: optimisers, groups of parameters, gradient clipping and schedules of the learning rate."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError


class LARS(torch.optim.Optimizer):
    """Run momentum SGD with a learning rate for each tensor: the rule of NVIDIA apex's LARC without clipping.

    You, Gitman and Ginsburg, arXiv:1708.03888v3. For a tensor p with the gradient g, if both norms are above zero:

        g ← trust · ‖p‖ / (‖g‖ + wd · ‖p‖ + eps) · (g + wd · p)

    Then buf ← momentum · buf + g and p ← p - lr · buf. If one of the norms is zero, g is neither scaled nor decayed: a
    bias that starts at zero takes a first step of lr · g. On a GPU, all tensors are updated together, and the host does not
    wait for the device.

    Args:
        params: parameters or groups of parameters.
        lr: learning rate, at least 0.
        momentum: momentum, at least 0.
        weight_decay: weight decay wd, at least 0.
        trust_coefficient: share of a tensor's norm that one step changes at lr 1.
        eps: number that is added to the denominator.

    Raises:
        ValueError: if lr, momentum or weight_decay is negative.
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
                raise ValueError(f"{name} is {value}: expected at least 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has overloads
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # A GPU updates all tensors together, in few kernels. On a CPU this would move every tensor through the memory
            # several times, and one tensor after the other stays in the cache. The result is the same bit for bit.
            parts = [[p] for p in params] if params and params[0].device.type == "cpu" else [params]
            for part in filter(None, parts):
                self._update(part, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        decay, trust, eps = group["weight_decay"], group["trust_coefficient"], group["eps"]
        norm = torch.stack(torch._foreach_norm(params))
        grad_norm = torch.stack(torch._foreach_norm(grads))
        # A parameter of norm zero has the ratio 1, a gradient of norm zero the ratio 0: then decay has no effect either.
        adapted = trust * norm / (grad_norm + decay * norm + eps)
        ratio = torch.where((norm > 0) & (grad_norm > 0), adapted, (grad_norm > 0).to(norm.dtype))
        ratios = list(ratio.unbind())
        if decay:
            updates = list(torch._foreach_add(grads, params, alpha=decay))
            torch._foreach_mul_(updates, ratios)
        else:
            updates = list(torch._foreach_mul(grads, ratios))
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
    """Divide the trainable parameters into groups of equal weight decay.

    Args:
        method: module with the parameters.
        weight_decay: weight decay of every parameter for which the other arguments do not set another.
        bias_decay: if False, parameters named `bias` and all other vectors (the scales of normalisation layers) have no
            decay. The scales `weight_g` of weight-normalised classifiers have two dimensions, so they are decayed, as in
            the authors' code.
        backbone_decay: weight decay of the backbone's parameters; None: `weight_decay`. `bias_decay` still applies.

    Returns:
        Groups for `build_optimizer`.
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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the momentum of an optimiser that has the same parameters. Its options, such as the momentum, stay as they are.

    Raises:
        InputError: if the state has other parameters, or tensors of other shapes.
    """
    kept = ("params", "lr")  # the learning rate is that of the last step
    options = [{name: value for name, value in group.items() if name not in kept} for group in optimizer.param_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in state["param_groups"]]
    if found != sizes:
        raise InputError(f"its optimizer has groups of {found} parameters, expected {sizes}")
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for parameter in group["params"]:
            entries = optimizer.state.get(parameter, {})
            names = (
                {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
            )
            if entries and (missing := names - entries.keys()):
                raise InputError(f"its optimizer has no {', '.join(sorted(missing))} for a parameter")
            for name, value in entries.items():
                shape = () if name == "step" else parameter.shape
                if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
                    raise InputError(
                        f"the {name} of its optimizer does not have the shape {tuple(shape)} of a parameter"
                    )


def build_optimizer(name: str, groups: list[dict], *, lr: float, momentum: float) -> torch.optim.Optimizer:
    """Build an optimiser over groups of parameters.

    Args:
        name: "lars", "sgd", "adamw" or "adam".
        groups: see `parameter_groups`.
        lr: learning rate.
        momentum: momentum of "lars" and "sgd"; the others ignore it.

    Raises:
        ValueError: if there is no optimiser of this name.
    """
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum, weight_decay=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr)
    raise ValueError(f"optimizer {name}: expected lars, sgd, adamw or adam")


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> None:
    """Clip the gradient of each tensor separately to a norm of at most `largest`.

    As in the authors' code, the factor is largest / (norm + 1e-6) if that is below 1, else 1.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if grads:
        factors = largest / (torch.stack(torch._foreach_norm(grads)) + 1e-6)
        torch._foreach_mul_(grads, list(factors.clamp(max=1.0).unbind()))


def freeze(method: nn.Module, beginnings: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with one of these strings, such as "backbone.layer1" or "classifiers.0".

    Batch normalisation with frozen parameters also keeps its running statistics; see `Trainer`.

    Args:
        method: module with the parameters.
        beginnings: whole components of names: "backbone" matches "backbone.conv1.weight", "back" does not.

    Raises:
        InputError: if no parameter has such a name, or no parameter is left to train.
    """
    for beginning in beginnings:
        matched = [p for name, p in method.named_parameters() if f"{name}.".startswith(f"{beginning}.")]
        if not matched:
            parts = ", ".join(name for name, _ in method.named_children())
            raise InputError(
                f"--freeze {beginning}: no parameter has a name that begins like this; expected a part of the network: {parts}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if beginnings and not any(p.requires_grad for p in method.parameters()):
        raise InputError(f"--freeze {' '.join(beginnings)}: no parameter is left to train; freeze fewer parts")


def warmup_cosine(
    base: float, final: float, warmup_start: float, warmup_epochs: int, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step: a linear warm-up, then a cosine.

    The first step of the warm-up has the rate `warmup_start` and its last step has the rate `base`. The first step of the
    cosine has the rate `base` again. The last step of the cosine is slightly above `final`.
    """
    warmup = warmup_epochs * steps_per_epoch
    decay = epochs * steps_per_epoch - warmup

    def lr(step: int) -> float:
        if step < warmup:
            return warmup_start + (base - warmup_start) * step / max(warmup - 1, 1)
        return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / decay))

    return lr


def warmup_drops(
    base: float, drops: Sequence[int], *, warmup_start: float, warmup_epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step: a linear warm-up, then falls to a tenth.

    Args:
        base: learning rate after the warm-up.
        drops: numbers of epochs after which the learning rate falls to a tenth.
        warmup_start, warmup_epochs: as for `warmup_cosine`.
    """
    warmup = warmup_epochs * steps_per_epoch
    risen = warmup_cosine(base, base, warmup_start, warmup_epochs, warmup_epochs + 1, steps_per_epoch)

    def lr(step: int) -> float:
        if step < warmup:
            return risen(step)
        return base / 10 ** sum(step >= epochs * steps_per_epoch for epochs in drops)

    return lr

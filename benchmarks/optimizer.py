"""Compare our LARS with a simple implementation, on the parameters of ResNet-50.

    python benchmarks/optimizer.py

The simple implementation updates tensor by tensor: the host reads two norms per tensor and then decides. Ours updates all
tensors together on a GPU, and tensor by tensor on a CPU. "together" is ours with all tensors together on every device. All
sides get the same gradients and end with the same weights.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import add_threads, in_words, machine, parse, parser, seconds_in_turns, spread, write
from src.optim import LARS

LR, MOMENTUM, DECAY, TRUST, EPS = 3.2, 0.9, 1e-6, 0.001, 1e-8


class Together(LARS):
    """LARS that updates all tensors together on every device."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self._update(group["params"], group)


class PerTensor:
    """LARS as a loop over the tensors."""

    def __init__(self, params):
        self.params = params
        self.momentum = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self):
        for p, buffer in zip(self.params, self.momentum, strict=True):
            grad, norm, grad_norm = p.grad, p.norm(), p.grad.norm()
            if norm != 0 and grad_norm != 0:
                ratio = TRUST * norm / (grad_norm + DECAY * norm + EPS)
                grad = ratio * (grad + DECAY * p)
            buffer.mul_(MOMENTUM).add_(grad)
            p.add_(buffer, alpha=-LR)


def main():
    made = parser(__doc__)
    add_threads(made)
    arguments = parse(made)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = machine("torch")
    print(in_words(where), flush=True)
    torch.manual_seed(0)
    params = [[torch.nn.Parameter(p.detach().clone().to(device)) for p in resnet50().parameters()]]
    params += [[torch.nn.Parameter(p.detach().clone()) for p in params[0]] for _ in range(2)]
    for first, *others in zip(*params, strict=True):
        first.grad = 0.01 * torch.randn_like(first)
        for other in others:
            other.grad = first.grad.clone()
    sides = {
        "ours": LARS(params[0], LR, MOMENTUM, DECAY, TRUST, EPS).step,
        "simple": PerTensor(params[1]).step,
        "together": Together(params[2], LR, MOMENTUM, DECAY, TRUST, EPS).step,
    }
    turns = 5 if arguments.quick else arguments.turns
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds = seconds_in_turns(sides, turns, finish, clock)
    difference = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in zip(*params[:2], strict=True)
    )
    count = sum(p.numel() for p in params[0])
    print(f"{len(params[0])} tensors, {count:,} parameters, {device}; milliseconds: median (range) of {turns} steps")
    for name, values in seconds.items():
        print(f"{name:10}{spread([1000 * value for value in values], 2)}")
    ratios = {name: median(seconds["simple"]) / median(seconds[name]) for name in ("ours", "together")}
    print(f"speed-up over the simple one: ours {ratios['ours']:.2f} ×, together {ratios['together']:.2f} ×; ", end="")
    print(f"largest relative difference of a tensor after all steps {difference:.0e}")
    row = {"device": str(device), "seconds": seconds, "ratios": ratios, "difference": difference}
    write(arguments.json, where, [row])


if __name__ == "__main__":
    main()

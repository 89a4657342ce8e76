"""Compare the images per second of our training step with those of a plain float32 loop, on tensors in memory.

    python benchmarks/step.py                      # ResNet-50, two views of 224² and six of 96², four classifiers, queue
    python benchmarks/step.py --quick              # ResNet-18, small views
    python benchmarks/step.py --cifar              # whole steps on images of 32 pixels; see benchmarks/cifar_step.py

The plain loop is a simple implementation: contiguous float32, the loss pair by pair, LARS tensor by tensor, and a queue
look-up over one big matrix. Our step runs with each option alone and with all options. On a GPU, the benchmark also reports
the ratio of our fastest step to the forward and backward pass of its backbone alone. On a CPU, it reports a bound: the time
that the multiplications of the plain loop take at the rate of float32 matrix products. No float32 step can be faster.
"""

import os
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import cifar_step
from benchmarks.common import in_words, machine, parse, parser, seconds_in_turns, spread, write
from benchmarks.loss import gathered
from benchmarks.optimizer import PerTensor
from src.data.loaders import Batch
from src.methods.self_classifier import Config, SelfClassifier
from src.models.backbones import build_backbone
from src.optim import build_optimizer, parameter_groups
from src.trainer import TrainingStep


class PlainLoop:
    """A training step as a simple implementation computes it."""

    def __init__(self, build, batch):
        self.method, self.batch = build(), batch
        self.optimizer = PerTensor(list(self.method.parameters()))

    def step(self):
        method, views, indices = self.method, self.batch.views, self.batch.indices
        large = method.backbone(torch.cat([view for view in views if view.shape[-1] == views[0].shape[-1]]))
        small = method.backbone(torch.cat([view for view in views if view.shape[-1] != views[0].shape[-1]]))
        embeddings = list(method.projection_head(torch.cat([large, small])).chunk(len(views)))
        queue, first = method.queue, embeddings[0].detach()
        best, second = (first @ queue.embeddings.T).topk(2, dim=1).indices.unbind(1)
        embeddings[0] = queue.embeddings[torch.where(queue.indices[best] == indices, second, best)]
        queue.push(first, indices)
        logits = [[classifier(embedding) for embedding in embeddings] for classifier in method.classifiers]
        for p in method.parameters():
            p.grad = None
        gathered(logits).backward()
        self.optimizer.step()


class Ours:
    """Our training step with some of its options."""

    def __init__(self, build, batch, precision=None, channels_last=False, compiled=False):
        self.method, self.batch, self.precision = build(), batch, precision
        if channels_last:
            self.method = self.method.to(memory_format=torch.channels_last)
            self.batch = Batch([v.to(memory_format=torch.channels_last) for v in batch.views], batch.indices)
        if compiled:
            self.method.backbone.compile(dynamic=False)
        self.forward = TrainingStep(self.method)
        self.optimizer = build_optimizer("lars", parameter_groups(self.method, 1e-6), lr=3.2, momentum=0.9)

    def autocast(self):
        return torch.autocast(self.batch.indices.device.type, self.precision, enabled=self.precision is not None)

    def step(self, batch=None):
        with self.autocast():
            loss = self.forward(batch or self.batch).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def backbone_only(self):
        views = self.batch.views
        sizes = sorted({view.shape[-1] for view in views})
        with self.autocast():
            outputs = [self.method.backbone(torch.cat([v for v in views if v.shape[-1] == size])) for size in sizes]
        torch.cat(outputs).float().square().mean().backward()


def bound(step) -> tuple[float, float]:
    """Return the floating-point operations of a step, and the highest measured rate of this machine per second.

    The operations are those of the products and convolutions. The rate is that of float32 matrix products.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    a, b = torch.randn(2, 2048, 2048)
    seconds = seconds_in_turns({"product": lambda: a @ b}, 20)["product"]
    return counter.get_total_flops(), 2 * 2048**3 / min(seconds)


def main():
    made = parser(__doc__)
    made.add_argument("--batch-size", type=int, help="number of images per step (default: 8 on a CPU, 256 on a GPU)")
    made.add_argument(
        "--compile", action="store_true", help="also time a compiled backbone; the first step then takes minutes"
    )
    made.add_argument("--turns", type=int, default=5, help="number of timed steps per side (default: 5)")
    made.add_argument(
        "--cifar",
        action="store_true",
        help="measure whole steps on images of 32 pixels, as a share of the rate of matrix products",
    )
    made.add_argument(
        "--cpu-time", action="store_true", help="with --cifar: count processor time; for one thread on a busy machine"
    )
    arguments = parse(made)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True  # for all sides, as in train.py
    where = machine("torch")
    print(in_words(where), flush=True)
    if arguments.cifar:
        turns = 1 if arguments.quick else arguments.turns
        write(arguments.json, where, cifar_step.report(turns, device, cpu_time=arguments.cpu_time))
        return

    arch, sides, length = ("resnet18", (64, 32), 4096) if arguments.quick else ("resnet50", (224, 96), 65536)
    batch_size = arguments.batch_size or (256 if on_gpu else 8)
    config = Config(queue_length=length)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(batch_size, 3, s, s, generator=generator).to(device) for s in [sides[0]] * 2 + [sides[1]] * 6]
    batch = Batch(views, torch.arange(batch_size, device=device))

    def build():
        torch.manual_seed(0)
        method = SelfClassifier(build_backbone(arch), config).to(device).train()
        stored = F.normalize(torch.randn(length, config.dim), dim=1).to(device)
        method.queue.push(stored, torch.arange(length, device=device))
        return method

    bf16 = torch.bfloat16
    runs = {"plain loop": PlainLoop(build, batch), "ours": Ours(build, batch)}
    runs["ours, channels_last"] = Ours(build, batch, channels_last=True)
    runs["ours, bfloat16"] = Ours(build, batch, bf16)
    runs["ours, both"] = Ours(build, batch, bf16, True)
    if arguments.compile:
        runs["ours, both, compiled"] = Ours(build, batch, bf16, True, compiled=True)
    steps = {name: run.step for name, run in runs.items()}
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = seconds_in_turns(steps, arguments.turns, finish)
    print(f"{arch}, 2 x {sides[0]}² + 6 x {sides[1]}², batch {batch_size}, queue {length:,}, {device}, ", end="")
    print(f"{os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} thread(s); {arguments.turns} steps each\n")
    print(f"{'':24}{'seconds per step':28}{'images/s':>9}{'× the plain loop':>22}")
    for name, values in seconds.items():
        ratio = median(seconds["plain loop"]) / median(values)
        print(f"{name:24}{spread(values, 3):28}{batch_size / median(values):9.1f}{ratio:22.2f}")
    row = {"arch": arch, "batch_size": batch_size, "device": str(device), "seconds": seconds}
    if on_gpu:
        fastest = min((name for name in runs if name != "plain loop"), key=lambda name: median(seconds[name]))
        pair = {"whole step": runs[fastest].step, "backbone alone": runs[fastest].backbone_only}
        again = seconds_in_turns(pair, arguments.turns, finish)
        share = median(again["backbone alone"]) / median(again["whole step"])
        print(f"\n{fastest}: {share:.2f} of the rate of the forward and backward pass of its backbone alone")
        row |= {"fastest": fastest, "backbone": again, "share": share}
    else:
        operations, rate = bound(steps["plain loop"])
        most = median(seconds["plain loop"]) / (operations / rate)
        print(
            f"\n{operations / 1e9:,.0f} GFLOP per step take, at {rate / 1e9:,.0f} GFLOP/s of float32 matrix products, ",
            end="",
        )
        print(f"{operations / rate:.2f} s; no float32 step can be more than {most:.2f} times as fast as the plain loop")
        row |= {"operations": operations, "operations_per_second": rate, "bound": most}
    write(arguments.json, where, [row])


if __name__ == "__main__":
    main()

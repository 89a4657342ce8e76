"""Measure whole training steps on images of 32 pixels, against the rate of matrix products: `benchmarks/step.py --cifar`."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import seconds_in_turns, spread
from src.config import ViewSettings
from src.data.datasets import MemoryImages
from src.data.loaders import Batch
from src.data.views import build_views
from src.machine import fastest_precision, keep_freed_memory
from src.methods.self_classifier import Config, SelfClassifier
from src.models.backbones import build_backbone
from src.optim import build_optimizer, parameter_groups
from src.trainer import TrainingStep

BATCHES = {"cifar_convnet": 512, "cifar_resnet18": 64}  # images per step
CLASSES = (10,) * 8 + (20, 20, 100, 100)
SIDE = 2048  # rows and columns of the matrices in the products
PRODUCTS = 10  # products per timed turn


class WholeStep:
    """A training step of Self-Classifier from images in memory to new weights, without a queue of neighbours."""

    def __init__(self, arch: str, precision: str, device: torch.device):
        torch.manual_seed(0)
        self.device, self.dtype = device, getattr(torch, precision)
        backbone = build_backbone(arch)
        config = Config(classes=CLASSES, hidden_dim=512, queue_length=0)
        self.method = SelfClassifier(backbone, config).to(device).to(memory_format=torch.channels_last).train()
        self.forward = TrainingStep(self.method)
        self.optimizer = build_optimizer("adamw", parameter_groups(self.method, 1e-4), lr=1e-3, momentum=0.0)
        self.images = torch.randint(0, 256, (BATCHES[arch], 3, 32, 32), dtype=torch.uint8).to(device)
        settings = ViewSettings(
            global_crops_size=32, global_crops_scale=(0.2, 1.0), local_crops_number=0, augment="simclr"
        )
        data = MemoryImages(self.images, torch.zeros(len(self.images)), [])
        self.views = build_views("cifar10", data, settings)
        self.indices, self.steps = np.arange(len(self.images)), 0

    def __call__(self):
        views = self.views(self.images, self.indices, seed=0, epoch=self.steps)
        self.steps += 1
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.forward(Batch(views, torch.from_numpy(self.indices).to(self.device))).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        assert loss.item() > 0  # reading the loss waits for a GPU, as the log of a run does


def measure(arch: str, turns: int, device: torch.device, clock: Callable[[], float]) -> dict:
    """Measure the step and the products in float32 and in bfloat16 in turns."""
    sides, operations, a_and_b = {}, 0, torch.randn(2, SIDE, SIDE).to(device)
    for precision in ("float32", "bfloat16"):
        step = WholeStep(arch, precision, device)
        a, b = a_and_b.to(getattr(torch, precision))
        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_total_flops()
        sides[f"{precision} step"] = step
        sides[f"{precision} products"] = lambda a=a, b=b: [a @ b for _ in range(PRODUCTS)][-1]
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = seconds_in_turns(sides, turns, finish, clock)
    row = {"arch": arch, "batch_size": BATCHES[arch], "operations": operations, "seconds": seconds}
    for precision in ("float32", "bfloat16"):
        rate = operations / median(seconds[f"{precision} step"])
        products = PRODUCTS * 2 * SIDE**3 / median(seconds[f"{precision} products"])
        row[precision] = {"step": rate, "products": products, "share": rate / products}
    return row


def report(turns: int, device: torch.device, *, cpu_time: bool) -> list[dict]:
    """Measure all networks and print a table. Return the numbers.

    Args:
        cpu_time: count processor time instead of the time that passes.
    """
    keep_freed_memory()  # as in train.py
    fastest = fastest_precision(device)
    print(f"two views of 32², {len(CLASSES)} classifiers, AdamW, channels_last, {device}, ", end="")
    clock = "processor time" if cpu_time else "time"
    print(f"{torch.get_num_threads()} thread(s); {turns} steps each, {clock}; --precision auto is {fastest}\n")
    print(f"{'':16}{'precision':11}{'GFLOP/view':>10}{'seconds per step':>28}{'views/s':>9}", end="")
    print(f"{'GFLOP/s':>9}{'products':>10}{'share':>7}")
    rows = []
    for arch, batch_size in BATCHES.items():
        row = measure(arch, turns, device, time.process_time if cpu_time else time.perf_counter)
        for precision in ("float32", "bfloat16"):
            values, found = row["seconds"][f"{precision} step"], row[precision]
            print(
                f"{arch:16}{precision:11}{row['operations'] / 2 / batch_size / 1e9:10.3f}{spread(values, 3):>28}",
                end="",
            )
            print(f"{2 * batch_size / median(values):9.0f}{found['step'] / 1e9:9.0f}", end="")
            print(f"{found['products'] / 1e9:10.0f}{found['share']:7.2f}", flush=True)
        rows.append(row | {"fastest": fastest})
    return rows

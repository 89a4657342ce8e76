"""Measure the images per second of training from image files, and of the same steps on tensors in memory.

    python benchmarks/feeding.py FOLDER            # a folder of photographs, which are repeated until there are enough
    python benchmarks/feeding.py FOLDER --quick    # ResNet-18, small views

The steps are ours with the fastest options of `benchmarks/step.py`. With a GPU, the workers have their own cores: a ratio of 1
means that the GPU never waits for images. On a CPU, network and workers share the cores, so the ratio is below 1.
"""

import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, seconds_in_turns, spread, write
from benchmarks.step import Ours
from src.config import ViewSettings
from src.data.datasets import open_folder
from src.data.decoding import check_decoding_on
from src.data.loaders import Batch, TrainLoader
from src.data.photographs import PhotoViews, published_views
from src.data.workers import available_workers
from src.methods.self_classifier import Config, SelfClassifier
from src.models.backbones import build_backbone


def main():
    made = parser(__doc__)
    made.add_argument("folder", help="folder of photographs")
    made.add_argument("--batch-size", type=int, help="number of images per step (default: 8 on a CPU, 256 on a GPU)")
    made.add_argument("--steps", type=int, help="number of steps per epoch (default: 12 on a CPU, 100 on a GPU)")
    made.add_argument(
        "--workers", type=int, default=-1, help="number of processes that decode (-1: one per available core)"
    )
    made.add_argument("--compile", action="store_true", help="also compile the backbone and the colour jitter")
    made.add_argument("--decode-on-gpu", action="store_true", help="decode on the device instead of in the workers")
    made.add_argument("--turns", type=int, default=3, help="number of timed epochs per side (default: 3)")
    arguments = parse(made)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True  # as in train.py
    if arguments.decode_on_gpu:
        check_decoding_on(device)
    where = machine("torch", "torchvision")
    print(in_words(where), flush=True)

    arch, sides, length = ("resnet18", (64, 32), 4096) if arguments.quick else ("resnet50", (224, 96), 65536)
    batch_size = arguments.batch_size or (256 if on_gpu else 8)
    steps = arguments.steps or (100 if on_gpu else 12)
    files = open_folder(arguments.folder, "test")
    rows = np.resize(np.arange(len(files)), steps * batch_size)
    data = files.keep(rows, files.labels.numpy()[rows], files.classes)
    recipes = published_views(ViewSettings(global_crops_size=sides[0], local_crops_size=sides[1]))
    views = PhotoViews(recipes, round(sides[0] * 256 / 224), compiled=arguments.compile)
    workers = available_workers() if arguments.workers < 0 else arguments.workers
    loader = TrainLoader(
        data,
        views,
        batch_size=batch_size,
        seed=0,
        device=device,
        workers=workers,
        decode_on_device=arguments.decode_on_gpu,
    )

    config = Config(queue_length=length)
    method = SelfClassifier(build_backbone(arch), config).to(device).train()
    stored = F.normalize(torch.randn(length, config.dim), dim=1).to(device)
    method.queue.push(stored, torch.arange(length, device=device))
    shapes = [(batch_size, 3, recipe.size, recipe.size) for recipe in recipes]
    ready = Batch([torch.randn(*shape, device=device) for shape in shapes], torch.arange(batch_size, device=device))
    ours = Ours(lambda: method, ready, torch.bfloat16 if on_gpu else None, True, arguments.compile)
    waited = []

    def on_tensors():
        for _ in range(steps):
            ours.step()

    def from_files():
        loader.waited = 0.0
        for batch in loader.epoch(len(waited)):
            ours.step(batch)
        waited.append(loader.waited)

    epochs = {"tensors in memory": on_tensors, "image files": from_files}
    seconds = seconds_in_turns(epochs, arguments.turns, torch.cuda.synchronize if on_gpu else lambda: None)
    loader.close()
    print(
        f"{arch}, 2 x {sides[0]}² + 6 x {sides[1]}², batch {batch_size}, {steps} steps, {device}, {workers} workers\n"
    )
    for name, values in seconds.items():
        print(f"{name:26}{spread(values, 2):24}s{steps * batch_size / median(values):10.1f} images/s")
    share = median(seconds["tensors in memory"]) / median(seconds["image files"])
    print(
        f"\nimage files reach {share:.2f} of the rate of tensors; an epoch waited {median(waited[1:]):.2f} s for files"
    )
    row = {"arch": arch, "batch_size": batch_size, "steps": steps, "workers": workers, "device": str(device)}
    write(arguments.json, where, [row | {"seconds": seconds, "waited": waited[1:], "share": share}])


if __name__ == "__main__":
    main()

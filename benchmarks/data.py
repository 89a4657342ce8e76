"""Measure the images per second and core of the data path, of the published pipeline with Pillow and of ours.

    python benchmarks/data.py FOLDER            # a folder of photographs
    python benchmarks/data.py FOLDER --quick

The views are those of the published recipe, two of 224 and six of 96 pixels. The published pipeline computes everything with
Pillow in a worker, one view after the other. Our worker only decodes and cuts. Colours, blur and normalisation run on whole
batches on the device of the network. On a CPU, both parts share the cores, so the row `together` tells the speed. With a GPU,
the rows of the worker tell it.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, seconds_in_turns, spread, write
from src.config import ViewSettings
from src.data.datasets import open_folder
from src.data.photographs import PhotoViews, published_views
from src.data.shrink import shrink
from src.preprocessing import IMAGENET_MEAN, IMAGENET_STD

GLOBAL, LOCAL = ((224, (0.4, 1.0)), (96, (0.05, 0.4)))  # the defaults of ViewSettings
SHORT_SIDE = 320


class Published:
    """The published recipe on Pillow images, one view after the other, built from the transforms of torchvision."""

    def __init__(self, num_global: int, num_local: int, sizes=(GLOBAL[0], LOCAL[0])):
        from torchvision import transforms

        def view(size, scale, blur, solarize):
            jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)

            def blurred(image):
                radius = float(torch.empty(1).uniform_(0.1, 2.0))
                return image.filter(ImageFilter.GaussianBlur(radius)) if torch.rand(1) < blur else image

            def solarized(image):
                return ImageOps.solarize(image) if torch.rand(1) < solarize else image

            bicubic = transforms.InterpolationMode.BICUBIC
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                    transforms.RandomHorizontalFlip(),
                    jitter,
                    transforms.RandomGrayscale(0.2),
                    blurred,
                    solarized,
                    transforms.ToTensor(),
                    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ]
            )

        first, other = view(sizes[0], GLOBAL[1], 0.1, 0.0), view(sizes[0], GLOBAL[1], 1.0, 0.2)
        self.views = [first, *[other] * (num_global - 1), *[view(sizes[1], LOCAL[1], 0.5, 0.0)] * num_local]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]


def opened(data, index: int) -> Image.Image:
    """Open an image as the loader of torchvision does."""
    with open(data.paths[index], "rb") as file:
        return Image.open(file).convert("RGB")


def from_files(folder: str, count: int, turns: int) -> list[tuple[str, list[float], int]]:
    """Time both pipelines on the same image files, and return (name, seconds of each turn, number of images) of each side."""
    data = open_folder(folder, "test")
    rows = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    data = data.keep(rows, data.labels.numpy()[rows], data.classes)
    with tempfile.TemporaryDirectory() as smaller:
        for i, path in enumerate(data.paths):
            if wrong := shrink(Path(path), Path(smaller) / f"{i:05}.jpg", short_side=SHORT_SIDE, quality=92):
                raise SystemExit(wrong)
        copy = open_folder(smaller, "test")
        in_memory = data.keeping(2**30)
        for i in range(len(data)):
            in_memory.decode(i)
        published = Published(2, 6)
        recipes = published_views(ViewSettings())
        views, compiled = PhotoViews(recipes, 256), PhotoViews(recipes, 256, compiled=True)
        indices = np.arange(len(data))
        kept: list = []

        batches = np.array_split(indices, max(len(indices) // 16, 1))

        def work(images):
            kept[:] = [views.cut([images.decode(i) for i in few], few, seed=0, epoch=0) for few in batches]

        def finish(views):
            for crops, few in zip(kept, batches, strict=True):
                views.finish(crops, few, seed=0, epoch=0)

        sides = {
            "published, decode and views": lambda: [published(opened(data, i)) for i in indices],
            "published, from the smaller copy": lambda: [published(opened(copy, i)) for i in indices],
            "ours, worker: decode and cut": lambda: work(data),
            "ours, worker, from the smaller copy": lambda: work(copy),
            "ours, worker, decoded images kept": lambda: work(in_memory),
            "ours, device part on this CPU": lambda: finish(views),
            "ours, device part --compile": lambda: finish(compiled),
        }
        seconds = seconds_in_turns(sides, turns)
    for how in ("on this CPU", "--compile"):
        parts = seconds["ours, worker: decode and cut"], seconds[f"ours, device part {how}"]
        seconds[f"ours, together {how}"] = [sum(turn) for turn in zip(*parts, strict=True)]
    return [(name, values, len(data)) for name, values in seconds.items()]


def from_memory(count: int, turns: int) -> list[tuple[str, list[float], int]]:
    """Time four views of images of 32 × 32 pixels, one by one with Pillow and in whole batches on the CPU."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    published = Published(2, 2, (32, 16))
    settings = ViewSettings(global_crops_size=32, local_crops_number=2, local_crops_size=16)
    views = PhotoViews(published_views(settings), 32)
    sides = {
        "32², 4 views: published": lambda: [published(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images],
        "32², 4 views: ours": lambda: [
            views(images[i].contiguous(), i.numpy(), seed=0, epoch=0) for i in torch.arange(count).split(256)
        ],
    }
    return [(name, values, count) for name, values in seconds_in_turns(sides, turns).items()]


def on_gpu(turns: int) -> list[tuple[str, list[float], int]]:
    """Time the device part of our pipeline on the GPU, with batches of 256 photographs."""
    recipes = published_views(ViewSettings())
    views, compiled = PhotoViews(recipes, 256), PhotoViews(recipes, 256, compiled=True)
    sizes = [GLOBAL[0]] * 2 + [LOCAL[0]] * 6
    crops = [torch.randint(0, 256, (256, 3, size, size), dtype=torch.uint8, device="cuda") for size in sizes]
    sides = {
        "ours, device part on the GPU": lambda: views.finish(crops, np.arange(256), seed=0, epoch=0),
        "ours, device part on the GPU --compile": lambda: compiled.finish(crops, np.arange(256), seed=0, epoch=0),
    }
    return [(name, values, 256) for name, values in seconds_in_turns(sides, turns, torch.cuda.synchronize).items()]


def main():
    made = parser(__doc__)
    made.add_argument("folder", help="folder of photographs")
    arguments = parse(made)
    torch.set_num_threads(1)
    where = machine("torch", "torchvision", "pillow")
    print(in_words(where), flush=True)
    count, small, turns = (32, 256, 2) if arguments.quick else (160, 1024, 5)
    in_memory = from_memory(small, turns)
    rows = from_files(arguments.folder, count, turns) + in_memory
    if torch.cuda.is_available():
        rows += on_gpu(turns)
    print(f"one core; images per second; seconds per {count} images: median (range) of {turns} turns\n")
    results = []
    for name, seconds, images in rows:
        reference = in_memory[0] if name.startswith("32²") else rows[0]
        ratio = median(reference[1]) / reference[2] / (median(seconds) / images)
        print(f"{name:40}{images / median(seconds):9.1f}  {spread(seconds, 2):22}{ratio:7.2f} × the published")
        results.append({"side": name, "images": images, "seconds": seconds, "ratio": ratio})
    write(arguments.json, where, results)


if __name__ == "__main__":
    main()

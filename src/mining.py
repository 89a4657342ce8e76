"""Find the nearest neighbours of the training images in the features of a network: python -m src.mining CHECKPOINT.

The file neighbors.npz is written beside the checkpoint. `train.py --method scan --pretrained CHECKPOINT` reads it there. Without
the file, SCAN finds the neighbours itself. The file holds fingerprints of the images and of the backbone, which are compared.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import files, fingerprints
from .checkpoint import read_weights
from .config import KnnEvalOptions, OneLineParser
from .data.arrays import Arrays, Damaged
from .data.datasets import Images, divide
from .errors import InputError, RunError, printable, run_script
from .evaluation.session import open_session
from .features import extract
from .logs import percent
from .releases import resolve
from .selection import label_agreement, nearest_others

NAME = "neighbors.npz"


class Neighbors(NamedTuple):
    """Tables as `selection.nearest_others` returns them; `held_out` is None if no images are held out."""

    train: Tensor
    held_out: Tensor | None


def of_backbone(checkpoint: str) -> str:
    """Return the SHA-256 of the backbone in a file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(resolve(checkpoint)).tensors.items()):
        if name.startswith("backbone."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(fingerprints.of_bytes(tensor))
    return digest.hexdigest()


def beside(checkpoint: str) -> Path:
    """Return the path of the file of neighbours that belongs to a checkpoint."""
    return resolve(checkpoint).parent / NAME


def expected(checkpoint: str, train: Images, held_out: Images | None, *, layer: str) -> dict[str, str]:
    """Return what the file of neighbours of these images must say about them."""
    return {
        "layer": layer,
        "weights": of_backbone(checkpoint),
        "train_images": fingerprints.of_data(train),
        "held_out_images": fingerprints.of_data(held_out) if held_out else "",
    }


def read(file: Path, wanted: dict[str, str], *, neighbors: int, select_neighbors: int) -> Neighbors:
    """Read a file of neighbours.

    Args:
        wanted: the result of `expected`.
        neighbors, select_neighbors: numbers of neighbours of each image, of which the file may hold more.

    Raises:
        InputError: if the file cannot be read, belongs to other images or another network, or holds too few neighbours.
    """
    advice = "mine again with python -m src.mining, or move the file away"
    try:
        with open(file, "rb") as opened:
            arrays = Arrays(opened)
            found = {name: bytes(arrays.read(name)).decode("ascii", "replace") for name in wanted}
            tables = [torch.from_numpy(arrays.read(name)) for name in ("train", "held_out")]
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; {advice}") from None
    except (Damaged, KeyError, ValueError) as error:
        raise InputError(f"{file}: no intact file of neighbours ({error}); {advice}") from None
    says = {
        "layer": "in another layer (--mine-from)",
        "weights": "with the weights of another checkpoint",
        "train_images": "among other training images, or with another --select-share",
        "held_out_images": "with other held-out images (--select-on, --select-share)",
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(f"{file}: the neighbours were found {says[name]}; {advice}")
    for table, k in zip(tables, (neighbors, select_neighbors if wanted["held_out_images"] else 0), strict=True):
        sound = (
            table.ndim == 2 and table.dtype == torch.int32 and bool((table >= 0).all() and (table < len(table)).all())
        )
        if not sound:
            raise InputError(f"{file}: no intact file of neighbours (positions out of range); {advice}")
        if len(table) and min(k, len(table) - 1) > table.shape[1] - 1:
            raise InputError(f"{file}: {table.shape[1] - 1} neighbours of each image, expected at least {k}; {advice}")
    train, held_out = (table[:, : k + 1] for table, k in zip(tables, (neighbors, select_neighbors), strict=True))
    return Neighbors(train, held_out if wanted["held_out_images"] else None)


def mine(args: argparse.Namespace) -> None:
    """Find the neighbours, write the file, and print how often neighbours have the label of their image."""
    layer = args.mine_from
    options = KnnEvalOptions(
        checkpoint=args.checkpoint,
        data=args.data,
        data_root=args.data_root,
        device=args.device,
        output_dir=args.output_dir,
    )
    splits = ("train", "test") if args.select_on == "test" and args.select_share else ("train",)
    part: Any = "head" if layer == "embedding" else "backbone"
    session = open_session(options, part=part, splits=splits, batch_size=args.batch_size)
    train, held_out = session.splits["train"], session.splits.get("test")
    if args.select_share and args.select_on == "train":
        train, held_out = divide(train, args.select_share)
    arrays: dict[str, Any] = {
        name: np.frombuffer(text.encode(), dtype=np.uint8)
        for name, text in expected(args.checkpoint, train, held_out, layer=layer).items()
    }
    for name, images, k in (("train", train, args.neighbors), ("held_out", held_out, args.select_neighbors)):
        if images is None:
            arrays[name] = np.zeros((0, 0), np.int32)
            continue
        if len(images) < 2:
            raise InputError(f"{len(images)} images, expected at least 2 to find neighbours: add images")
        rows = extract(
            session.network,
            images,
            session.views,
            split=name,
            layer="head" if layer == "embedding" else "backbone",
            batch_size=args.batch_size,
            device=session.device,
        )
        found = nearest_others(rows.to(session.device), min(k, len(images) - 1)).cpu()
        arrays[name] = found.numpy()
        agreement = label_agreement(images.labels, found)
        labels = "no labels" if agreement is None else f"{percent(agreement)} % have the label of their image"
        print(f"{name}: {found.shape[1] - 1} neighbours of each of {len(images):,} images; {labels}")
    file = Path(args.output_dir) / NAME if args.output_dir else beside(args.checkpoint)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as opened:
            np.savez(opened, **arrays)
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror}); give --output-dir") from None
    print(f"wrote {printable(file)}")


def main() -> None:
    parser = OneLineParser(
        prog="python -m src.mining",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file, a run folder, or the name of a released model")
    parser.add_argument("--data", default="", help="images; empty: those that the checkpoint names")
    parser.add_argument("--data-root", default="", help="folder of the files of cifar10, cifar100-20 or stl10")
    parser.add_argument("--neighbors", type=int, default=20, help="number of neighbours of each training image")
    parser.add_argument(
        "--mine-from", choices=("embedding", "backbone"), default="embedding", help="features that are compared"
    )
    parser.add_argument("--select-on", choices=("train", "test"), default="train", help="as in train.py --method scan")
    parser.add_argument("--select-share", type=float, default=0.1, help="as in train.py --method scan")
    parser.add_argument("--select-neighbors", type=int, default=5, help="as in train.py --method scan")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on")
    parser.add_argument("--output-dir", default="", help="folder of the file (empty: that of the checkpoint)")
    args = parser.parse_args()
    if args.neighbors < 1 or args.select_neighbors < 1 or args.batch_size < 1 or not 0 <= args.select_share < 1:
        parser.error(
            "expected --neighbors, --select-neighbors and --batch-size of at least 1, and 0 <= --select-share < 1"
        )
    mine(args)


if __name__ == "__main__":
    run_script(main)

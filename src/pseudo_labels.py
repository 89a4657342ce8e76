"""Write the labels that SeLa has given to the training images: python -m src.pseudo_labels --checkpoint runs/RUN.

The file labels.csv has the columns path, head and label. `train.py --method sela --labels FILE` trains a new network on it.
"""

import argparse
from pathlib import Path
from typing import Any

from .checkpoint import read_weights
from .config import OneLineParser
from .data.datasets import open_data
from .data.labels import names_of, write_labels
from .errors import InputError, RunError, printable, run_script
from .releases import resolve


def write(checkpoint: str, output: Path, *, data: str = "", data_root: str = "") -> str:
    """Write the labels of a checkpoint, and return a line that says what was written.

    Args:
        checkpoint: a checkpoint of train.py, a run folder, or a file of SeLa's authors with the entry L.
        output: the CSV file.
        data: the training images, as in --data; "": those that the checkpoint names.
        data_root: folder of the files of a data set of torchvision; "": the one that the checkpoint names.

    Raises:
        InputError: if the checkpoint has no labels, or has labels of another number of images.
        RunError: if the file cannot be written.
    """
    weights = read_weights(resolve(checkpoint))
    labels = weights.tensors.get("labels")
    if labels is None or labels.ndim != 2 or not labels.numel():
        raise InputError(f"--checkpoint {checkpoint}: holds no labels: expected a checkpoint of --method sela")
    known: dict[str, Any] = weights.record.get("config", {})
    if not data and not known.get("data"):
        raise InputError(f"--checkpoint {checkpoint}: does not name its training images: give --data")
    if data and data != known.get("data"):
        known = {}
    images = open_data(
        data or known["data"],
        "train",
        root=data_root or known.get("data_root", ""),
        subset=known.get("subset", ""),
        subset_file=known.get("subset_file", ""),
        unlabelled=known.get("unlabelled", False),
        val_share=known.get("val_share", 0.0),
    )
    if len(images) != labels.shape[1]:
        raise InputError(
            f"--checkpoint {checkpoint}: labels of {labels.shape[1]:,} images, but the data set has {len(images):,}: give its own "
            "training images with --data"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_labels(output, names_of(images), labels.numpy())
    except OSError as error:
        raise RunError(f"--output {output}: cannot be written ({error.strerror}); give another path") from None
    return f"wrote {labels.shape[0]} labels of each of {labels.shape[1]:,} images to {printable(output)}"


def main() -> None:
    parser = OneLineParser(
        prog="python -m src.pseudo_labels",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a file or a run folder of --method sela")
    parser.add_argument("--data", default="", help="training images; empty: those that the checkpoint names")
    parser.add_argument("--data-root", default="", help="folder of the files of cifar10, cifar100-20 or stl10")
    parser.add_argument("--output", type=Path, default=Path("labels.csv"), help="the file to write")
    args = parser.parse_args()
    print(write(args.checkpoint, args.output, data=args.data, data_root=args.data_root))


if __name__ == "__main__":
    run_script(main)

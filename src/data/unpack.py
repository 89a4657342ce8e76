"""Write a data set in memory as a flat folder of image files without labels: python -m src.data.unpack DATA FOLDER."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import OneLineParser, require_at_least
from ..errors import InputError, run_script
from .datasets import FeatureRows, MemoryImages, open_data


def write_files(data: MemoryImages, folder: Path, *, most: int = 0) -> int:
    """Write images as PNG files with the names 00000.png, 00001.png and so on, and return their number.

    Args:
        folder: must be empty or missing.
        most: largest number of images; 0: all.

    Raises:
        InputError: if the folder is not empty or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: name a new folder")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}, expected a new folder: name another one") from None
    number = min(most or len(data), len(data))
    for index in range(number):
        Image.fromarray(np.ascontiguousarray(data.picture(index))).save(folder / f"{index:05}.png")
    return number


def main() -> None:
    parser = OneLineParser(
        prog="python -m src.data.unpack",
        description="Write a data set as a flat folder of PNG files without labels.",
        allow_abbrev=False,
    )
    parser.add_argument("data", help="digits, cifar10, cifar100-20 or stl10")
    parser.add_argument("folder", type=Path, help="new folder for the files")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="split to write (default: test)")
    parser.add_argument("--most", type=int, default=0, help="largest number of images (default: all)")
    parser.add_argument("--data-root", default="", help="folder of the data set's own files")
    parser.add_argument("--download", action="store_true", help="download the data set into --data-root first")
    options = parser.parse_args(sys.argv[1:])
    require_at_least(options, most=0)
    data = open_data(options.data, options.split, root=options.data_root, download=options.download)
    if not isinstance(data, MemoryImages) or isinstance(data, FeatureRows):
        raise InputError(f"{options.data} is no data set in memory: expected digits, cifar10, cifar100-20 or stl10")
    print(f"wrote {write_files(data, options.folder, most=options.most):,} images to {options.folder}")


if __name__ == "__main__":
    run_script(main)

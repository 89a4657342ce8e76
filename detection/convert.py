"""Convert the ResNet-50 in a checkpoint to detectron2's format.

python detection/convert.py runs/published/checkpoint.pt sc_800ep_train.pkl
"""

import pickle
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection import config
from detection.errors import InputError, RunError, printable, run_program

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    options = config.parse_convert()
    from detection import checkpoints, files

    output = Path(options["output"])
    if output.suffix != ".pkl":
        raise InputError(
            f"{output}: detectron2 recognises the format by the ending .pkl: name a file that ends in .pkl"
        )
    if output.exists():
        raise InputError(f"{output} exists already: name another file")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder: make it, or name another file")
    content = as_detectron2(checkpoints.read_backbone(options["checkpoint"]))
    try:
        with files.replacing(output) as file:
            pickle.dump(content, file)
    except OSError as error:
        raise RunError(
            f"{output} cannot be written ({error.strerror}): free some space, or name another file"
        ) from None
    print(f"{printable(output)}: {len(content['model'])} arrays of a ResNet-50 for detectron2")


def detectron2_name(name: str) -> str:
    """Return detectron2's name of a tensor of torchvision's ResNet: layer1.0.bn1.weight → res2.0.conv1.norm.weight."""
    if "layer" not in name:
        name = f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def as_detectron2(backbone: "dict[str, Tensor]") -> dict[str, Any]:
    """Return the content of a file of weights for detectron2, with the arrays in numpy."""
    model = {detectron2_name(name): tensor.numpy() for name, tensor in backbone.items()}
    return {"model": model, "__author__": "SC", "matching_heuristics": True}


if __name__ == "__main__":
    run_program(main)

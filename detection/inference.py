"""Detections of a data set in the pixels of its images."""

import time
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from . import distributed
from .annotations import Annotations, Picture
from .coco import mask_tools
from .data import TestPictures, test_batches
from .models import Detector


@torch.inference_mode()
def detect(
    model: Detector,
    annotations: Annotations,
    *,
    shorter: int,
    longest: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    workers: int = 0,
    say: bool = False,
) -> list[dict[str, Any]]:
    """Return the detections of all pictures on every rank, in the order of the annotations.

    Each entry has the number of the picture, and lists of boxes, labels and scores, with masks also of run-length codes. A
    picture that cannot be read has no detections, and is counted in the annotations' problems.

    Args:
        shorter, longest: sides of the pictures in pixels.
        say: print progress.
    """
    model.eval()
    pictures = TestPictures(annotations, shorter=shorter, longest=longest)
    found: dict[int, dict[str, Any]] = {}
    unusable: list[str] = []
    printed = time.monotonic()
    for done, (index, image, problem) in enumerate(test_batches(pictures, workers=workers), start=1):
        picture = annotations.pictures[index]
        found[index] = {"number": picture.number, "boxes": [], "labels": [], "scores": []}
        if image is None:
            unusable.append(problem)
        else:
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                (one,) = model([image.to(device)])
            found[index] |= in_pixels(one, picture, width=image.shape[-1], height=image.shape[-2])
        if say and (time.monotonic() > printed + 10 or done == len(pictures)):
            printed = time.monotonic()
            print(f"{done:,} of {len(pictures):,} images on rank 0", flush=True)
    together: dict[int, dict[str, Any]] = {}
    for own, problems in distributed.gather_objects((found, unusable)):
        together |= own
        for problem in problems:
            annotations.problems.add("images that cannot be read, which count as without detections", problem)
    return [together[index] for index in range(len(annotations.pictures))]


def in_pixels(found: dict[str, Tensor], picture: Picture, *, width: int, height: int) -> dict[str, Any]:
    """Return detections in a resized image as lists in the pixels of the picture.

    Args:
        width, height: of the resized image.
    """
    scale = found["boxes"].new_tensor([picture.width / width, picture.height / height] * 2)
    boxes = found["boxes"] * scale
    result: dict[str, Any] = {
        "boxes": boxes.tolist(),
        "labels": found["labels"].tolist(),
        "scores": found["scores"].tolist(),
    }
    if "masks" in found:
        tools, result["masks"] = mask_tools(), []
        for mask, box in zip(
            found["masks"], boxes, strict=True
        ):  # one by one: a hundred masks of a photograph are large
            pasted = paste_masks_in_image(mask[None], box[None], (picture.height, picture.width))[0, 0] >= 0.5
            code = tools.encode(pasted.to(torch.uint8).cpu().numpy().copy(order="F"))
            result["masks"].append({"size": list(code["size"]), "counts": code["counts"].decode()})
    return result

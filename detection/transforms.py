"""Decode an image as its annotation sees it, and resize and mirror it with its objects."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .annotations import Picture, Thing

ORIENTATION = 0x0112  # the tag of EXIF


class Unreadable(Exception):
    """An image file cannot be used."""


def open_image(picture: Picture) -> Image.Image:
    """Decode an image in RGB, in the orientation in which its annotation gives the size.

    Some annotations were made on images that were rotated as their EXIF data says, others on the stored pixels. The size
    tells, unless the image is square or turned by 180 degrees; then the EXIF data is followed.

    Raises:
        Unreadable: if the file is damaged, or its size is that of the annotation in neither orientation.
    """
    try:
        with Image.open(picture.file) as image:
            stored = image.convert("RGB")
            orientation = image.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{picture.file.name} ({type(error).__name__})") from None
    wanted = (picture.width, picture.height)
    stored.getexif()[ORIENTATION] = orientation
    rotated = ImageOps.exif_transpose(stored) if orientation != 1 else stored
    for candidate in (rotated, stored):
        if candidate.size == wanted:
            return candidate
    width, height = stored.size
    raise Unreadable(f"{picture.file.name} ({width} x {height}, annotated as {wanted[0]} x {wanted[1]})")


def new_size(width: int, height: int, *, shorter: int, longer: int) -> tuple[int, int]:
    """Return width and height such that the shorter side has a given length, unless the longer one would exceed its limit."""
    scale = min(shorter / min(width, height), longer / max(width, height))
    return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)


def transform(
    image: Image.Image, things: Sequence[Thing], *, size: tuple[int, int], mirror: bool, masks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Resize an image, and mirror it if asked, with its objects. Objects that vanish are left out.

    Args:
        size: new width and height.

    Returns:
        The image (3, H, W), uint8; and boxes (G, 4), labels (G,), with masks also masks (G, H, W), uint8.
    """
    scale = np.array([size[0] / image.width, size[1] / image.height])
    resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    if mirror:
        resized = ImageOps.mirror(resized)
    boxes, labels, kept_masks = [], [], []
    for thing in things:
        box = (np.array(thing.box).reshape(2, 2) * scale).reshape(4)
        if mirror:
            box[[0, 2]] = size[0] - box[[2, 0]]
        if (box[2:] - box[:2]).min() <= 1e-5:
            continue
        if masks:
            mask = draw_mask(thing.mask, scale=scale, size=size, mirror=mirror)
            if not mask.any():
                continue
            kept_masks.append(torch.from_numpy(mask))
        boxes.append(box)
        labels.append(thing.label)
    target = {
        "boxes": torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    if masks:
        target["masks"] = torch.stack(kept_masks) if kept_masks else torch.zeros(0, size[1], size[0], dtype=torch.uint8)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous(), target


def draw_mask(mask: Any, *, scale: np.ndarray, size: tuple[int, int], mirror: bool) -> np.ndarray:
    """Return the (H, W) uint8 mask of an object in the resized image.

    Polygons are scaled and then drawn. A run-length code is decoded and resampled to the nearest pixel.
    """
    from .coco import decode_mask, mask_tools

    tools, (width, height) = mask_tools(), size
    if isinstance(mask, dict):
        code = mask if isinstance(mask["counts"], str | bytes) else tools.frPyObjects(mask, *mask["size"])
        drawn = Image.fromarray(decode_mask(code)).resize(size, Image.Resampling.NEAREST)
        return np.array(ImageOps.mirror(drawn) if mirror else drawn)
    polygons = []
    for polygon in mask:
        points = np.array(polygon, dtype=float).reshape(-1, 2) * scale
        if mirror:
            points[:, 0] = width - points[:, 0]
        polygons.append(points.flatten().tolist())
    return decode_mask(tools.merge(tools.frPyObjects(polygons, height, width)))

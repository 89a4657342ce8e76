"""Read annotations in COCO's format, and write them and detections for COCO's evaluators."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import Annotations, Picture, Problems, Thing, usable_box
from .errors import InputError, printable

COCO_CLASSES = 80


def read_coco(annotations: Path, images: Path, *, masks: bool) -> Annotations:
    """Read a file of instances.

    Args:
        annotations: JSON file with the lists images, annotations and categories.
        images: folder with the image files.
        masks: read the segmentations too. An object without one is left out then.

    Raises:
        InputError: if a file or folder is missing, or if the file is not in COCO's format.
    """
    content = _load(annotations)
    if not images.is_dir():
        raise InputError(f"{images}: no such folder, expected the images of {annotations.name}: correct the path")
    problems = Problems()
    try:
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        label_of = {number: place for place, (number, _) in enumerate(categories, start=1)}
        if len(label_of) < max(len(categories), 1):
            raise ValueError("no categories" if not categories else "two categories with one id")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{annotations}: bad categories ({printable(error)}), expected id and name: correct the file"
        ) from None
    present = set(os.listdir(images))
    pictures: dict[int, Picture] = {}
    missing = set()
    for entry in content["images"]:
        try:
            name, number, width, height = (
                str(entry["file_name"]),
                int(entry["id"]),
                int(entry["width"]),
                int(entry["height"]),
            )
        except (KeyError, TypeError, ValueError):
            problems.add("entries of images that cannot be read", entry)
            continue
        if name in present or (images / name).is_file():
            pictures[number] = Picture(images / name, number, width, height)
        else:
            missing.add(number)
            problems.add("images that are missing", name)
    for entry in content["annotations"]:
        _add(entry, pictures, missing=missing, label_of=label_of, problems=problems, masks=masks)
    if not pictures:
        raise InputError(
            f"{annotations}: none of its {len(content['images'])} images is in {images}: name the folder of these images"
        )
    names = [name for _, name in categories]
    return Annotations(str(annotations), list(pictures.values()), names, [number for number, _ in categories], problems)


def _load(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that has the lists of COCO's format."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected annotations in COCO's format: correct the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({printable(error)}): name a file in COCO's format") from None
    wanted = ("images", "annotations", "categories")
    lists = isinstance(content, dict) and all(isinstance(content.get(name), list) for name in wanted)
    if not lists:
        raise InputError(f"{path}: expected the lists {', '.join(wanted)}: name a file in COCO's format")
    return content


def _add(
    entry: Any,
    pictures: dict[int, Picture],
    *,
    missing: set[int],
    label_of: dict[int, int],
    problems: Problems,
    masks: bool,
) -> None:
    """Add one annotated object to its picture, or count why it cannot be used."""
    try:
        number, image, category = entry.get("id", "?"), int(entry["image_id"]), int(entry["category_id"])
        x, y, width, height = (float(side) for side in entry["bbox"])
        crowd, area, mask = (
            bool(entry.get("iscrowd", 0)),
            float(entry.get("area", width * height)),
            entry.get("segmentation"),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        problems.add("annotations that cannot be read", entry)
        return
    name = f"annotation {number}"
    if image in missing:
        problems.add("annotations of images that are missing", name)
        return
    if image not in pictures:
        problems.add("annotations of images that the file does not list", f"{name} of image {image}")
        return
    if category not in label_of:
        problems.add("annotations of categories that the file does not list", f"{name} of category {category}")
        return
    picture = pictures[image]
    box = usable_box(
        (x, y, x + width, y + height), width=picture.width, height=picture.height, name=name, problems=problems
    )
    if box is None:
        return
    if masks and not _is_mask(mask, picture):
        problems.add("annotations without a usable segmentation", name)
        return
    picture.things.append(Thing(box, label_of[category], mask=mask if masks else None, area=area, crowd=crowd))


def _is_mask(mask: Any, picture: Picture) -> bool:
    """Return whether a segmentation consists of polygons of at least three points, or is a code of the picture's size."""
    if isinstance(mask, dict):
        return mask.get("size") == [picture.height, picture.width] and isinstance(mask.get("counts"), str | list)
    return (
        isinstance(mask, list)
        and len(mask) > 0
        and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(x, int | float) and math.isfinite(x) for x in polygon)
            for polygon in mask
        )
    )


def as_coco(annotations: Annotations) -> dict[str, Any]:
    """Return annotations as the content of a file in COCO's format. It contains only what can be used."""
    things = [(picture, thing) for picture in annotations.pictures for thing in picture.things]
    entries = []
    for number, (picture, thing) in enumerate(things, start=1):
        x0, y0, x1, y1 = thing.box
        entry = {
            "id": number,
            "image_id": picture.number,
            "category_id": annotations.category_ids[thing.label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": thing.area,
            "iscrowd": int(thing.crowd),
        }
        entries.append(entry | ({"segmentation": thing.mask} if thing.mask is not None else {}))
    return {
        "info": {},
        "images": [
            {"id": picture.number, "file_name": picture.file.name, "width": picture.width, "height": picture.height}
            for picture in annotations.pictures
        ],
        "annotations": entries,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotations.category_ids, annotations.classes, strict=True)
        ],
    }


def as_results(found: Iterable[dict], annotations: Annotations) -> list[dict[str, Any]]:
    """Return detections as the list that COCO's evaluators read.

    Args:
        found: for each picture its number, and lists of boxes, labels and scores, with masks also of run-length codes.
    """
    results = []
    for one in found:
        masks = one.get("masks") or [None] * len(one["boxes"])
        for box, label, score, mask in zip(one["boxes"], one["labels"], one["scores"], masks, strict=True):
            x0, y0, x1, y1 = box
            result = {
                "image_id": one["number"],
                "category_id": annotations.category_ids[label - 1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            results.append(result | ({"segmentation": mask} if mask is not None else {}))
    return results


def mask_tools() -> Any:
    """Return the module that encodes and decodes masks.

    Raises:
        InputError: if pycocotools is not installed.
    """
    return _import("pycocotools.mask", "masks need it")


def decode_mask(code: Any) -> np.ndarray:
    """Return the (H, W) uint8 mask of a run-length code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools does not know numpy 2's `copy` yet
        return mask_tools().decode(code)


def _import(name: str, why: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(f"the package {package} is not installed, {why}: pip install {package}") from None

"""Pictures with annotated objects, and the record of everything in their files that cannot be used."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, shown

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside the box


@dataclass
class Thing:
    """An annotated object.

    Attributes:
        box: inside the picture.
        label: position of the class in the list of classes, from 1.
        mask: polygons [[x, y, x, y, ...], ...], a run-length code as in COCO, or None.
        area: pixels of the mask, by which COCO tells small from large objects.
        crowd: a group of objects; left out in training and ignored in evaluation.
        difficult: ignored in evaluation, as VOC does.
    """

    box: Box
    label: int
    mask: Any = None
    area: float = 0.0
    crowd: bool = False
    difficult: bool = False


@dataclass
class Picture:
    """An image file and its objects. The size is that of the annotation file; VOC calls the number a name."""

    file: Path
    number: int | str
    width: int
    height: int
    things: list[Thing] = field(default_factory=list)


class Problems:
    """Counts what cannot be used and keeps the first names of each kind."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: object) -> None:
        """Count one problem. `kind` is a plural noun, such as "images that are missing"."""
        self.names.setdefault(kind, []).append(str(name))

    def lines(self) -> Iterator[str]:
        """Yield one line for each kind of problem."""
        for kind, names in self.names.items():
            yield f"{len(names):,} {kind}: {shown(names)}"

    def counts(self) -> dict[str, int]:
        """Return {kind: number}."""
        return {kind: len(names) for kind, names in self.names.items()}


@dataclass
class Annotations:
    """The content of a data set's annotation files.

    Attributes:
        source: where it comes from, for messages.
        pictures: those whose file exists, in the order of the annotation file.
        classes: names; the label of a class is its position + 1.
        category_ids: COCO's numbers of the classes.
        problems: what was left out.
    """

    source: str
    pictures: list[Picture]
    classes: list[str]
    category_ids: list[int]
    problems: Problems

    def for_training(self) -> "Annotations":
        """Return the same without crowds and without pictures that have no object.

        Raises:
            InputError: if nothing remains.
        """
        kept = []
        for picture in self.pictures:
            things = [thing for thing in picture.things if not thing.crowd]
            if things:
                kept.append(Picture(picture.file, picture.number, picture.width, picture.height, things))
            else:
                self.problems.add("images without objects, which training leaves out", picture.file.name)
        if not kept:
            found = "; ".join(self.problems.lines()) or "no images"
            raise InputError(f"{self.source}: no image with an object remains ({found}): correct the annotations")
        return Annotations(self.source, kept, self.classes, self.category_ids, self.problems)

    def fingerprint(self) -> str:
        """Return 16 digits that differ if the pictures, their objects or the classes differ. The folder does not count."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for picture in self.pictures:
            digest.update(repr((picture.file.name, picture.width, picture.height)).encode())
            digest.update(repr([(thing.box, thing.label) for thing in picture.things]).encode())
        return digest.hexdigest()[:16]


def usable_box(box: Box, *, width: int, height: int, name: str, problems: Problems) -> Box | None:
    """Return the part of a box that lies inside a picture, or None if there is none. Problems are counted."""
    x0, y0, x1, y1 = box
    if not all(abs(side) < 1e9 for side in box) or x1 <= x0 or y1 <= y0:  # NaN fails the first comparison
        problems.add("boxes of zero area", name)
        return None
    inside = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        problems.add("boxes outside their image", name)
        return None
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 1.0:  # a pixel is a matter of convention
        problems.add("boxes partly outside their image, which are cut", name)
    return inside


def check_classes(annotations: Annotations, classes: list[str]) -> None:
    """Check that a data set has the classes for which a detector was trained, in the same order.

    Raises:
        InputError: if not.
    """
    if annotations.classes == classes:
        return
    missing = [name for name in classes if name not in annotations.classes]
    more = [name for name in annotations.classes if name not in classes]
    parts = [f"missing: {shown(missing)}"] if missing else []
    parts += [f"not in the detector: {shown(more)}"] if more else []
    raise InputError(
        f"{annotations.source}: {len(annotations.classes)} categories, expected the {len(classes)} of the detector "
        f"({'; '.join(parts) or 'in another order'}): name annotations with the same categories"
    )

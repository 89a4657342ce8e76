"""Read Pascal VOC's annotations, and compute its average precision."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .annotations import Annotations, Picture, Problems, Thing, usable_box
from .errors import InputError

CLASSES = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
    ),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))  # of the intersection over union


def read_voc(data: Path, sets: Sequence[str]) -> Annotations:
    """Read sets of VOC.

    Args:
        data: folder that holds VOC2007, VOC2012, ...
        sets: year and name of each set, as in "2007_trainval".

    Raises:
        InputError: if a file or folder is missing, or if no object belongs to one of VOC's classes.
    """
    problems, pictures = Problems(), []
    for chosen in sets:
        year, _, name = chosen.partition("_")
        folder = data / f"VOC{year}"
        listing = folder / "ImageSets" / "Main" / f"{name}.txt"
        try:
            # the lists of single classes have a second column
            names = [line.split()[0] for line in listing.read_text(errors="replace").splitlines() if line.strip()]
        except OSError as error:
            raise InputError(
                f"{listing}: {error.strerror}, expected the list of {chosen}: correct --data or --sets"
            ) from None
        for number in names:
            picture = _read_picture(folder, number, problems=problems)
            if picture is not None:
                pictures.append(picture)
    source = f"{data} ({', '.join(sets)})"
    if not pictures:
        found = "; ".join(problems.lines()) or "the lists are empty"
        raise InputError(f"{source}: no image with annotations remains ({found}): correct --data")
    return Annotations(source, pictures, list(CLASSES), list(range(1, len(CLASSES) + 1)), problems)


def _read_picture(folder: Path, number: str, *, problems: Problems) -> Picture | None:
    """Read one annotation file. Return None if it or the image is missing."""
    file, path = folder / "JPEGImages" / f"{number}.jpg", folder / "Annotations" / f"{number}.xml"
    if not file.is_file():
        problems.add("images that are missing", file.name)
        return None
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except FileNotFoundError:
        problems.add("images without annotation", file.name)
        return None
    except (ElementTree.ParseError, ValueError):
        problems.add("annotation files that cannot be read", path.name)
        return None
    picture = Picture(file, number, width, height)
    for place, entry in enumerate(root.iter("object"), start=1):
        name = f"object {place} of {path.name}"
        label = (entry.findtext("name") or "").strip()
        if label not in CLASSES:
            problems.add("objects of classes that VOC does not have", f"{label or 'unnamed'} ({name})")
            continue
        try:
            sides = {side: float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")}
        except ValueError:
            problems.add("objects without a readable box", name)
            continue
        # VOC counts pixels from 1, and the last pixel belongs to the box.
        box = usable_box(
            (sides["xmin"] - 1, sides["ymin"] - 1, sides["xmax"], sides["ymax"]),
            width=width,
            height=height,
            name=name,
            problems=problems,
        )
        if box is not None:
            area = (box[2] - box[0]) * (box[3] - box[1])
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            picture.things.append(Thing(box, CLASSES.index(label) + 1, area=area, difficult=difficult))
    return picture


# --------------------------------------------------------------------------------------------------------------------
# average precision


def average_precision(recall: np.ndarray, precision: np.ndarray, *, rule: str) -> float:
    """Return the average precision of a curve.

    Args:
        recall, precision: (D,) after the first, second, ... detection by falling score.
        rule: "11-point", the mean over the recalls 0, 0.1, ..., 1 of the highest precision at this recall or above (VOC 2007);
            or "area", the area below the curve of these highest precisions (VOC 2010 and later).
    """
    if rule == "11-point":
        points = np.linspace(0, 1, 11)  # a recall of 0.3 may be a little below 0.3 in floating point
        return float(np.mean([max(precision[recall >= point - 1e-9], default=0.0) for point in points]))
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * highest))


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box (4,) with others (G, 4); x1 and y1 are outside of the boxes."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return common / (areas - common)


def class_precision(
    annotations: Annotations, found: Sequence[dict], *, label: int, threshold: float, rule: str
) -> float | None:
    """Return the average precision of one class, or None if no object of it counts.

    A detection is right if its best overlap with an object of the picture reaches the threshold, and no detection with a higher
    score took this object. Detections of difficult objects do not count. Source: the development kit of VOC.

    Args:
        found: for each picture its number, and lists of boxes, labels and scores.
        label: from 1.
        threshold: of the intersection over union; it must be reached.
    """
    wanted = {
        picture.number: [thing for thing in picture.things if thing.label == label] for picture in annotations.pictures
    }
    total = sum(not thing.difficult for things in wanted.values() for thing in things)
    if not total:
        return None
    candidates = [
        (score, place, one["number"], box)
        for place, one in enumerate(found)
        for box, score, kind in zip(one["boxes"], one["scores"], one["labels"], strict=True)
        if kind == label
    ]
    taken: set[tuple[int | str, int]] = set()
    right = []
    for _, _, number, box in sorted(candidates, key=lambda candidate: -candidate[0]):
        things = wanted[number]
        shares = overlaps(np.array(box), np.array([thing.box for thing in things])) if things else np.zeros(0)
        best = int(shares.argmax()) if len(shares) else -1
        if best < 0 or shares[best] < threshold:
            right.append(False)
        elif not things[best].difficult:
            right.append((number, best) not in taken)
            taken.add((number, best))
    hits = np.cumsum(np.array(right, dtype=float))
    return average_precision(hits / total, hits / np.arange(1, len(hits) + 1), rule=rule)


def voc_scores(annotations: Annotations, found: Sequence[dict], *, rule: str) -> dict[str, float]:
    """Return AP, AP50 and AP75 as fractions: means over the classes that occur.

    AP is also the mean over the thresholds 0.5, 0.55, ..., 0.95.

    Args:
        found: see `class_precision`.
        rule: see `average_precision`.
    """
    means = []
    for threshold in THRESHOLDS:
        scores = [
            class_precision(annotations, found, label=label, threshold=threshold, rule=rule)
            for label in range(1, len(annotations.classes) + 1)
        ]
        present = [score for score in scores if score is not None]
        means.append(float(np.mean(present)) if present else 0.0)
    return {"ap": float(np.mean(means)), "ap50": means[0], "ap75": means[5]}

"""Find the images, the splits and the classes of a folder."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import BUILT_IN_DATA
from ..errors import InputError
from .formats import IMAGE_SUFFIXES, describe_others
from .listing import list_images

SPLITS = ("train", "val", "test")


class Found(NamedTuple):
    """The image files of one split.

    Attributes:
        paths: N paths.
        labels: (N,) int64, -1 where the class is unknown.
        classes: names of the classes; label k belongs to `classes[k]`.
        others: {suffix: number} of the files that are no images.
    """

    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    others: Mapping[str, int] = {}


def find_images(folder: str, split: str, *, unlabelled: bool = False, val_share: float = 0.0) -> Found:
    """Find the images of one split of a folder.

    A folder with a subfolder `train/`, `val/` or `test/` has splits: the training split is `train/`, the test split is `val/`
    or, without it, `test/`. A folder without them has only one set of images, and both splits consist of all of them, or
    `val_share` holds out a part for the test split.

    The subfolders of a split, or of a folder without splits, are the classes, as in ImageNet. If there are images beside the
    subfolders, or fewer than two subfolders with images, a folder without splits has no labels.

    Args:
        split: "train" or "test".
        unlabelled: give all images the label -1, also those in class folders.
        val_share: share of the images of each class that the test split gets, 0 <= share < 1; 0: both splits are equal. The
            choice depends on nothing but the sorted list of the images.

    Raises:
        InputError: if the folder or the split is missing, if it holds no image, or if `val_share` does not fit it.
    """
    top = _existing(folder)
    splits = [name for name in SPLITS if (top / name).is_dir()]
    if not splits:
        found = _all_below(top, folder, may_have_classes=not unlabelled)
        return _part(found, split, folder=folder, share=val_share) if val_share else found
    if val_share:
        raise InputError(
            f"--val-share is for folders without splits, but --data {folder} has {', '.join(splits)}: drop the flag"
        )
    wanted = ["train"] if split == "train" else ["val", "test"]
    present = [name for name in wanted if name in splits]
    if not present:
        raise InputError(
            f"--data {folder}: the folder has {', '.join(splits)}, but the {split} split needs {' or '.join(wanted)}: add it"
        )
    top = top / present[0]
    classes = _class_names(top)
    if unlabelled or not classes:
        return _flat(top, f"--data {folder}: no image in {present[0]}/")
    others: Counter[str] = Counter()
    by_class = list_images(top, classes, others=others)
    if not any(by_class):
        raise InputError(
            f"--data {folder}: the {len(classes)} class folders in {present[0]}/ hold no image{_but(others)}: add images"
        )
    # The training split defines the labels: a class without a folder in the test split must not shift the other labels.
    names = _class_names(Path(folder) / "train") if "train" in splits else classes
    return _labelled(classes, by_class, names + [name for name in classes if name not in names], others=others)


def _existing(folder: str) -> Path:
    if not folder:
        raise InputError(f"--data is empty, expected a folder of images or one of {', '.join(BUILT_IN_DATA)}")
    top = Path(folder)
    try:
        is_folder = top.is_dir()
    except OSError as error:  # a name that is too long
        raise InputError(f"--data {folder}: {error.strerror}: pass the path of a folder") from None
    if not is_folder:
        raise InputError(
            f"--data {folder}: no such folder, expected a folder of images or one of {', '.join(BUILT_IN_DATA)}"
        )
    return top


def _all_below(top: Path, folder: str, *, may_have_classes: bool) -> Found:
    """Return all images of a folder without splits, with labels if its subfolders are classes."""
    everything = _flat(top, f"--data {folder}: no image in this folder")
    if not may_have_classes:
        return everything
    below = [os.path.relpath(path, top).split(os.sep) for path in everything.paths]
    names = sorted({parts[0] for parts in below if len(parts) > 1})
    if len(names) < 2 or any(len(parts) == 1 for parts in below):
        return everything
    number = {name: label for label, name in enumerate(names)}
    labels = np.array([number[parts[0]] for parts in below], dtype=np.int64)
    return Found(everything.paths, labels, names, everything.others)


def _flat(top: Path, missing: str) -> Found:
    """Return all images below a folder without labels.

    Raises:
        InputError: if there is none; `missing` is the beginning of the message.
    """
    others: Counter[str] = Counter()
    (paths,) = list_images(top, [""], others=others)
    if not paths:
        raise InputError(f"{missing}{_but(others)}, expected files that end in {' '.join(sorted(IMAGE_SUFFIXES))}")
    return Found(paths, np.full(len(paths), -1), [], others)


def _but(others: Mapping[str, int]) -> str:
    """Return the files that are not read, for a message about a folder without images."""
    return f" ({describe_others(others)})" if others else ""


def _labelled(classes: list[str], by_class: list[list[str]], names: list[str], *, others: Mapping[str, int]) -> Found:
    number = {name: label for label, name in enumerate(names)}
    labels = [number[name] for name, paths in zip(classes, by_class, strict=True) for _ in paths]
    return Found([path for paths in by_class for path in paths], np.array(labels), names, others)


def _part(found: Found, split: str, *, folder: str, share: float) -> Found:
    """Return the training or the test part of images that have no splits."""
    held_out = np.zeros(len(found.paths), dtype=bool)
    for label in np.unique(found.labels):
        rows = np.flatnonzero(found.labels == label)
        held_out[np.random.default_rng(0).permutation(rows)[: round(share * len(rows))]] = True
    rows = np.flatnonzero(held_out if split == "test" else ~held_out)
    if not len(rows):
        raise InputError(
            f"--val-share {share:g} of the {len(found.paths)} images of --data {folder} leaves none for the {split} split: "
            "give another share"
        )
    return Found([found.paths[row] for row in rows], found.labels[rows], found.classes, found.others)


def _class_names(folder: Path) -> list[str]:
    """Return the names of the visible subfolders, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))

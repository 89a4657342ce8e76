"""Data sets: indexed images with optional labels.

Labels serve monitoring and scoring only. The label -1 means that the class is unknown.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from ..config import BUILT_IN_DATA, DataOptions
from ..errors import InputError, printable
from ..inspection import ROOM, read_lines
from .arrays import Arrays, Damaged
from .decoding import Kept, decode
from .folders import find_images

MOST_CLASSES = 1_000_000
CIFAR100_COARSE = (
    # superclass (0 to 19) of each of the 100 classes
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 8 15 13 14 17 18 10 "
    "16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)
CIFAR100_SUPERCLASSES = [
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium-sized_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
]


@dataclass(frozen=True)
class MemoryImages:
    """A data set of images in memory.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) long, -1 where the class is unknown.
        classes: names of the classes; label k belongs to `classes[k]`.
        names: N paths of the files from which the images were decoded; []: they were in no files of their own.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    names: list[str] = field(default_factory=list)

    has_pictures: ClassVar[bool] = True  # whether `picture` returns an image for display

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def picture(self, index: int) -> np.ndarray:
        """Return one image for display, (H, W) or (H, W, 3) uint8."""
        return self.images[index].permute(1, 2, 0).squeeze(-1).numpy()

    def keep(self, rows: np.ndarray, labels: np.ndarray, classes: list[str]) -> Self:
        """Return a data set of the images at positions `rows`, with new labels and class names."""
        names = [self.names[row] for row in rows] if self.names else []
        return type(self)(self.images[torch.from_numpy(rows)], torch.from_numpy(labels), classes, names)


@dataclass(frozen=True)
class FeatureRows(MemoryImages):
    """A data set of frozen features. `images` holds the features, (N, F) float32, and `channels` is F."""

    has_pictures: ClassVar[bool] = False


@dataclass(frozen=True)
class ImageFiles:
    """A data set of image files, which are decoded on demand.

    Attributes:
        paths: N paths of image files.
        labels: (N,) long, -1 where the class is unknown.
        classes: names of the classes; label k belongs to `classes[k]`.
        kept: memory for decoded images; None: every access decodes the file again.
        upright: rotate the images as their EXIF orientation says; False: show them as stored.
        others: {suffix: number} of the files beside them that are no images.
    """

    paths: list[str]
    labels: Tensor
    classes: list[str]
    channels: int = 3
    kept: Kept | None = None
    upright: bool = False
    others: Mapping[str, int] = field(default_factory=dict)

    has_pictures: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: int) -> Tensor:
        """Return the pixels of one image, (3, H, W) uint8; see `decoding.decode`."""
        if self.kept is None:
            return decode(self.paths[index], upright=self.upright)
        image = self.kept.get(index)
        if image is None:
            image = decode(self.paths[index], upright=self.upright)
            self.kept.put(index, image)
        return image

    def picture(self, index: int) -> np.ndarray:
        """Return one image for display, (H, W, 3) uint8."""
        return self.decode(index).permute(1, 2, 0).numpy()

    def keep(self, rows: np.ndarray, labels: np.ndarray, classes: list[str]) -> "ImageFiles":
        """Return a data set of the files at positions `rows`, with new labels and class names."""
        paths = [self.paths[row] for row in rows]
        return replace(self, paths=paths, labels=torch.from_numpy(labels), classes=classes, kept=None)

    def keeping(self, room: int) -> "ImageFiles":
        """Return the same data set with up to `room` bytes of memory for decoded images, each decoded only once."""
        return replace(self, kept=Kept(len(self), room))

    def in_memory(self) -> MemoryImages:
        """Decode all files and return their pixels as a data set in memory.

        Raises:
            InputError: if a file cannot be decoded, or if the images do not have one size.
        """
        images = torch.empty(0, dtype=torch.uint8)
        for i, path in enumerate(self.paths):
            try:
                image = self.decode(i)
            except Exception as error:  # Pillow raises errors of many kinds on damaged files
                raise InputError(
                    f"--in-memory: {path} cannot be decoded ({error}): repair or remove the file, or give --no-in-memory"
                ) from None
            if i == 0:
                images = torch.empty(len(self), *image.shape, dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                sizes = [" x ".join(str(side) for side in shape[-2:]) for shape in (images.shape, image.shape)]
                raise InputError(
                    f"--in-memory needs images of one size, but {self.paths[0]} has {sizes[0]} pixels and {path} has "
                    f"{sizes[1]}: resize the images, or give --no-in-memory"
                )
            images[i] = image
        return MemoryImages(images, self.labels, self.classes, self.paths)


Images = MemoryImages | ImageFiles


def open_data(
    name: str,
    split: str,
    *,
    root: str = "",
    download: bool = False,
    subset: str = "",
    subset_file: str = "",
    unlabelled: bool = False,
    val_share: float = 0.0,
    upright: bool = False,
) -> Images:
    """Open one split of a data set.

    Args:
        name: "digits", "cifar10", "cifar100-20", "stl10", "stl10-labelled", an .npz file of features (see `open_features`), or a folder
            (see `open_folder`).
        split: "train" or "test".
        root: folder that holds torchvision's data sets.
        download: download the data set to `root` if it is missing.
        subset: name of a published subset of ImageNet's classes, one of `SUBSETS`; "": all classes.
        subset_file: text file with one class name per line; "": all classes. The data set keeps only the listed classes and
            numbers them in the order of the file (see `keep_classes`).
        unlabelled: ignore the class folders of a folder of images.
        val_share: share of the images that is held out for the test split, if a folder has no splits.
        upright: rotate the images of a folder as their EXIF orientation says.

    Raises:
        InputError: if the data set cannot be opened, or does not have a class of the subset.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split}, expected train or test")
    data: Images
    if name == "digits":
        data = _digits(split)
    elif name in BUILT_IN_DATA:
        data = _from_torchvision(name, split, root=root, download=download)
    elif name.endswith(".npz"):
        data = open_features(name, split)
    else:
        data = open_folder(name, split, unlabelled=unlabelled, val_share=val_share, upright=upright)
    if subset:
        return keep_classes(data, published_classes(subset), f"--subset {subset}")
    if subset_file:
        return keep_classes(data, read_classes(subset_file), f"--subset-file {subset_file}")
    return data


def open_split(source: DataOptions, split: str, *, upright: bool) -> Images:
    """Open a split of the data that the flags name; see `open_data`."""
    return open_data(
        source.data,
        split,
        root=source.data_root,
        download=source.download,
        subset=source.subset,
        subset_file=source.subset_file,
        unlabelled=source.unlabelled,
        val_share=source.val_share,
        upright=upright,
    )


def divide(data: Images, share: float) -> tuple[Images, Images]:
    """Divide a data set at random into two parts that are the same in every run.

    Args:
        share: share of the images in the second part; both parts get at least two images.

    Returns:
        Both parts, with the images in their order.

    Raises:
        InputError: if there are fewer than four images.
    """
    if len(data) < 4:
        raise InputError(f"{len(data)} images: expected at least 4 to hold some of them out; add images")
    number = min(max(round(share * len(data)), 2), len(data) - 2)
    order = np.random.default_rng(0).permutation(len(data))
    labels = data.labels.numpy()
    rest, part = (np.sort(rows) for rows in (order[number:], order[:number]))
    return data.keep(rest, labels[rest], data.classes), data.keep(part, labels[part], data.classes)


def check_channels(data: Images, name: str, channels: int) -> None:
    """Raise InputError if the images of `--data name` do not have the number of channels that the network takes."""
    if data.channels != channels:
        raise InputError(
            f"--data {name}: the images have {data.channels} channels, but the network takes {channels}: use other images"
        )


# --------------------------------------------------------------------------------------------------------------------
# data sets in memory


def _digits(split: str) -> MemoryImages:
    """Return one split of scikit-learn's 1,797 handwritten digits of 8×8 pixels.

    The split is fixed and stratified by class: 80 % of the images are for training and 20 % for testing.
    """
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = dict(
        zip(
            ("train", "test"),
            train_test_split(np.arange(1797), test_size=0.2, stratify=digits.target, random_state=0),
            strict=True,
        )
    )
    ink = np.round(digits.images[rows[split]] * 255 / 16).astype(np.uint8)  # 0..16 → 0..255
    labels = torch.from_numpy(digits.target[rows[split]]).long()
    return MemoryImages(torch.from_numpy(ink)[:, None], labels, [str(digit) for digit in range(10)])


def _from_torchvision(name: str, split: str, *, root: str, download: bool) -> MemoryImages:
    """Return one split of a data set of torchvision."""
    from torchvision import datasets  # slow to import

    try:
        if name in ("stl10", "stl10-labelled"):
            train = "train+unlabeled" if name == "stl10" else "train"
            source = _stl10(root, split=train if split == "train" else "test", download=download)
            images, labels = torch.from_numpy(source.data), np.asarray(source.labels)  # -1: no label
        else:
            source = (datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100)(
                root, train=split == "train", download=download
            )
            images, labels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), np.asarray(source.targets)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"--data {name}: {error} (searched in --data-root {root}): pass --download to download it"
        ) from None
    if not hasattr(source, "classes"):  # torchvision checks all files of STL-10 except class_names.txt
        raise InputError(f"--data {name}: class_names.txt is missing in --data-root {root}: unpack the archive again")
    classes = list(source.classes)
    if name == "cifar100-20":
        labels, classes = np.array(CIFAR100_COARSE.split(), dtype=np.int64)[labels], CIFAR100_SUPERCLASSES
    return MemoryImages(images, torch.from_numpy(labels).long(), classes)


def _stl10(root: str, *, split: str, download: bool) -> Any:
    """Return torchvision's STL-10. If it is downloaded, try https first, because torchvision's address begins with http."""
    from torchvision import datasets  # slow to import

    secure = type("STL10", (datasets.STL10,), {"url": datasets.STL10.url.replace("http://", "https://")})
    try:
        return secure(root, split=split, download=download)
    except URLError:  # the host does not answer over https
        return datasets.STL10(root, split=split, download=download)


def open_features(file: str, split: str) -> FeatureRows:
    """Open a file of features that was written by `numpy.savez`.

    The file holds the array `train_features`, the array `test_features`, or both; each is (N, F) numbers. Three more
    arrays are optional: `train_labels` and `test_labels` are (N,) integers, with -1 where the class is unknown, and
    `classes` holds the names of the classes.

    Raises:
        InputError: if the file cannot be read, does not hold the split, or holds an array of a wrong shape or type, or
            features that are not finite.
    """
    if not os.path.isfile(file):
        raise InputError(f"--data {file}: no such file: pass the path of an .npz file")
    try:
        with open(file, "rb") as opened:
            return _features(Arrays(opened), file, split)
    except OSError as error:
        raise InputError(f"--data {file}: {error.strerror}: pass the path of an .npz file") from None
    except Damaged as error:
        raise InputError(f"--data {file}: not an .npz file of numbers ({error}): write it with numpy.savez") from None


def _features(arrays: Arrays, file: str, split: str) -> FeatureRows:
    name, other = f"{split}_features", "test_features" if split == "train" else "train_features"
    if name not in arrays.shapes:
        held = ", ".join(map(printable, list(arrays.shapes)[:10]))
        raise InputError(f"--data {file}: the file holds {held or 'no array'}, expected {name}: add this array")
    shape, kind = arrays.shapes[name], arrays.kind(name)
    if len(shape) != 2 or kind not in "fiu" or not math.prod(shape):
        raise InputError(
            f"--data {file}: {name} has shape {shape} and type {arrays.dtype(name)}, expected (N, F) numbers"
        )
    others = arrays.shapes.get(other, shape)
    if len(others) == 2 and others[1] != shape[1]:
        raise InputError(f"--data {file}: {name} is {shape}, the other split's {others}; expected one width F")
    size = os.path.getsize(file)
    memory = sum(
        4 * math.prod(each) + 8 * each[0] for each in {name: shape, other: arrays.shapes.get(other, (0,))}.values()
    )
    if memory > 2 * (size + ROOM):
        raise InputError(
            f"--data {file}: {size:,} bytes that take {memory:,} in memory: write float32 numbers with numpy.savez, without "
            "compression"
        )
    features = arrays.read(name, np.float32)  # a number that is too large for float32 becomes infinite
    if not all(np.isfinite(features[row : row + 4096]).all() for row in range(0, len(features), 4096)):
        raise InputError(f"--data {file}: {name} holds NaN or infinity, expected finite numbers")
    labels, classes = _labels(arrays, file, split)
    return FeatureRows(torch.from_numpy(features), torch.from_numpy(labels.astype(np.int64)), classes)


def _labels(arrays: Arrays, file: str, split: str) -> tuple[np.ndarray, list[str]]:
    """Return the labels of a split of features, and the names of the classes."""
    name, number = f"{split}_labels", arrays.shapes[f"{split}_features"][0]
    known: dict[str, np.ndarray] = {}
    for each in ("train_labels", "test_labels"):
        size: int = math.prod(arrays.shapes.get(each, (0,)))
        if size and arrays.kind(each) in "iu":
            known[each] = arrays.read(each)
    labels = known.get(name, np.full(number, -1))
    if name in arrays.shapes and (name not in known or labels.shape != (number,)):
        raise InputError(
            f"--data {file}: {name} has shape {arrays.shapes[name]} and type {arrays.dtype(name)}, "
            f"expected {number} integers"
        )
    if labels.min() < -1:
        raise InputError(f"--data {file}: {name} holds {labels.min()}, expected -1 (unknown class) or more")
    count = max((int(each.max()) + 1 for each in known.values()), default=0)
    named = math.prod(arrays.shapes["classes"]) if "classes" in arrays.shapes else count
    if max(count, named) > MOST_CLASSES:
        raise InputError(
            f"--data {file}: {max(count, named):,} classes, expected at most {MOST_CLASSES:,}: correct the labels or `classes`"
        )
    classes = [str(each) for each in np.ravel(arrays.read("classes") if "classes" in arrays.shapes else range(count))]
    if len(classes) < count:
        raise InputError(
            f"--data {file}: the largest label is {count - 1}, but `classes` has only {len(classes)} names: name all classes"
        )
    return labels, classes


def open_folder(
    folder: str, split: str, *, unlabelled: bool = False, val_share: float = 0.0, upright: bool = False
) -> ImageFiles:
    """Open a folder of images; see `folders.find_images`."""
    found = find_images(folder, split, unlabelled=unlabelled, val_share=val_share)
    labels = torch.from_numpy(found.labels)
    return ImageFiles(found.paths, labels, found.classes, upright=upright, others=found.others)


# --------------------------------------------------------------------------------------------------------------------
# subsets of the classes


def published_classes(name: str) -> list[str]:
    """Return the WordNet ids of a published subset of ImageNet's classes, in the published order, which is sorted.

    Source of the lists: SCAN, arXiv:2005.12320. Self-Classifier uses the same ones. Each list contains the shorter ones.

    Args:
        name: one of `SUBSETS`.
    """
    return (Path(__file__).parent / "imagenet_subsets" / f"{name}.txt").read_text().split()


def read_classes(file: str) -> list[str]:
    """Read a text file that lists classes, one per line. Empty lines do not count.

    Raises:
        InputError: if the file cannot be read or lists no class.
    """
    expected = "expected a text file with one class name per line"
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--subset-file {file}: {getattr(error, 'strerror', None) or error}, {expected}") from None
    if not lines:
        raise InputError(f"--subset-file {file}: lists no class, expected one class name per line")
    return lines


def keep_classes(data: Images, lines: list[str], source: str) -> Images:
    """Return the images of the listed classes, with new labels: the first line is class 0, and so on.

    The class name is the whole line if the data set has such a class, and the first word of the line otherwise.

    Args:
        lines: one line per class.
        source: the flag that names the list, and its value, for error messages.

    Raises:
        InputError: if a class is listed twice, if the data set does not have a listed class, or if it has no image of the
            listed classes.
    """
    if not data.classes:
        raise InputError(f"{source}: the images have no labels, but the flag selects by label: drop it")
    wanted = [line if line in data.classes else line.split()[0] for line in lines]
    unknown = [name for name in wanted if name not in data.classes]
    if unknown:
        what = f"class {unknown[0]} is" if len(unknown) == 1 else f"{len(unknown)} classes, such as {unknown[0]}, are"
        raise InputError(
            f"{source}: {what} not among the {len(data.classes)} classes of the data set: choose other classes or another --data"
        )
    if len(set(wanted)) < len(wanted):
        raise InputError(f"{source}: a class is listed twice: remove one of the lines")
    new_label = np.full(len(data.classes) + 1, -1)  # the extra entry at the end is for label -1
    for label, name in enumerate(wanted):
        new_label[data.classes.index(name)] = label
    labels = new_label[data.labels.numpy()]
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise InputError(f"{source}: the data set has no image of the {len(wanted)} listed classes: list other classes")
    return data.keep(rows, labels[rows], wanted)

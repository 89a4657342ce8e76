"""Data sets: indexed images with optional labels.

Labels serve monitoring and scoring only. The label -1 means that the class is unknown.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..config import BUILT_IN_DATA
from ..errors import InputError
from .decoding import Kept, decode
from .listing import IMAGE_SUFFIXES, list_images

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
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

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
        return type(self)(self.images[torch.from_numpy(rows)], torch.from_numpy(labels), classes)


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
    """

    paths: list[str]
    labels: Tensor
    classes: list[str]
    channels: int = 3
    kept: Kept | None = None

    has_pictures: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: int) -> Tensor:
        """Return the pixels of one image, (3, H, W) uint8; see `decoding.decode`."""
        if self.kept is None:
            return decode(self.paths[index])
        image = self.kept.get(index)
        if image is None:
            image = decode(self.paths[index])
            self.kept.put(index, image)
        return image

    def picture(self, index: int) -> np.ndarray:
        """Return one image for display, (H, W, 3) uint8."""
        return self.decode(index).permute(1, 2, 0).numpy()

    def keep(self, rows: np.ndarray, labels: np.ndarray, classes: list[str]) -> "ImageFiles":
        """Return a data set of the files at positions `rows`, with new labels and class names."""
        return ImageFiles([self.paths[row] for row in rows], torch.from_numpy(labels), classes, channels=self.channels)

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
                    f"--in-memory: {path} cannot be decoded ({error}): repair or remove the file"
                ) from None
            if i == 0:
                images = torch.empty(len(self), *image.shape, dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                sizes = [" x ".join(str(side) for side in shape[-2:]) for shape in (images.shape, image.shape)]
                raise InputError(
                    f"--in-memory needs images of one size, but {self.paths[0]} has {sizes[0]} pixels and {path} has "
                    f"{sizes[1]}: resize the images, or drop the flag"
                )
            images[i] = image
        return MemoryImages(images, self.labels, self.classes)


Images = MemoryImages | ImageFiles


def open_data(
    name: str, split: str, *, root: str = "", download: bool = False, subset: str = "", subset_file: str = ""
) -> Images:
    """Open one split of a data set.

    Args:
        name: "digits", "cifar10", "cifar100-20", "stl10", an .npz file of features (see `open_features`), or a folder
            (see `open_folder`).
        split: "train" or "test".
        root: folder that holds torchvision's data sets.
        download: download the data set to `root` if it is missing.
        subset: name of a published subset of ImageNet's classes, one of `SUBSETS`; "": all classes.
        subset_file: text file with one class name per line; "": all classes. The data set keeps only the listed classes and
            numbers them in the order of the file (see `keep_classes`).

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
        data = open_folder(name, split)
    if subset:
        return keep_classes(data, published_classes(subset), f"--subset {subset}")
    if subset_file:
        return keep_classes(data, read_classes(subset_file), f"--subset-file {subset_file}")
    return data


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
        if name == "stl10":
            source = datasets.STL10(root, split="train+unlabeled" if split == "train" else "test", download=download)
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
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # the reader can fail in any way on arbitrary bytes
        detail = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(f"--data {file}: not an .npz file of numbers ({detail}): write it with numpy.savez") from None
    features = found.get(f"{split}_features")
    if features is None:
        raise InputError(
            f"--data {file}: the file holds {', '.join(found) or 'no array'}, expected {split}_features: add this array"
        )
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not features.size:
        raise InputError(
            f"--data {file}: {split}_features has shape {features.shape} and type {features.dtype}, expected (N, F) numbers"
        )
    other = found.get("test_features" if split == "train" else "train_features")
    if other is not None and other.ndim == 2 and other.shape[1] != features.shape[1]:
        raise InputError(
            f"--data {file}: {split}_features is {features.shape}, the other split's {other.shape}; expected one width F"
        )
    with np.errstate(over="ignore"):  # too large for float32 is not finite, which is refused
        features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise InputError(f"--data {file}: {split}_features holds NaN or infinity, expected finite numbers")
    labels = found.get(f"{split}_labels", np.full(len(features), -1))
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise InputError(
            f"--data {file}: {split}_labels has shape {labels.shape} and type {labels.dtype}, "
            f"expected {len(features)} integers"
        )
    if labels.min() < -1:
        raise InputError(f"--data {file}: {split}_labels holds {labels.min()}, expected -1 (unknown class) or more")
    both = [found[name] for name in ("train_labels", "test_labels") if name in found]
    known = [each for each in both if each.size and each.dtype.kind in "iu"]
    count = max((int(each.max()) + 1 for each in known), default=0)
    classes = [str(name) for name in np.ravel(found.get("classes", range(count)))]
    if len(classes) < count:
        raise InputError(
            f"--data {file}: the largest label is {count - 1}, but `classes` has only {len(classes)} names: name all classes"
        )
    return FeatureRows(torch.from_numpy(features), torch.from_numpy(labels.astype(np.int64)), classes)


# --------------------------------------------------------------------------------------------------------------------
# folders of images


def open_folder(folder: str, split: str) -> ImageFiles:
    """Open a folder of images.

    If the folder has a subfolder `train/`, `val/` or `test/`, the training split is `train/`, and the test split is `val/`
    or, without it, `test/`. The subfolders of a split are the classes, as in ImageNet. A split without subfolders has no
    labels. If the folder has none of the three, both splits consist of all images below it, at any depth, without labels.

    Raises:
        InputError: if the folder or the split is missing, or if it holds no image.
    """
    top = Path(folder)
    if not folder:
        raise InputError(f"--data is empty, expected a folder of images or one of {', '.join(BUILT_IN_DATA)}")
    try:
        is_folder = top.is_dir()
    except OSError as error:  # a name that is too long
        raise InputError(f"--data {folder}: {error.strerror}: pass the path of a folder") from None
    if not is_folder:
        raise InputError(
            f"--data {folder}: no such folder, expected a folder of images or one of {', '.join(BUILT_IN_DATA)}"
        )
    splits = [name for name in ("train", "val", "test") if (top / name).is_dir()]
    if not splits:
        (paths,) = list_images(top, [""])
        if not paths:
            raise InputError(
                f"--data {folder}: no image in this folder, expected files that end in {' '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return ImageFiles(paths, torch.full((len(paths),), -1), [])
    wanted = ["train"] if split == "train" else ["val", "test"]
    found = [name for name in wanted if name in splits]
    if not found:
        raise InputError(
            f"--data {folder}: the folder has {', '.join(splits)}, but the {split} split needs {' or '.join(wanted)}: add it"
        )
    top = top / found[0]
    classes = _class_names(top)
    if not classes:
        (paths,) = list_images(top, [""])
        if not paths:
            raise InputError(
                f"--data {folder}: no image in {found[0]}/, expected files that end in {' '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return ImageFiles(paths, torch.full((len(paths),), -1), [])
    by_class = list_images(top, classes)
    if not any(by_class):
        raise InputError(f"--data {folder}: the {len(classes)} class folders in {found[0]}/ hold no image: add images")
    # The training split defines the labels: a class without a folder in the test split must not shift the other labels.
    names = _class_names(Path(folder) / "train") if "train" in splits else classes
    names = names + [name for name in classes if name not in names]
    number = {name: i for i, name in enumerate(names)}
    labels = [number[name] for name, paths in zip(classes, by_class, strict=True) for _ in paths]
    return ImageFiles([path for paths in by_class for path in paths], torch.tensor(labels), names)


def _class_names(folder: Path) -> list[str]:
    """Return the names of the visible subfolders, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


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
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"--subset-file {file}: {error.strerror}, {expected}") from None
    except UnicodeDecodeError:
        raise InputError(f"--subset-file {file}: not a text file, expected one class name per line") from None
    lines = [line.strip() for line in lines if line.strip()]
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

"""Evaluation views: the size, the resize rule and the normalisation with which a network sees a photograph in evaluations.

They belong to the network, not to the data on which it is evaluated: a network sees images normalised as in its training.
The size is that of the published evaluation and does not depend on the size of the training crops.
"""

from dataclasses import dataclass, replace

from .errors import InputError

Rgb = tuple[float, float, float]

IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)
SWAV_STD: Rgb = (0.228, 0.224, 0.225)  # SwAV's code trains and probes with 0.228 in the red channel
CIFAR10_MEAN: Rgb = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Rgb = (0.247, 0.243, 0.261)
CIFAR100_MEAN: Rgb = (0.5071, 0.4867, 0.4408)
CIFAR100_STD: Rgb = (0.2675, 0.2565, 0.2761)
SMALL = 64  # largest training crop in pixels with which the images of a folder stay whole
PHOTOGRAPHS = 96  # smallest training crop in pixels with which a folder is evaluated as ImageNet
NATIVE = {
    "cifar10": 32,
    "cifar100-20": 32,
    "stl10": 96,
    "stl10-labelled": 96,
}  # side in pixels of the images of small data sets


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Describe the evaluation view of photographs: resize, central crop, normalise.

    Attributes:
        resize: length in pixels to which the shorter side is resized.
        size: side in pixels of the central crop, at most `resize`.
        mean, std: normalisation of RGB values in [0, 1].

    Raises:
        InputError: if the crop is larger than the resized image.
    """

    resize: int
    size: int
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise InputError(
                f"--eval-resize {self.resize} is smaller than the evaluation view of {self.size} pixels, which is cut from the "
                "resized image: raise it, or give a smaller --eval-size"
            )

    def whole(self) -> "Preprocessing":
        """Return the same view of a small image, which is resized to `size` and not cropped."""
        return replace(self, resize=self.size)

    def changed(self, *, size: int = 0, resize: int = 0) -> "Preprocessing":
        """Return the view with the values of --eval-size and --eval-resize.

        Args:
            size: side of the crop in pixels; 0: unchanged.
            resize: length of the shorter side in pixels; 0: in the same proportion to the size as now.
        """
        size = size or self.size
        return replace(self, size=size, resize=resize or round(size * self.resize / self.size))

    def in_protocol(self, protocol: str) -> "Preprocessing":
        """Return the view with the standard deviation of a published evaluation of networks for ImageNet.

        SwAV's linear and semi-supervised evaluations (arXiv:2006.09882) divide the red channel by 0.228. Those of
        Self-Classifier (arXiv:2103.10994v3: linear classifier, nearest neighbours, k-means) divide it by 0.229, also for the
        weights of SwAV. Networks with the statistics of other data, such as CIFAR-10, keep theirs.

        Args:
            protocol: "swav", "self_classifier", or "" for the values of the network's training.
        """
        if not protocol or self.mean != IMAGENET_MEAN:
            return self
        return replace(self, std=SWAV_STD if protocol == "swav" else IMAGENET_STD)


IMAGENET = Preprocessing(resize=256, size=224)


def of_training(data: str, *, crop_size: int, augment: str) -> Preprocessing:
    """Return the evaluation view of a network that train.py trained on photographs.

    - CIFAR and STL-10 images stay whole, at their own size, or at the size of the training crops if those are larger.
    - A folder whose training crops have at least 96 pixels holds photographs. They are evaluated at the published size: the
      central 224 pixels after the shorter side is resized to 256.
    - A folder with smaller training crops is evaluated at the size of these crops. Up to 64 pixels the images stay whole, above
      they are resized in the published proportion and cropped.

    Args:
        data: value of --data of the training run.
        crop_size: side of the global training crops in pixels.
        augment: value of --augment of the training run.
    """
    statistics = {
        "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
        "cifar100-20": (CIFAR100_MEAN, CIFAR100_STD),
    }
    mean, std = statistics.get(data, (IMAGENET_MEAN, SWAV_STD if augment == "swav" else IMAGENET_STD))
    if data not in NATIVE and crop_size >= PHOTOGRAPHS:
        return replace(IMAGENET, mean=mean, std=std)
    size = max(NATIVE.get(data, 0), crop_size)
    return Preprocessing(resize=resize_first(data, size), size=size, mean=mean, std=std)


def resize_first(data: str, size: int) -> int:
    """Return the length in pixels to which the shorter side is resized before a window of `size` pixels is cut.

    Small images stay whole. Photographs are resized in the published proportion, 256 for 224.
    """
    return size if data in NATIVE or size <= SMALL else round(size * IMAGENET.resize / IMAGENET.size)

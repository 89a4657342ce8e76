"""Backbones: networks without a classifier. The attribute `width` of a backbone is F, the size of its features."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Backbone
from .sela_networks import BIG, SMALL, AlexNet, PreActivationResNet

CIFAR_RESNETS = {"cifar_resnet18": (2, 2, 2, 2), "cifar_resnet34": (3, 4, 6, 3)}
STL_RESNETS = {"stl_resnet18": (2, 2, 2, 2)}  # as for CIFAR, with max-pooling in the stem
ALEXNETS = ("sela_alexnet", "sela_alexnet_small")
VITS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}  # width, attention heads; the depth is 12
OWN_NAMES = (
    "small_convnet",
    "cifar_convnet",
    "identity",
    *CIFAR_RESNETS,
    *STL_RESNETS,
    *ALEXNETS,
    "sela_resnet50",
    *VITS,
)  # parameter names differ from torchvision's
WIDE_RESNETS = {"resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}


def build_backbone(arch: str, in_channels: int = 3, *, image_size: int = 224, patch_size: int = 16) -> Backbone:
    """Build a randomly initialised backbone, (B, in_channels, H, W) → (B, F). Its attribute `width` is F.

    Args:
        arch: "small_convnet", "cifar_convnet", "cifar_resnet18", "cifar_resnet34", "stl_resnet18", "sela_alexnet",
            "sela_alexnet_small", "sela_resnet50", "resnet50w2", "resnet50w4", "resnet50w5", "vit_tiny", "vit_small",
            "vit_base", the name of a torchvision network whose classifier is called `fc`, or "identity" for data that are
            features of width `in_channels`.
        image_size: side of the global views in pixels. The position embedding of a ViT has this size; for images of other
            sizes it is interpolated.
        patch_size: side of a ViT's patches in pixels.

    Raises:
        InputError: if the network does not exist, is not supported, or does not accept such images.
    """
    if arch == "identity":
        return Identity(in_channels)
    if arch == "small_convnet":
        return SmallConvNet(in_channels)
    if arch == "cifar_convnet":
        return CifarConvNet(in_channels)
    if arch in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[arch], in_channels)
    if arch in STL_RESNETS:
        return CifarResNet(STL_RESNETS[arch], in_channels, max_pool=True)
    if arch in ALEXNETS or arch == "sela_resnet50":
        return _sela(arch, in_channels, image_size=image_size)
    if arch in VITS:
        return _vit(arch, in_channels, image_size=image_size, patch_size=patch_size)
    return _torchvision(arch, in_channels)


def _torchvision(arch: str, in_channels: int) -> Backbone:
    """Build one of torchvision's networks, or a ResNet-50 that is wider than theirs, without its classifier."""
    from torchvision import models  # slow to import

    # This module has only networks for classification, not for detection, segmentation or video.
    known = models.list_models(module=models)
    if arch not in (*known, *WIDE_RESNETS):
        own = ", ".join([*OWN_NAMES, *WIDE_RESNETS])
        raise InputError(f"--arch {arch} is unknown, expected {own}, or a torchvision network such as resnet50")
    if arch in ("googlenet", "inception_v3"):
        raise InputError(
            f"--arch {arch} has auxiliary classifiers, which are not supported: use another network, such as resnet50"
        )
    if in_channels != 3:
        raise InputError(
            f"--arch {arch} takes images of 3 channels, but these have {in_channels}: use small_convnet or cifar_resnet18"
        )
    if arch in WIDE_RESNETS:
        return WideResNet(WIDE_RESNETS[arch])
    backbone = cast(Backbone, models.get_model(arch, weights=None))  # it gets the attribute below
    classifier = getattr(backbone, "fc", None)
    if not isinstance(classifier, nn.Linear):
        raise InputError(
            f"--arch {arch} has no linear classifier named fc, which a backbone must drop: use a network such as resnet50"
        )
    backbone.width = classifier.in_features
    backbone.fc = nn.Identity()
    return backbone


def _sela(arch: str, in_channels: int, *, image_size: int) -> Backbone:
    """Build one of SeLa's networks."""
    if arch == "sela_resnet50":
        return PreActivationResNet(in_channels)
    if not 224 <= image_size < 255:
        raise InputError(
            f"--arch {arch} takes views of 224 to 254 pixels, but --global-crops-size is {image_size}: change one of them"
        )
    return AlexNet(BIG if arch == "sela_alexnet" else SMALL, in_channels)


def _vit(arch: str, in_channels: int, *, image_size: int, patch_size: int) -> Backbone:
    """Build a vision transformer of depth 12 whose features are the class token."""
    from .vit import SelfClassifierViT  # timm is slow to import

    if image_size % patch_size:
        raise InputError(
            f"--patch-size {patch_size} does not divide --global-crops-size {image_size}: change one of them"
        )
    width, heads = VITS[arch]
    network = SelfClassifierViT(
        width, heads=heads, image_size=image_size, patch_size=patch_size, in_channels=in_channels
    )
    return cast(Backbone, network)


class WideResNet(Backbone):
    """ResNet-50 in which every layer has `widen` times as many channels, (B, 3, H, W) → (B, 2048 · widen).

    Source: SwAV, arXiv:2006.09882v5. Parameter names and blocks are those of torchvision's ResNet-50. torchvision's own wide
    ResNets are different: they are wider within the blocks, but not between them.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, widen: int):
        from torchvision.models.resnet import Bottleneck  # slow to import

        super().__init__()
        inputs = 64 * widen
        self.conv1 = nn.Conv2d(3, inputs, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for i, number in enumerate((3, 4, 6, 3)):
            planes, stride = 64 * widen * 2**i, 1 if i == 0 else 2
            outputs = planes * Bottleneck.expansion
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            blocks = [Bottleneck(inputs, planes, stride=stride, downsample=shortcut)]
            blocks += [Bottleneck(outputs, planes) for _ in range(number - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.width = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


# --------------------------------------------------------------------------------------------------------------------
# small images


def conv_bn(inputs: int, outputs: int, size: int, *, stride: int = 1) -> nn.Sequential:
    """Build a convolution of `size` × `size` pixels without bias, followed by batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SmallConvNet(Backbone):
    """Three 3×3 convolutions for images of 8×8 to 32×32 pixels, (B, in_channels, H, W) → (B, 128).

    The first and the last convolution have stride 2. The network trains in seconds on a CPU.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv_bn(in_channels, 32, 3, stride=2),
            nn.ReLU(),
            conv_bn(32, 64, 3),
            nn.ReLU(),
            conv_bn(64, 128, 3, stride=2),
            nn.ReLU(),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.width = 128

    def forward(self, images: Tensor) -> Tensor:
        return self.avgpool(self.layers(images)).flatten(1)


class CifarConvNet(Backbone):
    """Convolutional network for images of 32×32 pixels on a CPU, (B, in_channels, H, W) → (B, 256).

    A 2×2 convolution with 24 channels comes first. Three blocks of two 3×3 convolutions follow, with 32, 128 and 256
    channels; max pooling after the first convolution of a block halves the map. The features are the means of the last map.
    The forward and the backward pass of a view of 32×32 pixels take 0.265 GFLOP. The smallest view has 16×16 pixels.

    The layout is that of the networks of CIFAR-10 speed records, such as arXiv:2404.00498, with half their width. Their first
    layer whitens patches of the training images and is not trained. Ours starts from a fixed basis instead: `color_patches`
    are close to the principal components of patches of photographs, and the batch normalisation that follows gives all of
    them the same variance.
    """

    def __init__(self, in_channels: int = 3):
        super().__init__()
        stem = nn.Conv2d(in_channels, 24, 2, bias=False)
        if in_channels == 3:
            patches = color_patches()
            stem.weight.data.copy_(torch.cat([patches, -patches]))
        blocks: list[nn.Module] = [stem, nn.BatchNorm2d(24), nn.GELU()]
        inputs = 24
        for outputs in (32, 128, 256):
            conv, norm = conv_bn(inputs, outputs, 3)
            blocks += [conv, nn.MaxPool2d(2), norm, nn.GELU(), *conv_bn(outputs, outputs, 3), nn.GELU()]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.width = inputs

    def forward(self, images: Tensor) -> Tensor:
        return self.avgpool(self.blocks(images)).flatten(1)


def color_patches() -> Tensor:
    """Return an orthonormal basis of patches of 2×2 pixels and 3 channels, (12, 3, 2, 2).

    Each patch is the product of one of four patterns (constant, vertical edge, horizontal edge, checkerboard) and one of
    three colours (grey, red against blue, green against magenta).
    """
    patterns = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    colors = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    patches = torch.einsum("ip,jc->ijcp", patterns, colors).reshape(12, 3, 2, 2)
    return patches / patches.flatten(1).norm(dim=1)[:, None, None, None]


class Identity(nn.Identity, Backbone):
    """Return frozen features unchanged, (B, F) → (B, F)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut. A 1×1 convolution projects the shortcut if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            conv_bn(inputs, outputs, 3, stride=stride), nn.ReLU(), conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class CifarResNet(Backbone):
    """ResNet for images of 32×32 pixels, or of 96×96 with `max_pool`, (B, in_channels, H, W) → (B, 512).

    The stem is a 3×3 convolution of stride 1, as is common for CIFAR. Four stages of basic blocks follow.
    Sources: He et al., arXiv:1512.03385v1; for `max_pool` SCAN's network for STL-10, arXiv:2005.12320, which ends in an
    average over 7×7 positions. Those are all positions for images of 96 pixels, so a global average equals it.

    Args:
        blocks: number of basic blocks in each stage.
        max_pool: let the stem end in max-pooling over 2×2 positions with stride 2 and padding 1. It has no parameters.
    """

    def __init__(self, blocks: Sequence[int], in_channels: int = 3, *, max_pool: bool = False):
        super().__init__()
        pooling = [nn.MaxPool2d(2, stride=2, padding=1)] if max_pool else []
        self.stem = nn.Sequential(conv_bn(in_channels, 64, 3), nn.ReLU(), *pooling)
        stages, inputs = [], 64
        for i, number in enumerate(blocks):
            outputs = 64 * 2**i
            strides = [1 if i == 0 else 2] + [1] * (number - 1)
            for stride in strides:
                stages.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.width = inputs

    def forward(self, images: Tensor) -> Tensor:
        return self.avgpool(self.stages(self.stem(images))).flatten(1)


def pool_windows(backbone: nn.Module, window: int, *, in_channels: int, image_size: int) -> int:
    """Replace the global average pooling of a backbone by average pooling over windows, in place.

    The pooling averages the last feature map over all n windows of `window` × `window` positions, with stride 1. A backbone
    with C channels then returns (B, C · n) features; the n windows of a channel are adjacent.

    The linear evaluation of SwAV, arXiv:2006.09882, pools in this way: windows of 6 on the 7 × 7 map of a ResNet-50 give
    n = 4 and 8192 features.

    Args:
        window: side of a window in positions of the map.
        image_size: side of the backbone's input images in pixels.

    Returns:
        C · n, the new number of features.

    Raises:
        InputError: if the backbone has no global average pooling, or if the window is larger than the map.
    """
    if not isinstance(getattr(backbone, "avgpool", None), nn.AdaptiveAvgPool2d):
        raise InputError(
            f"--pool-window {window}: the backbone does not end in global average pooling: use a ResNet, or drop the flag"
        )
    channels = cast(Backbone, backbone).width
    backbone.avgpool = nn.Identity()
    with torch.no_grad():
        places = backbone.eval()(torch.zeros(1, in_channels, image_size, image_size)).shape[1] // channels
    side = math.isqrt(places)
    if window > side:
        raise InputError(
            f"--pool-window {window} is larger than the last feature map, which is {side} × {side} for images of "
            f"{image_size} pixels: pass a smaller window, or 0 for global average pooling"
        )
    backbone.avgpool = nn.AvgPool2d(window, stride=1)
    return channels * (side - window + 1) ** 2


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

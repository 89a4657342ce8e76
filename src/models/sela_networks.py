"""The networks of SeLa (arXiv:1911.05371): an AlexNet with batch normalisation, and a pre-activation ResNet-50.

The names of the parameters are those of the authors' checkpoints.
"""

import torch
from torch import Tensor, nn

from .base import Backbone

AlexNetLayers = tuple[tuple[int, int, int, int] | None, ...]
BIG: AlexNetLayers = (  # output channels, kernel, stride and padding of each convolution; None: max-pooling
    *((96, 11, 4, 2), None, (256, 5, 1, 2), None),
    *((384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), None),
)
SMALL: AlexNetLayers = (
    *((64, 11, 4, 2), None, (192, 5, 1, 2), None),
    *((384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), None),
)


class AlexNet(Backbone):
    """AlexNet for RGB images of 224 to 254 pixels, (B, in_channels, H, W) → (B, 4096).

    Batch normalisation and a ReLU follow each of the five convolutions, which keep their biases. Two linear layers with
    dropout and a ReLU follow. The features are the output of the second one. The authors train the big variant.

    Args:
        layers: `BIG` or `SMALL`.
    """

    def __init__(self, layers: AlexNetLayers, in_channels: int = 3):
        super().__init__()
        modules: list[nn.Module] = []
        inputs = in_channels
        for layer in layers:
            if layer is None:
                modules.append(nn.MaxPool2d(3, stride=2))
                continue
            outputs, size, stride, padding = layer
            conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding)
            nn.init.normal_(conv.weight, std=(2 / (size * size * outputs)) ** 0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # the layer has a bias
            modules += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.features = nn.Sequential(*modules)
        layers_after: list[nn.Module] = []
        for width in (inputs * 6 * 6, 4096):
            linear = nn.Linear(width, 4096)
            nn.init.normal_(linear.weight, std=self.head_std)
            nn.init.zeros_(linear.bias)
            layers_after += [nn.Dropout(0.5), linear, nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*layers_after)
        self.width = 4096

    head_std = 0.01  # standard deviation of the initial weights of the linear layers, also of the heads

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class PreActivationBlock(nn.Module):
    """Bottleneck block in which batch normalisation and ReLU come before each convolution (arXiv:1603.05027).

    A 1×1 convolution of the activated input is the shortcut if the shape changes.
    """

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        outputs = 4 * planes
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        y = self.conv1(active)
        y = self.conv2(torch.relu(self.bn2(y)))
        return self.conv3(torch.relu(self.bn3(y))) + shortcut


class PreActivationResNet(Backbone):
    """Pre-activation ResNet-50 without normalisation after the stem and after the last block, (B, C, H, W) → (B, 2048)."""

    def __init__(self, in_channels: int = 3):
        super().__init__()
        stem = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        layers: list[nn.Module] = [stem, nn.MaxPool2d(3, stride=2, padding=1)]
        inputs = 64
        for i, number in enumerate((3, 4, 6, 3)):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = []
            for j in range(number):
                blocks.append(PreActivationBlock(inputs, planes, stride if j == 0 else 1))
                inputs = 4 * planes
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.width = inputs

    def forward(self, images: Tensor) -> Tensor:
        return self.avgpool(self.features(images)).flatten(1)

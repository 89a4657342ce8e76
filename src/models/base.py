"""The base class of all backbones."""

from torch import nn


class Backbone(nn.Module):
    """A network without a classifier, (B, C, H, W) → (B, F).

    Attributes:
        width: F, the size of the features.
    """

    width: int

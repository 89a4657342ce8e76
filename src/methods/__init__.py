"""METHODS: name → class, the only place that lists the methods. The names are the names of their files."""

from ..models.backbones import build_backbone
from .base import Method, PrototypeMethod, Step
from .deepcluster_v2 import DeepClusterV2
from .sela_v2 import SeLaV2
from .self_classifier import SelfClassifier
from .self_classifier_v1 import SelfClassifierV1
from .swav import SwAV

METHODS: dict[str, type[Method]] = {
    "self_classifier": SelfClassifier,
    "self_classifier_v1": SelfClassifierV1,
    "swav": SwAV,
    "deepcluster_v2": DeepClusterV2,
    "sela_v2": SeLaV2,
}


def build_method(
    name: str, config: object, arch: str, in_channels: int, image_size: int, patch_size: int, num_global: int
) -> Method:
    """A method with random weights, on a backbone of this architecture; see `build_backbone`."""
    backbone = build_backbone(arch, in_channels, image_size, patch_size)
    return METHODS[name](backbone, config, num_global)


__all__ = ["METHODS", "Method", "PrototypeMethod", "Step", "build_method"]

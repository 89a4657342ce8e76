"""Register the methods. METHODS is the only list of them and maps each name, which is the name of its file, to its class."""

from collections.abc import Mapping
from typing import Any

from ..models.backbones import build_backbone
from .base import Method, PrototypeMethod, Step, feature_width
from .deepcluster_v2 import DeepClusterV2
from .scan import SCAN
from .sela import SeLa
from .sela_v2 import SeLaV2
from .self_classifier import SelfClassifier
from .self_classifier_simclr import SelfClassifierSimCLR
from .self_classifier_v1 import SelfClassifierV1
from .selflabel import SelfLabel
from .simclr import SimCLR
from .swav import SwAV

METHODS: dict[str, type[Method]] = {
    "self_classifier": SelfClassifier,
    "self_classifier_simclr": SelfClassifierSimCLR,
    "self_classifier_v1": SelfClassifierV1,
    "swav": SwAV,
    "deepcluster_v2": DeepClusterV2,
    "sela_v2": SeLaV2,
    "sela": SeLa,
    "simclr": SimCLR,
    "scan": SCAN,
    "selflabel": SelfLabel,
}


def build_method(name: str, config: Any, settings: Mapping[str, Any]) -> Method:
    """Build a method with random weights.

    Args:
        name: a key of `METHODS`.
        config: the method's own `Config`.
        settings: the configuration of the run. Only `arch`, `channels`, `global_crops_size`, `patch_size` and
            `global_crops_number` are used.
    """
    backbone = build_backbone(
        settings["arch"],
        settings["channels"],
        image_size=settings["global_crops_size"],
        patch_size=settings["patch_size"],
    )
    return METHODS[name](backbone, config, settings["global_crops_number"])


__all__ = ["METHODS", "Method", "PrototypeMethod", "Step", "build_method", "feature_width"]

"""Checkpoints of other projects in our names: one table, read from top to bottom, of how to know each and what to rename.

Ours are `backbone.*`, `projection_head.mlp.*`, `classifiers.<k>.*` and `queue.*`. The facts about the files are those of the
projects' own repositories; the key names were checked against models built by their code.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Weights(NamedTuple):
    """What a file held: tensors in our names, who wrote it, the names of the tensors that were left out.

    method: the method of this project that all of `tensors` belong to; None if only the backbone is of use to us. Files of
        DeepCluster-v2 and SeLa-v2 cannot be told apart by their names, and hold the same network: both are deepcluster_v2.
    arch: the backbone as the file names it; if it does not, a ResNet known by its blocks and shapes; else "".
    record: what else was in it: of a checkpoint of train.py everything, of others the number of epochs, and of several
        classifiers the one with the lowest loss, as SCAN's files say.
    """

    tensors: dict[str, Tensor]
    source: str
    left_out: list[str]
    method: str | None
    arch: str
    record: dict


@dataclass(frozen=True)
class Source:
    """One kind of foreign file.

    signs: patterns; each must match the beginning of some name in the state dict (without DataParallel's `module.`).
    rules: (pattern, replacement) for the beginning of a name; the first that matches counts. What none matches is left out.
    beside: at least one of these must lie in the file beside the state dict, or hold it.
    arch: the backbone, where there is only one of these names.
    """

    name: str
    signs: tuple[str, ...]
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    beside: tuple[str, ...] = ()
    method: str | None = None
    arch: str = ""


def _small_block(match: re.Match) -> str:
    """Block b of layer l of a ResNet-18 with two blocks a layer, in the names of our `CifarResNet`."""
    layer, block, part = int(match[1]), int(match[2]), match[3]
    inside = {"conv1": "residual.0.0", "bn1": "residual.0.1", "conv2": "residual.2.0", "bn2": "residual.2.1"}
    return f"backbone.stages.{2 * (layer - 1) + block}.{inside.get(part, part)}."


TRUNK = (r"(conv1|bn1|layer[1-4])\.", r"backbone.\1.")  # torchvision's names
SCAN_HEADS = (
    (r"cluster_head\.(\d+)\.", r"classifiers.\1."),
    (r"contrastive_head\.", "projection_head.mlp."),
)

PROTOTYPES = (  # of SwAV a matrix, of DeepCluster-v2 and SeLa-v2 a numbered one for each head
    TRUNK,
    (r"projection_head\.", "projection_head.mlp."),
    (r"prototypes\.prototypes(\d+)\.", r"classifiers.\1."),
    (r"prototypes\.", "classifiers.0."),
)

SOURCES = (
    Source(
        "Self-Classifier, the authors' second generation",
        signs=(r"backbone\.", r"cls_0\.weight_v"),
        rules=(
            (r"backbone\.", "backbone."),
            (r"mlp_head\.mlp\.", "projection_head.mlp."),
            (r"cls_(\d+)\.", r"classifiers.\1."),
        ),
        method="self_classifier",
    ),
    Source(
        "Self-Classifier, the authors' first generation",
        signs=(r"backbone\.", r"cls_0$"),
        rules=(
            (r"backbone\.fc\.", "projection_head.mlp."),
            (r"backbone\.", "backbone."),
            (r"cls_(\d+)$", r"classifiers.\1.weight"),
        ),
        method="self_classifier_v1",
    ),
    Source(  # the momentum encoder and the queue of negatives are left out
        "MoCo v2",
        signs=(r"encoder_q\.conv1\.",),
        rules=((r"encoder_q\.fc\.", "projection_head.mlp."), (r"encoder_q\.", "backbone.")),
    ),
    Source(
        "SimSiam",
        signs=(r"encoder\.conv1\.", r"predictor\."),
        rules=(
            (r"encoder\.fc\.", "projection_head.mlp."),
            (r"encoder\.", "backbone."),
            (r"predictor\.", "predictor."),
        ),
    ),
    Source(
        "SwAV",
        signs=(r"conv1\.", r"projection_head\.\d", r"prototypes\.weight$"),
        rules=PROTOTYPES,
        method="swav",
    ),
    Source(
        "DeepCluster-v2 or SeLa-v2",
        signs=(r"conv1\.", r"projection_head\.\d", r"prototypes\.prototypes0\."),
        rules=PROTOTYPES,
        method="deepcluster_v2",
    ),
    Source(  # fine-tuned on labels, or trained without prototypes
        "a network of SwAV's code",
        signs=(r"conv1\.", r"projection_head\."),
        rules=PROTOTYPES,
    ),
    Source(  # CIFAR's and STL-10's names are the same; STL-10's network has a max-pool more than ours
        "SCAN, ResNet-18 for small images",
        signs=(r"backbone\.layer2\.0\.shortcut\.", r"(cluster|contrastive)_head\."),
        rules=(
            (r"backbone\.conv1\.", "backbone.stem.0.0."),
            (r"backbone\.bn1\.", "backbone.stem.0.1."),
            (r"backbone\.layer(\d)\.(\d)\.(\w+)\.", _small_block),
            *SCAN_HEADS,
        ),
        arch="cifar_resnet18",
    ),
    Source(
        "SCAN, ResNet-50",
        signs=(r"backbone\.", r"(cluster|contrastive)_head\."),
        rules=((r"backbone\.", "backbone."), *SCAN_HEADS),
    ),
    Source(  # AlexNet and the pre-activation ResNet, of which this project has none
        "SeLa",
        signs=(r"features\.", r"top_layer"),
        rules=(
            (r"features\.(module\.)?", "backbone.features."),
            (r"classifier\.", "backbone.classifier."),
            (r"top_layer(\d+)\.", r"classifiers.\1."),
            (r"top_layer\.(0\.)?", "classifiers.0."),
        ),
    ),
    Source(
        "SeLa, exported to torchvision's names",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK, (r"fc\.", "classifiers.0.")),
        beside=("labels", "L"),
    ),
    Source(  # fc is left out
        "OBoW",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK,),
        beside=("network",),
    ),
    Source(
        "a ResNet in torchvision's names (Barlow Twins, DINO, torchvision)",
        signs=(r"conv1\.", r"layer1\.0\."),
        rules=(TRUNK, (r"fc\.", "classifiers.0.")),
    ),
    Source(
        "a plain state dict of self_classifier",
        signs=(r"backbone\.", r"classifiers\.0\.weight_v"),
        rules=((r"(\w+)", r"\1"),),
        method="self_classifier",
    ),
    Source(
        "a plain state dict of this project",
        signs=(r"backbone\.",),
        rules=((r"(\w+)", r"\1"),),
    ),
)

DEPTHS = {  # blocks of the four layers, and whether each has three convolutions
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
WRAPPERS = ("state_dict", "model", "network", "net")  # where files keep the state dict, if not at the top


class AuthorsQueue:
    """Stands in for the class `utils.NNQueue` that the authors of Self-Classifier pickle: it takes tensors, runs nothing."""

    state: dict | None = None

    def __setstate__(self, state: dict) -> None:
        kinds = {"queue": Tensor, "queue_indices": Tensor, "queue_targets": Tensor, "ptr": int, "full": bool}
        for name, kind in kinds.items():
            if not isinstance(state, dict) or type(state.get(name)) is not kind:
                raise InputError(f"utils.NNQueue in it has no {kind.__name__} called {name}")
        self.state = state

    def buffers(self) -> dict[str, Tensor]:
        """As the buffers of our `NearestNeighborQueue`."""
        return {
            "queue.embeddings": self.state["queue"],
            "queue.indices": self.state["queue_indices"].long(),
            "queue.labels": self.state["queue_targets"].long(),
            "queue._pointer": torch.tensor(self.state["ptr"]),
            "queue._full": torch.tensor(self.state["full"]),
        }


def translate(content: object) -> Weights:
    """Find the state dict in what was read from a file, recognise who wrote it, and give its tensors our names.

    Raises:
        InputError: if there is no state dict, or none of the table's.
    """
    state, beside = _find_state_dict(content)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for source in SOURCES:
        known = all(any(re.match(sign, name) for name in state) for sign in source.signs)
        if known and (not source.beside or beside & set(source.beside)):
            break
    else:
        raise InputError(f"a state dict with unknown names ({_some(state)}); known are those of docs/pretrained.md")
    renamed = {name: _rename(name, source.rules) for name in state}
    tensors = {new: state[name] for name, new in renamed.items() if new}
    queue = content.get("nn_queue") if "state_dict" in beside else None
    if isinstance(queue, AuthorsQueue) and queue.state:
        tensors |= queue.buffers()
    arch, epoch, *best = (content.get(name) if beside else None for name in ("arch", "epoch", "head", "best_loss_head"))
    best = next((head for head in best if isinstance(head, int)), None)
    return Weights(
        tensors,
        source.name,
        left_out=[name for name, new in renamed.items() if not new],
        method=source.method,
        arch=arch if isinstance(arch, str) else source.arch or _resnet_in(tensors),
        record={"epoch": epoch if isinstance(epoch, int) else None}
        | ({} if best is None else {"history": [{"classifier": best}]}),
    )


def _resnet_in(tensors: dict[str, Tensor]) -> str:
    """The name of the ResNet that the backbone is, in torchvision's names of its tensors, or "" if it is another network.

    Others have these names too, such as those that are wide, or in groups, only within the blocks.
    """
    stem, inner = (tensors.get(f"backbone.{name}.weight") for name in ("conv1", "layer1.0.conv2"))
    if stem is None or inner is None:
        return ""
    blocks = tuple(sum(f"backbone.layer{i}.{j}.conv1.weight" in tensors for j in range(99)) for i in range(1, 5))
    depth = DEPTHS.get((blocks, "backbone.layer1.0.conv3.weight" in tensors), "")
    widen = {64: "", 128: "w2", 256: "w4", 320: "w5"}.get(len(stem))
    if widen is None or stem.shape[1:] != (3, 7, 7) or inner.shape[:2] != (len(stem), len(stem)):
        return ""
    return depth + widen if depth == "resnet50" or not widen else ""


def _find_state_dict(content: object) -> tuple[dict[str, Tensor], set[str]]:
    """The state dict, and the names of what lies beside it or holds it (none if the file is nothing but a state dict)."""
    if isinstance(content, dict):
        if _is_state_dict(content):
            return content, set()
        for wrapper in WRAPPERS:
            if _is_state_dict(content.get(wrapper)):
                return content[wrapper], {key for key in content if isinstance(key, str)}
    found = f"{type(content).__name__} of {_some(content)}" if isinstance(content, dict) else type(content).__name__
    raise InputError(f"no state dict in it, but a {found}")


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _rename(name: str, rules) -> str | None:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


def _some(names) -> str:
    return ", ".join(map(str, list(names)[:4])) + ", ..." * (len(names) > 4)

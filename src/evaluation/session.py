"""Open everything that an evaluation needs in one call: the checkpoint, the data, the views, the device and the folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..config import DataOptions, EvaluationOptions, EvalViewOptions, ViewSettings, as_plain, check_patches, flag
from ..data.base import Views
from ..data.datasets import FeatureRows, ImageFiles, Images, MemoryImages, check_channels, open_split
from ..data.formats import describe_others
from ..data.loaders import single_views
from ..data.subsets import keep_rows
from ..data.views import build_views
from ..errors import InputError, printable
from ..features import extract
from ..loading import Unclassified, evaluation_view, load_backbone, load_classifiers, load_method
from ..machine import resolve_precision
from ..methods import Method
from ..models.heads import LinearClassifiers
from ..preprocessing import Preprocessing
from ..run import results_folder

Part = Literal["backbone", "head", "classifiers"]
Network = Method | LinearClassifiers | nn.ModuleDict  # nn.ModuleDict for a backbone alone


@dataclass(frozen=True, kw_only=True)
class Session:
    """A network on its device, the data on which it is evaluated, and the settings of both.

    Attributes:
        checkpoint: the value of `--checkpoint`.
        network: in evaluation mode. It has a `backbone`, and `embed` and `predict` if the evaluation asked for them.
        trained: the configuration of the run that wrote the checkpoint.
        state: the checkpoint without the weights.
        source: the data set.
        splits: {name of a split: its images}.
        views: the views of the training run; evaluations use the view `single`.
        view: the evaluation view of photographs; None for digits and features, which have their own views.
        folder: folder for the results, which may not exist yet.
        batch_size: number of images per forward pass and rank.
        workers: number of processes per rank that decode files; -1: one per available core.
        features_cache: folder of cached features; "": no cache.
    """

    checkpoint: str
    network: Network
    trained: dict[str, Any]
    state: dict[str, Any]
    source: DataOptions
    splits: dict[str, Images]
    views: Views
    view: Preprocessing | None
    device: torch.device
    precision: str
    channels_last: bool
    folder: Path
    batch_size: int
    workers: int
    features_cache: str

    @property
    def view_size(self) -> int:
        """Side of the evaluation view in pixels."""
        return self.view.size if self.view else self.trained["global_crops_size"]

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the network in mixed precision, or None."""
        return None if self.precision == "float32" else getattr(torch, self.precision)

    @property
    def layout(self) -> torch.memory_format:
        """Memory layout of the network."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def open(self, split: str) -> Images:
        """Return the images of a split, which may be one that is not in `splits`."""
        if split in self.splits:
            return self.splits[split]
        return open_split(self.source, split, upright=self.trained["upright"])

    def batches(self, data: Images, views: Views | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield batches of evaluation views of this rank's share of the images, with the indices of the images."""
        return single_views(
            data, views or self.views, batch_size=self.batch_size, device=self.device, workers=self.workers
        )

    def features(self, data: Images, *, split: str, layer: str, network: nn.Module | None = None) -> Tensor:
        """Return the features of all images on every rank, (N, F) float32 on the CPU; see `features.extract`."""
        return extract(
            network or self.network,
            data,
            self.views,
            split=split,
            layer=layer,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            autocast=self.autocast,
            cache=self.features_cache,
        )

    def facts(self) -> dict[str, Any]:
        """Return the entries about the checkpoint, the data and the evaluation view that every result file has.

        Digits and features have no entries about the view.
        """
        facts = {
            "checkpoint": self.checkpoint,
            "method": self.trained["method"],
            "arch": self.trained["arch"],
            "epochs": self.state.get("epoch"),
            "seed": self.trained.get("seed"),
            "data": self.source.data,
            "subset": self.source.subset,
            "subset_file": self.source.subset_file,
        }
        if self.view:
            facts |= {f"eval_{name}": value for name, value in as_plain(self.view).items()}
        return facts


def open_session(
    options: EvaluationOptions,
    *,
    part: Part,
    splits: tuple[str, ...],
    labelled: bool = False,
    batch_size: int,
    features_cache: str = "",
    below: str = "",
    protocol: Literal["", "self_classifier", "swav"] = "",
) -> Session:
    """Open a checkpoint of this project or of another one, together with its data.

    The function finds every mistake in the options before it reads an image.

    Args:
        part: what the evaluation needs: "backbone", "head" (backbone and embedding) or "classifiers" (all of them).
        splits: names of the splits to open.
        labelled: keep only images with a label, and require the same classes in all splits.
        below: subfolder of the folder of the checkpoint for the results, unless `--output-dir` is given.
        protocol: published evaluation that is followed; see `Preprocessing.in_protocol`.

    Raises:
        InputError: if something is missing or does not fit together. It is an `Unclassified` if the checkpoint lacks `part`.
    """
    network, state = _load(options, part)
    trained = state["config"]
    if not options.data and not trained["data"]:
        raise InputError(
            f"--data is missing: {options.checkpoint} does not name the data it was trained on; give --data"
        )
    source = _source(options, trained)
    opened = _labelled if labelled else _all
    images = opened(source, splits, upright=trained["upright"])
    first = images[splits[0]]
    check_channels(first, source.data, trained["channels"])
    if isinstance(first, FeatureRows) != (trained["arch"] == "identity"):
        takes = "features" if trained["arch"] == "identity" else "images"
        raise InputError(f"--data {source.data}: checkpoint {options.checkpoint} takes {takes}: give others")
    view = choose_view(options, state, first, data=source.data, protocol=protocol)
    views = build_views(source.data, first, ViewSettings.of(trained), evaluation=view)
    folder = results_folder(options.checkpoint, output_dir=options.output_dir, below=below)
    device = distributed.start(options.device)
    if distributed.is_main():
        lines = {describe_others(data.others) for data in images.values() if isinstance(data, ImageFiles)}
        for line in sorted(lines - {""}):
            print(printable(line), flush=True)
    session = Session(
        checkpoint=str(options.checkpoint),
        network=network,
        trained=trained,
        state=state,
        source=source,
        splits=images,
        views=views,
        view=view,
        device=device,
        precision=resolve_precision(options.precision, device),
        channels_last=options.channels_last,
        folder=folder,
        batch_size=batch_size,
        workers=options.workers,
        features_cache=features_cache,
    )
    network.to(device).to(memory_format=session.layout)
    return session


def choose_view(
    options: EvalViewOptions, state: dict[str, Any], images: Images, *, data: str, protocol: str = ""
) -> Preprocessing | None:
    """Return the evaluation view of photographs for a network; None for digits and features, which have their own views.

    Images in memory are small. They are resized to the size of the view and stay whole, unless --eval-resize is given.

    Args:
        state: the checkpoint without the weights.
        images: images that are evaluated.
        data: their --data.
        protocol: see `Preprocessing.in_protocol`.

    Raises:
        InputError: if --eval-size or --eval-resize does not fit the data or the network.
    """
    if data == "digits" or isinstance(images, FeatureRows):
        for name in ("eval_size", "eval_resize"):
            if getattr(options, name):
                raise InputError(
                    f"{flag(name)} is for photographs, but --data {data} has its own views: drop {flag(name)}"
                )
        return None
    view = evaluation_view(state, data).in_protocol(protocol)
    if isinstance(images, MemoryImages):
        view = view.whole()
    view = view.changed(size=options.eval_size, resize=options.eval_resize)
    trained = state["config"]
    check_patches(trained["arch"], view.size, patch_size=trained["patch_size"])
    return view


def _load(options: EvaluationOptions, part: Part) -> tuple[Network, dict[str, Any]]:
    if part == "backbone":
        backbone, state = load_backbone(options.checkpoint, options.arch)
        return nn.ModuleDict({"backbone": backbone}), state
    if part == "head":
        return load_method(options.checkpoint)
    return load_classifiers(options.checkpoint, options.arch)


def _source(options: EvaluationOptions, trained: dict[str, Any]) -> DataOptions:
    """Return the data set of the options, or that of the training run, whose folder may have moved since then."""
    if options.data:
        return options
    given = bool(options.subset or options.subset_file)  # one flag replaces the classes of the training run
    return DataOptions(
        data=trained["data"],
        data_root=options.data_root or trained["data_root"],
        download=options.download,
        subset=options.subset if given else trained["subset"],
        subset_file=options.subset_file if given else trained["subset_file"],
        unlabelled=options.unlabelled or trained["unlabelled"],
        val_share=options.val_share or trained["val_share"],
    )


def _all(source: DataOptions, splits: tuple[str, ...], *, upright: bool) -> dict[str, Images]:
    """Return the images of several splits. The network decides whether they are rotated by EXIF, as in its training."""
    return {split: open_split(source, split, upright=upright) for split in splits}


def _labelled(source: DataOptions, splits: tuple[str, ...], *, upright: bool) -> dict[str, Images]:
    """Return the images with a label of several splits.

    Raises:
        InputError: if a split has no labels, or the splits have different classes.
    """
    images = _all(source, splits, upright=upright)
    for split, data in images.items():
        if not (data.labels >= 0).any():
            raise InputError(
                f"--data {source.data}: the {split} split has no labels, but this evaluation needs labels in all splits; "
                "give another --data"
            )
    first = images[splits[0]]
    if len(splits) > 1 and isinstance(first, ImageFiles) and first.paths == cast(ImageFiles, images[splits[1]]).paths:
        raise InputError(
            f"--data {source.data}: the folder has no train/ and val/, so both splits are the same images: "
            "hold out a part with --val-share 0.2"
        )
    for split, data in images.items():
        if data.classes != first.classes:
            only = sorted(set(first.classes) ^ set(data.classes))
            raise InputError(
                f"--data {source.data}: {len(first.classes)} classes in the {splits[0]} split, {len(data.classes)} in the "
                f"{split} split; not in both: {', '.join(only[:3])}{' ...' if len(only) > 3 else ''}; list the common classes "
                "in a --subset-file"
            )
    return {split: keep_rows(data, np.flatnonzero(data.labels.numpy() >= 0)) for split, data in images.items()}


__all__ = ["Session", "Unclassified", "open_session"]

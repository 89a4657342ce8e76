"""Open the network of predict.py with one of its classifiers, and compute its predictions."""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed, fingerprints
from ..config import PredictOptions, ViewSettings, as_plain
from ..data.base import Views
from ..data.datasets import ImageFiles, Images, open_data
from ..data.loaders import single_views
from ..data.stream import Request, stream
from ..data.views import build_views
from ..errors import InputError
from ..evaluation.classification import choose_classifier
from ..evaluation.session import choose_view
from ..evaluation.trust import Head
from ..features import predict_clusters, stream_predictions
from ..loading import Unclassified, load_classifiers
from ..machine import resolve_precision
from ..preprocessing import Preprocessing

MOST_TRAINING = 50_000  # largest number of training images from which the means are computed
FEWEST_TRAINING = 2_000


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A network on its device, and one of its classifiers.

    Attributes:
        number: the classifier, chosen because of `chosen_by`.
        clusters: C, the number of its clusters.
        model: fingerprint of the weights.
        trained: configuration of the training run.
        state: the checkpoint without the weights.
        view, views: the evaluation view of image files; `view` is None for a network for digits.
        facts: what the predictions depend on beside the images.
    """

    network: nn.Module
    number: int
    chosen_by: str
    clusters: int
    model: str
    trained: dict[str, Any]
    state: dict[str, Any]
    view: Preprocessing | None
    views: Views
    device: torch.device
    precision: str
    options: PredictOptions

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "classifier": self.number,
            "precision": self.precision,
            "view": as_plain(self.view) if self.view else None,
        }

    def predict(
        self, requests: Iterable[Request], damaged: Callable[[list[tuple[int, str]]], None]
    ) -> Generator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield the predictions of image files batch by batch.

        Args:
            damaged: called with number and reason of the files of a batch that cannot be decoded, before its predictions.

        Yields:
            B numbers, (B, C) probabilities and (B, F) embeddings. B may be 0.
        """
        empty = np.zeros((0, self.clusters), dtype=np.float32)
        for batch in stream(requests, self.views, device=self.device, workers=self.options.workers):
            damaged(batch.damaged)
            if batch.images is None:
                yield [], empty, empty
                continue
            pairs = self._predictions([(batch.images, np.array(batch.numbers))])
            for probabilities, embeddings, _ in pairs:
                yield batch.numbers, probabilities.numpy(), embeddings.numpy()

    @property
    def equals(self) -> list[int]:
        """The classifiers with as many clusters as this one, this one first."""
        sizes = list(cast(Any, self.network).classes)
        return [self.number, *(k for k, size in enumerate(sizes) if size == self.clusters and k != self.number)]

    def heads(self, requests: Iterable[Request], most: int) -> list[Head]:
        """Return what every classifier with as many clusters as this one finds in image files, this one first.

        Args:
            requests: files that could be decoded before.
            most: number of files.
        """
        shown = 0

        def batches() -> Iterator[tuple[Tensor, np.ndarray]]:
            nonlocal shown
            for batch in stream(requests, self.views, device=self.device, workers=self.options.workers):
                if batch.images is not None:
                    yield batch.images, np.arange(shown, shown + len(batch.images))
                    shown += len(batch.images)

        clusters, confidences, *_ = predict_clusters(self.network, batches(), most, autocast=self.autocast)
        last = (self.state.get("history") or [{}])[-1]
        return [
            Head(
                clusters=clusters[k, :shown],
                confidence=float(confidences[k, :shown].mean()),
                loss=last.get(f"loss_{k}"),
            )
            for k in self.equals
        ]

    @property
    def autocast(self) -> torch.dtype | None:
        return None if self.precision == "float32" else getattr(torch, self.precision)

    def training_images(
        self, count: Callable[[int, int], None], *, most: int
    ) -> tuple[np.ndarray, np.ndarray, str] | None:
        """Return the sums of the embeddings of training images in each cluster, the numbers of images, and which they are.

        Args:
            count: called with the number of images of each batch, and of all of them.
            most: largest number of images. If there are more, some are drawn.

        Returns:
            (C, F) float64, (C,) and words; None if the training images are not on this machine.
        """
        found = self._open_training()
        if found is None:
            return None
        data, views = found
        rows = np.arange(len(data))
        if len(rows) > most:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:most])
        which = (
            f"{len(rows):,} of {len(data):,} training images"
            if len(rows) < len(data)
            else f"{len(rows):,} training images"
        )
        sums, counts = np.zeros((0, 0)), np.zeros(self.clusters, dtype=np.int64)
        for probabilities, embeddings, _ in self._predictions(self._views_of(data, rows, views)):
            if not sums.size:
                sums = np.zeros((self.clusters, embeddings.shape[1]))
            clusters = probabilities.argmax(dim=1).numpy()
            np.add.at(sums, clusters, embeddings.double().numpy())
            counts += np.bincount(clusters, minlength=self.clusters)
            count(len(clusters), len(rows))
        return (sums, counts, which) if sums.size else None

    def _views_of(self, data: Images, rows: np.ndarray, views: Views) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield the evaluation views of training images. Those that cannot be decoded are left out."""
        size = self.options.batch_size
        if not isinstance(data, ImageFiles):
            kept = data.keep(rows, data.labels.numpy()[rows], data.classes)
            yield from single_views(kept, views, batch_size=size, device=self.device)
            return
        requests = ([(row, data.paths[row]) for row in rows[i : i + size].tolist()] for i in range(0, len(rows), size))
        for batch in stream(requests, views, device=self.device, workers=self.options.workers):
            if batch.images is not None:
                yield batch.images, np.array(batch.numbers)

    def _predictions(self, batches: Iterable[tuple[Tensor, np.ndarray]]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        return stream_predictions(self.network, batches, classifier=self.number, autocast=self.autocast)

    def _open_training(self) -> tuple[Images, Views] | None:
        """Return the training images and their evaluation view, or None if they are not on this machine."""
        trained = self.trained
        if not trained["data"]:
            return None
        try:
            data = open_data(
                trained["data"],
                "train",
                root=trained["data_root"],
                subset=trained["subset"],
                subset_file=trained["subset_file"],
                unlabelled=trained["unlabelled"],
                val_share=trained["val_share"],
            )
        except InputError:
            return None
        return data, _views(self.options, self.state, data, name=trained["data"])[1]


def open_classifier(options: PredictOptions, *, example: str) -> Classifier:
    """Open a checkpoint with its classifier.

    Args:
        example: path of an image, for which the evaluation view is chosen.

    Raises:
        InputError: if the checkpoint holds no classifiers, does not take images, or does not fit the options.
    """
    try:
        network, state = load_classifiers(options.checkpoint, options.arch)
    except Unclassified as error:
        raise InputError(f"{error}; cls_eval.py --kmeans K puts images into clusters without a classifier") from None
    trained = state["config"]
    if trained["arch"] == "identity":
        raise InputError(f"checkpoint {options.checkpoint} takes features, not images: cls_eval.py evaluates it")
    is_digits = trained["data"] == "digits"
    if trained["channels"] != (1 if is_digits else 3):
        raise InputError(
            f"checkpoint {options.checkpoint} takes images with {trained['channels']} channels, but image files have 3: give "
            "another checkpoint"
        )
    sizes = list(network.classes)
    number, chosen_by = choose_classifier(options.classifier, state, len(sizes))
    data = ImageFiles([example], torch.full((1,), -1), [])
    view, views = _views(options, state, data, name="digits" if is_digits else options.data)
    device = distributed.start(options.device)
    model = fingerprints.of_weights(network)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return Classifier(
        network=network.to(device).to(memory_format=layout),
        number=number,
        chosen_by=chosen_by,
        clusters=sizes[number],
        model=model,
        trained=trained,
        state=state,
        view=view,
        views=views,
        device=device,
        precision=resolve_precision(options.precision, device),
        options=options,
    )


def _views(
    options: PredictOptions, state: dict[str, Any], data: Images, *, name: str
) -> tuple[Preprocessing | None, Views]:
    """Return the evaluation view of a network for images of `--data name`, None for digits, and the views that make it."""
    view = choose_view(options, state, data, data=name)
    return view, build_views(name, data, ViewSettings.of(state["config"]), evaluation=view)

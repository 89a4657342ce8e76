"""The evaluation of cls_eval.py, unsupervised classification: put every image into a cluster and score the clusters.

The steps are: open, cluster, judge without labels, judge by labels, write and print.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..config import ClsEvalOptions, KMeansOptions, ViewSettings, as_plain
from ..data.base import Views
from ..data.datasets import ImageFiles, Images, MemoryImages
from ..data.imagenet import class_to_superclass
from ..data.subsets import draw_share, keep_rows, read_list
from ..data.views import build_views
from ..errors import InputError, printable
from ..features import average_clusters, predict_clusters, predict_probabilities
from ..loading import Unclassified, load_classifiers
from ..methods import Method
from ..metrics import adjusted_mutual_information, contingency
from ..models.heads import LinearClassifiers
from ..reports import clusters as report
from ..reports.atlas import AtlasData
from ..run import make_folder
from . import atlas, kmeans, trust
from .clustering import SCORES, Clustering, kmeans_on_pixels, score_classifiers, score_superclasses
from .knn import unit_rows
from .maps import choose_images, name_directions, tsne, two_directions
from .quality import agreement, align, rankme, silhouette
from .session import Session, choose_view, open_session
from .trust import Head

Other = tuple[Method | LinearClassifiers, dict[str, Any], Views]
MAPPED = 10_000  # largest number of points in a map of principal components


@dataclass(frozen=True, kw_only=True)
class Job:
    """An open session, and the other inputs of the evaluation.

    Attributes:
        split: the part of the data that is evaluated.
        data: its images, which are put into clusters.
        superclasses: {choice: ({class: superclass}, names of the superclasses)}.
        others: {checkpoint to compare with: (network, the checkpoint without the weights, views)}.
    """

    session: Session
    split: str
    data: Images
    superclasses: dict[str, tuple[dict[int, int], list[str]]]
    others: dict[str, Other]

    @property
    def labelled(self) -> np.ndarray:
        """Positions of the images whose class is known."""
        return np.flatnonzero(self.data.labels.numpy() >= 0)


def run(options: ClsEvalOptions) -> None:
    """Open the checkpoint and the data, cluster the images, judge the clusters, write the results and print them."""
    job = open_job(options)
    if options.kmeans:
        settings = KMeansOptions(**{field.name: getattr(options, field.name) for field in fields(KMeansOptions)})
        found = cluster_by_kmeans(job, settings)
    else:
        found = cluster_by_classifiers(job, options.classifier, ensemble=options.ensemble)
    others = cluster_by_others(job)
    seen = look(job, found) if options.atlas else None
    features = found.features
    if features is None and (options.feature_quality or options.tsne or options.pca):
        features = job.session.features(job.data, split=job.split, layer="backbone")
    if distributed.is_main():
        quality = judge_without_labels(found, features if options.feature_quality else None, others)
        result = {**describe(job, found), "quality": quality}
        if found.settings is None:
            history = job.session.state.get("history") or []
            judged = trust.judge(found, history=history, others=list(others.values()), features=features)
            result["trust"] = {**judged, "sentences": trust.notes(judged)}
        if len(job.labelled):
            result |= judge_by_labels(job, found, pixel_kmeans=options.pixel_kmeans)
        maps = maps_of(job, found, features, pca=options.pca, tsnes=options.tsne, tsne_classes=options.tsne_classes)
        drawing = report.Drawing(
            data=job.data,
            clusters=found.clusters[found.chosen],
            confidences=found.confidences[found.chosen],
            grids=options.grids,
            log_sums=found.log_sums[found.chosen] if found.log_sums is not None and _is_first(job.session) else None,
            maps=maps,
            suffix=options.figures,
            dpi=options.dpi,
        )
        write(job.session.folder, drawing, result)
        if seen is not None:
            sentences = result["trust"]["sentences"] if "trust" in result else ()
            atlas.write(replace(seen, notes=sentences), job.session.folder)
    distributed.stop()


# ---- open -----------------------------------------------------------------------------------------------------------


def open_job(options: ClsEvalOptions) -> Job:
    """Open the checkpoint and the data. The function finds every mistake in the options before it reads an image.

    Raises:
        InputError: if something is missing or does not fit together.
    """
    by_features = bool(options.kmeans)
    try:
        session = open_session(
            options,
            part=options.layer if by_features else "classifiers",
            splits=(options.split,),
            batch_size=options.batch_size,
            features_cache=options.features_cache,
            below="kmeans" if by_features else "",
            protocol="self_classifier" if by_features else "",
        )
    except Unclassified as error:
        hint = "drop --layer head" if by_features else "--kmeans K clusters the features of any backbone"
        raise InputError(f"{error}; {hint}") from None
    data, name = session.splits[options.split], session.source.data
    if options.pixel_kmeans and not isinstance(data, MemoryImages):
        raise InputError(
            f"--pixel-kmeans needs small images held in memory, but --data {name} is a folder: drop --pixel-kmeans"
        )
    grouped = bool((data.labels >= 0).any())
    if options.grids and not grouped and (by_features or not _is_first(session)):
        raise InputError(f"--grids sorts clusters by accuracy, but --data {name} has no labels: drop --grids")
    for wanted, given in (("--grids", options.grids), ("--atlas", options.atlas)):
        if given and not data.has_pictures:
            raise InputError(f"{wanted} shows images, but --data {name} holds features: drop {wanted}")
    for seed in range(options.tsne):  # raises if there are too few images
        classes = data.labels if grouped else torch.zeros_like(data.labels)
        choose_images(classes.numpy(), options.tsne_classes if grouped else 0, seed)
    superclasses = {
        choice: class_to_superclass(choice, data.classes, options.hierarchy) for choice in options.superclass
    }
    for choice, (of_class, _) in superclasses.items():
        if not np.isin(data.labels, list(of_class)).any():
            raise InputError(f"--superclass {choice}: no image of the {options.split} split belongs to one of them")
    others = {other: _open_other(other, options, data, data_name=name) for other in options.compare}
    return Job(session=session, split=options.split, data=data, superclasses=superclasses, others=others)


def _is_first(session: Session) -> bool:
    """Return whether the checkpoint is of the first generation of Self-Classifier, whose grids are other ones."""
    return session.trained["method"] == "self_classifier_v1"


def _open_other(name: str, options: ClsEvalOptions, data: Images, *, data_name: str) -> Other:
    """Open a checkpoint to compare with, and the views of its training run."""
    method, state = load_classifiers(name, options.arch, strict=False)
    trained = state["config"]
    if trained["channels"] != data.channels:
        raise InputError(
            f"--compare {name}: the network takes images with {trained['channels']} channels, but --data {data_name} has "
            f"{data.channels}: drop this checkpoint"
        )
    view = choose_view(options, state, data, data=data_name)
    return method, state, build_views(data_name, data, ViewSettings.of(trained), evaluation=view)


# ---- cluster --------------------------------------------------------------------------------------------------------


def cluster_by_classifiers(job: Job, classifier: int | None = None, *, ensemble: bool = False) -> Clustering:
    """Assign every image to its most likely class, by each classifier.

    Args:
        classifier: the classifier to score; None: the one that training chose.
        ensemble: also average the predictions of all classifiers of its size.

    Raises:
        InputError: if the classifier to score does not exist, or if --ensemble finds no other classifier of its size.
    """
    session, network = job.session, job.session.network
    assert not isinstance(network, nn.ModuleDict)  # the session was opened with classifiers
    classes: Sequence[Any] = network.classes
    sizes: list[int] = list(classes)
    chosen, chosen_by = choose_classifier(classifier, session.state, len(sizes))
    equals = [k for k, size in enumerate(sizes) if size == sizes[chosen]]
    if ensemble and len(equals) == 1:
        raise InputError(
            f"--ensemble: classifier {chosen} is the only one with {sizes[chosen]} classes: drop --ensemble, or give another "
            "--classifier"
        )
    clusters, confidences, weights, log_sums = predict_clusters(
        network, session.batches(job.data), len(job.data), autocast=session.autocast
    )
    members = None
    if ensemble:
        common = {k: align(clusters[k], clusters[chosen], sizes[chosen]) for k in equals}
        together, _ = average_clusters(
            network, session.batches(job.data), len(job.data), names=common, autocast=session.autocast
        )
        members = equals, together
    return Clustering(
        names=[f"classifier {k}" for k in range(len(sizes))],
        sizes=sizes,
        clusters=clusters,
        confidences=confidences,
        weights=weights,
        log_sums=log_sums,
        chosen=chosen,
        chosen_by=chosen_by,
        protocol="one central view per image, arg-max",
        ensemble=members,
    )


def choose_classifier(wanted: int | None, state: dict, count: int) -> tuple[int, str]:
    """Return the number of the classifier to score, and the reason for this choice.

    It is the wanted classifier, or the one that training chose without labels, or the first one.

    Raises:
        InputError: if there is no such classifier.
    """
    if wanted is not None:
        chosen, chosen_by = wanted, "--classifier"
    elif state.get("history") and "classifier" in state["history"][-1]:
        chosen, chosen_by = state["history"][-1]["classifier"], "lowest training loss"
    else:
        chosen, chosen_by = 0, "being the first"
    if not 0 <= chosen < count:
        what = f"--classifier {chosen}" if wanted is not None else f"the checkpoint names classifier {chosen}"
        raise InputError(f"{what}: this checkpoint has the classifiers 0 to {count - 1}")
    return chosen, chosen_by


def cluster_by_kmeans(job: Job, settings: KMeansOptions) -> Clustering:
    """Fit k-means on features of training images, and assign the images of the split to the nearest centroids.

    Raises:
        InputError: if there are fewer images to fit on than clusters, or if --fit-list names unknown images.
    """
    session = job.session
    train = session.open("train")
    rows, which = _fitted_rows(settings, train)
    features = session.features(job.data, split=job.split, layer=settings.layer)
    if _same_files(train, job.data) or job.split == "train":
        fitted_on = features[rows]
    elif session.features_cache:  # a cache holds the whole split, because the next evaluation may use another share
        fitted_on = session.features(train, split="train", layer=settings.layer)[rows]
    else:
        fitted_on = session.features(keep_rows(train, rows), split="train", layer=settings.layer)
    to_cluster = features
    if settings.normalize:
        fitted_on, to_cluster = (unit_rows(each, torch.float32) for each in (fitted_on, features.clone()))
    fit = kmeans.fit(
        fitted_on.to(session.device),
        settings.kmeans,
        init=settings.init,
        restarts=settings.restarts,
        seed=settings.seed,
        least_gain=kmeans.EARLY if settings.early_stop else 0.0,
    )
    clusters, confidences = (
        each.cpu().numpy()[None] for each in kmeans.assign(to_cluster.to(session.device), fit.centroids)
    )
    start = f"{settings.init}, early stop" if settings.early_stop else settings.init
    facts = as_plain(settings)
    facts = {"clusters": facts.pop("kmeans"), **facts, "fit_images": len(rows), "inertia": fit.inertia}
    facts |= {"iterations": fit.iterations, "best": fit.restart, "features": fitted_on.shape[1]}
    return Clustering(
        names=[f"k-means, {settings.layer}"],
        sizes=[settings.kmeans],
        clusters=clusters,
        confidences=confidences,
        weights=None,
        chosen=0,
        chosen_by="--kmeans",
        protocol=f"one central view per image, output of the {settings.layer}{' at unit length' if settings.normalize else ''}; "
        f"k-means with {settings.kmeans} clusters, the best of {settings.restarts} starts ({start}), fitted on "
        f"{len(rows)} training images ({which})",
        settings=facts,
        features=features if settings.layer == "backbone" else None,
    )


def _same_files(one: Images, other: Images) -> bool:
    """Tell whether two splits consist of the same files, as those of a folder without `train/` do."""
    return isinstance(one, ImageFiles) and isinstance(other, ImageFiles) and one.paths == other.paths


def _fitted_rows(settings: KMeansOptions, train: Images) -> tuple[np.ndarray, str]:
    """Return the positions of the training images on which k-means is fitted, and a description of them."""
    if settings.fit_list:
        rows, which = read_list(train, settings.fit_list, "--fit-list"), f"listed in {settings.fit_list}"
    else:
        labels = torch.where(
            train.labels < 0, len(train.classes), train.labels
        )  # images without a label form one more class
        rows = draw_share(labels.numpy(), settings.fit_share, settings.seed)
        which = f"{100 * settings.fit_share:g} % of each class"
    if settings.kmeans > len(rows):
        raise InputError(
            f"--kmeans {settings.kmeans} is larger than the {len(rows)} images it is fitted on, of {len(train)} "
            f"training images ({which}): give a smaller --kmeans or fit on more images"
        )
    return rows, which


def cluster_by_others(job: Job) -> dict[str, Head]:
    """Return {other checkpoint: what the classifier that its training chose finds in the same images}."""
    found = {}
    for name, (network, state, views) in job.others.items():
        chosen, _ = choose_classifier(None, state, len(network.classes))
        probabilities = predict_probabilities(
            network.to(job.session.device),
            job.session.batches(job.data, views),
            len(job.data),
            classifier=chosen,
            autocast=job.session.autocast,
        )
        best = probabilities.max(axis=1)
        seed, own = (each.get("seed") for each in (state["config"], job.session.trained))
        independent = seed != own or seed is None
        found[name] = Head(
            clusters=probabilities.argmax(axis=1),
            confidence=float(best.mean()),
            probabilities=probabilities if independent else None,
        )
        network.cpu()
    return found


def look(job: Job, found: Clustering) -> AtlasData:
    """Return what the atlas shows."""
    others = {
        name: (network, views, choose_classifier(None, state, len(network.classes))[0])
        for name, (network, state, views) in job.others.items()
    }
    return atlas.look(job.session, job.data, found, split=job.split, others=others)


# ---- judge ----------------------------------------------------------------------------------------------------------


def describe(job: Job, found: Clustering) -> dict[str, Any]:
    """Return the entries of the result about the images, the clusters and the protocol."""
    result = {
        **job.session.facts(),
        "split": job.split,
        "images": len(job.data),
        "labelled_images": len(job.labelled),
        "classifier": found.chosen if found.settings is None else None,
        "classifier_chosen_by": found.chosen_by,
        "protocol": f"{found.protocol}; NMI and AMI arithmetic; ACC by Hungarian matching, over-clustering rule",
        "cluster_sizes": found.counts(found.chosen).tolist(),
    }
    return result if found.settings is None else {**result, "kmeans": found.settings}


def judge_without_labels(found: Clustering, features: Tensor | None, others: dict[str, Head]) -> dict[str, Any]:
    """Compute the numbers that need no labels.

    They are the number of clusters with images, the balance of their sizes, and the agreement of the classifiers with each
    other and with other checkpoints. If there are features, their RankMe and the silhouette of the clusters are added.
    """
    own = found.clusters[found.chosen]
    quality: dict[str, Any] = {"used": len(np.unique(own)), **found.balances(found.chosen)}
    if found.settings is None:
        pairs = agreement(found.clusters, found.sizes)
        quality["agreement"] = {str(size): {"ami": ami, "pairs": count} for size, (ami, count) in pairs.items()}
    if others:
        quality["compared_with"] = {
            name: adjusted_mutual_information(contingency(own, other.clusters)[2]) for name, other in others.items()
        }
    if features is not None:
        quality |= {"rankme": rankme(features), "features": features.shape[1], "silhouette": silhouette(features, own)}
    return quality


def judge_by_labels(job: Job, found: Clustering, *, pixel_kmeans: bool = False) -> dict[str, Any]:
    """Score the chosen clusters by classes and superclasses, and also the other classifiers, the ensemble and raw pixels."""
    labels = job.data.labels.numpy()
    clusters = found.clusters[found.chosen]
    scores = score_classifiers(labels, found.clusters)
    result: dict[str, Any] = {name: scores[found.chosen][name] for name in SCORES}
    result["mapping"] = {str(cluster): label for cluster, label in scores[found.chosen]["mapping"].items()}
    columns = SCORES + ("used",)
    if found.settings is None:
        result["classifiers"] = [
            {**{name: score[name] for name in columns}, "size": size, **found.balances(k)}
            for k, (score, size) in enumerate(zip(scores, found.sizes, strict=True))
        ]
    if found.ensemble:
        members, together = found.ensemble
        score = score_classifiers(labels, together[None])[0]
        result["ensemble"] = {"members": members, **{name: score[name] for name in columns}}
    if pixel_kmeans:
        train, test, known = job.session.open("train"), job.data, job.labelled
        assert isinstance(train, MemoryImages)  # open_job has refused other data
        assert isinstance(test, MemoryImages)
        by_pixels = kmeans_on_pixels(
            train=train.images.numpy(), test=test.images[known].numpy(), num_clusters=len(test.classes)
        )
        score = score_classifiers(labels[known], by_pixels[None])[0]
        result["pixel_kmeans"] = {"size": len(job.data.classes), **{name: score[name] for name in columns}}
    if job.superclasses:
        result["superclass"] = {}
    for choice, (of_class, names) in job.superclasses.items():
        covered = {"superclasses": len(names), "classes": len(of_class)}
        covered["images"] = int(np.isin(labels, list(of_class)).sum())
        result["superclass"][choice] = {**covered, **score_superclasses(labels, clusters, of_class)}
    return result


def write(folder: Path, drawing: report.Drawing, result: dict[str, Any]) -> None:
    """Write figures, list of clusters and results into the folder, and print the results.

    Raises:
        InputError: if the files cannot be written.
    """
    make_folder(folder)
    files = report.write(folder, drawing, result)
    print("\n".join(report.as_text(result, len(drawing.data.classes))))
    print(f"wrote {', '.join(files)} to {printable(folder)}")


def maps_of(
    job: Job, found: Clustering, features: Tensor | None, *, pca: bool, tsnes: int, tsne_classes: int
) -> list[report.Map]:
    """Return maps of the features in two dimensions, coloured by class, or by cluster if there are no labels.

    Args:
        pca: map the features to their two principal directions.
        tsnes: number of t-SNE maps, each of `tsne_classes` classes (0: all).

    Raises:
        InputError: if there are too few images for a map.
    """
    if features is None or not (pca or tsnes):
        return []
    rows = features.numpy()
    if len(job.labelled):
        groups, names = job.data.labels.numpy(), [printable(name) for name in job.data.classes]
    else:
        groups = found.clusters[found.chosen]
        names = [f"cluster {k}" for k in range(max(groups) + 1)]
    maps = []
    if pca:
        shown = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(groups >= 0))[:MAPPED])
        points, shares = two_directions(rows[shown])
        maps.append(
            report.Map(
                file="pca",
                title=f"Principal components of {len(shown):,} images",
                points=points,
                groups=groups[shown],
                names=names,
                axis_labels=name_directions(shares),
            )
        )
    for seed in range(tsnes):
        shown = choose_images(groups, tsne_classes, seed)
        title = f"t-SNE of {len(shown):,} images"
        maps.append(
            report.Map(file=f"tsne_{seed}", title=title, points=tsne(rows[shown]), groups=groups[shown], names=names)
        )
    return maps

"""What cls_eval.py does, piece by piece: open, cluster, judge without labels, judge by labels, draw, say."""

import csv
import os
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, figures
from .config import VIEW_SETTINGS, ClsEvalOptions, InputError, KMeansOptions, data_of
from .data.datasets import ImageFiles, Images, MemoryImages, check_channels, open_data
from .data.imagenet import class_to_superclass
from .data.loaders import Views, single_views
from .data.subsets import draw_share, read_list
from .data.views import build_views
from .evaluation import kmeans
from .evaluation.clustering import SCORES, kmeans_on_pixels, score_classifiers, score_superclasses
from .evaluation.knn import unit_rows
from .evaluation.linear import keep_rows
from .evaluation.maps import choose_images, tsne, two_directions
from .evaluation.quality import agreement, align, balance, rankme, silhouette
from .features import average_clusters, extract, predict_clusters
from .logs import percent, table, write_json
from .metrics import adjusted_mutual_information, contingency
from .pretrained import Unclassified, load_backbone, load_classifiers, load_method
from .run import make_folder, results_folder

# figures of an earlier evaluation, which this one replaces
FIGURES = r"(confusion|gallery|sizes|pca|(grid|tsne)_\d+)\.(png|pdf)"
GRID = 9  # images of a cluster in a grid, and how many it needs for one
MAPPED = 10_000  # points in a map of directions at most


@dataclass(frozen=True)
class Job:
    """What was asked for, opened: a network on its device, and the images that it is to sort.

    Attributes:
        trained: the configuration of the checkpoint; state: all of it but the weights.
        where: the arguments of `open_data` behind name and split.
        superclasses: {choice: ({class: superclass}, names)}.
        others: {checkpoint to compare with: (its network, the rest of it, its views of the same images)}.
    """

    options: ClsEvalOptions
    method: nn.Module
    trained: dict
    state: dict
    data_name: str
    where: tuple[str, bool, str]
    data: Images
    superclasses: dict[str, tuple[dict[int, int], list[str]]]
    others: dict[str, tuple[nn.Module, dict, Views]]
    folder: Path
    device: torch.device
    views: Views
    autocast: torch.dtype | None

    @property
    def labelled(self) -> np.ndarray:
        """Positions of the images whose class is known."""
        return np.flatnonzero(self.data.labels.numpy() >= 0)

    def features(self, data: Images, split: str, layer: str) -> Tensor:
        """Features of all images of a part of the data, (N, F), float32 on the CPU."""
        how = (self.options.batch_size, self.device, self.options.workers, self.autocast, self.options.features_cache)
        return extract(self.method, data, split, self.views, layer, *how)

    def batches(self, views: Views | None = None):
        """The evaluation views of all images, this rank's share of them."""
        return single_views(self.data, views or self.views, self.options.batch_size, self.device, self.options.workers)


@dataclass(frozen=True)
class Clustering:
    """N images sorted by K classifiers, or by one k-means.

    Attributes:
        names: of the classifiers. sizes: how many clusters each has, with or without images.
        clusters, confidences: (K, N) each; in [0, 1], the probability, of k-means 1 - distance / distance to the second nearest.
        weights: of each, (C_k,) what a cluster weighs: its mean probability, or the images of k-means.
        chosen: the one that counts. chosen_by: why.
        protocol: how it was done, in words.
        settings: of k-means.
        ensemble: members of an ensemble with the chosen one, and its clusters (N,).
        features: (N, F) of the images, where they are known already.
    """

    names: list[str]
    sizes: list[int]
    clusters: np.ndarray
    confidences: np.ndarray
    weights: list[np.ndarray]
    chosen: int
    chosen_by: str
    protocol: str
    settings: dict | None = None
    ensemble: tuple[list[int], np.ndarray] | None = None
    features: Tensor | None = None


# ---- open -----------------------------------------------------------------------------------------------------------


def open_job(options: ClsEvalOptions) -> Job:
    """Open the checkpoint and the data. What can be wrong with them is found out here, before any image is read.

    Raises:
        InputError: if something is missing or does not fit together.
    """
    method, state = _load(options)
    trained = state["config"]
    if not options.data and not trained["data"]:
        raise InputError(f"--data is missing: {options.checkpoint} does not say what it was trained on")
    source = options if options.data else data_of(trained, options)
    where = (source.data_root, source.download, source.subset_file)
    data = open_data(source.data, options.split, *where)
    check_channels(data, source.data, trained["channels"])
    if options.pixel_kmeans and not isinstance(data, MemoryImages):
        raise InputError(f"--pixel-kmeans needs small images held in memory, --data {source.data} is a folder: drop it")
    if options.grids and not (data.labels >= 0).any():
        raise InputError(f"--grids shows clusters by their accuracy, --data {source.data} has no labels: drop it")
    grouped = (data.labels >= 0).any()
    for seed in range(options.tsne):
        classes = data.labels if grouped else torch.zeros_like(data.labels)
        choose_images(classes.numpy(), options.tsne_classes if grouped else 0, seed)  # or is there too little to show?
    superclasses = {
        choice: class_to_superclass(choice, data.classes, options.hierarchy) for choice in options.superclass
    }
    for choice, (of_class, _) in superclasses.items():
        if not np.isin(data.labels, list(of_class)).any():
            raise InputError(f"--superclass {choice}: no image of the {options.split} split belongs to one")
    others = {name: _open_other(name, source.data, data) for name in options.compare}
    folder = results_folder(options.checkpoint, options.output_dir, below="kmeans" if options.kmeans else "")
    views = build_views(source.data, data, *(trained[name] for name in VIEW_SETTINGS))

    device = distributed.start(options.device)
    method = method.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    return Job(
        *(options, method, trained, state, source.data, where, data),
        *(superclasses, others, folder, device, views, autocast),
    )


def _load(options: ClsEvalOptions) -> tuple[nn.Module, dict]:
    """The network with what is needed of it, and the rest of the checkpoint."""
    if options.kmeans and options.layer == "backbone":
        backbone, state = load_backbone(options.checkpoint, options.arch)
        return nn.ModuleDict({"backbone": backbone}), state
    try:
        return load_method(options.checkpoint) if options.kmeans else load_classifiers(options.checkpoint, options.arch)
    except Unclassified as error:
        hint = "drop --layer head" if options.kmeans else "--kmeans K clusters the features of any backbone"
        raise InputError(f"{error}; {hint}") from None


def _open_other(name: str, data_name: str, data: Images) -> tuple[nn.Module, dict, Views]:
    method, state = load_classifiers(name)
    trained = state["config"]
    if trained["channels"] != data.channels:
        raise InputError(
            f"--compare {name}: takes images with {trained['channels']} channels, --data {data_name} has {data.channels}"
        )
    return method, state, build_views(data_name, data, *(trained[setting] for setting in VIEW_SETTINGS))


# ---- cluster --------------------------------------------------------------------------------------------------------


def cluster_by_classifiers(job: Job) -> Clustering:
    """Every image to the class that a classifier finds most likely.

    Raises:
        InputError: if there is no such classifier, or none to form an ensemble with.
    """
    options, sizes = job.options, list(job.method.classes)
    chosen, chosen_by = choose_classifier(options.classifier, job.state, len(sizes))
    equals = [k for k, size in enumerate(sizes) if size == sizes[chosen]]
    if options.ensemble and len(equals) == 1:
        raise InputError(
            f"--ensemble: classifier {chosen} is the only one with {sizes[chosen]} classes: drop it, or give another "
            "--classifier"
        )
    clusters, confidences, weights = predict_clusters(job.method, job.batches(), len(job.data), job.autocast)
    ensemble = None
    if options.ensemble:
        common = {k: align(clusters[k], clusters[chosen], sizes[chosen]) for k in equals}
        ensemble = equals, average_clusters(job.method, job.batches(), len(job.data), common, job.autocast)[0]
    names = [f"classifier {k}" for k in range(len(sizes))]
    protocol = "one central view per image, arg-max"
    return Clustering(names, sizes, clusters, confidences, weights, chosen, chosen_by, protocol, ensemble=ensemble)


def choose_classifier(wanted: int | None, state: dict, count: int) -> tuple[int, str]:
    """The classifier that was asked for, or that training named without labels; and by what it was chosen."""
    if wanted is not None:
        chosen, chosen_by = wanted, "--classifier"
    elif state.get("history") and "classifier" in state["history"][-1]:
        chosen, chosen_by = state["history"][-1]["classifier"], "lowest training loss"
    else:
        chosen, chosen_by = 0, "being the first"
    if not 0 <= chosen < count:
        what = f"--classifier {chosen}" if wanted is not None else f"the checkpoint names classifier {chosen}"
        raise InputError(f"{what}: this checkpoint has classifiers 0 to {count - 1}")
    return chosen, chosen_by


def cluster_by_kmeans(job: Job) -> Clustering:
    """k-means, fitted on features of training images, applied to those of the split.

    Raises:
        InputError: if there are fewer images to fit on than clusters, or a list of them names others.
    """
    options = job.options
    train = job.data if options.split == "train" else open_data(job.data_name, "train", *job.where)
    if options.fit_list:
        rows, which = read_list(train, options.fit_list, "--fit-list"), f"listed in {options.fit_list}"
    else:
        labels = torch.where(train.labels < 0, len(train.classes), train.labels)  # without a label: one more class
        rows = draw_share(labels.numpy(), options.fit_share, options.seed)
        which = f"{100 * options.fit_share:g} % of each class's"
    if options.kmeans > len(rows):
        raise InputError(
            f"--kmeans {options.kmeans} is larger than the {len(rows)} images it is fitted on, of {len(train)} "
            f"training images ({which}): ask for fewer clusters or fit on more images"
        )

    features = job.features(job.data, options.split, options.layer)
    if options.split == "train":
        fitted_on = features[rows]
    elif options.features_cache:  # a cache is for the whole split: the next evaluation may take another share
        fitted_on = job.features(train, "train", options.layer)[rows]
    else:
        fitted_on = job.features(keep_rows(train, rows), "train", options.layer)
    to_cluster = features
    if options.normalize:
        fitted_on, to_cluster = (unit_rows(each, torch.float32) for each in (fitted_on, features.clone()))
    fit = kmeans.fit(fitted_on.to(job.device), options.kmeans, options.init, options.restarts, options.seed)
    clusters, confidences = (
        each.cpu().numpy()[None] for each in kmeans.assign(to_cluster.to(job.device), fit.centroids)
    )

    settings = {field.name: getattr(options, field.name) for field in fields(KMeansOptions)}
    settings = {"clusters": settings.pop("kmeans"), **settings, "fit_images": len(rows), "inertia": fit.inertia}
    settings |= {"iterations": fit.iterations, "best": fit.restart, "features": fitted_on.shape[1]}
    return Clustering(
        [f"k-means, {options.layer}"],
        [options.kmeans],
        clusters,
        confidences,
        [np.bincount(clusters[0], minlength=options.kmeans)],
        0,
        "--kmeans",
        f"one central view per image, output of the {options.layer}{' at unit length' * options.normalize}; k-means with "
        f"{options.kmeans} clusters, the best of {options.restarts} starts ({options.init}), fitted "
        f"on {len(rows)} training images ({which})",
        settings,
        features=features if options.layer == "backbone" else None,
    )


def cluster_by_others(job: Job) -> dict[str, np.ndarray]:
    """What other checkpoints make of the same images: {checkpoint: (N,) clusters of the classifier each of them chose}."""
    found = {}
    for name, (method, state, views) in job.others.items():
        chosen, _ = choose_classifier(None, state, len(method.classes))
        clusters, _, _ = predict_clusters(method.to(job.device), job.batches(views), len(job.data), job.autocast)
        found[name] = clusters[chosen]
        method.cpu()
    return found


# ---- judge ----------------------------------------------------------------------------------------------------------


def describe(job: Job, found: Clustering) -> dict:
    """What was clustered, and how."""
    result = {
        "checkpoint": str(job.options.checkpoint),
        "method": job.trained["method"],
        "arch": job.trained["arch"],
        "epochs": job.state.get("epoch"),
        "seed": job.trained["seed"],
        "data": job.data_name,
        "subset_file": job.where[2],
        "split": job.options.split,
        "images": len(job.data),
        "labelled_images": len(job.labelled),
        "classifier": found.chosen if found.settings is None else None,
        "classifier_chosen_by": found.chosen_by,
        "protocol": f"{found.protocol}; NMI and AMI arithmetic; ACC by Hungarian matching, over-clustering rule",
        "cluster_sizes": np.bincount(found.clusters[found.chosen], minlength=found.sizes[found.chosen]).tolist(),
    }
    return result if found.settings is None else {**result, "kmeans": found.settings}


def judge_without_labels(found: Clustering, features: Tensor | None, others: dict[str, np.ndarray]) -> dict:
    """What can be said of clusters without a label: how many are used and how evenly, how far classifiers agree with one
    another and with those of other checkpoints, and with features how these lie."""
    own = found.clusters[found.chosen]
    quality = {"used": len(np.unique(own)), "balance": balance(found.weights[found.chosen])}
    if found.settings is None:
        pairs = agreement(found.clusters, found.sizes)
        quality["agreement"] = {str(size): {"ami": ami, "pairs": count} for size, (ami, count) in pairs.items()}
    if others:
        quality["compared_with"] = {
            name: adjusted_mutual_information(contingency(own, clusters)[2]) for name, clusters in others.items()
        }
    if features is not None:
        quality |= {"rankme": rankme(features), "features": features.shape[1], "silhouette": silhouette(features, own)}
    return quality


def judge_by_labels(job: Job, found: Clustering) -> dict:
    """Scores of the chosen clusters, in their own right and against superclasses, and of all that stands beside them."""
    labels = job.data.labels.numpy()
    clusters = found.clusters[found.chosen]
    scores = score_classifiers(labels, found.clusters)
    result = {name: scores[found.chosen][name] for name in SCORES}
    result["mapping"] = {str(cluster): label for cluster, label in scores[found.chosen]["mapping"].items()}
    columns = (*SCORES, "used")
    if found.settings is None:
        result["classifiers"] = [
            {**{name: score[name] for name in columns}, "size": size, "balance": balance(weights)}
            for score, size, weights in zip(scores, found.sizes, found.weights, strict=True)
        ]
    if found.ensemble:
        members, together = found.ensemble
        score = score_classifiers(labels, together[None])[0]
        result["ensemble"] = {"members": members, **{name: score[name] for name in columns}}
    if job.options.pixel_kmeans:
        train, known = open_data(job.data_name, "train", *job.where), job.labelled
        by_pixels = kmeans_on_pixels(train.images.numpy(), job.data.images[known].numpy(), len(job.data.classes))
        score = score_classifiers(labels[known], by_pixels[None])[0]
        result["pixel_kmeans"] = {"size": len(job.data.classes), **{name: score[name] for name in columns}}
    if job.superclasses:
        result["superclass"] = {}
    for choice, (of_class, names) in job.superclasses.items():
        covered = {"superclasses": len(names), "classes": len(of_class)}
        covered["images"] = int(np.isin(labels, list(of_class)).sum())
        result["superclass"][choice] = {**covered, **score_superclasses(labels, clusters, of_class)}
    return result


# ---- draw -----------------------------------------------------------------------------------------------------------


def draw(job: Job, found: Clustering, result: dict, features: Tensor | None, folder: Path) -> list[str]:
    """All figures into a folder; what they are called."""
    data, options, known = job.data, job.options, job.labelled
    class_names = [printable(name) for name in data.classes]
    clusters, confidences = found.clusters[found.chosen], found.confidences[found.chosen]
    labels = data.labels.numpy()
    drawn = []

    def file(name: str) -> Path:
        drawn.append(f"{name}.{options.figures}")
        return folder / drawn[-1]

    if len(known):
        mapping = {int(cluster): label for cluster, label in result["mapping"].items()}
        scored = {
            "labels": labels[known],
            "clusters": clusters[known],
            "mapping": mapping,
            "class_names": class_names,
        }

        def picture(index: int) -> np.ndarray:
            return data.picture(int(known[index]))

        figures.confusion_matrix(file("confusion"), **scored)
        figures.gallery(file("gallery"), picture, confidences=confidences[known], **scored)
        best = best_clusters(labels[known], clusters[known], mapping)[: options.grids]
        result |= {"grids": [{**cluster, "class": class_names[cluster["class"]]} for cluster in best]} if best else {}
        for rank, cluster in enumerate(best):
            rows = np.flatnonzero(clusters[known] == cluster["cluster"])
            shown = np.random.RandomState(0).choice(rows, GRID, replace=False)
            figures.grid(file(f"grid_{rank}"), [picture(row) for row in shown])
    else:
        figures.gallery(file("gallery"), data.picture, None, clusters, confidences, None, None)
    class_sizes = np.unique(labels, return_counts=True)[1] if len(known) == len(data) else None
    figures.cluster_sizes(file("sizes"), result["cluster_sizes"], class_sizes)

    # points have the colours of their classes, without labels those of their clusters
    colours, names = (
        (labels, class_names) if len(known) else (clusters, [f"cluster {k}" for k in range(max(clusters) + 1)])
    )
    if options.pca:
        shown = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(colours >= 0))[:MAPPED])
        figures.scatter(file("pca"), two_directions(features[shown].numpy()), colours[shown], names)
    for seed in range(options.tsne):
        shown = choose_images(colours, options.tsne_classes, seed)
        figures.scatter(file(f"tsne_{seed}"), tsne(features[shown].numpy()), colours[shown], names)
    return drawn


def best_clusters(labels: np.ndarray, clusters: np.ndarray, mapping: dict[int, int]) -> list[dict]:
    """Clusters in the order of their accuracy, the share of images that are of the class the cluster stands for; those with
    fewer images than a grid are left out.

    Args:
        labels, clusters: (N,) class and cluster of every image.
        mapping: {cluster: class}.
    """
    ranked = []
    for cluster in np.unique(clusters).tolist():
        inside = labels[clusters == cluster]
        accuracy = float((inside == mapping[cluster]).mean())
        if len(inside) >= GRID:
            ranked.append({"cluster": cluster, "class": mapping[cluster], "images": len(inside), "accuracy": accuracy})
    return sorted(ranked, key=lambda row: (-row["accuracy"], -row["images"], row["cluster"]))


# ---- write and say --------------------------------------------------------------------------------------------------


def write_clusters(path: Path, data: Images, clusters: np.ndarray, confidences: np.ndarray, result: dict) -> None:
    """One line for each image: its file or position, its cluster, how sure that is; with labels also what the cluster
    stands for and what the image is."""
    known = bool((data.labels >= 0).any())
    # file names are bytes, not always text
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "cluster", "confidence", *(["class_of_cluster", "class"] if known else [])])
        for index, (cluster, sure) in enumerate(zip(clusters.tolist(), confidences.tolist(), strict=True)):
            line = [data.paths[index] if isinstance(data, ImageFiles) else index, cluster, f"{sure:.4g}"]
            if known:
                label = int(data.labels[index])
                stands_for = result["mapping"].get(str(cluster))
                line += [data.classes[each] if each is not None and each >= 0 else "" for each in (stands_for, label)]
            lines.writerow(line)


def write(job: Job, found: Clustering, quality: dict, features: Tensor | None) -> None:
    """Judge by labels, where there are any, draw, write everything into the folder, and print it.

    What is in the folder belongs together: all of it is written aside first, and takes the place of an earlier evaluation
    at once, the JSON last.

    Raises:
        InputError: if there is no room for it, or too few images for a map.
    """
    result = {**describe(job, found), "quality": quality}
    if len(job.labelled):
        result |= judge_by_labels(job, found)
    make_folder(job.folder)
    aside = job.folder / f".cls_eval.{os.getpid()}.part"
    try:
        aside.mkdir()
        files = [*draw(job, found, result, features, aside), "clusters.csv", "cls_eval.json"]
        chosen = found.clusters[found.chosen], found.confidences[found.chosen]
        write_clusters(aside / "clusters.csv", job.data, *chosen, result)
        write_json(aside / "cls_eval.json", result)
        for earlier in job.folder.iterdir():
            if re.fullmatch(FIGURES, earlier.name) and earlier.name not in files:
                earlier.unlink()
        for name in files:
            os.replace(aside / name, job.folder / name)
    except OSError as error:
        raise InputError(f"--output-dir {job.folder}: {error.filename or ''}: {error.strerror}; give another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(*said(result, len(job.data.classes)), sep="\n")
    print(f"wrote {', '.join(files[::-1])} to {job.folder}")


def printable(name: str) -> str:
    """A name of a file or folder, whose bytes need not be text, as text."""
    return os.fsencode(name).decode(errors="replace")


def said(result: dict, num_classes: int) -> list[str]:
    """A result in the words and tables that are printed."""
    quality, remarks = result["quality"], []
    for size, pairs in quality.get("agreement", {}).items():
        which = f"{pairs['pairs']} pairs of" if pairs["pairs"] > 1 else "two"
        remarks.append(f"agreement of the {which} classifiers with {size} clusters: AMI {percent(pairs['ami'])}")
    for name, ami in quality.get("compared_with", {}).items():
        remarks.append(f"agreement with {name}: AMI {percent(ami)}")
    if "rankme" in quality:
        shape = "none" if quality["silhouette"] is None else f"{quality['silhouette']:.3f}"
        remarks.append(
            f"features: RankMe {quality['rankme']:.1f} of {quality['features']}; silhouette of the clusters {shape}"
        )
    for rank, grid in enumerate(result.get("grids", [])):
        remarks.append(
            f"grid {rank}: cluster {grid['cluster']}, {percent(grid['accuracy'])} % of {grid['images']:,} images are “{grid['class']}”"
        )
    if not result["labelled_images"]:
        filled = f"{quality['used']} cluster{'s' * (quality['used'] > 1)}, balance {percent(quality['balance'])}"
        return [f"{result['images']} images in {filled}; no labels, so no scores: see the gallery", *remarks]

    def row(name: str, size: int, score: dict) -> list[str]:
        even = percent(score["balance"]) if "balance" in score else ""
        return [name, str(size), str(score["used"]), even, *(percent(score[of]) for of in SCORES)]

    if "kmeans" in result:
        both = {**quality, **{name: result[name] for name in SCORES}}
        rows = [row(f"k-means, {result['kmeans']['layer']}", result["kmeans"]["clusters"], both)]
    else:
        rows = [
            row(f"classifier {k}{' (chosen)' * (k == result['classifier'])}", score["size"], score)
            for k, score in enumerate(result["classifiers"])
        ]
    if "ensemble" in result:
        members = result["ensemble"]["members"]
        size = result["classifiers"][members[0]]["size"]
        rows.append(row(f"mean of {len(members)} classifiers", size, result["ensemble"]))
    if "pixel_kmeans" in result:
        rows.append(row("k-means on pixels", result["pixel_kmeans"]["size"], result["pixel_kmeans"]))
    lines = [
        f"{result['data']}, {result['split']} split, {result['labelled_images']} labelled images, {num_classes} classes",
        table(["", "clusters", "used", "balance", *(name.upper() for name in SCORES)], rows),
        *remarks,
    ]
    coarse = [
        [
            f"{f'level {choice}' if choice.isdecimal() else choice}, {protocol}",
            *(str(found["superclasses"]), str(found["classes"]), f"{found['images']:,}"),
            *(percent(found[protocol][name]) for name in SCORES),
        ]
        for choice, found in result.get("superclass", {}).items()
        for protocol in ("published", "throughout")
    ]
    if coarse:
        lines.append(table(["superclasses", "number", "classes", "images", *(name.upper() for name in SCORES)], coarse))
        lines.append(
            "published: clusters matched with classes, ACC of superclasses; throughout: superclasses are the labels"
        )
    return lines

"""Write and print what cls_eval.py found: figures, the list of clusters, and tables. Needs arrays and results, no network."""

import csv
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..data.datasets import ImageFiles, Images
from ..errors import InputError, printable
from ..logs import percent, table, write_json
from . import figures

SCORES = ("acc", "nmi", "ami", "ari")
# names of the figures; a new evaluation removes those of an earlier one
FIGURES = r"(confusion|gallery|sizes|pca|(grid|tsne)_\d+)\.(png|pdf|svg)"
GRID = 9  # images in a grid; a smaller cluster has no grid


@dataclass(frozen=True, kw_only=True)
class Map:
    """Images as points in the plane.

    Attributes:
        file: name of the figure, without suffix.
        points: (N, 2).
        groups: (N,) class or cluster of every image, a position in `names`.
        axis_labels: what the two directions mean, if they mean something.
    """

    file: str
    title: str
    points: np.ndarray
    groups: np.ndarray
    names: Sequence[str]
    axis_labels: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """N images with their clusters, and which figures to draw.

    Attributes:
        clusters: (N,) cluster of every image.
        confidences: (N,) confidence of every image in its cluster.
        grids: number of figures of single clusters.
        log_sums: (N,) minus the sum of the log probabilities of every image, for grids as in the first generation of
            Self-Classifier; None: grids as in the second generation.
        maps: maps of the features to draw.
        suffix: file format of the figures: png, pdf or svg.
        dpi: resolution of the figures in dots per inch.
    """

    data: Images
    clusters: np.ndarray
    confidences: np.ndarray
    grids: int = 0
    log_sums: np.ndarray | None = None
    maps: Sequence[Map] = ()
    suffix: str = "png"
    dpi: int = 150


def write(folder: Path, drawing: Drawing, result: dict[str, Any]) -> list[str]:
    """Write figures, clusters.csv and cls_eval.json into a folder, and return their names.

    The files belong together. They are written to a temporary folder first and then replace those of an earlier
    evaluation, the JSON last.

    Raises:
        InputError: if they cannot be written.
    """
    aside = folder / f".cls_eval.{os.getpid()}.part"
    try:
        aside.mkdir()
        names = [*draw(aside, drawing, result), "clusters.csv", "cls_eval.json"]
        write_clusters(aside / "clusters.csv", drawing, result)
        write_json(aside / "cls_eval.json", result)
        for earlier in folder.iterdir():
            if re.fullmatch(FIGURES, earlier.name) and earlier.name not in names:
                earlier.unlink()
        for name in names:
            files.move(aside / name, folder / name)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {error.filename or ''}: {error.strerror}; give another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return names[::-1]


# ---- figures --------------------------------------------------------------------------------------------------------


def draw(folder: Path, drawing: Drawing, result: dict[str, Any]) -> list[str]:
    """Draw all figures into a folder and return their names. Adds `grids` to the result."""
    data, clusters, confidences = drawing.data, drawing.clusters, drawing.confidences
    labels = data.labels.numpy()
    known = np.flatnonzero(labels >= 0)
    drawn = []

    def file(name: str) -> Path:
        drawn.append(f"{name}.{drawing.suffix}")
        return folder / drawn[-1]

    with figures.resolution(drawing.dpi):
        if len(known):
            _draw_scored(drawing, result, known=known, file=file)
        elif data.has_pictures:
            figures.gallery(file("gallery"), data.picture, clusters=clusters, confidences=confidences)
        if drawing.grids and data.has_pictures:
            _draw_grids(drawing, result, known=known, file=file)
        class_sizes = np.unique(labels, return_counts=True)[1] if len(known) == len(data) else None
        figures.cluster_sizes(file("sizes"), result["cluster_sizes"], class_sizes)
        for each in drawing.maps:
            figures.scatter(
                file(each.file),
                each.points,
                each.groups,
                class_names=each.names,
                title=each.title,
                axis_labels=each.axis_labels,
            )
    return drawn


def _draw_scored(drawing: Drawing, result: dict[str, Any], *, known: np.ndarray, file: Callable[[str], Path]) -> None:
    """Draw the figures that need labels, for the images at the positions `known`."""
    data = drawing.data
    names = [printable(name) for name in data.classes]
    labels, clusters = data.labels.numpy()[known], drawing.clusters[known]
    mapping = {int(cluster): label for cluster, label in result["mapping"].items()}
    figures.confusion_matrix(file("confusion"), labels, clusters, mapping=mapping, class_names=names)
    if not data.has_pictures:
        return

    def picture(index: int) -> np.ndarray:
        return data.picture(int(known[index]))

    figures.gallery(
        file("gallery"),
        picture,
        clusters=clusters,
        confidences=drawing.confidences[known],
        labels=labels,
        mapping=mapping,
        class_names=names,
    )


def _draw_grids(drawing: Drawing, result: dict[str, Any], *, known: np.ndarray, file: Callable[[str], Path]) -> None:
    """Draw nine images of each of some clusters, and add `grids` to the result.

    The second generation of Self-Classifier shows random images of the most accurate clusters. The first generation shows
    the first images of the clusters with the smallest `log_sums`, without gaps and borders, and needs no labels.
    """
    data, first = drawing.data, drawing.log_sums is not None
    mapping = {int(cluster): label for cluster, label in result.get("mapping", {}).items()}
    if drawing.log_sums is not None:
        shown = np.arange(len(data))
        ranked = clusters_by_log_sum(drawing.clusters, drawing.log_sums)
    else:
        shown = known
        ranked = best_clusters(data.labels.numpy()[known], drawing.clusters[known], mapping)
    for rank, row in enumerate(ranked[: drawing.grids]):
        members = shown[drawing.clusters[shown] == row["cluster"]]
        nine = members[:GRID] if first else np.random.RandomState(0).choice(members, GRID, replace=False)
        figures.grid(file(f"grid_{rank}"), [data.picture(index) for index in nine], framed=not first)
        if row["cluster"] in mapping:
            row["class"] = printable(data.classes[mapping[row["cluster"]]])
    if ranked:
        result["grids"] = ranked[: drawing.grids]


def best_clusters(labels: np.ndarray, clusters: np.ndarray, mapping: dict[int, int]) -> list[dict]:
    """Return the clusters with enough images for a grid, the most accurate first.

    The accuracy of a cluster is the share of its images that belong to the class that the cluster stands for.

    Args:
        labels: (N,) class of every image.
        clusters: (N,) cluster of every image.
        mapping: {cluster: class}.
    """
    ranked = []
    for cluster in np.unique(clusters).tolist():
        inside = labels[clusters == cluster]
        accuracy = float((inside == mapping[cluster]).mean())
        if len(inside) >= GRID:
            ranked.append({"cluster": cluster, "class": mapping[cluster], "images": len(inside), "accuracy": accuracy})
    return sorted(ranked, key=lambda row: (-row["accuracy"], -row["images"], row["cluster"]))


def clusters_by_log_sum(clusters: np.ndarray, log_sums: np.ndarray) -> list[dict]:
    """Return the clusters with enough images for a grid, in the order of the first generation of Self-Classifier.

    The authors call the value entropy and start with the lowest one. It is the mean over the images of a cluster of
    -Σ_y log p(y|x). It does not weight the logarithms by p(y|x), so it is lowest where the predictions are even.

    Args:
        clusters: (N,) cluster of every image.
        log_sums: (N,) -Σ_y log p(y|x) of every image.
    """
    ranked = []
    for cluster in np.unique(clusters).tolist():
        inside = log_sums[clusters == cluster]
        if len(inside) >= GRID:
            ranked.append({"cluster": cluster, "images": len(inside), "log_sum": float(inside.mean())})
    return sorted(ranked, key=lambda row: (row["log_sum"], row["cluster"]))


# ---- list and tables ------------------------------------------------------------------------------------------------


def write_clusters(path: Path, drawing: Drawing, result: dict[str, Any]) -> None:
    """Write one line per image: file or position, cluster and confidence.

    With labels, the line also has the class that the cluster stands for and the class of the image. In names, backslashes
    are doubled and what cannot be printed is escaped as in Python; the codec `unicode_escape` restores them.
    """
    data = drawing.data
    known = bool((data.labels >= 0).any())
    names = [printable(name, reversible=True) for name in data.classes]
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "cluster", "confidence", *(["class_of_cluster", "class"] if known else [])])
        rows = zip(drawing.clusters.tolist(), drawing.confidences.tolist(), strict=True)
        for index, (cluster, confidence) in enumerate(rows):
            image = printable(data.paths[index], reversible=True) if isinstance(data, ImageFiles) else index
            line = [image, cluster, f"{confidence:.4g}"]
            if known:
                label = int(data.labels[index])
                stands_for = result["mapping"].get(str(cluster))
                line += [names[each] if each is not None and each >= 0 else "" for each in (stands_for, label)]
            lines.writerow(line)


def as_text(result: dict[str, Any], num_classes: int) -> list[str]:
    """Return the sentences and tables to print for a result."""
    quality, remarks = result["quality"], _remarks(result)
    if not result["labelled_images"]:
        filled = f"{quality['used']} cluster{'s' if quality['used'] > 1 else ''}, balance {percent(quality['balance_hard'])} (hard)"
        if "balance_soft" in quality:
            filled += f", {percent(quality['balance_soft'])} (soft)"
        return [f"{result['images']} images in {filled}; no labels, so no scores: see the gallery", *remarks]
    lines = [
        f"{result['data']}, {result['split']} split, {result['labelled_images']} labelled images, {num_classes} classes",
        table(
            ["", "clusters", "used", "balance (hard)", "balance (soft)", *(name.upper() for name in SCORES)],
            _rows(result),
        ),
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


def _remarks(result: dict[str, Any]) -> list[str]:
    """Return one sentence for each number that is not in the table of scores."""
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
    remarks.extend(sentence for _, sentence in result.get("trust", {}).get("sentences", []))
    for rank, grid in enumerate(result.get("grids", [])):
        if "log_sum" in grid:
            share = f"-Σ log p {grid['log_sum']:.1f} on average over {grid['images']:,} images"
            share += f", mapped to “{grid['class']}”" if "class" in grid else ""
        else:
            share = f"{percent(grid['accuracy'])} % of {grid['images']:,} images are “{grid['class']}”"
        remarks.append(f"grid {rank}: cluster {grid['cluster']}, {share}")
    return remarks


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of scores."""

    def row(name: str, size: int, score: dict[str, Any]) -> list[str]:
        even = [percent(score[kind]) if kind in score else "" for kind in ("balance_hard", "balance_soft")]
        return [name, str(size), str(score["used"]), *even, *(percent(score[of]) for of in SCORES)]

    if "kmeans" in result:
        both = {**result["quality"], **{name: result[name] for name in SCORES}}
        rows = [row(f"k-means, {result['kmeans']['layer']}", result["kmeans"]["clusters"], both)]
    else:
        rows = [
            row(f"classifier {k}{' (chosen)' if k == result['classifier'] else ''}", score["size"], score)
            for k, score in enumerate(result["classifiers"])
        ]
    if "ensemble" in result:
        members = result["ensemble"]["members"]
        size = result["classifiers"][members[0]]["size"]
        rows.append(row(f"mean of {len(members)} classifiers", size, result["ensemble"]))
    if "pixel_kmeans" in result:
        rows.append(row("k-means on pixels", result["pixel_kmeans"]["size"], result["pixel_kmeans"]))
    return rows

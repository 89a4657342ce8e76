"""Figures of images: the most confident images of each cluster, and images of one cluster."""

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .canvas import MUTED, WRONG, classes_of, figure_at, one_line, pixels, same_length, whole_percent


def gallery(
    path: str | PathLike[str],
    images: Callable[[int], NDArray],
    *,
    clusters: ArrayLike,
    confidences: ArrayLike,
    labels: ArrayLike | None = None,
    mapping: Mapping[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    per_cluster: int = 10,
    max_clusters: int = 20,
) -> None:
    """Draw one row per cluster with its most confident images, left to right.

    With labels, the clusters with the largest share of images of their class come first, and images of another class
    get a red frame. Without labels, the clusters with the highest mean confidence come first. Clusters that cannot fill
    a row come last, because a small cluster is easily pure.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        images: index → (H, W, 3) or (H, W) uint8 array. Called only for the images that are drawn. Wide or tall images
            are cropped to the square in the middle.
        clusters: (N,) cluster of every image.
        confidences: (N,) confidence of every image in its cluster, in [0, 1].
        labels: (N,) class of every image, a position in `class_names`; None if there are no labels.
        mapping: {cluster: class}, for every cluster that occurs; None: clusters have no names. Required with labels.
        class_names: name of each class; None together with `mapping`.
        per_cluster: largest number of images in a row.
        max_clusters: largest number of rows.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a cluster has no class, a class has no name, the lengths differ, an image has another shape or
            type, labels come without a mapping, or a number of rows or images is below 1.
    """
    clusters, confidences = np.asarray(clusters), np.asarray(confidences)
    known = None if labels is None else np.asarray(labels)
    same_length(clusters=clusters, confidences=confidences)
    if per_cluster < 1 or max_clusters < 1:
        raise ValueError(f"got per_cluster={per_cluster} and max_clusters={max_clusters}; both must be at least 1")
    if (mapping is None) != (class_names is None):
        raise ValueError("got only one of mapping and class_names; pass both or neither")
    if known is not None:
        same_length(labels=known, clusters=clusters)
        if mapping is None:
            raise ValueError("got labels but no mapping from clusters to classes; pass mapping and class_names")

    cluster_ids = np.unique(clusters)
    members = [np.flatnonzero(clusters == cluster) for cluster in cluster_ids]
    sizes = np.array([len(rows) for rows in members])
    wrong = np.zeros(len(clusters), dtype=bool)  # (N,) whether an image is of another class than its cluster
    titles = [f"cluster {cluster}" for cluster in cluster_ids]
    if mapping is not None and class_names is not None:
        cluster_class = classes_of(cluster_ids, mapping, len(class_names))
        titles = [f"{title} → “{one_line(class_names[k], 24)}”" for title, k in zip(titles, cluster_class, strict=True)]
        if known is not None:
            wrong = known != cluster_class[np.searchsorted(cluster_ids, clusters)]
    if known is None:
        merit = np.array([confidences[rows].mean() for rows in members])
        captions = [
            f"{size:,} images, mean confidence {whole_percent(m)}" for size, m in zip(sizes, merit, strict=True)
        ]
    else:
        merit = np.array([(~wrong[rows]).mean() for rows in members])
        captions = [f"{whole_percent(m)} of {size:,} images" for size, m in zip(sizes, merit, strict=True)]

    ranking = np.lexsort((cluster_ids, -sizes, -merit, sizes < per_cluster))[:max_clusters]
    shown = [members[k][np.argsort(-confidences[members[k]], kind="stable")[:per_cluster]] for k in ranking]
    which = "each cluster" if len(ranking) == len(cluster_ids) else f"{len(ranking)} of {len(cluster_ids):,} clusters"
    header = f"The most confident images of {which}."
    if wrong[np.concatenate(shown)].any():
        header += " Red frame: image of another class."
    _draw_rows(path, _tiles(images, shown, wrong), titles=[(titles[k], captions[k]) for k in ranking], header=header)


def _tiles(images: Callable[[int], NDArray], shown: Sequence[NDArray], wrong: NDArray) -> list[list[NDArray]]:
    """Return the tile of every image in rows of indices; the first image decides the size of all tiles."""
    side, rows = 0, []
    for indices in shown:
        row = []
        for index in indices.tolist():
            image = _checked_image(images(index))
            side = side or _tile_side(image)
            row.append(_tile(image, side, framed=bool(wrong[index])))
        rows.append(row)
    return rows


def _draw_rows(
    path: str | PathLike[str], rows: Sequence[Sequence[NDArray]], *, titles: Sequence[tuple[str, str]], header: str
) -> None:
    """Draw rows of (side, side, 3) tiles, exact to the pixel, each with a title and a caption at its left."""
    gap, margin = pixels(6), pixels(24)
    side = len(rows[0][0])
    pitch, row_pitch = side + gap, side + 2 * gap
    width, height = max(len(row) for row in rows) * pitch - gap, len(rows) * row_pitch - 2 * gap
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * row_pitch : i * row_pitch + side, j * pitch : j * pitch + side] = tile

    with figure_at(path, 1, 1) as figure:
        # All sizes are in pixels. The figure grows to the widest title.
        texts = [
            (figure.text(0, 0, title, fontsize=7.5, weight="bold"), figure.text(0, 0, caption, fontsize=6, color=MUTED))
            for title, caption in titles
        ]
        heading = figure.text(0, 0, header, fontsize=7, color=MUTED, va="center")
        column = max(text.get_window_extent().width for pair in texts for text in pair)
        left, top = margin + math.ceil(column) + margin, margin + pixels(30)
        total_width = left + max(width, int(heading.get_window_extent().width)) + margin
        total_height = top + height + margin
        figure.set_size_inches(total_width / figure.dpi, total_height / figure.dpi)
        figure.figimage(canvas, left, margin)
        heading.set(x=left / total_width, y=1 - (margin + pixels(4)) / total_height)
        for i, (title, caption) in enumerate(texts):
            middle = total_height - top - i * row_pitch - side / 2
            x = (left - margin) / total_width
            title.set(x=x, y=(middle + pixels(3)) / total_height, ha="right", va="bottom")
            caption.set(x=x, y=(middle - pixels(4)) / total_height, ha="right", va="top")


def _checked_image(image: NDArray) -> NDArray:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"got an image {image.shape} of {image.dtype}; expected (H, W, 3) or (H, W) of uint8")
    return image


def _tile_side(image: NDArray) -> int:
    """Return 96 pixels (at 150 dots per inch), or about as many as a whole multiple of the side of a small image."""
    side = min(image.shape[:2])
    return side * max(round(pixels(96) / side), 1) if side <= 48 else pixels(96)


def _tile(image: NDArray, side: int, *, framed: bool) -> NDArray:
    """Return the square in the middle of an image as (side, side, 3), with a red frame if `framed`."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short]).convert("RGB")
    # Small images keep their pixels; larger ones are smoothed.
    tile = np.array(square.resize((side, side), Image.Resampling.NEAREST if short <= 48 else Image.Resampling.LANCZOS))
    if framed:
        rim, thickness = np.ones((side, side), dtype=bool), pixels(5)
        rim[thickness:-thickness, thickness:-thickness] = False
        tile[rim] = tuple(bytes.fromhex(WRONG[1:]))
    return tile


def grid(path: str | PathLike[str], images: Sequence[NDArray], *, framed: bool = True) -> None:
    """Draw images of one cluster in a square, as the authors of Self-Classifier do.

    Each image is squeezed to 128 × 128 pixels. The size in pixels is the same at every resolution.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        images: a square number of images, each (H, W, 3) or (H, W) uint8. Nine make 444 × 444 pixels, or 384 × 384.
        framed: 3 pixels of each image are a black border, and 15 pixels of white lie between and around the images, as in
            the second generation; False: the images touch each other and have no border, as in the first generation.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the number of images is not a square, or an image has another shape or type.
    """
    side = math.isqrt(len(images))
    if side * side != len(images) or not images:
        raise ValueError(f"got {len(images)} images; expected a square number of images")
    gap, tile, border = (15, 128, 3) if framed else (0, 128, 0)
    pitch, inside = tile + gap, slice(border, tile - border)
    canvas = np.full((side * pitch + gap, side * pitch + gap, 3), 255, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (gap + pitch * each for each in divmod(position, side))
        shown = Image.fromarray(_checked_image(image)).convert("RGB").resize((tile, tile), Image.Resampling.BILINEAR)
        bordered = np.zeros((tile, tile, 3), dtype=np.uint8)
        bordered[inside, inside] = np.array(shown)[inside, inside]
        canvas[top : top + tile, left : left + tile] = bordered
    dpi = 100
    with figure_at(path, canvas.shape[1] / dpi, canvas.shape[0] / dpi, dpi=dpi) as figure:
        figure.figimage(canvas)

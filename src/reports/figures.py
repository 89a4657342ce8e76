"""Figures of a clustering and of a training run, written as PNG, PDF or SVG.

The name of the file decides the format. The same arguments give the same file, byte for byte: no date is written. Text
stays text: PDF files embed TrueType fonts, SVG files leave the font to the viewer.

No function needs a display: matplotlib's Agg canvas draws, never pyplot. matplotlib is imported on first use, so that
importing this module is cheap.
"""

import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.legend import Legend

FORMATS = (".png", ".pdf", ".svg")
DPI = 150
INK, MUTED, FAINT, ACCENT = "#1f2328", "#656d76", "#d8dee4", "#0a3069"
WRONG = "#d1242f"
LINES = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989"]
# Colours of up to 20 classes. The first six are those of Okabe and Ito without yellow and black. The others were chosen
# one after the other: each is as far as possible (in OKLab, also as seen with a colour vision deficiency) from all before.
CLASSES = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#78005a", "#c3005a", "#a5e100", "#4b1e96"),
    *("#875a00", "#875a87", "#3cd296", "#00695a", "#781e00", "#f0b4d2", "#b44bd2", "#a587ff", "#4b78ff", "#ff4b69"),
)
STYLE = {
    "text.parse_math": False,  # class names come from folders: a dollar sign is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9,
    # Publishers refuse Type 3 fonts, matplotlib's default.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",  # else the ids in the file are random
}

_resolution: ContextVar[int] = ContextVar("resolution", default=DPI)


@contextmanager
def resolution(dpi: int) -> Iterator[None]:
    """Draw the figures of this block at another resolution, in dots per inch (default: 150)."""
    token = _resolution.set(dpi)
    try:
        yield
    finally:
        _resolution.reset(token)


# ---- confusion matrix -----------------------------------------------------------------------------------------------


def confusion_matrix(
    path: str | PathLike[str],
    labels: ArrayLike,
    clusters: ArrayLike,
    *,
    mapping: Mapping[int, int],
    class_names: Sequence[str],
) -> None:
    """Draw which classes each cluster contains.

    Rows are clusters, ordered by the class that they stand for, so that correct images lie on the diagonal (with several
    clusters per class, on a staircase). Columns are the classes that occur. The colour is the share of the row. Counts
    are written for up to 20 classes and 40 clusters, names for up to 60 classes and 120 clusters. In larger matrices the
    colour follows the square root of the share, as the scale at the side shows, because thin pale cells would vanish.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        labels: (N,) class of every image, a position in `class_names`.
        clusters: (N,) cluster of every image.
        mapping: {cluster: class}, for every cluster that occurs.
        class_names: name of each class.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a cluster has no class, a class has no name, or the lengths differ.
    """
    counts, cluster_ids, columns, accuracy = _cells(labels, clusters, mapping=mapping, num_names=len(class_names))
    K, C = counts.shape
    share = counts / counts.sum(axis=1, keepdims=True)
    names = [_line(class_names[column], 24) for column in columns]
    write_counts, write_names = C <= 20 and K <= 40, C <= 60 and K <= 120
    upright = max(len(name) for name in names) > 3
    class_size, cluster_size = (9 if count <= 40 else 6 for count in (C, K))  # of the type

    width = float(np.clip(0.46 * C, 3.2, 8.5))
    height = max(2.4, 0.36 * K if write_counts else min(width * K / C, 8.5), 0.12 * K if write_names else 0)
    below = 0.8
    if write_names and upright:
        below += max(len(name) for name in names) * class_size * 0.6 / 72
    with _figure(path, width + 1.9, height + below, layout="constrained") as figure:
        axes = figure.add_subplot()
        image = _draw_shares(axes, share, even=write_names)
        axes.set_title(f"accuracy {100 * accuracy:.1f} % of {counts.sum():,} images", pad=10)
        axes.set_xlabel("true class" if write_names else f"true class ({C:,})")
        axes.set_ylabel("cluster (ordered by class)" if write_names else f"cluster ({K:,}, ordered by class)")
        if write_names:
            axes.set_xticks(range(C), names, rotation=90 if upright else 0, fontsize=class_size)
            axes.set_yticks(range(K), [str(cluster) for cluster in cluster_ids], fontsize=cluster_size)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if write_counts:
            _write_counts(axes, counts, share)
        _add_scale(figure, axes, image, height)


def _cells(
    labels: ArrayLike, clusters: ArrayLike, *, mapping: Mapping[int, int], num_names: int
) -> tuple[NDArray, NDArray, NDArray, float]:
    """Count the images of each cluster and class.

    Returns:
        The (K, C) counts, the K clusters ordered by class, the C classes, and the share of images in a cluster of their
        class.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    _same_length(labels=labels, clusters=clusters)
    cluster_ids, row = np.unique(clusters, return_inverse=True)
    cluster_class = _classes_of(cluster_ids, mapping, num_names)
    _check_labels(labels, num_names)
    columns = np.union1d(labels, cluster_class)  # (C,) class ids
    K, C = len(cluster_ids), len(columns)
    cells = row * C + np.searchsorted(columns, labels)
    counts = np.bincount(cells, minlength=K * C).reshape(K, C)
    correct = counts[np.arange(K), np.searchsorted(columns, cluster_class)]  # (K,) images
    order = np.lexsort((cluster_ids, -correct, cluster_class))
    return counts[order], cluster_ids[order], columns, correct.sum() / len(labels)


def _draw_shares(axes: "Axes", share: NDArray, *, even: bool) -> "AxesImage":
    """Draw a (K, C) matrix of shares; not `even`: small shares are darker than in proportion."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    image = axes.imshow(
        share,
        cmap=LinearSegmentedColormap.from_list("share", ["white", "#54aeff", ACCENT]),
        norm=PowerNorm(1 if even else 0.5, vmin=0, vmax=1),
        aspect="auto",
        interpolation="nearest" if max(share.shape) <= 1200 else "auto",  # smooth only where a cell is below a pixel
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    return image


def _write_counts(axes: "Axes", counts: NDArray, share: NDArray) -> None:
    K, C = counts.shape
    axes.hlines(np.arange(1, K) - 0.5, -0.5, C - 0.5, color=FAINT, linewidth=0.5)
    axes.vlines(np.arange(1, C) - 0.5, -0.5, K - 0.5, color=FAINT, linewidth=0.5)
    for i, j in np.argwhere(counts > 0):
        color = "white" if share[i, j] > 0.5 else INK
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=color, fontsize=8)


def _add_scale(figure: "Figure", axes: "Axes", image: "AxesImage", height: float) -> None:
    """Add the colour scale at the right of axes that are `height` inches high."""
    shrink = min(2.2 / height, 0.9)
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=shrink * height / 0.14, pad=0.02)
    bar.set_ticks([0, 0.25, 0.5, 1], labels=["0", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.set_label("share of the cluster")
    bar.ax.spines["outline"].set_visible(False)


# ---- gallery --------------------------------------------------------------------------------------------------------


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
    _same_length(clusters=clusters, confidences=confidences)
    if per_cluster < 1 or max_clusters < 1:
        raise ValueError(f"got per_cluster={per_cluster} and max_clusters={max_clusters}; both must be at least 1")
    if (mapping is None) != (class_names is None):
        raise ValueError("got only one of mapping and class_names; pass both or neither")
    if known is not None:
        _same_length(labels=known, clusters=clusters)
        if mapping is None:
            raise ValueError("got labels but no mapping from clusters to classes; pass mapping and class_names")

    cluster_ids = np.unique(clusters)
    members = [np.flatnonzero(clusters == cluster) for cluster in cluster_ids]
    sizes = np.array([len(rows) for rows in members])
    wrong = np.zeros(len(clusters), dtype=bool)  # (N,) whether an image is of another class than its cluster
    titles = [f"cluster {cluster}" for cluster in cluster_ids]
    if mapping is not None and class_names is not None:
        cluster_class = _classes_of(cluster_ids, mapping, len(class_names))
        titles = [f"{title} → “{_line(class_names[k], 24)}”" for title, k in zip(titles, cluster_class, strict=True)]
        if known is not None:
            wrong = known != cluster_class[np.searchsorted(cluster_ids, clusters)]
    if known is None:
        merit = np.array([confidences[rows].mean() for rows in members])
        captions = [f"{size:,} images, mean confidence {_percent(m)}" for size, m in zip(sizes, merit, strict=True)]
    else:
        merit = np.array([(~wrong[rows]).mean() for rows in members])
        captions = [f"{_percent(m)} of {size:,} images" for size, m in zip(sizes, merit, strict=True)]

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
    gap, margin = _pixels(6), _pixels(24)
    side = len(rows[0][0])
    pitch, row_pitch = side + gap, side + 2 * gap
    width, height = max(len(row) for row in rows) * pitch - gap, len(rows) * row_pitch - 2 * gap
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * row_pitch : i * row_pitch + side, j * pitch : j * pitch + side] = tile

    with _figure(path, 1, 1) as figure:
        # All sizes are in pixels. The figure grows to the widest title.
        texts = [
            (figure.text(0, 0, title, fontsize=7.5, weight="bold"), figure.text(0, 0, caption, fontsize=6, color=MUTED))
            for title, caption in titles
        ]
        heading = figure.text(0, 0, header, fontsize=7, color=MUTED, va="center")
        column = max(text.get_window_extent().width for pair in texts for text in pair)
        left, top = margin + math.ceil(column) + margin, margin + _pixels(30)
        total_width = left + max(width, int(heading.get_window_extent().width)) + margin
        total_height = top + height + margin
        figure.set_size_inches(total_width / figure.dpi, total_height / figure.dpi)
        figure.figimage(canvas, left, margin)
        heading.set(x=left / total_width, y=1 - (margin + _pixels(4)) / total_height)
        for i, (title, caption) in enumerate(texts):
            middle = total_height - top - i * row_pitch - side / 2
            x = (left - margin) / total_width
            title.set(x=x, y=(middle + _pixels(3)) / total_height, ha="right", va="bottom")
            caption.set(x=x, y=(middle - _pixels(4)) / total_height, ha="right", va="top")


def _checked_image(image: NDArray) -> NDArray:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"got an image {image.shape} of {image.dtype}; expected (H, W, 3) or (H, W) of uint8")
    return image


def _tile_side(image: NDArray) -> int:
    """Return 96 pixels (at 150 dots per inch), or about as many as a whole multiple of the side of a small image."""
    side = min(image.shape[:2])
    return side * max(round(_pixels(96) / side), 1) if side <= 48 else _pixels(96)


def _tile(image: NDArray, side: int, *, framed: bool) -> NDArray:
    """Return the square in the middle of an image as (side, side, 3), with a red frame if `framed`."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short]).convert("RGB")
    # Small images keep their pixels; larger ones are smoothed.
    tile = np.array(square.resize((side, side), Image.Resampling.NEAREST if short <= 48 else Image.Resampling.LANCZOS))
    if framed:
        rim, thickness = np.ones((side, side), dtype=bool), _pixels(5)
        rim[thickness:-thickness, thickness:-thickness] = False
        tile[rim] = tuple(bytes.fromhex(WRONG[1:]))
    return tile


# ---- one cluster, and all of them ------------------------------------------------------------------------------------


def grid(path: str | PathLike[str], images: Sequence[NDArray]) -> None:
    """Draw images of one cluster in a square, as the authors of Self-Classifier do.

    Each image is squeezed to 128 × 128 pixels, 3 of which are a black border. 15 pixels of white lie between and around
    the images. The size in pixels is the same at every resolution.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        images: a square number of images, each (H, W, 3) or (H, W) uint8. Nine make 444 × 444 pixels.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the number of images is not a square, or an image has another shape or type.
    """
    side = math.isqrt(len(images))
    if side * side != len(images) or not images:
        raise ValueError(f"got {len(images)} images; expected a square number of images")
    gap, tile, border = 15, 128, 3
    pitch, inside = tile + gap, slice(border, tile - border)
    canvas = np.full((side * pitch + gap, side * pitch + gap, 3), 255, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (gap + pitch * each for each in divmod(position, side))
        shown = Image.fromarray(_checked_image(image)).convert("RGB").resize((tile, tile), Image.Resampling.BILINEAR)
        framed = np.zeros((tile, tile, 3), dtype=np.uint8)
        framed[inside, inside] = np.array(shown)[inside, inside]
        canvas[top : top + tile, left : left + tile] = framed
    dpi = 100
    with _figure(path, canvas.shape[1] / dpi, canvas.shape[0] / dpi, dpi=dpi) as figure:
        figure.figimage(canvas)


def cluster_sizes(path: str | PathLike[str], sizes: ArrayLike, class_sizes: ArrayLike | None = None) -> None:
    """Draw how many images each cluster contains, the largest cluster first.

    A dashed line shows the mean. Up to 60 clusters have their number below the bar.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        sizes: (K,) number of images in every cluster, including empty ones.
        class_sizes: (C,) number of images in every class, drawn as a line for comparison; None: unknown. If C is not K,
            the line is stretched to the width of the figure and its values are multiplied by C / K.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if all clusters are empty.
    """
    sizes = np.asarray(sizes)
    if not sizes.sum():
        raise ValueError("got no image in any cluster; expected at least one")
    order = np.argsort(-sizes, kind="stable")
    K, used = len(sizes), int((sizes > 0).sum())
    with _figure(path, 6, 3.4, layout="constrained") as figure:
        axes = figure.add_subplot()
        edges = np.arange(K + 1)
        if K <= 60:
            axes.bar(edges[:-1] + 0.5, sizes[order], width=0.8, color=LINES[0])
            axes.set_xticks(edges[:-1] + 0.5, [str(cluster) for cluster in order])
            axes.tick_params(axis="x", labelsize=8 if K <= 30 else 6, rotation=0 if K <= 30 else 90, pad=2)
        else:  # bars would be thinner than the gaps between them
            axes.stairs(sizes[order], edges, fill=True, color=LINES[0])
            axes.set_xticks([])
        axes.axhline(sizes.mean(), color=MUTED, linewidth=1, linestyle="--", label="mean of the clusters")
        if class_sizes is not None:
            _add_class_sizes(axes, np.asarray(class_sizes), K)
        axes.set_title(f"{sizes.sum():,} images in {used:,} of {K:,} clusters", pad=22)
        axes.set_xlabel("cluster, the largest first" if K <= 60 else f"clusters ({K:,}), the largest first")
        axes.set_ylabel("images")
        axes.locator_params(axis="y", integer=True)
        axes.set_xlim(0, K)
        axes.set_ylim(bottom=0)
        axes.tick_params(length=0)
        _open_style(axes)
        axes.legend(
            frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, borderpad=0, ncols=2
        )


def _add_class_sizes(axes: "Axes", class_sizes: NDArray, num_clusters: int) -> None:
    C = len(class_sizes)
    edges = np.linspace(
        0, num_clusters, C + 1
    )  # the largest at the left end and the smallest at the right, as clusters
    name = "classes" if num_clusters == C else f"classes, sizes × {C:,}/{num_clusters:,}"
    heights = np.sort(class_sizes)[::-1] * C / num_clusters
    axes.stairs(heights, edges, color=LINES[1], linewidth=1.4, label=name, baseline=None)


# ---- points in the plane --------------------------------------------------------------------------------------------

LISTED_BESIDE, LISTED_BELOW = 20, 300  # largest number of classes whose names are at the side, and below


def scatter(
    path: str | PathLike[str],
    points: ArrayLike,
    labels: ArrayLike,
    *,
    class_names: Sequence[str],
    title: str = "",
    axis_labels: tuple[str, str] | None = None,
) -> None:
    """Draw points in the colours of their classes.

    Up to 20 classes are named at the side. Up to 300 classes are named in an index below, and each class's number is
    written among its points; a number that would cover another one is left out. More classes have no names.

    Both axes have the same scale and no ticks.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        points: (N, 2).
        labels: (N,) class of every point, a position in `class_names`.
        class_names: name of each class.
        axis_labels: what the two directions mean; None: nothing, as in t-SNE, and no axes are drawn.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the points are not (N, 2), a class has no name, or the lengths differ.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    _same_length(points=points, labels=labels)
    if points.shape != (len(points), 2):
        raise ValueError(f"got points {points.shape}; expected (N, 2)")
    _check_labels(labels, len(class_names))
    classes, group = np.unique(labels, return_inverse=True)
    colours = _class_colours(len(classes))
    numbered = LISTED_BESIDE < len(classes) <= LISTED_BELOW
    with _figure(path, 1, 1) as figure:
        names = [_line(class_names[k], 20 if numbered else 24) for k in classes]
        if numbered:  # unless the name is the number
            names = [n if n in (f"{k}", f"cluster {k}") else f"{k}  {n}" for k, n in zip(classes, names, strict=True)]
        axes = _lay_out(figure, names, colours, axis_labels=axis_labels)
        order = np.random.default_rng(0).permutation(len(points))  # else the last class would cover the others
        x, y = points[order].T
        size = float(np.clip(220 / math.sqrt(len(points)), 1, 30))
        many = len(points) > 20_000  # as one image in PDF and SVG files: viewers are slow with so many shapes
        axes.scatter(x, y, s=size, c=colours[group][order], linewidths=0, rasterized=many)
        axes.set_title(title)
        if numbered:
            _write_numbers(axes, points, group, classes)


def _lay_out(
    figure: "Figure", names: Sequence[str], colours: NDArray, *, axis_labels: tuple[str, str] | None
) -> "Axes":
    """Make a figure of square axes and a list of names beside or below, and return the axes."""
    beside, below = len(names) <= LISTED_BESIDE, LISTED_BESIDE < len(names) <= LISTED_BELOW
    side, margin = (7.0 if below else 5.0), 0.15  # inches
    left = bottom = 0.4 if axis_labels else margin
    width, height = left + side + margin, 0.4 + side + bottom
    if beside:
        legend = _legend(figure, names, colours, size=9, ncols=1)
        extent = legend.get_window_extent()
        width += extent.width / figure.dpi + margin
        height = max(height, extent.height / figure.dpi + 2 * margin)
        legend.set_loc("center right")
        legend.set_bbox_to_anchor((1 - margin / width, 0.5))
    elif below:
        legend = _columns(figure, names, colours, width=width - 2 * margin)
        listed = margin + legend.get_window_extent().height / figure.dpi
        bottom, height = bottom + listed, height + listed
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, listed / height))
    else:
        bottom, height = bottom + 0.25, height + 0.25
        note = f"{len(names):,} classes; up to {LISTED_BELOW:,} are named"
        figure.text(left / width, margin / height, note, fontsize=8, color=MUTED)
    figure.set_size_inches(width, height)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    axes.set_aspect("equal", adjustable="datalim")
    if axis_labels:
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(FAINT)
    else:
        axes.set_axis_off()
    return axes


def _columns(figure: "Figure", names: Sequence[str], colours: NDArray, *, width: float) -> "Legend":
    """Add a legend with as many columns as fit into `width` inches."""
    longest = sorted(names, key=len)[-10:]  # to measure all names takes as long as to draw them
    one_column = _legend(figure, longest, colours[: len(longest)], size=6, ncols=1)
    gap = 6 / 72  # between columns
    ncols = int((width + gap) / (one_column.get_window_extent().width / figure.dpi + gap))
    one_column.remove()
    while True:
        legend = _legend(figure, names, colours, size=6, ncols=ncols)
        if ncols == 1 or legend.get_window_extent().width <= width * figure.dpi:
            return legend
        legend.remove()
        ncols -= 1


def _legend(figure: "Figure", names: Sequence[str], colours: NDArray, *, size: float, ncols: int) -> "Legend":
    """Add the list of names, each with a point in its colour."""
    from matplotlib.lines import Line2D

    points = [Line2D([], [], color=tuple(c), marker="o", linestyle="", markersize=0.6 * size) for c in colours]
    return figure.legend(
        points,
        names,
        fontsize=size,
        ncols=ncols,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1,
        labelspacing=0.5 if ncols == 1 else 0.3,
    )


def _write_numbers(axes: "Axes", points: NDArray, group: NDArray, classes: NDArray) -> None:
    """Write the number of each class at the median of its points, or at a point near it if another number is there.

    Large classes come first. A number that finds no free place is left out.
    """
    size = 6
    axes.apply_aspect()  # the scale of the axes is final only now
    digits = len(str(classes.max()))
    room = np.array([0.7 * digits + 0.2, 1.2]) * size * axes.figure.dpi / 72  # width and height of a number
    taken = np.empty((0, 2))
    for k in np.argsort(-np.bincount(group), kind="stable"):
        own = points[group == k]
        median = np.median(own, axis=0)
        nearest = np.argsort(((own - median) ** 2).sum(axis=1), kind="stable")[:40]
        places = np.vstack([median, own[nearest]])
        pixels = axes.transData.transform(places)
        covers = np.all(np.abs(pixels[:, None] - taken) < room, axis=2)  # (places, numbers so far)
        free = ~np.any(covers, axis=1)
        if not free.any():
            continue
        first = int(free.argmax())
        taken = np.vstack([taken, pixels[first]])
        x, y = places[first]
        behind = {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
        axes.text(x, y, str(classes[k]), fontsize=size, ha="center", va="center", bbox=behind)


def _class_colours(count: int) -> NDArray:
    """Return one colour per class, (count, 3) in [0, 1].

    Up to 20 are distinct. More lie evenly on the hue circle of OKLab, so that the last class resembles the first again.
    Three alternating lightnesses keep neighbours apart, each with the largest chroma that sRGB has at every hue.
    """
    if count <= len(CLASSES):
        return np.array([list(bytes.fromhex(colour[1:])) for colour in CLASSES[:count]]) / 255
    hue = 2 * np.pi * np.arange(count) / count
    lightness, chroma = np.resize([0.65, 0.5, 0.77], count), np.resize([0.11, 0.085, 0.115], count)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # From OKLab to linear sRGB (Ottosson 2020), then to sRGB.
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=1,
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (cones**3 @ to_rgb.T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).clip(0, 1)


# ---- training curves ------------------------------------------------------------------------------------------------


def training_curves(
    path: str | PathLike[str],
    epochs: Sequence[float],
    curves: Mapping[str, Sequence[tuple[str, Sequence[float | None]]]],
) -> None:
    """Draw numbers over epochs, one small panel per title.

    Args:
        path: file to write, .png, .pdf or .svg; its folder must exist.
        epochs: (E,) horizontal axis.
        curves: {title: [(name, (E,) values), ...]}. None means that the number was not measured in that epoch: the line
            continues to the next measurement. A single line with an empty name has no legend.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a curve does not have one value per epoch, or there is no panel.
    """
    if not curves:
        raise ValueError("got no curve; expected at least one")
    num_columns = 2 if len(curves) == 4 else min(len(curves), 3)
    num_rows = -(-len(curves) // num_columns)
    with _figure(path, 3.4 * num_columns, 2.5 * num_rows, layout="constrained") as figure:
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, (title, lines) in zip(panels, curves.items(), strict=False):
            _draw_panel(axes, epochs, title, lines)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes in panels[max(len(curves) - num_columns, 0) : len(curves)]:
            axes.set_xlabel("epoch")


def _draw_panel(
    axes: "Axes", epochs: Sequence[float], title: str, lines: Sequence[tuple[str, Sequence[float | None]]]
) -> None:
    for (name, values), color in zip(lines, cycle(LINES), strict=False):
        _same_length(epochs=epochs, **{f"curve {name or title!r}": values})
        measured = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
        sparse = len(measured) < len(epochs) or len(measured) == 1
        x, y = np.array(measured, dtype=float).reshape(-1, 2).T
        axes.plot(x, y, color=color, linewidth=1.6, marker="o" if sparse else None, markersize=3, label=name)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", integer=True, nbins=6)
    _open_style(axes)
    if any(name for name, _ in lines):
        axes.legend(frameon=False, fontsize=8)


# ---- shared ---------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(
    path: str | PathLike[str],
    width: float,
    height: float,
    *,
    dpi: int | None = None,
    layout: Literal["constrained"] | None = None,
) -> Iterator["Figure"]:
    """Yield a white figure of width × height inches and write it to `path` at the end of the block."""
    suffix, folder = Path(path).suffix, Path(path).absolute().parent
    if suffix not in FORMATS:
        raise ValueError(f"{path}: got a name that ends in {suffix or 'nothing'}; expected {', '.join(FORMATS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; create it first")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = STYLE
    no_date = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[suffix]
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the figures
        matplotlib.rcParams.update(style)
        # matplotlib draws a box in place of a character that its font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        figure = Figure(figsize=(width, height), dpi=dpi or _resolution.get(), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        if layout == "constrained":
            figure.set_layout_engine(layout, w_pad=0.12, h_pad=0.12)
        yield figure
        figure.savefig(path, dpi="figure", metadata=no_date)


def _open_style(axes: "Axes") -> None:
    """Leave only the lower edge and horizontal grid lines behind the data."""
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _pixels(at_default: float) -> int:
    """Return a length in pixels at the current resolution, given the pixels at the default one."""
    return round(at_default * _resolution.get() / DPI)


def _classes_of(cluster_ids: NDArray, mapping: Mapping[int, int], num_names: int) -> NDArray:
    """Return the class of each cluster, in the order of `cluster_ids`."""
    for cluster in cluster_ids.tolist():
        if cluster not in mapping:
            raise ValueError(f"cluster {cluster} occurs but is not in the mapping; give every cluster a class")
        if not 0 <= mapping[cluster] < num_names:
            raise ValueError(f"cluster {cluster} is class {mapping[cluster]}, but there are {num_names} names")
    return np.array([mapping[cluster] for cluster in cluster_ids.tolist()])


def _check_labels(labels: NDArray, num_names: int) -> None:
    if not 0 <= labels.min() <= labels.max() < num_names:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, but there are {num_names} names")


def _same_length(**sequences: Sequence[Any] | NDArray) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"got lengths {lengths}; expected equal lengths above zero")


def _percent(share: float) -> str:
    """Round a share to whole percent; only a share of 1 gives 100 %."""
    return f"{100 if share == 1 else min(round(100 * share), 99)} %"


def _line(name: str, length: int) -> str:
    """Return a name as one line of at most `length` characters.

    Line breaks and other control characters become escapes such as `\\n`: they are no text, and an SVG file with them
    is not valid.
    """
    unprintable = {"Cc", "Cn", "Cs", "Zl", "Zp"}
    line = "".join(ascii(c)[1:-1] if unicodedata.category(c) in unprintable else c for c in name)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"

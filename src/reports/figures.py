"""Figures of a clustering and of a training run, written as PNG, PDF or SVG; see `canvas` for what they share."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .canvas import (
    ACCENT,
    FAINT,
    FORMATS,
    INK,
    LINES,
    MUTED,
    check_labels,
    classes_of,
    figure_at,
    one_line,
    open_style,
    resolution,
    same_length,
)
from .galleries import gallery, grid
from .scatter import scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "FORMATS",
    "cluster_sizes",
    "confusion_matrix",
    "gallery",
    "grid",
    "resolution",
    "scatter",
    "training_curves",
]

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
    names = [one_line(class_names[column], 24) for column in columns]
    write_counts, write_names = C <= 20 and K <= 40, C <= 60 and K <= 120
    upright = max(len(name) for name in names) > 3
    class_size, cluster_size = (9 if count <= 40 else 6 for count in (C, K))  # of the type

    width = float(np.clip(0.46 * C, 3.2, 8.5))
    height = max(2.4, 0.36 * K if write_counts else min(width * K / C, 8.5), 0.12 * K if write_names else 0)
    below = 0.8
    if write_names and upright:
        below += max(len(name) for name in names) * class_size * 0.6 / 72
    with figure_at(path, width + 1.9, height + below, layout="constrained") as figure:
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
        _add_scale(figure, axes, image, height=height)


def _cells(
    labels: ArrayLike, clusters: ArrayLike, *, mapping: Mapping[int, int], num_names: int
) -> tuple[NDArray, NDArray, NDArray, float]:
    """Count the images of each cluster and class.

    Returns:
        The (K, C) counts, the K clusters ordered by class, the C classes, and the share of images in a cluster of their
        class.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    same_length(labels=labels, clusters=clusters)
    cluster_ids, row = np.unique(clusters, return_inverse=True)
    cluster_class = classes_of(cluster_ids, mapping, num_names)
    check_labels(labels, num_names)
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


def _add_scale(figure: "Figure", axes: "Axes", image: "AxesImage", *, height: float) -> None:
    """Add the colour scale at the right of axes that are `height` inches high."""
    shrink = min(2.2 / height, 0.9)
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=shrink * height / 0.14, pad=0.02)
    bar.set_ticks([0, 0.25, 0.5, 1], labels=["0", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.set_label("share of the cluster")
    bar.ax.spines["outline"].set_visible(False)


# ---- cluster sizes ----


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
    with figure_at(path, 6, 3.4, layout="constrained") as figure:
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
        open_style(axes)
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
    with figure_at(path, 3.4 * num_columns, 2.5 * num_rows, layout="constrained") as figure:
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, (title, lines) in zip(panels, curves.items(), strict=False):
            _draw_panel(axes, epochs, title=title, lines=lines)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes in panels[max(len(curves) - num_columns, 0) : len(curves)]:
            axes.set_xlabel("epoch")


def _draw_panel(
    axes: "Axes", epochs: Sequence[float], *, title: str, lines: Sequence[tuple[str, Sequence[float | None]]]
) -> None:
    for (name, values), color in zip(lines, cycle(LINES), strict=False):
        same_length(epochs=epochs, **{f"curve {name or title!r}": values})
        measured = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
        sparse = len(measured) < len(epochs) or len(measured) == 1
        x, y = np.array(measured, dtype=float).reshape(-1, 2).T
        axes.plot(x, y, color=color, linewidth=1.6, marker="o" if sparse else None, markersize=3, label=name)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", integer=True, nbins=6)
    open_style(axes)
    if any(name for name, _ in lines):
        axes.legend(frameon=False, fontsize=8)

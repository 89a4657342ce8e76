"""Pictures of a clustering and of a training run, written as PNG or, where the file is called so, PDF.

Nothing here needs a display: figures are drawn by matplotlib's Agg canvas, never through pyplot. matplotlib is imported
on first use, so that importing this file costs nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

FORMATS = (".png", ".pdf", ".svg")
_dpi: list[int] = [150]  # of the figures that are drawn now
INK, MUTED, FAINT, ACCENT = "#1f2328", "#656d76", "#d8dee4", "#0a3069"
WRONG = "#d1242f"
LINES = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989"]
STYLE = {
    "text.parse_math": False,  # class names come from folders: a dollar sign is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9,
}


# ---- confusion matrix -----------------------------------------------------------------------------------------------


def confusion_matrix(
    path: str | PathLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    *,
    mapping: Mapping[int, int],
    class_names: Sequence[str],
) -> None:
    """Draw which classes each cluster holds.

    Rows are clusters, in the order of the classes they stand for, so that what is right lies on the diagonal (with
    several clusters per class, on a staircase). Columns are the classes that occur. Colour is the share of the row.
    Counts and names are written as far as there is room: up to 20 and 60 classes. Beyond that, small shares are drawn
    darker than in proportion (square root, as the scale at the side shows), or thin cells would vanish.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
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

    names = [_shortened(class_names[column], 24) for column in columns]
    write_counts, write_names = C <= 20 and K <= 40, C <= 60 and K <= 120
    width = float(np.clip(0.46 * C, 3.2, 8.5))
    height = float(np.clip(0.36 * K, 2.4, 14.0)) if write_counts else float(np.clip(width * K / C, 2.4, 14.0))
    with _figure(path, width + 1.9, height + (1.6 if write_names else 1.0), layout="constrained") as figure:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        axes = figure.add_subplot()
        image = axes.imshow(
            share,
            cmap=LinearSegmentedColormap.from_list("share", ["white", "#54aeff", ACCENT]),
            norm=PowerNorm(1 if write_names else 0.5, vmin=0, vmax=1),
            aspect="auto",
            interpolation="nearest" if max(K, C) <= 1200 else "auto",  # smoothing only where a cell is under a pixel
        )
        axes.set_title(f"accuracy {100 * accuracy:.1f} % of {counts.sum():,} images", loc="left", pad=10, weight="bold")
        axes.set_xlabel("true class" if write_names else f"true class ({C:,})")
        axes.set_ylabel("cluster, in the order of its class" if write_names else f"cluster ({K:,}), by its class")
        axes.tick_params(length=0)
        axes.spines[:].set_color(FAINT)
        if write_names:
            size = 9 if max(C, K) <= 40 else 6
            upright = max(len(name) for name in names) > 3
            axes.set_xticks(range(C), names, rotation=90 if upright else 0, fontsize=size)
            axes.set_yticks(range(K), cluster_ids, fontsize=size)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if write_counts:
            axes.hlines(np.arange(1, K) - 0.5, -0.5, C - 0.5, color=FAINT, linewidth=0.5)
            axes.vlines(np.arange(1, C) - 0.5, -0.5, K - 0.5, color=FAINT, linewidth=0.5)
            for i, j in np.argwhere(counts > 0):
                color = "white" if share[i, j] > 0.5 else INK
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=color, fontsize=8)
        bar_height = min(2.2 / height, 0.9)
        bar = figure.colorbar(image, ax=axes, shrink=bar_height, aspect=bar_height * height / 0.14, pad=0.02)
        bar.set_ticks([0, 0.25, 0.5, 1], labels=["0", "25 %", "50 %", "100 %"])
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
        bar.set_label("share of the cluster")
        bar.outline.set_visible(False)


def _cells(
    labels: ArrayLike, clusters: ArrayLike, *, mapping: Mapping[int, int], num_names: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(K, C) images of each cluster and class, the clusters in that order, the classes, and the share that is placed right."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    _same_length(labels=labels, clusters=clusters)
    cluster_ids, row = np.unique(clusters, return_inverse=True)
    cluster_class = _classes_of(cluster_ids, mapping, num_names)
    if not 0 <= labels.min() <= labels.max() < num_names:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, but there are {num_names} names")
    columns = np.union1d(labels, cluster_class)  # (C,) class ids
    K, C = len(cluster_ids), len(columns)
    cells = row * C + np.searchsorted(columns, labels)
    counts = np.bincount(cells, minlength=K * C).reshape(K, C)
    right = counts[np.arange(K), np.searchsorted(columns, cluster_class)]  # (K,) images
    order = np.lexsort((cluster_ids, -right, cluster_class))
    return counts[order], cluster_ids[order], columns, right.sum() / len(labels)


# ---- gallery --------------------------------------------------------------------------------------------------------


def gallery(
    path: str | PathLike,
    images: Callable[[int], NDArray],
    clusters: ArrayLike,
    confidences: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    mapping: Mapping[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    per_cluster: int = 10,
    max_clusters: int = 20,
) -> None:
    """Draw one row per cluster with its most confident images, left to right.

    With labels, the clusters with the largest share of images of their class come first, and images of another class
    get a red frame. Without, the clusters of the highest mean confidence come first. Clusters too small to fill a row
    come after all others: being pure is easy for them.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
        images: index -> (H, W, 3) or (H, W) uint8 array. Asked only for the images that are drawn. Wide or tall images
            are cropped to the square in the middle.
        labels: (N,) class of every image, a position in `class_names`; None for a folder without labels.
        clusters: (N,) cluster of every image.
        confidences: (N,) probability of the cluster of every image, in [0, 1].
        mapping: {cluster: class}, for every cluster that occurs. None, only without labels: clusters have no names.
        class_names: name of each class; None together with `mapping`.
        per_cluster: images per row at most.
        max_clusters: rows at most.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a cluster has no class, a class no name, the lengths differ, an image is not as described, or
            there are labels without a mapping, or a number of rows or images below 1.
    """
    clusters, confidences = np.asarray(clusters), np.asarray(confidences)
    _same_length(clusters=clusters, confidences=confidences)
    if per_cluster < 1 or max_clusters < 1:
        raise ValueError(f"nothing to draw with per_cluster={per_cluster} and max_clusters={max_clusters}")
    if (mapping is None) != (class_names is None):
        raise ValueError("mapping and class_names come together: give both or neither")
    if labels is not None:
        labels = np.asarray(labels)
        _same_length(labels=labels, clusters=clusters)
        if mapping is None:
            raise ValueError("labels were given, but no mapping from clusters to classes")

    cluster_ids = np.unique(clusters)
    cluster_class = None if mapping is None else _classes_of(cluster_ids, mapping, len(class_names))
    members = [np.flatnonzero(clusters == cluster) for cluster in cluster_ids]
    sizes = np.array([len(rows) for rows in members])
    if labels is None:
        merit = np.array([confidences[rows].mean() for rows in members])
        captions = [f"{size:,} images, mean confidence {_percent(m)}" for size, m in zip(sizes, merit, strict=True)]
    else:
        merit = np.array([(labels[rows] == name).mean() for rows, name in zip(members, cluster_class, strict=True)])
        captions = [f"{_percent(m)} of {size:,} images" for size, m in zip(sizes, merit, strict=True)]
    ranking = np.lexsort((cluster_ids, -sizes, -merit, sizes < per_cluster))[:max_clusters]

    rows, titles = [], []
    side, any_wrong = None, False
    for k in ranking:
        shown = members[k][np.argsort(-confidences[members[k]], kind="stable")[:per_cluster]]
        wrong = np.zeros(len(shown), dtype=bool) if labels is None else labels[shown] != cluster_class[k]
        any_wrong |= bool(wrong.any())
        rows.append([])
        for index, framed in zip(shown.tolist(), wrong, strict=True):
            image = _checked_image(images(index))
            side = side or _tile_side(image)  # the first image decides for all
            rows[-1].append(_tile(image, side, framed))
        name = "" if mapping is None else f" → “{_shortened(class_names[cluster_class[k]], 24)}”"
        titles.append((f"cluster {cluster_ids[k]}{name}", captions[k]))
    which = "each cluster" if len(ranking) == len(cluster_ids) else f"{len(ranking)} of {len(cluster_ids):,} clusters"
    header = f"The most confident images of {which}." + (" Red frame: of another class." if any_wrong else "")
    _draw_rows(path, rows, titles=titles, header=header)


def _draw_rows(
    path: str | PathLike, rows: Sequence[Sequence[NDArray]], *, titles: Sequence[tuple[str, str]], header: str
) -> None:
    """Rows of (side, side, 3) tiles with a two-line title at the left of each row, exact to the pixel."""
    dpi, gap, margin = 100, 6, 24
    side = len(rows[0][0])
    pitch, row_pitch = side + gap, side + 2 * gap
    width, height = max(len(row) for row in rows) * pitch - gap, len(rows) * row_pitch - 2 * gap
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * row_pitch : i * row_pitch + side, j * pitch : j * pitch + side] = tile

    with _figure(path, 1, 1, dpi=dpi) as figure:
        # Sizes are pixels: the column of titles is as wide as the widest of them, and the figure is made to fit.
        texts = [
            (figure.text(0, 0, title, fontsize=11, weight="bold"), figure.text(0, 0, caption, fontsize=9, color=MUTED))
            for title, caption in titles
        ]
        heading = figure.text(0, 0, header, fontsize=10, color=MUTED, va="center")
        column = max(text.get_window_extent().width for pair in texts for text in pair)
        left, top = margin + int(np.ceil(column)) + margin, margin + 30
        total_width = left + max(width, int(heading.get_window_extent().width)) + margin
        total_height = top + height + margin
        figure.set_size_inches(total_width / dpi, total_height / dpi)
        figure.figimage(canvas, left, margin)
        heading.set(x=left / total_width, y=1 - (margin + 4) / total_height)
        for i, (title, caption) in enumerate(texts):
            middle = total_height - top - i * row_pitch - side / 2
            title.set(x=(left - margin) / total_width, y=(middle + 3) / total_height, ha="right", va="bottom")
            caption.set(x=(left - margin) / total_width, y=(middle - 4) / total_height, ha="right", va="top")


def _checked_image(image: NDArray) -> NDArray:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"images must be (H, W, 3) or (H, W) of uint8, got {image.shape} of {image.dtype}")
    return image


def _tile_side(image: NDArray) -> int:
    """About 96 pixels, and a whole multiple of the side of a small image."""
    side = min(image.shape[:2])
    return side * round(96 / side) if side <= 48 else 96


def _tile(image: NDArray, side: int, framed: bool) -> NDArray:
    """The square in the middle of an image as (side, side, 3), in a red frame if asked for."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short]).convert("RGB")
    # Small images are shown pixel by pixel, as they are; everything else is smoothed.
    tile = np.array(square.resize((side, side), Image.Resampling.NEAREST if short <= 48 else Image.Resampling.LANCZOS))
    if framed:
        rim = np.ones((side, side), dtype=bool)
        rim[5:-5, 5:-5] = False
        tile[rim] = tuple(bytes.fromhex(WRONG[1:]))
    return tile


# ---- one cluster, and all of them ------------------------------------------------------------------------------------


def grid(path: str | PathLike, images: Sequence[NDArray]) -> None:
    """Draw images of one cluster as Self-Classifier's authors show them: a square of tiles of 128 × 128 pixels, each squeezed
    to that shape and in a black border of 3 pixels, with 15 pixels of white between and around.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
        images: a square number of them, each (H, W, 3) or (H, W) uint8. Nine make 444 × 444 pixels.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if their number is not a square, or an image is not as described.
    """
    side = math.isqrt(len(images))
    if side * side != len(images) or not images:
        raise ValueError(f"expected a square number of images, got {len(images)}")
    gap, tile, border = 15, 128, 3
    pitch = tile + gap
    canvas = np.full((side * pitch + gap, side * pitch + gap, 3), 255, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (gap + pitch * each for each in divmod(position, side))
        shown = Image.fromarray(_checked_image(image)).convert("RGB").resize((tile, tile), Image.Resampling.BILINEAR)
        canvas[top : top + tile, left : left + tile] = 0
        inside = slice(border, tile - border)
        canvas[top + border : top + tile - border, left + border : left + tile - border] = np.array(shown)[
            inside, inside
        ]
    dpi = 100
    with _figure(path, canvas.shape[1] / dpi, canvas.shape[0] / dpi, dpi=dpi) as figure:
        figure.figimage(canvas)


def cluster_sizes(path: str | PathLike, sizes: ArrayLike, class_sizes: ArrayLike | None = None) -> None:
    """Draw how many images each cluster holds, the largest first, with a line where all would hold as many.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
        sizes: (K,) images of every cluster, of empty ones too.
        class_sizes: (C,) images of every class, to be drawn beside them as a line; None: unknown.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if there is no image.
    """
    sizes = np.sort(np.asarray(sizes))[::-1]
    if not sizes.sum():
        raise ValueError("there is no image in any cluster")
    with _figure(path, 6, 3.2, layout="constrained") as figure:
        axes = figure.add_subplot()
        edges = np.arange(len(sizes) + 1)
        if len(sizes) <= 60:
            axes.bar(edges[:-1] + 0.5, sizes, width=0.8, color=LINES[0])
        else:  # bars would be thinner than what is between them
            axes.stairs(sizes, edges, fill=True, color=LINES[0])
        axes.axhline(sizes.mean(), color=MUTED, linewidth=1, linestyle="--", label="all alike")
        if class_sizes is not None:
            class_sizes = np.sort(np.asarray(class_sizes))[::-1]
            # stretched, so that both have the largest at the left and the smallest at the right end
            spread = np.linspace(0, len(sizes), len(class_sizes) + 1)
            scaled = class_sizes * len(class_sizes) / len(sizes)
            same = "" if len(class_sizes) == len(sizes) else f", times {len(class_sizes)}/{len(sizes)}"
            axes.stairs(scaled, spread, color=LINES[1], linewidth=1.4, label=f"classes{same}", baseline=None)
        empty = int((sizes == 0).sum())
        axes.set_title(
            f"{sizes.sum():,} images in {len(sizes) - empty:,} of {len(sizes):,} clusters", loc="left", weight="bold"
        )
        axes.set_xlabel("clusters, the largest first")
        axes.set_ylabel("images")
        axes.set_xlim(0, len(sizes))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)


# ---- points in the plane --------------------------------------------------------------------------------------------


def scatter(
    path: str | PathLike, points: ArrayLike, labels: ArrayLike, *, class_names: Sequence[str], title: str = ""
) -> None:
    """Draw points in the colours of their classes, without axes; up to 20 classes are named at the side.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
        points: (N, 2), of t-SNE for instance.
        labels: (N,) class of every point, a position in `class_names`.
        class_names: name of each class.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the points are not (N, 2), a class has no name, or the lengths differ.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    _same_length(points=points, labels=labels)
    if points.shape != (len(points), 2):
        raise ValueError(f"points must be (N, 2), got {points.shape}")
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, but there are {len(class_names)} names")
    classes = np.unique(labels)
    with _figure(path, 6, 5, layout="constrained") as figure:
        from matplotlib import colormaps

        # The colour circle without its end, which is its beginning again.
        colours = colormaps["hsv"](np.arange(len(classes)) / len(classes))
        axes = figure.add_subplot()
        for colour, name in zip(colours, classes, strict=True):
            x, y = points[labels == name].T
            axes.scatter(x, y, s=10, color=colour, linewidths=0, label=_shortened(class_names[name], 24))
        axes.set_title(title, loc="left")
        axes.set_axis_off()
        if len(classes) <= 20:
            figure.legend(loc="outside right center", frameon=False, markerscale=1.5)


# ---- training curves ------------------------------------------------------------------------------------------------


def training_curves(
    path: str | PathLike,
    epochs: Sequence[float],
    curves: Mapping[str, Sequence[tuple[str, Sequence[float | None]]]],
) -> None:
    """Draw numbers over epochs, one small panel per title.

    Args:
        path: file to write, .png or .pdf; its folder must exist.
        epochs: (E,) horizontal axis.
        curves: {title: [(name, (E,) values), ...]}. None stands for an epoch in which the number was not measured: the
            line goes on to the next one that was. A single line with an empty name has no legend.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if a curve does not have one value per epoch, or there is no panel.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    num_columns = 2 if len(curves) == 4 else min(len(curves), 3)
    num_rows = -(-len(curves) // num_columns)
    with _figure(path, 3.4 * num_columns, 2.5 * num_rows, layout="constrained") as figure:
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, (title, lines) in zip(panels, curves.items(), strict=False):
            for (name, values), color in zip(lines, _cycled(LINES), strict=False):
                _same_length(epochs=epochs, **{f"curve {name or title!r}": values})
                measured = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
                sparse = len(measured) < len(epochs) or len(measured) == 1
                x, y = np.array(measured, dtype=float).reshape(-1, 2).T
                axes.plot(x, y, color=color, linewidth=1.6, marker="o" if sparse else None, markersize=3, label=name)
            axes.set_title(title, loc="left", weight="bold", fontsize=10)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            axes.locator_params(axis="x", integer=True, nbins=6)
            if any(name for name, _ in lines):
                axes.legend(frameon=False, fontsize=8)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes in panels[max(len(curves) - num_columns, 0) : len(curves)]:
            axes.set_xlabel("epoch")


def _cycled(values: Sequence) -> Iterator:
    while True:
        yield from values


# ---- shared ---------------------------------------------------------------------------------------------------------


@contextmanager
def resolution(dpi: int) -> Iterator[None]:
    """Draw the figures of this block with another resolution, in dots per inch."""
    _dpi.append(dpi)
    try:
        yield
    finally:
        _dpi.pop()


@contextmanager
def _figure(
    path: str | PathLike, width: float, height: float, *, dpi: int | None = None, layout: str | None = None
) -> Iterator:
    """A white figure of width by height inches to draw on, written to `path` at the end of the block."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = dpi or _dpi[-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=dpi, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        if layout == "constrained":
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        yield figure
        figure.savefig(path, dpi=dpi)


def _classes_of(cluster_ids: NDArray, mapping: Mapping[int, int], num_classes: int) -> NDArray:
    """Class of each cluster, in the order of `cluster_ids`."""
    for cluster in cluster_ids.tolist():
        if cluster not in mapping:
            raise ValueError(f"cluster {cluster} occurs but the mapping gives it no class")
        if not 0 <= mapping[cluster] < num_classes:
            raise ValueError(f"cluster {cluster} is class {mapping[cluster]}, but there are {num_classes} names")
    return np.array([mapping[cluster] for cluster in cluster_ids.tolist()])


def _same_length(**sequences: Sequence | NDArray) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"expected equal lengths above zero, got {lengths}")


def _percent(share: float) -> str:
    """Whole percent; 100 % only if nothing is missing."""
    return f"{100 if share == 1 else min(round(100 * share), 99)} %"


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"

"""Write an atlas: everything that the page needs becomes text in one HTML file."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ... import files
from . import layout
from .data import MOST_IMAGES, AtlasData, Clusters
from .pictures import COLUMNS, Pictures, Sheets, pack, read_pictures

LARGEST = 12_000_000  # bytes of an atlas of `MOST_IMAGES` images
SMALLEST_BUDGET = 500_000  # bytes for the thumbnails of a few images
LIKELIEST = 5  # clusters of an image whose probabilities are stored; if there are many clusterings:
FEW_LIKELIEST, MANY_CLUSTERINGS = 3, 4
MOST_SKIPPED = 1_000  # files in the list of skipped files
# The parts of the page, in the order in which the page needs them.
SCRIPTS = (
    "core",
    "sheets",
    "groups",
    "picks",
    "grid",
    "image",
    "overview",
    "cluster",
    "map",
    "filters",
    "matrix",
    "compare",
    "run",
    "app",
)


def write(data: AtlasData, path: Path) -> None:
    """Write an atlas as one HTML file. An earlier file is replaced as a whole.

    Raises:
        OSError: if the file cannot be written.
    """
    pictures = read_pictures(len(data.paths), data.picture)
    first = data.clusterings[0]
    order = np.lexsort((-first.confidences, first.clusters))  # the images of a cluster share a few sheets
    content = describe(data, pictures, folder=path.parent)
    content["place"] = packed(np.argsort(order))
    page, fixed = assemble(content), len(_page_parts("", ""))
    share = min(len(data.paths) / MOST_IMAGES, 1)
    room = (LARGEST * max(share, 0.1) - len(page) - fixed) * 3 / 4 * 0.99  # base64 needs 4 characters for 3 bytes
    sheets = pack([pictures.thumbnails[i] for i in order], int(max(room, SMALLEST_BUDGET * share)))
    content["sheets"] = {"tile": sheets.tile, "columns": COLUMNS, "count": len(sheets.files)}
    shapes = np.zeros_like(sheets.shapes)
    shapes[order] = sheets.shapes
    content["shapes"] = packed(shapes)
    files.write_text(path, _page_parts(assemble(content), _sheet_elements(sheets)))


def describe(data: AtlasData, pictures: Pictures, *, folder: Path) -> dict[str, Any]:
    """Return everything that the page knows except the thumbnails, as it is stored in the page.

    Args:
        folder: the folder of the page, to which links are relative.
    """
    rows = layout.unit_rows(data.embeddings)
    neighbours, similarities = layout.find_neighbours(rows, layout.NEIGHBOURS)
    points = layout.two_dimensions(rows)
    likeliest = LIKELIEST if len(data.clusterings) <= MANY_CLUSTERINGS else FEW_LIKELIEST
    return {
        "title": data.title,
        "paths": list(data.paths),
        "links": None if data.files is None else [_link(file, folder) for file in data.files],
        "clusterings": [_clustering(each, likeliest) for each in data.clusterings],
        "neighbours": packed(neighbours),
        "similarities": packed(np.clip(similarities, 0, 1) * 255),
        "points": packed(points * 65535),
        "sketch": {"type": "i8", "data": base64.b64encode(layout.sketch(rows).tobytes()).decode()},
        "sizes": packed(pictures.sizes),
        "brightness": packed(pictures.brightness),
        "sharpness": packed(pictures.sharpness * 10),
        "duplicates": packed(pictures.duplicates),
        "broken": {str(i): reason for i, reason in pictures.broken.items()},
        "labels": None if data.labels is None else packed(data.labels + 1),
        "classes": list(data.classes),
        "skipped": [list(each) for each in data.skipped[:MOST_SKIPPED]],
        "skipped_count": len(data.skipped),
        "totals": None if data.totals is None else data.totals.tolist(),
        "left_out": {
            str(cluster): [[name, _link(file, folder)] for name, file in images]
            for cluster, images in data.left_out.items()
        },
        "history": [_numbers(epoch) for epoch in data.history],
        "config": {key: _shown(value) for key, value in data.config.items()},
        "notes": [list(note) for note in data.notes],
    }


def _clustering(found: Clusters, likeliest: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": found.name,
        "size": found.size,
        "model": found.model,
        "classifier": found.classifier,
        "clusters": packed(found.clusters),
        "confidences": packed(np.clip(found.confidences, 0, 1) * 65535),
        "top": None,
        "names": found.names,
    }
    if found.top is not None:
        clusters, shares = (each[:, :likeliest] for each in found.top)
        entry["top"] = {"width": clusters.shape[1], "clusters": packed(clusters), "shares": packed(shares * 65535)}
    return entry


def packed(values: np.ndarray) -> dict[str, str]:
    """Return numbers >= 0 as text, in the smallest unsigned type: {"type": u8, u16 or u32, "data": base64}."""
    whole = np.rint(values)
    largest = whole.max(initial=0)
    kind, dtype = ("u8", "<u1") if largest < 1 << 8 else ("u16", "<u2") if largest < 1 << 16 else ("u32", "<u4")
    return {"type": kind, "data": base64.b64encode(whole.astype(dtype).tobytes()).decode()}


def _link(file: str, folder: Path) -> str:
    """Return the address of a file relative to a folder. Both may hold any bytes."""
    return quote(os.fsencode(os.path.relpath(os.path.realpath(file), os.path.realpath(folder))))


def _numbers(epoch: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an epoch."""
    return {
        key: float(f"{value:.6g}")
        for key, value in epoch.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)


# ---- the file ---------------------------------------------------------------------------------------------------------


def assemble(content: Mapping[str, Any]) -> str:
    """Return content as JSON that can stand inside an element `script`. Text that is not valid Unicode stays escaped."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sheet_elements(sheets: Sheets) -> str:
    return "\n".join(
        f'<script type="text/plain" class="sheet">{base64.b64encode(file).decode()}</script>' for file in sheets.files
    )


def _page_parts(content: str, sheets: str) -> str:
    """Return the page: style, scripts, content and sheets inserted into index.html."""
    folder = resources(__package__) / "page"
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    page = (folder / "index.html").read_text(encoding="utf-8")
    parts = {
        "/* style.css */": (folder / "style.css").read_text(encoding="utf-8"),
        "/* scripts */": script,
        "<!-- sheets -->": sheets,
        "/* content */": content,
    }
    for place, text in parts.items():
        before, after = page.split(place)
        page = before + text + after
    return page

"""Tables and numbers of the documentation that come from measurements other than training runs.

The programs in `benchmarks/` write cards with `--json docs/results/benchmarks/NAME.json`: command, commit, date, machine, and the
seconds of each turn. Measurements that are older than the cards were copied from the pages, and their cards say so: in place of
the seconds of each turn, they have median, least and most. The campaign writes `reliability.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .errors import InputError

Card = dict[str, Any]
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, "MB": 1e6, "GB": 1e9, "ms": 1e-3, "GFLOP": 1e9}


def read(results: Path, name: str) -> Card:
    """Return the content of docs/results/NAME.json.

    Raises:
        InputError: if there is no such file, or if it is no JSON object.
    """
    path = results / f"{name}.json"
    try:
        card = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a card: write it with --json") from None
    except ValueError:
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{path}: damaged, expected a JSON object: restore the file")
    return card


def as_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, between line breaks."""
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return "\n" + "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


# ---- numbers --------------------------------------------------------------------------------------------------------


def middle(found: Any) -> float:
    """Return the median of the turns of one side."""
    return found["median"] if isinstance(found, Mapping) else median(found)


def center(found: Any, unit: float = 1) -> str:
    """Return the median of the turns of one side as text."""
    return _rounded(found, middle(found) / unit)


def spread(found: Any, unit: float = 1) -> str:
    """Return the median of the turns of one side, and their range if there are several."""
    if isinstance(found, Mapping):
        ends = [found["least"], found["most"]] if "least" in found else []
    else:
        ends = [min(found), max(found)] if len(found) > 1 else []
    rest = f" ({' to '.join(_rounded(found, end / unit) for end in ends)})" if ends else ""
    return center(found, unit) + rest


def _rounded(found: Any, number: float) -> str:
    """Return a number with three significant digits, or the digits that were copied."""
    if isinstance(found, Mapping):
        return f"{number:,.6g}"
    digits = next((digits for digits, least in enumerate((100, 10, 1, 0.1)) if abs(number) >= least), 4)
    return f"{number:,.{digits}f}"


# ---- blocks ---------------------------------------------------------------------------------------------------------


def value(results: Path, name: str, *words: str) -> str:
    """Return one number of a card as part of a sentence.

    Args:
        words: the keys and positions that lead to the number, with `_` in place of spaces, and at last its form: a format of
            Python such as `.1f` or `.0%`, or such a format and a unit of `UNITS`, such as `.2fGiB`.
    """
    *keys, form = words
    card = read(results, name)
    found: Any = card["results"] if "results" in card and keys[0].isdigit() else card
    for key in keys:
        inside = enumerate(found) if isinstance(found, list) else found.items()
        found = {str(name).replace(" ", "_"): each for name, each in inside}[key]
    unit = next((unit for unit in UNITS if form.endswith(unit)), "")
    number = middle(found) if isinstance(found, list | dict) else found
    text = f"{number / UNITS[unit]:{form.removesuffix(unit)}}" if unit else f"{number:{form}}"
    return text.replace("%", " %")


def made_on(results: Path, name: str) -> str:
    """Return command, machine, versions and commit of a card, as part of a sentence."""
    card = read(results, name)
    where = dict(card["machine"])
    first = [f"{where.pop('cores')} cores of {where.pop('cpu')}", *([where.pop("gpu")] if "gpu" in where else [])]
    where.pop("omp_num_threads", None)
    versions = [f"{name} {version}" for name, version in where.items()]
    commit = f"commit {card['commit']}" if "commit" in card else "no commit recorded"
    return f"`{card['command']}`, {', '.join([*first, *versions, commit])}"


def steps(results: Path, name: str) -> str:
    """Return the table of `benchmarks/step.py`: seconds per step, images per second, and the speed-up over the plain loop."""
    (row,) = read(results, name)["results"]
    loop = middle(row["seconds"]["plain loop"])
    lines = []
    for side, seconds in row["seconds"].items():
        ratio = row.get("ratios", {}).get(side) or loop / middle(seconds)
        rate = row["batch_size"] / middle(seconds)
        lines.append([side, spread(seconds), f"{rate:.1f}", "1" if side == "plain loop" else f"{ratio:.2f}×"])
    return as_table(["", "seconds per step", "images/s", "ratio"], lines)


def small_steps(results: Path, name: str) -> str:
    """Return the table of `benchmarks/step.py --cifar`."""
    lines = []
    for row in read(results, name)["results"]:
        for precision in ("float32", "bfloat16"):
            seconds, rates = row["seconds"][f"{precision} step"], row[precision]
            views = 2 * row["batch_size"]
            lines.append([f"`{row['arch']}`, {row['batch_size']}", precision, f"{row['operations'] / views / 1e9:.3f}"])
            lines[-1] += [spread(seconds), f"{views / middle(seconds):,.0f}"]
            lines[-1] += [f"{rates[part] / 1e9:.0f}" for part in ("step", "products")] + [f"{rates['share']:.2f}"]
    header = ["network, images per step", "precision", "GFLOP per view", "seconds per step", "views/s"]
    return as_table([*header, "GFLOP/s", "GFLOP/s of products", "share"], lines)


def loss(results: Path, name: str) -> str:
    """Return the table of `benchmarks/loss.py`. Two values in a cell are ours / gathered."""
    lines = []
    for row in read(results, name)["results"]:
        ours, gathered = (row["seconds"][side] for side in ("ours", "gathered"))
        memory = " / ".join(f"{row['peak_bytes'][side] / UNITS['MiB']:,.0f}" for side in ("ours", "gathered"))
        sent = [row["sent_bytes"][side] for side in ("ours", "gathered")]
        share = f"{sent[0]:,} / {sent[1]:,} ({100 * sent[0] / sent[1]:.2f} %)" if sent[1] else "0"
        ratio = f"{middle(gathered) / middle(ours):.1f}×"
        lines.append([str(row["processes"]), center(ours), center(gathered), ratio, memory, share])
    header = ["processes", "ours, s", "gathered, s", "speed-up", "memory per rank, MiB", "sent per rank, bytes"]
    return as_table(header, lines)


def sent(results: Path, name: str, *words: str) -> str:
    """Return how many bytes a rank sends per step for the loss, computed from the bytes that `benchmarks/loss.py` counted.

    With a ring algorithm, a rank sends 2 (W - 1) / W times the vectors of our loss, and (W - 1) / W times the logits.

    Args:
        words: numbers of views, of classes and of images of a step, and the numbers of ranks.
    """
    views, classes, images, *ranks = map(int, words)
    row = read(results, name)["results"][-1]
    W, per_view = row["processes"], row["views"] * row["C"]
    vectors = row["sent_bytes"]["ours"] * W / (2 * (W - 1)) / per_view
    logits = row["sent_bytes"]["gathered"] * W / (W - 1) / (per_view * row["N"])
    numbers, lines = views * classes, []
    for count in ranks:
        ours = vectors * numbers * 2 * (count - 1) / count
        gathered = logits * numbers * images * (count - 1) / count
        lines.append([str(count), f"{ours / 1e6:.1f} MB", f"{gathered / 1e9:.1f} GB"])
    return as_table(["ranks", "sent per rank, ours", "sent per rank, gathered as in the authors' code"], lines)


def sinkhorn(results: Path, name: str) -> str:
    """Return the table of `benchmarks/sinkhorn.py`."""
    lines = []
    for row in read(results, name)["results"]:
        if "epsilon" in row:
            times = [row["seconds"][side] for side in ("ours", "plain")]
            ratio = row.get("ratio") or middle(times[0]) / middle(times[1])
            errors = [row["errors"][side] for side in ("ours", "plain")]  # not a number: null or NaN
            shown = [
                f"{error:.0e}".replace("e-0", "e-") if error == error and error else "not a number" for error in errors
            ]
            lines.append([str(row["epsilon"]), *map(spread, times), f"{ratio:.2f}", *shown])
    header = ["epsilon", "ours, s", "plain, s", "ours / plain", "largest error, ours", "largest error, plain"]
    return as_table(header, lines)


def data(results: Path, name: str) -> str:
    """Return the table of `benchmarks/data.py`."""
    lines = []
    for row in read(results, name)["results"]:
        rate = row.get("images_per_second") or row["images"] / middle(row["seconds"])
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append([row["side"], f"{rate:,.1f}", spread(row["seconds"]) if row["seconds"] else "", ratio])
    return as_table(["", "images per second", "seconds", "times the published"], lines)


def score_times(results: Path, name: str) -> str:
    """Return the table of `benchmarks/metrics.py`."""
    lines, header = [], ["data"]
    for row in read(results, name)["results"]:
        header = ["data", *(each["score"].upper() for each in row["scores"])]
        cells = [f"{center(each['seconds']['ours'])} s, {each['ratio']:.3g}×" for each in row["scores"]]
        lines.append([row["case"], *cells])
    return as_table(header, lines)


def knn(results: Path, name: str) -> str:
    """Return the table of `benchmarks/knn.py`."""
    seconds = read(results, name)["results"][0]["seconds"]
    bases = ("products", "faiss")
    lines = [
        [side, spread(found), *(f"{middle(found) / middle(seconds[base]):.2f}" for base in bases)]
        for side, found in seconds.items()
    ]
    return as_table(["", "seconds", *(f"times {base}" for base in bases)], lines)


def kmeans(results: Path, name: str) -> str:
    """Return the table of `benchmarks/kmeans.py`: times and sums relative to ours."""
    lines = []
    for row in read(results, name)["results"]:
        for side, found in row.get("seconds", {}).items():
            times = middle(found) / middle(row["seconds"]["ours"])
            more = 100 * (row["inertia"][side] / row["inertia"]["ours"] - 1)
            change = "0" if side == "ours" else f"{more:+.3f} %"
            lines.append(
                [f"{row['what']}: {side}", spread(found), f"{times:.2f}", str(row["iterations"][side]), change]
            )
    return as_table(["", "seconds", "times ours", "iterations", "sum of squared distances"], lines)


def reading(results: Path, name: str) -> str:
    """Return the tables of `benchmarks/reading.py`: milliseconds, and shares."""
    (row,) = read(results, name)["results"]
    lines = [[side, spread(found, UNITS["ms"])] for side, found in row["seconds"].items()]
    lines += [[share, f"{100 * found:.1f} %"] for share, found in row["ratios"].items()]
    return as_table(["part", "milliseconds"], lines)


def copied(results: Path, name: str) -> str:
    """Return a table that was copied into a card as text."""
    card = read(results, name)
    return as_table(card["columns"], card["rows"])


def searched(results: Path, folder: str) -> str:
    """Return a table of short runs from their metrics.jsonl, in the order of the notes in runs.json."""
    lines = []
    for run, (method, differs) in read(results, f"{folder}/runs")["runs"].items():
        text = (results / folder / run / "metrics.jsonl").read_text()
        epochs = [json.loads(line) for line in text.splitlines()]
        last = epochs[-1]
        accuracies = ", ".join(f"{100 * epoch['acc']:.1f}" for epoch in epochs)
        lines.append([f"`{folder.rpartition('/')[2]}/{run}`", method, differs, str(last["epoch"])])
        counted = f"{last['total_pflop']:.3f}" if "total_pflop" in last else "not counted"
        lines[-1] += [counted, accuracies, f"{100 * last['nmi']:.1f}"]
    header = ["folder", "method", "differs in", "epochs", "PFLOP", "ACC after each epoch, %", "NMI at the end, %"]
    return as_table(header, lines)


# ---- the campaign ---------------------------------------------------------------------------------------------------


def faults(results: Path) -> str:
    """Return the totals of the campaign, as part of a sentence."""
    tried, survived = _totals(read(results, "reliability"))
    return f"{tried:,} faults tried, {survived:,} survived"


def campaign(results: Path) -> str:
    """Return the machines of the campaign, and its table with the totals in the last row."""
    rows = read(results, "reliability")
    where = sorted({f"{row['date']}, {row['hardware']}, {row['versions']}." for row in rows.values()})
    return "\n" + "\n".join(where) + "\n" + campaign_table(rows)


def campaign_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of the campaign.

    Args:
        rows: {name of a row: its entry}.
    """
    lines = []
    for row in rows.values():
        note = f" (left out: {row['left out']})" if "left out" in row else ""
        counts = [f"{count:,}" for count in (row["tried"], row["survived"], row["tried"] - row["survived"])]
        lines.append([row["what"] + note, *counts, row["commit"]])
    tried, survived = _totals(rows)
    lines.append(["**all**", *(f"**{count:,}**" for count in (tried, survived, tried - survived)), ""])
    return as_table(["what", "tried", "survived", "failures", "commit"], lines)


def _totals(rows: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Return how many faults were tried and how many were survived."""
    tried, survived = (sum(row[key] for row in rows.values()) for key in ("tried", "survived"))
    return tried, survived


BLOCKS = (
    *(value, made_on, steps, small_steps, loss, sent, sinkhorn, data, score_times, knn, kmeans, reading),
    *(copied, searched, faults, campaign),
)

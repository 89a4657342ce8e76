"""Tables over many runs: `python -m src.results table DIR...` reads what the evaluations left in each folder.

    python -m src.results table runs/seeds/*                               # every run; mean ± standard deviation
    python -m src.results table runs/*/* --means --format latex            # the latter alone

Reads `cls_eval.json`, `knn_eval.json` and `lincls_eval.json`, makes a table of each, and puts together what differs by the
seed alone: same method, architecture, epochs, data and protocol. The standard deviation is that of a sample (n - 1).
"""

import argparse
import csv
import io
import json
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

SCORES = ("acc", "nmi", "ami", "ari")
EVALUATIONS = ("cls_eval", "knn_eval", "lincls_eval")
# What makes runs comparable, apart from the method; where it differs between groups, it is in their names.
SETTINGS = (
    "arch",
    "epochs",
    "data",
    "subset_file",
    "split",
    "layer",
    "precision",
    "tau",
    "bank_share",
    "preset",
)


@dataclass(frozen=True)
class Result:
    """One evaluation of one run: its folder, the settings that others must share, and {name: fraction}."""

    evaluation: str
    folder: str
    method: str
    settings: tuple[tuple[str, str], ...]
    scores: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Results that differ by the seed alone."""

    name: str
    results: list[Result]

    def spread(self, score: str) -> tuple[float, float]:
        """Mean and sample standard deviation, two runs at least."""
        values = [result.scores[score] for result in self.results]
        return statistics.mean(values), statistics.stdev(values)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_results(folders: list[str]) -> list[Result]:
    """The evaluations of each run, in the order of the folders.

    Raises:
        ValueError: if a folder has none, or a damaged one, or one without scores, or is given twice.
    """
    results, seen = [], set()
    for folder in folders:
        if Path(folder).resolve() in seen:
            raise ValueError(f"{folder}: given twice; name each run once")
        seen.add(Path(folder).resolve())
        found = [name for name in EVALUATIONS if (Path(folder) / f"{name}.json").is_file()]
        if not found:
            raise ValueError(
                f"{folder}: none of {', '.join(EVALUATIONS)}.json in it; run an evaluation of its checkpoint"
            )
        results += [_read(folder, evaluation) for evaluation in found]
    return results


def _read(folder: str, evaluation: str) -> Result:
    path = Path(folder) / f"{evaluation}.json"
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not what {evaluation}.py writes; run it again")
    if evaluation == "cls_eval" and "cluster_sizes" in content and "acc" not in content:
        raise ValueError(f"{path}: has no scores, its data had no labels")
    try:
        scores = _scores(evaluation, content)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {error} missing; run {evaluation}.py again") from None
    known = {name: content[name] for name in SETTINGS if content.get(name) not in (None, "")}
    if evaluation == "cls_eval":
        known["by"] = _clusters(content.get("kmeans"))
        known["clusters"] = len(content.get("cluster_sizes", ()))
    known["protocol"] = content.get("protocol", "")
    settings = tuple((name, str(value)) for name, value in known.items())
    return Result(evaluation, folder, content.get("method") or "unknown", settings, scores)


def _scores(evaluation: str, content: dict) -> dict[str, float]:
    if evaluation == "cls_eval":
        return {name: content[name] for name in SCORES}
    if evaluation == "lincls_eval":
        return {name: content[name] for name in ("top1", "top5")}
    return {f"{k}-nn {name}": top[name] for k, top in content["k"].items() for name in ("top1", "top5")}


def _clusters(kmeans: dict | None) -> str:
    """Where clusters come from."""
    if not kmeans:
        return "classifier"
    unit = " at unit length" * kmeans["normalize"]
    starts = f"{kmeans['restarts']} x {kmeans['init']}"
    return f"k-means {kmeans['clusters']} on {kmeans['layer']}{unit}, {kmeans['fit_images']} images, {starts}"


def group(results: list[Result]) -> list[Group]:
    """Put together what belongs together; the first of each group gives the order."""
    members: dict[tuple, list[Result]] = {}
    for result in results:
        members.setdefault((result.method, result.settings, tuple(result.scores)), []).append(result)
    groups = []
    for key, own in members.items():
        method, settings, _ = key
        others = [dict(other) for name, other, _ in members if name == method and other != settings]
        differing = [name for name, value in settings if any(other.get(name) != value for other in others)]
        # A whole sentence only where nothing shorter tells it from another group.
        short = {name: value for name, value in settings if name != "protocol"}
        if not any(short == {name: value for name, value in other.items() if name != "protocol"} for other in others):
            differing = [name for name in differing if name != "protocol"]
        groups.append(Group(", ".join([method, *(f"{name} {dict(settings)[name]}" for name in differing)]), own))
    return groups


# ---- writing --------------------------------------------------------------------------------------------------------


def rows_of(groups: list[Group], means: bool, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for reading, in percent."""
    scores = list(dict.fromkeys(name for each in groups for result in each.results for name in result.scores))
    rows = []
    for each in groups:
        n = len(each.results)
        if not means or n == 1:
            for result in each.results:
                found = [f"{100 * result.scores[name]:.1f}" if name in result.scores else "" for name in scores]
                rows.append([f"{each.name} (1 run)" if means else result.folder, *found])
        if n > 1:
            title = f"{each.name} ({n} runs)" if means else f"mean {plus_minus} std of {n}"
            title = f"{each.name}: {title}" if len(groups) > 1 and not means else title
            found = []
            for name in scores:
                mean, std = each.spread(name) if name in each.results[0].scores else (None, None)
                found.append("" if mean is None else f"{100 * mean:.1f} {plus_minus} {100 * std:.1f}")
            rows.append([title, *found])
    return ["run", *(name.upper() for name in scores)], rows


def markdown(groups: list[Group], means: bool = False) -> str:
    header, rows = rows_of(groups, means, "±")
    cells = [[text.replace("|", "\\|") for text in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def latex(groups: list[Group], means: bool = False) -> str:
    """A tabular that needs no package."""
    header, rows = rows_of(groups, means, "$\\pm$")
    special = str.maketrans({c: f"\\{c}" for c in "_%&#{}"} | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"})
    lines = [" & ".join(text.translate(special) for text in row) + r" \\" for row in (header, *rows)]
    return "\n".join(
        [f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", lines[0], "\\hline", *lines[1:], "\\end{tabular}"]
    )


def as_csv(groups: list[Group], means: bool = False) -> str:
    """For programs: fractions at full length, mean and standard deviation in columns of their own."""
    scores = list(dict.fromkeys(name for each in groups for result in each.results for name in result.scores))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["evaluation", "group", "run", "runs", *(column for name in scores for column in (name, f"{name}_std"))]
    )
    for each in groups:
        start = [each.results[0].evaluation, each.name]
        if not means or len(each.results) == 1:
            for result in each.results:
                table.writerow(
                    [*start, result.folder, 1, *(x for name in scores for x in (result.scores.get(name), ""))]
                )
        if len(each.results) > 1:
            known = [each.spread(name) if name in each.results[0].scores else ("", "") for name in scores]
            table.writerow([*start, "mean", len(each.results), *(x for pair in known for x in pair)])
    return text.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": as_csv}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m src.results", description="Tables over many runs.")
    parser.add_argument("what", choices=["table"])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of the evaluations")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the tables (default: markdown)")
    parser.add_argument("--means", action="store_true", help="leave out the single runs of a group")
    args = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may have seen enough
    try:
        results = read_results(args.folders)
    except (ValueError, OSError) as error:
        parser.exit(2, f"results: error: {error}\n")
    tables = {
        evaluation: group(own)
        for evaluation in EVALUATIONS
        if (own := [result for result in results if result.evaluation == evaluation])
    }
    for i, (evaluation, groups) in enumerate(tables.items()):
        if i:
            print()
        if len(tables) > 1 and args.format != "csv":
            print(f"{'% ' * (args.format == 'latex')}{evaluation}\n")
        print(FORMATS[args.format](groups, args.means))


if __name__ == "__main__":
    sys.exit(main())

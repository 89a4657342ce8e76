"""Make tables of many runs, and keep the numbers of the documentation replayable.

    python -m src.results table runs/seeds/*                               # every run; mean ± standard deviation
    python -m src.results table runs/*/* --means --format latex            # mean ± standard deviation only
    python -m src.results table runs/*/* --format csv > results.csv        # one row per run and metric, for programs
    python -m src.results card runs/seeds/* --output docs/results/digits   # run cards: how runs were made, and their numbers
    python -m src.results verify                                           # README and docs against the cards
    python -m src.results traces                                           # the losses of every method, see src/traces.py

`table` reads `cls_eval.json`, `knn_eval.json` and `lincls_eval.json`. Runs that differ only in the seed form a group: they have the
same method, architecture, epochs, data and protocol. The standard deviation is that of a sample (n - 1).
"""

import argparse
import csv
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cards, documents
from .errors import RunError, printable
from .inspection import read_json

ROOT = Path(__file__).parents[1]
SCORES = ("acc", "nmi", "ami", "ari")
TOPS = ("top1", "top5")
BALANCES = ("balance_hard", "balance_soft")
EVALUATIONS = ("cls_eval", "knn_eval", "lincls_eval")
# What runs of a group have in common, apart from the method. The name of a group has those in which groups differ.
SETTINGS = (
    "arch",
    "epochs",
    "data",
    "subset",
    "subset_file",
    "split",
    "layer",
    "precision",
    "tau",
    "bank_share",
    "preset",
)
COLUMNS = ("evaluation", "group", "run", "seed", "protocol", "metric", "value")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluation of one run.

    Attributes:
        evaluation: one of EVALUATIONS.
        folder: folder of the run.
        seed: seed of the training run, empty if unknown.
        protocol: how the scores were measured.
        settings: (name, value) pairs that all runs of a group have in common.
        scores: {metric: fraction}, for the tables.
        balances: {metric: fraction} of BALANCES, for the CSV file only.
    """

    evaluation: str
    folder: str
    method: str
    seed: str
    protocol: str
    settings: tuple[tuple[str, str], ...]
    scores: dict[str, float]
    balances: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Results of one evaluation that differ only in the seed."""

    name: str
    results: list[Result]

    @property
    def evaluation(self) -> str:
        return self.results[0].evaluation

    @property
    def scores(self) -> list[str]:
        """Names of the scores, the same for all results."""
        return list(self.results[0].scores)

    def spread(self, score: str) -> tuple[float, float]:
        """Return mean and sample standard deviation of at least two runs."""
        values = [result.scores[score] for result in self.results]
        return statistics.mean(values), statistics.stdev(values)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_results(folders: list[str]) -> list[Result]:
    """Read the evaluations of each run, in the order of the folders.

    Raises:
        ValueError: if a folder is given twice or has no evaluation, or an evaluation is damaged or has no scores.
    """
    results, seen = [], set()
    for folder in folders:
        if Path(folder).resolve() in seen:
            raise ValueError(f"{folder}: given twice; name each run once")
        seen.add(Path(folder).resolve())
        found = [name for name in EVALUATIONS if (Path(folder) / f"{name}.json").is_file()]
        if not found:
            raise ValueError(
                f"{folder}: has none of {', '.join(EVALUATIONS)}.json; run an evaluation of its checkpoint first"
            )
        results += [_read(folder, evaluation) for evaluation in found]
    return results


def _read(folder: str, evaluation: str) -> Result:
    path = Path(folder) / f"{evaluation}.json"
    content = _load(path, evaluation)
    try:
        scores = _scores(evaluation, content)
        quality = content.get("quality", {})
        balances = {name: float(quality[name]) for name in BALANCES if quality.get(name) is not None}
        settings = _settings(evaluation, content)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; run {evaluation}.py again") from None
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: is not a result of {evaluation}.py; run it again") from None
    return Result(
        evaluation=evaluation,
        folder=folder,
        method=content.get("method") or "unknown",
        seed="" if content.get("seed") is None else str(content["seed"]),
        protocol=content.get("protocol", ""),
        settings=settings,
        scores=scores,
        balances=balances,
    )


def _load(path: Path, evaluation: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a result of {evaluation}.py; run it again")
    if evaluation == "cls_eval" and "cluster_sizes" in content and "acc" not in content:
        raise ValueError(f"{path}: has no scores, because its data has no labels; leave it out")
    return content


def _scores(evaluation: str, content: dict[str, Any]) -> dict[str, float]:
    if evaluation == "cls_eval":
        scores = {name: content[name] for name in SCORES}
    elif evaluation == "knn_eval":
        scores = {f"{k}-nn {name}": found[name] for k, found in content["k"].items() for name in TOPS}
    elif "best_epoch" in content:  # the best epoch is chosen on the test split; the name has to say so
        scores = {f"{name} (best epoch)": content[name] for name in TOPS}
        scores |= {f"{name} (last epoch)": content[f"last_{name}"] for name in TOPS}
    else:  # --fast scores the test split once
        scores = {name: content[name] for name in TOPS}
    return {name: float(value) for name, value in scores.items()}


def _settings(evaluation: str, content: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    known = {name: content[name] for name in SETTINGS if content.get(name) not in (None, "")}
    if evaluation == "cls_eval":
        known["by"] = _source_of_clusters(content.get("kmeans"))
        known["clusters"] = len(content.get("cluster_sizes", ()))
    known["protocol"] = content.get("protocol", "")
    return tuple((name, str(value)) for name, value in known.items())


def _source_of_clusters(kmeans: dict[str, Any] | None) -> str:
    if not kmeans:
        return "classifier"
    unit = " at unit length" if kmeans["normalize"] else ""
    early = ", early stop" if kmeans.get("early_stop") else ""  # missing in files of former versions
    starts = f"{kmeans['restarts']} x {kmeans['init']}{early}"
    return f"k-means {kmeans['clusters']} on {kmeans['layer']}{unit}, {kmeans['fit_images']} images, {starts}"


# ---- grouping -------------------------------------------------------------------------------------------------------


def group(results: list[Result]) -> list[Group]:
    """Put runs that differ only in the seed together. Groups are in the order of their first run."""
    members: dict[tuple[str, str, tuple[tuple[str, str], ...], tuple[str, ...]], list[Result]] = {}
    for result in results:
        key = (result.evaluation, result.method, result.settings, tuple(result.scores))
        members.setdefault(key, []).append(result)
    groups = []
    for (evaluation, method, settings, _), own in members.items():
        others = [
            dict(other) for of, name, other, _ in members if (of, name) == (evaluation, method) and other != settings
        ]
        named = _differing(dict(settings), others)
        groups.append(Group(", ".join([method, *(f"{name} {dict(settings)[name]}" for name in named)]), own))
    return groups


def _differing(settings: dict[str, str], others: list[dict[str, str]]) -> list[str]:
    """Return the settings whose values differ from those of another group.

    The protocol is a long sentence. It is among them only if nothing else tells two groups apart.
    """

    def without_protocol(of: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in of.items() if name != "protocol"}

    differing = [name for name, value in settings.items() if any(other.get(name) != value for other in others)]
    if any(without_protocol(settings) == without_protocol(other) for other in others):
        return differing
    return [name for name in differing if name != "protocol"]


# ---- writing --------------------------------------------------------------------------------------------------------


def rows_of(groups: list[Group], means: bool, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table for readers, in percent; with `means` one row per group."""
    scores = list(dict.fromkeys(score for each in groups for score in each.scores))
    rows = []
    for each in groups:
        n = len(each.results)
        if not means:
            rows += [[result.folder, *_percents(result, scores)] for result in each.results]
        elif n == 1:
            rows.append([f"{each.name} (1 run)", *_percents(each.results[0], scores)])
        if n > 1:
            title = f"{each.name} ({n} runs)"
            if not means:
                title = f"mean {plus_minus} std of {n}"
                title = f"{each.name}: {title}" if len(groups) > 1 else title
            rows.append([title, *_spreads(each, scores, plus_minus)])
    return ["run", *map(_heading, scores)], rows


def _percents(result: Result, scores: list[str]) -> list[str]:
    return [f"{100 * result.scores[name]:.1f}" if name in result.scores else "" for name in scores]


def _spreads(each: Group, scores: list[str], plus_minus: str) -> list[str]:
    spreads = {name: each.spread(name) for name in each.scores}
    texts = {name: f"{100 * mean:.1f} {plus_minus} {100 * std:.1f}" for name, (mean, std) in spreads.items()}
    return [texts.get(name, "") for name in scores]


def _heading(score: str) -> str:
    """Return the name of a score in capitals, but not the remark in brackets."""
    name, bracket, remark = score.partition(" (")
    return name.upper() + bracket + remark


def markdown(groups: list[Group], means: bool = False) -> str:
    """Return one table of groups of the same evaluation."""
    header, rows = rows_of(groups, means, "±")
    cells = [[printable(text).replace("|", "\\|") for text in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def latex(groups: list[Group], means: bool = False) -> str:
    """Return one tabular of groups of the same evaluation. It needs no package."""
    special: dict[str, str | int | None] = {c: f"\\{c}" for c in "_%&#{}$"}
    special |= {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}", "±": "$\\pm$"}
    header, rows = rows_of(groups, means, "±")
    lines = [
        " & ".join(printable(text).translate(str.maketrans(special)) for text in row) + r" \\"
        for row in (header, *rows)
    ]
    return "\n".join(
        [f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", lines[0], "\\hline", *lines[1:], "\\end{tabular}"]
    )


def as_csv(groups: list[Group]) -> str:
    """Return one table of all groups, a row per run and metric: fractions in full precision, no means."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for each in sorted(groups, key=lambda each: EVALUATIONS.index(each.evaluation)):
        for result in each.results:
            texts = (result.evaluation, each.name, result.folder, result.seed, result.protocol)
            start = [printable(text, reversible=True) for text in texts]
            table.writerows([*start, metric, value] for metric, value in (result.scores | result.balances).items())
    return text.getvalue().rstrip("\n")


TABLES: dict[str, Callable[[list[Group], bool], str]] = {"markdown": markdown, "latex": latex}


def as_tables(groups: list[Group], style: str, means: bool) -> str:
    """Return one table per evaluation; several have a title each."""
    tables = {}
    for evaluation in EVALUATIONS:
        if own := [each for each in groups if each.evaluation == evaluation]:
            tables[evaluation] = TABLES[style](own, means)
    if len(tables) == 1:
        return next(iter(tables.values()))
    comment = "% " if style == "latex" else ""
    return "\n\n".join(f"{comment}{evaluation}\n\n{table}" for evaluation, table in tables.items())


# ---- program --------------------------------------------------------------------------------------------------------


def main() -> None:
    args = _parser().parse_args()
    try:
        text = args.command(args)
    except RunError as error:
        sys.exit(f"results: error: {printable(error)}")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"results: error: {printable(error)}\n")
        raise SystemExit(2) from None
    if text:
        _print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m src.results", description="Make tables of many runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    tables = commands.add_parser("table", help="print a table of many runs")
    tables.add_argument("folders", nargs="+", metavar="DIR", help="output folder of the evaluations of one run")
    tables.add_argument(
        "--format",
        choices=[*TABLES, "csv"],
        default="markdown",
        help="markdown and latex: one table per evaluation, in percent. csv: one row per run and metric, as fractions "
        "(default: markdown)",
    )
    tables.add_argument("--means", action="store_true", help="show only means and standard deviations of groups")
    tables.set_defaults(command=_table)

    card = commands.add_parser("card", help="write the run cards of finished runs: how each was made, and its numbers")
    card.add_argument("folders", nargs="+", metavar="RUN", help="folder of a finished run of train.py")
    card.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the cards, for example docs/results/digits"
    )
    card.set_defaults(command=lambda args: "\n".join(map(str, cards.collect(args.folders, Path(args.output)))))

    verify = commands.add_parser("verify", help="compare the tables of README and docs with the run cards")
    verify.add_argument("--write", action="store_true", help="replace what differs")
    verify.set_defaults(command=_verify)

    replay = commands.add_parser("traces", help="replay the first 30 steps of every method and compare the losses")
    replay.add_argument("--write", action="store_true", help="store the traces that have changed")
    replay.set_defaults(command=_traces)
    return parser


def _table(args: argparse.Namespace) -> str:
    if args.means and args.format == "csv":
        raise ValueError("--means has no effect on --format csv, which has every run; drop one of them")
    groups = group(read_results(args.folders))
    return as_csv(groups) if args.format == "csv" else as_tables(groups, args.format, args.means)


def _verify(args: argparse.Namespace) -> str:
    found = documents.differences(ROOT, write=args.write)
    if found and not args.write:
        _print("\n".join(found))
        raise SystemExit(1)
    return "\n".join(found) if found else "all tables are those of the run cards"


def _traces(args: argparse.Namespace) -> str:
    from . import traces  # imports torch

    with tempfile.TemporaryDirectory() as folder:
        found = traces.run_all(Path(folder))
    lines = []
    for method, new in found.items():
        if changed := traces.differences(new, traces.read(method)):
            lines += [f"{method}: {line}" for line in changed]
            if args.write:
                traces.write(method, new)
                lines.append(f"wrote {traces.FOLDER / method}.json")
    if lines and not args.write:
        _print("\n".join(lines))
        raise SystemExit(1)
    return "\n".join(lines) or "all traces are as stored"


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        if not isinstance(error, BrokenPipeError):  # a reader such as head may stop early; a full disk is an error
            sys.exit(f"results: error: {error.strerror}, writing the table; free some space or write elsewhere")


if __name__ == "__main__":
    main()

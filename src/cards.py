"""Run cards: one JSON file per run with how the run was made and its numbers. The tables of the documentation come from them.

A card holds the resolved configuration, the starts of the run (commit, versions, processor, fingerprint of the data), the
minutes of training, the PFLOP if they were counted, the metrics per epoch, and the results of the evaluations.
"""

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

from . import files
from .errors import InputError

EVALUATIONS = ("cls_eval", "knn_eval", "lincls_eval")
# Entries that say where something was on one machine, or that no table needs.
LEFT_OUT = {"output_dir", "data_root", "checkpoint", "mapping", "cluster_sizes"}
NOT_PER_EPOCH = {"epoch", "step", "images_per_second", "seconds"}
DIGITS = 5  # significant digits of the metrics per epoch


# ---- writing --------------------------------------------------------------------------------------------------------


def collect(runs: list[str], output: Path) -> list[Path]:
    """Write the cards of several runs to OUTPUT/METHOD-SEED.json and return their paths.

    Raises:
        InputError: if a run is not finished, or if a card would not tell how the run was made.
    """
    cards: dict[Path, dict[str, Any]] = {}
    for run in runs:
        try:
            card = make_card(Path(run))
        except KeyError as error:
            raise InputError(f"{run}: its files have no {error}: name the folder of a run of train.py") from None
        path = output / f"{card['method']}-{card['seed']}.json"
        if path in cards:
            raise InputError(f"{run}: another run has the same method and seed: write its card to another --output")
        cards[path] = card
    output.mkdir(parents=True, exist_ok=True)
    for path, card in cards.items():
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in card.items()]
        files.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return list(cards)


def make_card(run: Path) -> dict[str, Any]:
    """Return the card of a run from the files in its folder.

    Raises:
        InputError: see `collect`.
    """
    config = _read(run / "config.json")
    starts = [_read_line(run / "starts.jsonl", line) for line in _lines(run / "starts.jsonl")]
    epochs = [_read_line(run / "metrics.jsonl", line) for line in _lines(run / "metrics.jsonl")]
    if len(epochs) != config["epochs"]:
        raise InputError(f"{run}: {len(epochs)} of {config['epochs']} epochs are finished: finish the run first")
    for start in starts:
        if not re.fullmatch("[0-9a-f]{40}", start["revision"]):
            raise InputError(
                f"{run}: the code was {start['revision']}, expected a commit without changes: commit, and run again"
            )
    found = {name: run / f"{name}.json" for name in EVALUATIONS}
    return {
        "method": config["method"],
        "seed": config["seed"],
        "config": _without_places(config),
        "starts": starts,
        "minutes": round(sum(epoch["seconds"] for epoch in epochs) / 60, 2),
        **({"pflop": _rounded(epochs[-1]["total_pflop"], DIGITS)} if "total_pflop" in epochs[-1] else {}),
        "per_epoch": _per_epoch(epochs),
        **{name: _rounded(_without_places(_read(path)), 7) for name, path in found.items() if path.exists()},
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a file of train.py: name the folder of a run") from None


def _read(path: Path) -> dict[str, Any]:
    return _read_line(path, "\n".join(_lines(path)))


def _read_line(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged, expected JSON objects: make the run again, or restore the file")
    return content


def _without_places(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries without the folders of the machine: of a path only its last part remains."""
    return {
        name: os.path.basename(value.rstrip(os.sep)) if isinstance(value, str) and value.startswith(os.sep) else value
        for name, value in content.items()
        if name not in LEFT_OUT
    }


def _per_epoch(epochs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return {metric: its values, null where an epoch lacks it}. Of several classifiers, only the last chosen one counts."""
    chosen = epochs[-1].get("classifier")
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for epoch in epochs for name in epoch):
        base, number = re.fullmatch(r"(.+?)(?:_(\d+))?", name).groups()  # type: ignore[union-attr]
        if name not in NOT_PER_EPOCH and number in (None, str(chosen)):
            key = base if number is None else f"{base} of classifier {number}"
            columns[key] = [_rounded(epoch.get(name), DIGITS) for epoch in epochs]
    return columns


def _rounded(value: Any, digits: int) -> Any:
    """Round all floating-point numbers in a JSON value to some significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    return {name: _rounded(each, digits) for name, each in value.items()} if isinstance(value, dict) else value


# ---- reading --------------------------------------------------------------------------------------------------------


def read_cards(folder: Path, method: str) -> dict[int, dict[str, Any]]:
    """Return {seed: card} of the runs of a method.

    Raises:
        InputError: if there is none.
    """
    found = {card["seed"]: card for card in map(_read, folder.glob(f"{method}-*.json"))}
    if not found:
        raise InputError(f"{folder}: has no card of {method}: write it with python -m src.results card")
    return dict(sorted(found.items()))


def scores(cards: dict[int, dict[str, Any]], metric: str) -> list[float]:
    """Return a score of cls_eval.py of each run, in percent."""
    return [100 * card["cls_eval"][metric] for card in cards.values()]


def candidates(card: dict[str, Any]) -> list[float]:
    """Return the accuracies, in percent, of the classifiers that are as large as the first one."""
    classifiers = card["cls_eval"]["classifiers"]
    return [100 * each["acc"] for each in classifiers if each["size"] == classifiers[0]["size"]]


def spread(values: list[float]) -> str:
    """Return mean and sample standard deviation as text: 96.2 ± 0.6. One value has no deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

"""Rebuild the tables of README and docs from the run cards, and find what differs.

In a document, a block stands between two comments that readers of the page do not see:

    <!-- results: methods -->
    | method | ACC | ...
    <!-- end -->

The words after "results:" are the name of a function in `BLOCKS` and its arguments. A block can also be a few words in a
sentence. In README and docs/results, a table with numbers that is in no block must follow a comment that says why:

    <!-- no card: REASON -->

or be on a page with the comment

    <!-- no cards on this page: REASON -->
"""

import json
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from . import measured
from .cards import candidates, read_cards, scores, spread
from .errors import InputError
from .measured import as_table

BLOCK = re.compile(r"<!-- results: (?P<name>.+?) -->(?P<text>.*?)<!-- end -->", flags=re.DOTALL)
TABLE = re.compile(r"^(?:\|.*\|\n)+", flags=re.MULTILINE)
NO_CARDS = "<!-- no cards on this page: "
NO_CARD = re.compile(r"<!-- no card: .+? -->\n\n?\Z")
NUMBER = re.compile(r"\|[ *]*[-+]?\d[\d.,]*( ±[^|]*| \([^|]*| %)?[ *]*(?=\|)")  # a cell that is a number
METRICS = ("acc", "nmi", "ami", "ari")
NAMES = {
    "self_classifier": "Self-Classifier",
    "sela_v2": "SeLa-v2",
    "sela": "SeLa",
    "deepcluster_v2": "DeepCluster-v2",
    "swav": "SwAV",
}
Cards = dict[int, dict[str, Any]]


# ---- finding what differs -------------------------------------------------------------------------------------------


def differences(root: Path, *, write: bool = False) -> list[str]:
    """Return one line for each block in README and docs that differs from the cards, and for each result without a card.

    Args:
        root: folder with README.md and docs.
        write: replace the text of the blocks that differ.

    Raises:
        InputError: if a block has no function, or a card is missing.
    """
    lines = []
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text, where = path.read_text(), path.relative_to(root)
        parts, end = [], 0
        for block in BLOCK.finditer(text):
            expected = _render(root, block["name"], str(where))
            parts += [text[end : block.start("text")], expected]
            end = block.end("text")
            if block["text"] != expected:
                lines.append(f"{where}: {block['name']}: {_first_difference(block['text'], expected)}")
        after = "".join(parts) + text[end:]
        if write and after != text:
            path.write_text(after)
        if path.name == "README.md" or path.parent == root / "docs" / "results":  # other pages have tables of settings
            lines += [f"{where}: {line}" for line in _tables_without_card(text)]
    return lines


def _render(root: Path, name: str, where: str) -> str:
    function, *words = name.split()
    if function not in BLOCKS:
        raise InputError(f"{where}: results: {function}: no such block, expected one of {', '.join(BLOCKS)}")
    try:
        signature(BLOCKS[function]).bind(root, *words)
    except TypeError:
        raise InputError(f"{where}: results: {name}: wrong number of arguments") from None
    try:
        return BLOCKS[function](root / "docs" / "results", *words)
    except KeyError as error:
        raise InputError(
            f"{where}: results: {name}: a card has no {error}: score the run and write its card again"
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: results: {name}: {error}") from None


def _first_difference(found: str, expected: str) -> str:
    """Return the first line in which two texts differ, with what the cards give instead."""
    one, two = found.split("\n"), expected.split("\n")
    for number, line in enumerate(two):
        if number >= len(one) or one[number] != line:
            return f"found {one[number] if number < len(one) else 'nothing'!r}, the cards give {line!r}"
    return f"found {one[len(two)]!r}, the cards give nothing"


def _tables_without_card(text: str) -> list[str]:
    if NO_CARDS in text:
        return []
    covered = [block.span() for block in BLOCK.finditer(text)]
    lines = []
    for table in TABLE.finditer(text):
        rows = table[0].splitlines()[2:]
        inside = any(first <= table.start() < last for first, last in covered)
        if not inside and any(map(NUMBER.search, rows)) and not NO_CARD.search(text[: table.start()]):
            lines.append(f"the table {rows[0][:60]!r} has numbers, but neither a block nor a reason for having none")
    return lines


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _of(results: Path, runs: str) -> Cards:
    """Return the cards of FOLDER/METHOD."""
    folder, _, method = runs.rpartition("/")
    return read_cards(results / folder, method)


def _seeds(cards: Cards, words: str) -> Cards:
    """Return the cards of a range of seeds such as 0-4, or all cards for "all"."""
    if words == "all":
        return cards
    first, _, last = words.partition("-")
    wanted = range(int(first), int(last or first) + 1)
    if missing := [seed for seed in wanted if seed not in cards]:
        raise InputError(f"there is no card of seed {missing[0]}: write it with python -m src.results card")
    return {seed: cards[seed] for seed in wanted}


def seeds(results: Path, runs: str, *groups: str) -> str:
    """Return a table with one row per run, and one with mean and standard deviation for each range of seeds."""
    cards = _of(results, runs)
    rows = []
    for seed, card in cards.items():
        single = candidates(card)
        percents = [f"{100 * card['cls_eval'][metric]:.1f}" for metric in METRICS]
        rows.append([str(seed), *percents, f"{sum(single) / len(single):.1f}", f"{min(single):.1f}"])
    for words in groups:
        title = f"mean ± std, {words.replace('-', ' to ')}"
        rows.append([title, *(spread(scores(_seeds(cards, words), metric)) for metric in METRICS), "", ""])
    number = len(candidates(next(iter(cards.values()))))
    header = ["seed", *map(str.upper, METRICS), f"mean ACC of the {number} candidates", "worst candidate"]
    return as_table(header, rows)


def methods(results: Path, folder: str, words: str, *names: str) -> str:
    """Return a table with one row per method: means over a range of seeds."""
    rows = []
    for name in names:
        cards = _seeds(read_cards(results / folder, name), words)
        single = [acc for card in cards.values() for acc in candidates(card)]
        acc = scores(cards, "acc")
        others = [spread(scores(cards, metric)) for metric in METRICS[1:]]
        heads = len(candidates(next(iter(cards.values()))))
        more = len(next(iter(cards.values()))["cls_eval"]["classifiers"]) - heads
        number = f"{heads}, and {more} larger ones" if more else str(heads)
        rows.append(
            [NAMES.get(name, name), spread(acc), f"{min(acc):.1f}", *others, f"{sum(single) / len(single):.1f}", number]
        )
    if pixels := [f"{score:.1f}" for score in _pixels(results, folder)]:
        rows.append(["k-means on pixels", pixels[0], "", *pixels[1:], "", ""])
    return as_table(["method", "ACC", "worst", "NMI", "AMI", "ARI", "mean ACC of single heads", "heads"], rows)


def budgets(results: Path, folder: str, words: str, *names: str) -> str:
    """Return a table with one row per method: its cost and its scores, as means over a range of seeds."""
    rows = []
    for name in names:
        cards = _seeds(read_cards(results / folder, name), words)
        cost = sum(card["pflop"] for card in cards.values()) / len(cards)
        rows.append(
            [f"`{name}`", str(len(cards)), f"{cost:.3f}", *(spread(scores(cards, metric)) for metric in METRICS)]
        )
    return as_table(["method", "runs", "PFLOP", *map(str.upper, METRICS)], rows)


def accuracies(results: Path, folder: str, words: str, *names: str) -> str:
    """Return a table with the accuracy of each method (rows) and seed (columns)."""
    found = {name: _seeds(read_cards(results / folder, name), words) for name in names}
    rows = [[NAMES.get(name, name), *(f"{acc:.1f}" for acc in scores(cards, "acc"))] for name, cards in found.items()]
    return as_table(["method", *(f"seed {seed}" for seed in next(iter(found.values())))], rows)


def two_nodes(results: Path, words: str) -> str:
    """Return a table that compares runs on two nodes with runs in one process, seed by seed."""
    pair = [_seeds(read_cards(results / folder, "self_classifier"), words) for folder in ("digits_two_nodes", "digits")]
    columns = [scores(cards, metric) for metric in ("acc", "nmi") for cards in pair]
    rows = [[str(seed), *(f"{column[i]:.1f}" for column in columns)] for i, seed in enumerate(pair[0])]
    rows.append(["mean ± std", *map(spread, columns)])
    titles = [f"{metric}, {where}" for metric in ("ACC", "NMI") for where in ("two nodes", "one process")]
    return as_table(["seed", *titles], rows)


def overview(results: Path) -> str:
    """Return the table at the start of README: ours on digits, and what the authors published."""
    page, split = "docs/results/digits.md", "digits, held-out 20 %"
    rows = []
    for name, network, words, source in (
        ("self_classifier", "3-layer convnet, 90 epochs, seeds 0 to 9", "0-9", f"ours, [docs/results]({page})"),
        ("sela_v2", "same network and views, seeds 0 to 4", "0-4", f"ours, [same search for all methods]({page})"),
        ("deepcluster_v2", "same network and views, seeds 0 to 4", "0-4", "ours"),
        ("swav", "same network and views, seeds 0 to 4", "0-4", "ours"),
    ):
        cards = _seeds(read_cards(results / "digits", name), words)
        acc, *others = (spread(scores(cards, metric)) for metric in METRICS)
        bold = "**" if name == "self_classifier" else ""
        first = f"{bold}{acc}{bold} (worst {min(scores(cards, 'acc')):.1f})"
        rows.append([split, f"{NAMES[name]}, {network}", first, *others, source])
    pixels = [f"{score:.1f}" for score in _pixels(results, "digits")]
    rows.append([split, "k-means on pixels", *pixels, "ours, printed by the demo"])
    published = json.loads((results / "published.json").read_text())["self_classifier 800ep"]
    rows.append(
        ["ImageNet-1k val", "ResNet-50, 800 epochs", *(f"{published[metric]:.1f}" for metric in METRICS), "the authors"]
    )
    rows.append(["ImageNet-1k val", "ResNet-50, 800 epochs", "not run", "", "", "", "ours"])
    return as_table(["data", "network, training", *map(str.upper, METRICS), "source"], rows)


def _pixels(results: Path, folder: str) -> list[float]:
    """Return the scores of k-means on pixels in percent, from the first card that holds them, or nothing."""
    for path in sorted((results / folder).glob("*.json")):
        if found := json.loads(path.read_text()).get("cls_eval", {}).get("pixel_kmeans"):
            return [100 * found[metric] for metric in METRICS]
    return []


def pixels(results: Path, folder: str) -> str:
    """Return the scores of k-means on pixels as part of a sentence."""
    named = zip(METRICS, _pixels(results, folder), strict=True)
    return ", ".join(f"{metric.upper()} {score:.1f}" for metric, score in named)


def worst(results: Path, runs: str, words: str) -> str:
    """Return the accuracy of the worst run."""
    return f"{min(scores(_seeds(_of(results, runs), words), 'acc')):.1f}"


def single(results: Path, runs: str, words: str) -> str:
    """Return the range of the accuracies of single classifiers, as part of a sentence."""
    found = [acc for card in _seeds(_of(results, runs), words).values() for acc in candidates(card)]
    return f"{min(found):.1f} to {max(found):.1f}"


def minutes(results: Path, runs: str) -> str:
    """Return the range of the training times, as part of a sentence."""
    found = [card["minutes"] for card in _of(results, runs).values()]
    return f"{min(found):.1f} to {max(found):.1f}"


def made_with(results: Path, folder: str) -> str:
    """Return processor, versions and commit of all runs of a folder, as part of a sentence.

    Raises:
        InputError: if they are not the same for all runs.
    """
    starts = [
        start for path in sorted((results / folder).glob("*.json")) for start in json.loads(path.read_text())["starts"]
    ]
    facts = {
        (start["processor"], start["versions"]["python"], start["versions"]["torch"], start["revision"][:8])
        for start in starts
    }
    if len(facts) != 1:
        raise InputError(
            f"{results / folder}: the cards have {len(facts)} processors, versions or commits, expected one"
        )
    processor, python, torch, revision = facts.pop()
    return f"{processor}, Python {python}, torch {torch}, commit {revision}"


BLOCKS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(seeds, methods, budgets, accuracies, two_nodes, overview, pixels, worst, single, minutes, made_with),
        *measured.BLOCKS,
    )
}

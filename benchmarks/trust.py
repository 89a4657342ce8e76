"""Measure how far the judgements of cls_eval.py about clusters can be trusted, on runs whose images have labels.

    python benchmarks/trust.py runs/seed-0 runs/seed-1 runs/seed-2 ...

The runs differ in nothing but the seed. Every classifier with as many clusters as the first one is judged without labels, as if
training had chosen it: against the other classifiers of its run, and against the chosen classifiers of the other runs. Then the
labels tell its accuracy. The table has for each run: classifiers with a wrong partition, which is more than 5 points below the
best of all, and how many of them raise an alarm (the level red); alarms on the others; and the expected calibration error
(15 bins) of the own confidences and of those that the other runs have calibrated.

A second table judges an injected failure, as if all classifiers of a run had it: the clusters that stand for the classes
--merge A B become one, and the largest other cluster falls into two halves.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, write
from src.config import parse_cls_eval
from src.evaluation import kmeans, trust
from src.evaluation.classification import choose_classifier
from src.evaluation.quality import align
from src.evaluation.session import open_session
from src.evaluation.trust import Head
from src.features import stream_predictions
from src.logs import percent, table
from src.metrics import clustering_scores

BELOW = 0.05  # accuracy below the best from which on a partition is wrong


def read_run(name: str, split: str) -> dict[str, Any]:
    """Return the heads of a run with as many clusters as the first one, the chosen one, the embeddings and the labels."""
    session = open_session(parse_cls_eval(["--checkpoint", name]), part="classifiers", splits=(split,), batch_size=256)
    data, last = session.splits[split], session.state["history"][-1]
    sizes = list(session.network.classes)
    heads, embeddings = [], None
    for k in [k for k, size in enumerate(sizes) if size == sizes[0]]:
        found = list(stream_predictions(session.network, session.batches(data), classifier=k))
        probabilities = torch.cat([p for p, _, _ in found]).numpy()
        embeddings = torch.cat([rows for _, rows, _ in found])
        heads.append(head_of(probabilities, last.get(f"loss_{k}")))
    chosen, _ = choose_classifier(None, session.state, len(sizes))
    return {"heads": heads, "chosen": chosen, "embeddings": embeddings, "labels": data.labels.numpy()}


def head_of(probabilities: np.ndarray, loss: float | None = None) -> Head:
    """Return a head with these (N, C) probabilities."""
    best = probabilities.max(axis=1)
    return Head(
        clusters=probabilities.argmax(axis=1), confidence=float(best.mean()), loss=loss, probabilities=probabilities
    )


def injected(run: dict[str, Any], merge: tuple[int, int]) -> Head:
    """Return the chosen head of a run with two clusters merged and the largest other cluster split by 2-means."""
    own: Head = run["heads"][run["chosen"]]
    size = own.probabilities.shape[1]
    to_class = np.argsort(align(run["labels"], own.clusters, size))  # cluster -> class
    a, b = (int(np.flatnonzero(to_class == label)[0]) for label in merge)
    counts = np.bincount(own.clusters, minlength=size)
    counts[[a, b]] = 0
    split = int(counts.argmax())
    rows = own.clusters == split
    fit = kmeans.fit(run["embeddings"][torch.from_numpy(rows)], 2, restarts=3, seed=0)
    half = kmeans.assign(run["embeddings"], fit.centroids)[0].numpy() == 1
    p = own.probabilities.copy()
    p[:, a] += p[:, b]
    p[:, b] = np.where(half, p[:, split], 0)
    p[half, split] = 0
    return head_of(p)


def judge(own: Head, same_run: list[Head], independent: list[Head], labels: np.ndarray) -> dict[str, float | bool]:
    """Judge a head without labels, and return the level red or not, its accuracy and its calibration errors."""
    size = own.probabilities.shape[1]
    found = trust.judge_partition(own, same_run=same_run, independent=independent, size=size)
    scores = clustering_scores(labels, own.clusters)
    mapping = {int(cluster): label for cluster, label in scores["mapping"].items()}
    right = np.array([mapping.get(int(cluster), -1) for cluster in own.clusters]) == labels
    return {
        "alarm": found["level"] == trust.RED,
        "acc": scores["acc"],
        "ece": trust.expected_calibration_error(own.probabilities.max(axis=1), right),
        "ece_calibrated": trust.expected_calibration_error(trust.calibrated(own, independent, size), right),
    }


def summarise(name: str, rows: list[dict], best: float) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers of one row of the table, and the row."""
    wrong = [row for row in rows if row["acc"] < best - BELOW]
    good = [row for row in rows if row["acc"] >= best - BELOW]
    numbers = {
        "name": name,
        "wrong": len(wrong),
        "alarms_on_wrong": sum(row["alarm"] for row in wrong),
        "good": len(good),
        "alarms_on_good": sum(row["alarm"] for row in good),
        **{
            f"{kind}_{how.__name__}": how([row[kind] for row in rows])
            for kind in ("ece", "ece_calibrated")
            for how in (max, np.mean)
        },
    }
    shown = [
        *(f"{numbers['alarms_on_' + kind]} of {numbers[kind]}" for kind in ("wrong", "good")),
        *(percent(numbers[f"{kind}_{how}"]) for kind in ("ece", "ece_calibrated") for how in ("mean", "max")),
    ]
    return numbers, [name, *shown]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("runs", nargs="+", help="run folders that differ in the seed")
    made.add_argument(
        "--merge", type=int, nargs=2, default=(1, 8), help="classes of the injected failure (default: 1 8)"
    )
    made.add_argument("--split", choices=("train", "test"), default="test", help="images to judge (default: test)")
    arguments = parse(made)
    where = machine("torch")
    print(in_words(where), flush=True)
    runs = [read_run(name, arguments.split) for name in arguments.runs]
    chosen = [run["heads"][run["chosen"]] for run in runs]
    judged, failures = [], []
    for i, run in enumerate(runs):
        others = [head for j, head in enumerate(chosen) if j != i]
        heads = run["heads"]
        judged.append([judge(own, heads[:k] + heads[k + 1 :], others, run["labels"]) for k, own in enumerate(heads)])
        failure = injected(run, tuple(arguments.merge))
        same = [replace(failure) for _ in heads[1:]]
        failures.append([judge(failure, same, others, run["labels"])])
    best = max(row["acc"] for rows in judged for row in rows)
    results = []
    header = [
        "",
        "alarms on wrong",
        "alarms on others",
        "ECE (mean)",
        "ECE (max)",
        "calibrated (mean)",
        "calibrated (max)",
    ]
    for title, groups in (("classifiers", judged), ("injected failure", failures)):
        named = [*zip(arguments.runs, groups, strict=True), ("all", [row for rows in groups for row in rows])]
        found = [summarise(name, rows, best) for name, rows in named]
        print(f"\n{title}; best accuracy {percent(best)} %\n{table(header, [row for _, row in found])}")
        results.append({"title": title, "best": best, "rows": [numbers for numbers, _ in found]})
    write(arguments.json, where, results)


if __name__ == "__main__":
    main()

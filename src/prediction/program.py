"""The program predict.py, from the options to the written files.

The steps are: open, list the files, predict, then write what follows from the predictions. What an interrupted run has done is in
the database of the output folder.
"""

import csv
import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .. import files, locks
from ..config import PredictOptions
from ..data.stream import Request
from ..data.walk import Entry, identity_of, walk
from ..errors import InputError, RunError, printable
from ..evaluation.trust import level_of, notes
from ..logs import Progress, percent, table, write_json
from ..signals import launched_as
from ..stopping import StopRequest
from . import sorting, trust
from .atlas import FILE as ATLAS
from .atlas import write_atlas
from .names import Names, names_in, read_names
from .network import FEWEST_TRAINING, MOST_TRAINING, Classifier, open_classifier
from .store import FILE, Result, Store

COLUMNS = ("path", "cluster", "name", "confidence", "trust", "second_cluster", "second_probability", "distance")
LOCK = "predict"
OURS = {FILE, f"{FILE}-journal", f".{LOCK}.lock"}  # a folder with nothing else belongs to this program
FORMAT = "self-classifier predictions"


def run(options: PredictOptions) -> None:
    """Predict the images of --data, or continue, and write the results into the output folder.

    Raises:
        InputError: if something is missing or does not fit together, before anything is written.
        RunError: if no image can be decoded, or if the database cannot be written.
        SystemExit: after SIGINT or SIGTERM, with 128 + the signal.
    """
    if launched_as()[1] != "1":
        raise InputError("predict.py runs as one process: start it without torchrun or srun")
    data, folder = choose_folders(options)
    top = data if data.is_dir() else data.parent
    example = first_image(data)
    classifier = open_classifier(options, example=str(top / example))
    given = None
    if options.names:
        given = read_names(
            options.names, model=classifier.model, classifier=classifier.number, clusters=classifier.clusters
        )
    locks.hold(folder, LOCK)
    store = Store(folder)
    try:
        bind(store, {"data": os.path.realpath(data), **classifier.facts}, folder=folder)
        store.set_fact("top", os.path.abspath(top))
        list_files(store, data, folder=folder, update=options.update)
        predict(store, classifier, top)
        if not store.counts()["predicted"]:
            write_skipped(store, folder)
            raise RunError(f"none of the files in {data} can be decoded: {folder}/skipped.csv lists the reasons")
        find_means(store, classifier)
        if given is not None:
            store.set_fact("names", given[1])
        names = names_in(store.fact("names") or {}, classifier.clusters)
        finish(store, classifier, names, options=options, top=top, folder=folder)
    finally:
        store.close()


# ---- open -----------------------------------------------------------------------------------------------------------


def choose_folders(options: PredictOptions) -> tuple[Path, Path]:
    """Return the folder or file of the images, and the output folder, which may not exist yet.

    Raises:
        InputError: if the images are missing, or if the output folder lies in that of the images or holds other files.
    """
    data = Path(options.data)
    try:
        is_folder, is_file = data.is_dir(), data.is_file()
    except OSError as error:  # a name that is too long
        raise InputError(f"--data {data}: {error.strerror}: pass the path of a folder or an image") from None
    if not is_folder and not is_file:
        raise InputError(f"--data {data}: no such folder or file: pass the path of a folder of images, or of an image")
    real = Path(os.path.realpath(data))
    folder = Path(
        options.output_dir or Path("runs") / "predicted" / ((real.name if is_folder else real.stem) or "root")
    )
    target = Path(os.path.realpath(folder))
    if is_folder and (target == real or real in target.parents):
        raise InputError(
            f"--output-dir {folder}: lies in --data {data}, where its files would be taken for images: give another folder"
        )
    try:
        found = set(os.listdir(folder))
    except FileNotFoundError:
        return data, folder
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {error.strerror}, expected a folder: give another one") from None
    if FILE not in found and (others := sorted(found - OURS)):
        raise InputError(
            f"--output-dir {folder}: holds other files, such as {printable(others[0])}: give a folder that is empty or new"
        )
    return data, folder


def first_image(data: Path) -> str:
    """Return the relative path of the first file that may be an image.

    Raises:
        InputError: if there is none.
    """
    refused: Entry | None = None
    for entry in walk(data):
        if not entry.refused:
            return entry.path
        refused = refused or entry
    reason = f"; {printable(refused.path)}: {refused.refused}" if refused else ""
    raise InputError(f"--data {data}: no image in this folder{reason}: give another one")


def bind(store: Store, facts: dict[str, Any], *, folder: Path) -> None:
    """Store what the predictions depend on, or compare it with what is stored.

    Raises:
        InputError: if the folder holds predictions of other images or by another network.
    """
    words = {
        "data": "of other images ({found})",
        "model": "of another checkpoint",
        "classifier": "of classifier {found}",
        "precision": "in {found}",
        "view": "of another evaluation view",
    }
    for name, value in facts.items():
        found = store.fact(name)
        if store.fact("bound") and found != value:
            raise InputError(
                f"--output-dir {folder}: holds predictions {words[name].format(found=found)}; give another folder"
            )
    with store.transaction():
        for name, value in facts.items():
            store.set_fact(name, value)
        store.set_fact("bound", True)


# ---- predict --------------------------------------------------------------------------------------------------------


def list_files(store: Store, data: Path, *, folder: Path, update: bool) -> None:
    """List the files into the database, unless an earlier run has done it and no update is asked for."""
    listed = store.fact("listed")
    if listed and not update:
        return
    counts = store.list_files(walk(data, without=identity_of(folder)))
    if listed:
        print(f"update: {counts['new']:,} new, {counts['changed']:,} changed and {counts['gone']:,} missing files")


def predict(store: Store, classifier: Classifier, top: Path) -> None:
    """Predict all files that have no prediction yet. Each batch is stored as a whole or not at all.

    Raises:
        SystemExit: after SIGINT or SIGTERM.
    """
    counts = store.counts()
    done = counts["predicted"] + counts["skipped"]
    if done == counts["files"]:
        return
    if counts["predicted"]:
        print(f"continuing: {done:,} of {counts['files']:,} files are done")
    progress = Progress(counts["files"], done, enabled=True)
    stop = StopRequest()
    stop.listen()
    skipped: list[tuple[int, str]] = []
    batches = classifier.predict(_requests(store, top, classifier.options.batch_size), skipped.extend)
    try:
        for numbers, probabilities, embeddings in batches:
            with store.transaction():
                store.skip(skipped)
                store.add(numbers, probabilities, embeddings)
            progress.count(len(numbers) + len(skipped), "predicting")
            skipped.clear()
            if stop.number:
                progress.say(
                    f"stopped by {signal.Signals(stop.number).name} after {progress.done:,} of {progress.total:,} files: the same "
                    "command continues"
                )
                raise SystemExit(128 + stop.number)
    finally:
        batches.close()
        progress.close()
        stop.stop_listening()


def _requests(store: Store, top: Path, size: int) -> Iterator[Request]:
    for rows in store.pending(size):
        yield [(number, os.path.join(top, path)) for number, path in rows]


def find_means(store: Store, classifier: Classifier) -> None:
    """Store the mean embedding of each cluster: of training images if they are on this machine, otherwise of the predicted ones.

    The means of training images are computed once, from at most as many images as were predicted, but from at least 2,000.
    """
    if (store.fact("means_of") or "").endswith("training images"):
        return
    predicted = store.counts()["predicted"]
    found = None
    if store.fact("data") != os.path.realpath(classifier.trained["data"]):
        most = min(max(predicted, FEWEST_TRAINING), MOST_TRAINING)
        bars: list[Progress] = []

        def count(images: int, total: int) -> None:
            if not bars:
                bars.append(Progress(total, 0, enabled=True))
            bars[0].count(images, "training images")

        try:
            found = classifier.training_images(count, most=most)
        finally:
            for bar in bars:
                bar.close()
    sums, counts, which = found or (*_sums(store.results(), classifier.clusters), f"{predicted:,} predicted images")
    store.set_means(sums / np.maximum(counts, 1)[:, None], counts, which)


def _sums(results: Iterator[Result], clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of the embeddings in each cluster, (C, F) float64, and the numbers of images, (C,)."""
    first = next(results)
    sums, counts = np.zeros((clusters, len(first.embedding))), np.zeros(clusters, dtype=np.int64)
    for result in chain([first], results):
        sums[result.cluster] += result.embedding
        counts[result.cluster] += 1
    return sums, counts


# ---- write ----------------------------------------------------------------------------------------------------------


def finish(
    store: Store, classifier: Classifier, names: Names, *, options: PredictOptions, top: Path, folder: Path
) -> None:
    """Write the lists and the sorted folders, and print what is where."""
    written = ["assignments.csv"]
    write_assignments(store, folder, names)
    if write_skipped(store, folder):
        written.append("skipped.csv")
    kind = options.sort if options.sort != "no" else store.fact("sort")
    if kind:
        store.set_fact("sort", kind)
        progress = Progress(store.counts()["predicted"], 0, enabled=True)
        sorting.sort(store, folder, top=top, kind=kind, names=names, count=partial(progress.count, what="sorting"))
        progress.close()
        written.append(f"{sorting.FOLDER}/")
    result = describe(store, classifier, names)
    if options.atlas:
        print("writing the atlas", flush=True)
        write_atlas(store, classifier, top=top, folder=folder, notes=notes(result["trust"]))
        written.append(ATLAS)
    write_json(folder / "predict.json", result)
    print("\n".join(as_text(result)))
    print(f"wrote {', '.join([*written, 'predict.json'])} to {printable(folder)}")


def write_assignments(store: Store, folder: Path, names: Names) -> None:
    """Write assignments.csv, one line per image, sorted by path.

    In paths and names, backslashes are doubled and what cannot be printed is escaped as in Python; the codec `unicode_escape`
    restores them. The distance is Euclidean, between the embedding of the image and the mean of its cluster; it is empty if
    the cluster has no mean.
    """
    means = store.means()
    with files.replacing(folder / "assignments.csv") as binary:
        text = _Text(binary)
        lines = csv.writer(text)
        lines.writerow(COLUMNS)
        for each in store.results():
            mean = means.get(each.cluster)
            distance = "" if mean is None else f"{float(np.linalg.norm(each.embedding - mean)):.4g}"
            lines.writerow(
                [
                    printable(each.path, reversible=True),
                    each.cluster,
                    printable(names.name_of(each.cluster, each.path), reversible=True),
                    f"{each.confidence:.7f}",
                    level_of(each.confidence),
                    each.second,
                    f"{each.second_probability:.7f}",
                    distance,
                ]
            )


def write_skipped(store: Store, folder: Path) -> bool:
    """Write skipped.csv, one line per file that was skipped, or remove it if there is none. Return whether there are some."""
    path = folder / "skipped.csv"
    if not store.counts()["skipped"]:
        path.unlink(missing_ok=True)
        return False
    with files.replacing(path) as binary:
        lines = csv.writer(_Text(binary))
        lines.writerow(("path", "reason"))
        lines.writerows((printable(path, reversible=True), printable(reason)) for path, reason in store.skipped())
    return True


class _Text:
    """A text file for `csv.writer` on top of a binary file."""

    def __init__(self, binary: Any):
        self.binary = binary

    def write(self, text: str) -> None:
        self.binary.write(text.encode())


def describe(store: Store, classifier: Classifier, names: Names) -> dict[str, Any]:
    """Return the content of predict.json."""
    counts = store.counts()
    sizes = store.cluster_sizes(classifier.clusters)
    judged = trust.judge(store, classifier)
    return {
        "format": FORMAT,
        "checkpoint": classifier.options.checkpoint,
        "data": classifier.options.data,
        **classifier.facts,
        "classifier_chosen_by": classifier.chosen_by,
        "images": counts["predicted"],
        "skipped": counts["skipped"],
        "means_of": store.fact("means_of"),
        "trust": judged,
        "clusters": [
            {
                "cluster": k,
                "name": names.name_of(k, ""),
                "images": sizes[k],
                "confidence": confidence,
                "trust": judged["clusters"][k]["level"],
            }
            for k, confidence in enumerate(store.mean_confidences(classifier.clusters))
        ],
    }


def as_text(result: dict[str, Any]) -> list[str]:
    """Return the table and the sentences to print: the largest clusters first."""
    used = sorted((each for each in result["clusters"] if each["images"]), key=lambda each: -each["images"])
    shown = used[:20]
    rows = [
        [
            each["name"],
            f"{each['images']:,}",
            percent(each["images"] / result["images"]),
            percent(each["confidence"]),
            each["trust"] or "",
        ]
        for each in shown
    ]
    lines = [table(["", "images", "share (%)", "mean confidence (%)", "trust"], rows)]
    if len(used) > len(shown):
        lines.append(f"and {len(used) - len(shown)} smaller clusters")
    count = f"{result['images']:,} image{'s' if result['images'] > 1 else ''}"
    lines.append(
        f"{count} in {len(used)} of {len(result['clusters'])} clusters of classifier {result['classifier']} (chosen by "
        f"{result['classifier_chosen_by']}); {result['skipped']:,} files skipped"
    )
    lines.append(f"distances: to the means of {result['means_of']}")
    lines.extend(sentence for _, sentence in notes(result["trust"]))
    return lines

"""What predict.py knows about each file, in an SQLite database in the output folder.

The database makes memory independent of the number of files, and an interrupted run loses at most the last seconds: a file is
either predicted and stored, or still to be predicted.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.walk import Entry
from ..errors import InputError, RunError

FILE = "predictions.db"
APPLICATION = 0x53434C46  # marks a database as one of predict.py
VERSION = 1
MOST_LIKELY = 16  # largest number of clusters whose probabilities are kept per image
PIECE = 1024  # rows that are read together
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, changed INTEGER NOT NULL,
    seen INTEGER NOT NULL);
CREATE TABLE skipped (id INTEGER PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE results (id INTEGER PRIMARY KEY, cluster INTEGER NOT NULL, confidence REAL NOT NULL, second INTEGER NOT NULL,
    second_probability REAL NOT NULL);
CREATE TABLE details (id INTEGER PRIMARY KEY, clusters BLOB NOT NULL, probabilities BLOB NOT NULL, embedding BLOB NOT NULL);
CREATE TABLE means (cluster INTEGER PRIMARY KEY, mean BLOB NOT NULL);
CREATE TABLE places (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, place BLOB NOT NULL UNIQUE);
"""


class Result(NamedTuple):
    """The prediction of one image.

    Attributes:
        path: relative to --data.
        cluster: the most likely cluster, and `confidence` its probability.
        second: the second cluster, and `second_probability` its probability.
        embedding: (F,) float16, the input of the classifier.
    """

    number: int
    path: str
    cluster: int
    confidence: float
    second: int
    second_probability: float
    embedding: np.ndarray


class Image(NamedTuple):
    """The details of the prediction of one image.

    Attributes:
        path: relative to --data.
        clusters: the T most likely clusters, the most likely first, and `probabilities`, both (T,).
        embedding: (F,) float16, the input of the classifier.
    """

    path: str
    clusters: np.ndarray
    probabilities: np.ndarray
    embedding: np.ndarray


class Store:
    """The database of one output folder.

    Args:
        folder: the output folder, which exists.

    Raises:
        InputError: if the file in the folder is no database of predict.py.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        if self.path.is_symlink():
            raise InputError(f"{self.path} is a link, expected a file: remove it")
        fresh = not self.path.exists()
        self._base = sqlite3.connect(self.path, isolation_level=None)
        try:
            with self.failures():
                if fresh or not self._value("SELECT count(*) FROM sqlite_master"):
                    self._begin()
                found = self._value("PRAGMA application_id"), self._value("PRAGMA user_version")
        except RunError:
            found = (0, 0)
        if found != (APPLICATION, VERSION):
            self._base.close()
            raise InputError(
                f"{self.path}: damaged, or not written by this version of predict.py: give another --output-dir"
            )
        self._base.execute("PRAGMA cache_size = -16000")  # KiB

    def _begin(self) -> None:
        self._base.executescript(
            f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
        )

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Turn an error of the database, such as a full disk, into one line."""
        try:
            yield
        except sqlite3.Error as error:
            raise RunError(
                f"{self.path}: {error}; free some space, or give another --output-dir if the file is damaged"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Store everything that is written in the block, or nothing of it."""
        with self.failures():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def close(self) -> None:
        self._base.close()

    def _value(self, query: str, *values: Any) -> Any:
        row = self._base.execute(query, values).fetchone()
        return None if row is None else row[0]

    # ---- facts ----

    def fact(self, name: str) -> Any:
        """Return a stored fact, or None."""
        with self.failures():
            text = self._value("SELECT value FROM facts WHERE name = ?", name)
        return None if text is None else json.loads(text)

    def set_fact(self, name: str, value: Any) -> None:
        """Store a fact that JSON can hold."""
        with self.failures():
            self._base.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # ---- files ----

    def list_files(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Compare the files on the disk with those in the database, in one transaction.

        New files are added. What was known about changed files is forgotten, so that they are predicted again. Files that are
        gone are removed, except for their places in the sorted folders.

        Returns:
            The numbers of files: `new`, `changed` and `gone`.
        """
        counts = {"new": 0, "changed": 0, "gone": 0}
        turn = (self.fact("turn") or 0) + 1
        with self.transaction():
            for entry in entries:
                path = os.fsencode(entry.path)
                known = self._base.execute("SELECT id, size, changed FROM files WHERE path = ?", (path,)).fetchone()
                now = (entry.size, entry.changed)
                if known is None:
                    cursor = self._base.execute("INSERT INTO files VALUES (NULL, ?, ?, ?, ?)", (path, *now, turn))
                    number, kind = cursor.lastrowid, "new"
                else:
                    number, kind = known[0], "" if known[1:] == now else "changed"
                    self._base.execute(
                        "UPDATE files SET size = ?, changed = ?, seen = ? WHERE id = ?", (*now, turn, number)
                    )
                if kind:
                    counts[kind] += 1
                    self._forget("= ?", number)
                    self._base.execute("UPDATE places SET kind = 'stale' WHERE id = ?", (number,))
                if entry.refused and (kind or self._value("SELECT 1 FROM skipped WHERE id = ?", number) is None):
                    self._forget("= ?", number)
                    self._base.execute("INSERT INTO skipped VALUES (?, ?)", (number, entry.refused))
            gone = "IN (SELECT id FROM files WHERE seen < ?)"
            counts["gone"] = self._value(f"SELECT count(*) FROM files WHERE id {gone}", turn)
            self._forget(gone, turn)
            self._base.execute("DELETE FROM files WHERE seen < ?", (turn,))
            self.set_fact("turn", turn)
            self.set_fact("listed", True)
        return counts

    def _forget(self, which: str, value: Any) -> None:
        for table in ("skipped", "results", "details"):
            self._base.execute(f"DELETE FROM {table} WHERE id {which}", (value,))

    def counts(self) -> dict[str, int]:
        """Return the numbers of files: `files`, `predicted` and `skipped`."""
        with self.failures():
            return {
                name: self._value(f"SELECT count(*) FROM {table}")
                for name, table in (("files", "files"), ("predicted", "results"), ("skipped", "skipped"))
            }

    def pending(self, size: int) -> Iterator[list[tuple[int, str]]]:
        """Yield the files that are to be predicted, in parts of `size`: their numbers and paths."""
        last = 0
        while True:
            with self.failures():
                rows = self._base.execute(
                    "SELECT id, path FROM files WHERE id > ? AND NOT EXISTS (SELECT 1 FROM results WHERE id = files.id) "
                    "AND NOT EXISTS (SELECT 1 FROM skipped WHERE id = files.id) ORDER BY id LIMIT ?",
                    (last, size),
                ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [(number, os.fsdecode(path)) for number, path in rows]

    def skip(self, numbers: Iterable[tuple[int, str]]) -> None:
        """Store why files were skipped."""
        self._base.executemany("INSERT OR REPLACE INTO skipped VALUES (?, ?)", numbers)

    def skipped(self) -> Iterator[tuple[str, str]]:
        """Yield path and reason of the skipped files, sorted by path."""
        with self.failures():
            for path, reason in self._base.execute(
                "SELECT path, reason FROM files JOIN skipped USING (id) ORDER BY path"
            ):
                yield os.fsdecode(path), reason

    # ---- results ----

    def add(self, numbers: Sequence[int], probabilities: np.ndarray, embeddings: np.ndarray) -> None:
        """Store the predictions of B images.

        Args:
            probabilities: (B, C) float32.
            embeddings: (B, F).
        """
        size = probabilities.shape[1]
        kept = min(MOST_LIKELY, size)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :kept]
        sorted_ = np.take_along_axis(probabilities, order, axis=1).astype(np.float32)
        rows, details = [], []
        for i, number in enumerate(numbers):
            best = [
                value for pair in zip(order[i, :2].tolist(), sorted_[i, :2].tolist(), strict=True) for value in pair
            ]
            rows.append((number, *best))
            blobs = order[i].astype(np.int32), sorted_[i], embeddings[i].astype(np.float16)
            details.append((number, *(blob.tobytes() for blob in blobs)))
        self._base.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)", rows)
        self._base.executemany("INSERT OR REPLACE INTO details VALUES (?, ?, ?, ?)", details)

    def results(self) -> Iterator[Result]:
        """Yield the predictions of all images, sorted by path."""
        with self.failures():
            for number, path, cluster, confidence, second, probability, embedding in self._base.execute(
                "SELECT files.id, path, cluster, confidence, second, second_probability, embedding FROM files "
                "JOIN results USING (id) JOIN details USING (id) ORDER BY path"
            ):
                yield Result(
                    number,
                    os.fsdecode(path),
                    cluster=cluster,
                    confidence=confidence,
                    second=second,
                    second_probability=probability,
                    embedding=np.frombuffer(embedding, dtype=np.float16),
                )

    def overview(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return number, cluster and confidence of all images, sorted by path, each (N,)."""
        columns = np.dtype([("number", np.int64), ("cluster", np.int64), ("confidence", np.float64)])
        with self.failures():
            rows = self._base.execute("SELECT id, cluster, confidence FROM files JOIN results USING (id) ORDER BY path")
            found = np.fromiter(rows, dtype=columns)
        return found["number"], found["cluster"], found["confidence"]

    def image(self, number: int) -> Image:
        """Return the details of the prediction of an image."""
        with self.failures():
            path, clusters, probabilities, embedding = self._base.execute(
                "SELECT path, clusters, probabilities, embedding FROM files JOIN details USING (id) WHERE id = ?",
                (number,),
            ).fetchone()
        return Image(
            os.fsdecode(path),
            clusters=np.frombuffer(clusters, dtype=np.int32),
            probabilities=np.frombuffer(probabilities, dtype=np.float32),
            embedding=np.frombuffer(embedding, dtype=np.float16),
        )

    def cluster_sizes(self, clusters: int) -> list[int]:
        """Return the number of images in each cluster."""
        with self.failures():
            found = dict(self._base.execute("SELECT cluster, count(*) FROM results GROUP BY cluster").fetchall())
        return [found.get(cluster, 0) for cluster in range(clusters)]

    def mean_confidences(self, clusters: int) -> list[float | None]:
        """Return the mean confidence of the images in each cluster; None for a cluster without images."""
        with self.failures():
            found = dict(self._base.execute("SELECT cluster, avg(confidence) FROM results GROUP BY cluster").fetchall())
        return [found.get(cluster) for cluster in range(clusters)]

    # ---- means of the clusters ----

    def set_means(self, means: np.ndarray, counts: np.ndarray, source: str) -> None:
        """Store the mean embedding of each cluster that has images.

        Args:
            means: (C, F).
            counts: (C,) number of images.
            source: the images, in words.
        """
        rows = [(k, means[k].astype(np.float32).tobytes()) for k in np.flatnonzero(counts).tolist()]
        with self.transaction():
            self._base.execute("DELETE FROM means")
            self._base.executemany("INSERT INTO means VALUES (?, ?)", rows)
            self.set_fact("means_of", source)

    def means(self) -> dict[int, np.ndarray]:
        """Return {cluster: its mean embedding, (F,) float32}."""
        with self.failures():
            rows = self._base.execute("SELECT cluster, mean FROM means").fetchall()
        return {cluster: np.frombuffer(mean, dtype=np.float32) for cluster, mean in rows}

    # ---- places in the sorted folders ----

    def places_of_the_gone(self) -> Iterator[tuple[int, str]]:
        """Yield the sorted files whose images have no prediction any more: number and path below the sorted folder."""
        while True:
            with self.failures():
                rows = self._base.execute(
                    "SELECT id, place FROM places WHERE NOT EXISTS (SELECT 1 FROM results WHERE id = places.id) LIMIT ?",
                    (PIECE,),
                ).fetchall()
            if not rows:
                return
            yield from ((number, os.fsdecode(place)) for number, place in rows)

    def place_of(self, number: int) -> tuple[str, str] | None:
        """Return how and where an image was sorted, or None."""
        with self.failures():
            row = self._base.execute("SELECT kind, place FROM places WHERE id = ?", (number,)).fetchone()
        return None if row is None else (row[0], os.fsdecode(row[1]))

    def set_place(self, number: int, kind: str, place: str) -> None:
        """Store how and where an image was sorted."""
        with self.failures():
            self._base.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?)", (number, kind, os.fsencode(place)))

    def forget_place(self, number: int) -> None:
        """Remove the place of an image."""
        with self.failures():
            self._base.execute("DELETE FROM places WHERE id = ?", (number,))

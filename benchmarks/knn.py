"""Compare our nearest-neighbour votes, computed in chunks, with the brute-force search of scikit-learn.

    python benchmarks/knn.py
    python benchmarks/knn.py --large      # the size of ImageNet, 1.28 million × 2048 features and 50,000 queries; for a GPU

Both sides find the same neighbours of the same features. The benchmark reports the seconds and the peak memory beyond the
features. The peak of our search should not grow with the bank.
"""

import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, peak_memory, seconds_in_turns, spread, write
from src.evaluation.knn import unit_rows
from src.metrics import knn_top

KS, TAU, CLASSES = (10, 20, 100, 200), 0.1, 1000


def features(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows of unit length around one centre per class, and return them with their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    found = torch.empty(rows, width).normal_(generator=generator)
    for part in torch.arange(rows).split(65536):
        found[part] += 0.5 * centres[labels[part]]
    return unit_rows(found, torch.float32), labels


def compare(bank_size: int, num_queries: int, width: int, turns: int) -> dict:
    """Compute one row of the table, on the CPU. scikit-learn votes for the largest k only, our search for all four k."""
    bank, bank_labels = features(bank_size, width, 1)
    queries, query_labels = features(num_queries, width, 2)
    # the cosine similarity is 1 - distance, so the votes are the same
    theirs = KNeighborsClassifier(
        max(KS), algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / TAU)
    )
    theirs.fit(bank.numpy(), bank_labels.numpy())
    result = {}

    def run_ours():
        result["ours"] = knn_top(bank, bank_labels, queries, query_labels, KS, TAU)[max(KS)][0]

    def run_theirs():
        result["theirs"] = theirs.score(queries.numpy(), query_labels.numpy())

    sides = {"ours": run_ours, "scikit-learn": run_theirs}
    seconds = seconds_in_turns(sides, turns)
    peaks = {name: peak_memory(run) for name, run in sides.items()}
    return {
        "bank": bank_size,
        "queries": num_queries,
        "width": width,
        "seconds": seconds,
        "ratio": median(seconds["scikit-learn"]) / median(seconds["ours"]),
        "peak_bytes": peaks,
        "bank_bytes": bank.nbytes,
        "top1": result,
    }


def large(bank_size: int, num_queries: int, width: int) -> dict:
    """Time our search alone at the size of ImageNet, with the bank in host memory, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank, bank_labels = features(bank_size, width, 1)
    queries, query_labels = features(num_queries, width, 2)
    queries = queries.to(device)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    result = {}

    def run():
        result["top1"] = knn_top(bank, bank_labels, queries, query_labels, KS, TAU)[max(KS)][0]

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    peak = peak_memory(run)
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = seconds_in_turns({"ours": run}, 1, finish)
    size = {"bank": bank_size, "queries": num_queries, "width": width, "bank_bytes": bank.nbytes, "device": str(device)}
    return {**size, "seconds": seconds, "peak_bytes": {"ours": peak}, "device_peak_bytes": on_device, **result}


def main():
    flags = parser(__doc__)
    flags.add_argument(
        "--large", action="store_true", help="time our search alone at the size of ImageNet, on a GPU if there is one"
    )
    arguments = parse(flags)
    where = machine("torch", "scikit-learn", "numpy")
    print(in_words(where), flush=True)
    if arguments.large:
        bank, queries, width = (200_000, 10_000, 2048) if arguments.quick else (1_281_167, 50_000, 2048)
        row = large(bank, queries, width)
        print(
            f"bank {bank:,} x {width} ({row['bank_bytes'] / 2**30:.1f} GiB), {queries:,} queries, {row['device']}: "
            f"{spread(row['seconds']['ours'], 1)} s; peak {row['peak_bytes']['ours'] / 2**30:.2f} GiB of host memory beyond the features, "
            f"{row['device_peak_bytes'] / 2**30:.2f} GiB on the device with the queries; top-1 {row['top1']:.4f}"
        )
        write(arguments.json, where, [row])
        return
    turns, num_queries, width = (2, 1000, 128) if arguments.quick else (3, 4000, 256)
    sizes = (10_000, 20_000) if arguments.quick else (50_000, 100_000, 200_000)
    print(
        f"{num_queries:,} queries × {width}; seconds: median (range) of {turns} runs; peak memory beyond the features in MiB"
    )
    print(f"{'bank':>8}{'MiB':>6}  {'ours':24}{'scikit-learn':24}{'times':>6}  {'peak':>6}{'theirs':>8}   top-1, both")
    rows = []
    for size in sizes:
        row = compare(size, num_queries, width, turns)
        rows.append(row)
        peaks = [row["peak_bytes"][side] / 2**20 for side in ("ours", "scikit-learn")]
        print(
            f"{size:8,}{row['bank_bytes'] / 2**20:6.0f}  {spread(row['seconds']['ours'], 2):24}"
            f"{spread(row['seconds']['scikit-learn'], 2):24}{row['ratio']:6.2f}  {peaks[0]:6.0f}{peaks[1]:8.0f}   "
            f"{row['top1']['ours']:.4f} {row['top1']['theirs']:.4f}",
            flush=True,
        )
    growth = rows[-1]["peak_bytes"]["ours"] - rows[-2]["peak_bytes"]["ours"]
    print(f"with twice the bank, our peak memory beyond the features changes by {growth / 2**20:+.0f} MiB")
    write(arguments.json, where, rows)


if __name__ == "__main__":
    main()

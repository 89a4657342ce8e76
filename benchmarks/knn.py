"""Compare our nearest-neighbour search and votes with faiss, with plain torch and with the products alone.

    python benchmarks/knn.py --threads 1
    python benchmarks/knn.py --large --queries 2048     # the bank of ImageNet, 1.28 million × 2048 features

All sides search 200 neighbours of the same queries. "products" computes the dot products and
selects nothing. The benchmark reports seconds, ratios, the share of queries with the neighbours of faiss, and the peak memory
beyond the features, which should not grow with the bank.
"""

import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import faiss
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    add_threads,
    in_words,
    machine,
    parse,
    parser,
    peak_memory,
    seconds_in_turns,
    spread,
    write,
)
from src import neighbors
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


def compare(bank_size: int, num_queries: int, width: int, *, threads: int, turns: int, clock) -> dict:
    """Compute the rows of one table, on the CPU."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    bank, bank_labels = features(bank_size, width, 1)
    queries, query_labels = features(num_queries, width, 2)
    k, found = max(KS), {}
    parts = queries.split(neighbors.QUERY_CHUNK)

    def products():
        for part in parts:
            for rows in bank.split(neighbors.BANK_CHUNK):
                part @ rows.T

    def plain():
        for part in queries.split(256):  # the product of all queries would need 0.8 GB
            (part @ bank.T).topk(k, dim=1)

    def by_faiss():
        found["faiss"] = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)[1]

    def ours():
        found["ours"] = torch.cat([neighbors.nearest(bank, part, k)[1] for part in parts])

    def by_torch():
        worthwhile, neighbors.WORTHWHILE = neighbors.WORTHWHILE, 1 << 62
        ours()
        neighbors.WORTHWHILE = worthwhile

    def votes():
        found["top1"] = knn_top(bank, bank_labels, queries, query_labels, KS, TAU)[k][0]

    sides = {
        "products": products,
        "faiss": by_faiss,
        "ours": ours,
        "ours, votes for four k": votes,
        "ours, without faiss": by_torch,
        "topk of the products": plain,
    }
    seconds = seconds_in_turns(sides, turns, clock=clock)
    ours()
    same = (found["ours"].sort(dim=1).values == torch.from_numpy(found["faiss"]).sort(dim=1).values).all(dim=1)
    size = {"bank": bank_size, "queries": num_queries, "width": width, "k": k, "threads": threads}
    return {**size, "seconds": seconds, "same_neighbours": same.double().mean().item(), "top1": found["top1"]}


def memory(bank_size: int, num_queries: int, width: int) -> dict:
    """Measure the peak memory of the votes beyond the features, for features in float32 and in bfloat16."""
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        (bank, bank_labels), (queries, query_labels) = (
            features(rows, width, seed) for rows, seed in ((bank_size, 1), (num_queries, 2))
        )
        bank, queries = bank.to(dtype), queries.to(dtype)
        peaks[str(dtype)] = peak_memory(partial(knn_top, bank, bank_labels, queries, query_labels, KS, TAU))
    return {"bank": bank_size, "queries": num_queries, "width": width, "peak_bytes": peaks}


def large(bank_size: int, num_queries: int, width: int) -> dict:
    """Time our search alone at the size of ImageNet, with the bank in host memory, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank, bank_labels = features(bank_size, width, 1)
    queries, query_labels = features(num_queries, width, 2)
    queries = queries.to(device)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    result = {}

    def run():
        started = time.perf_counter()
        result["top1"] = knn_top(bank, bank_labels, queries, query_labels, KS, TAU)[max(KS)][0]
        finish()
        result["seconds"] = {"ours": [time.perf_counter() - started]}

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    peak = peak_memory(run)
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    size = {"bank": bank_size, "queries": num_queries, "width": width, "bank_bytes": bank.nbytes, "device": str(device)}
    return {**size, "peak_bytes": {"ours": peak}, "device_peak_bytes": on_device, **result}


def main():
    flags = parser(__doc__)
    flags.add_argument(
        "--large", action="store_true", help="time our search alone at the size of ImageNet, on a GPU if there is one"
    )
    flags.add_argument(
        "--bank", type=int, default=1_281_167, help="rows of the bank with --large (default: %(default)s)"
    )
    flags.add_argument(
        "--queries", type=int, default=50_000, help="number of queries with --large (default: %(default)s)"
    )
    add_threads(flags)
    arguments = parse(flags)
    where = machine("torch", "faiss-cpu", "numpy")
    print(in_words(where), flush=True)
    if arguments.large:
        bank, queries, width = arguments.bank, arguments.queries, 2048
        row = large(bank, queries, width)
        print(
            f"bank {bank:,} x {width} ({row['bank_bytes'] / 2**30:.1f} GiB), {queries:,} queries, {row['device']}: "
            f"{spread(row['seconds']['ours'], 1)} s; peak {row['peak_bytes']['ours'] / 2**30:.2f} GiB of host memory beyond the features, "
            f"{row['device_peak_bytes'] / 2**30:.2f} GiB on the device with the queries; top-1 {row['top1']:.4f}"
        )
        write(arguments.json, where, [row])
        return
    turns = arguments.turns
    num_queries, width, size = (1000, 128, 20_000) if arguments.quick else (4000, 256, 50_000)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    row = compare(size, num_queries, width, threads=arguments.threads, turns=turns, clock=clock)
    rows = [row]
    print(
        f"{num_queries:,} queries, bank {size:,} x {width}, k {row['k']}, {row['threads']} thread(s); seconds: median (range) "
        f"of {turns} runs; neighbours equal to those of faiss for {row['same_neighbours']:.2%} of the queries"
    )
    base, other = (median(row["seconds"][side]) for side in ("products", "faiss"))
    for side, seconds in row["seconds"].items():
        ratios = f"{median(seconds) / base:5.2f} x products  {median(seconds) / other:5.2f} x faiss"
        print(f"  {side:24}{spread(seconds, 2):22}{ratios}", flush=True)
    for bank_size in (size, 2 * size, 4 * size):
        row = memory(bank_size, num_queries, width)
        rows.append(row)
        peaks = ", ".join(f"{name} {peak / 2**20:.0f}" for name, peak in row["peak_bytes"].items())
        print(f"bank {bank_size:9,} x {width}: peak memory beyond the features in MiB: {peaks}", flush=True)
    write(arguments.json, where, rows)


if __name__ == "__main__":
    main()

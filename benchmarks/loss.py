"""Compare our loss of Self-Classifier, which exchanges column statistics, with the same loss from gathered logits.

    OMP_NUM_THREADS=1 python benchmarks/loss.py            # one, two and four gloo processes
    OMP_NUM_THREADS=1 python benchmarks/loss.py --quick

The gathered loss follows the formulas of the paper: every rank gathers all logits, computes both softmaxes over all N rows,
keeps its own rows, and processes the ordered pairs of views one by one. Both sides run forward and backward. The benchmark
counts the bytes that a rank sends in its collectives, as ring algorithms send them: 2 n (W - 1) / W for an all-reduce of n
bytes, and n (W - 1) for an all-gather to which each of W ranks contributes n bytes.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, peak_memory, seconds_in_turns, spread, write
from src.losses import self_classifier

ROW_TAU, COL_TAU, EPS = 0.1, 0.05, 1e-12


class Gather(torch.autograd.Function):
    """Gathers the rows of all ranks. The backward pass sums the gradients over the ranks and returns those of the own rows."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        ctx.rows = len(z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.rows)[dist.get_rank()]


def gathered(logits, num_global=2):
    """Compute the loss pair by pair, from all logits on every rank."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    terms = []
    for views in logits:
        targets, predictions = [], []
        for z in views:
            B, C = z.shape
            mine = slice(rank * B, (rank + 1) * B)
            everyone = Gather.apply(z) if world_size > 1 else z
            target = (everyone / COL_TAU).softmax(dim=0)[mine]
            targets.append(target / target.sum(dim=1, keepdim=True).clamp(min=EPS))
            prediction = (everyone / ROW_TAU).softmax(dim=1)
            prediction = (prediction / prediction.sum(dim=0, keepdim=True).clamp(min=EPS))[mine]
            predictions.append((len(everyone) / C * prediction + EPS).log())
        for i, target in enumerate(targets):
            for j, prediction in enumerate(predictions):
                if i != j and not (i >= num_global and j >= num_global):
                    terms.append(-(target * prediction).sum(dim=1).mean())
    return sum(terms) / len(terms)


def count_bytes(run):
    """Return the bytes that this rank sends in the collectives of one run with ring algorithms, and their number."""
    sent, calls = 0, 0
    all_reduce, all_gather, world_size = dist.all_reduce, dist.all_gather, dist.get_world_size()

    def counted_reduce(x, *args, **kwargs):
        nonlocal sent, calls
        calls += 1
        sent += 2 * x.nbytes * (world_size - 1) // world_size
        return all_reduce(x, *args, **kwargs)

    def counted_gather(parts, x, *args, **kwargs):
        nonlocal sent, calls
        calls += 1
        sent += x.nbytes * (world_size - 1)
        return all_gather(parts, x, *args, **kwargs)

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather
    try:
        run()
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
    return sent, calls


def measure(views, N, C, turns, out):
    """Run the benchmark on one rank. Rank 0 saves its numbers."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world_size > 1 else 0
    torch.manual_seed(rank)
    logits = [torch.randn(views, N // world_size, C).mul_(0.3).requires_grad_()]

    def step(loss):
        logits[0].grad = None
        value = loss(logits)
        value.backward()
        return value

    def nothing_left(run):
        logits[0].grad = None
        return peak_memory(run)

    sides = {
        "ours": lambda: step(lambda z: self_classifier(z, ROW_TAU, COL_TAU, EPS)),
        "gathered": lambda: step(gathered),
    }
    values, gradients = {}, {}
    for name, run in sides.items():
        values[name] = run().item()
        gradients[name] = logits[0].grad
    difference = (gradients["ours"] - gradients["gathered"]).abs().max() / gradients["gathered"].abs().max()
    wait = dist.barrier if world_size > 1 else lambda: None
    counted = {name: count_bytes(run) if world_size > 1 else (0, 0) for name, run in sides.items()}
    row = {
        "processes": world_size,
        "views": views,
        "N": N,
        "C": C,
        "seconds": seconds_in_turns(sides, turns, wait),
        "peak_bytes": {name: nothing_left(run) for name, run in sides.items()},
        "sent_bytes": {name: sent for name, (sent, _) in counted.items()},
        "collectives": {name: calls for name, (_, calls) in counted.items()},
        "loss_difference": abs(values["ours"] - values["gathered"]) / abs(values["gathered"]),
        "gradient_difference": difference.item(),
    }
    if rank == 0:
        torch.save(row, out)
    if world_size > 1:
        dist.destroy_process_group()


def run_ranks(world_size, *words):
    """Start this file once per rank, and return the numbers that rank 0 saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "row.pt")
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", *map(str, words), out],
                env={**os.environ, **place, "RANK": str(rank)},
            )
            for rank in range(world_size)
        ]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed; its message is above")
        return torch.load(out)


def main():
    made = parser(__doc__)
    made.add_argument(
        "--rank-of", nargs=5, metavar=("VIEWS", "N", "C", "TURNS", "OUT"), help="for internal use: run as one rank"
    )
    made.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)"
    )
    arguments = parse(made)
    if arguments.rank_of:
        *numbers, out = arguments.rank_of
        return measure(*map(int, numbers), out)

    where = machine("torch")
    print(in_words(where), flush=True)
    views, N, C, turns = (8, 512, 100, 2) if arguments.quick else (8, 4096, 1000, 5)
    print(f"{views} views, N = {N}, C = {C}; forward and backward; median (range) of {turns} turns\n")
    print(f"{'processes':10}{'ours, s':26}{'gathered, s':26}{'faster':>7}{'memory':>20}{'sent, bytes':>26}{'share':>9}")
    results = []
    for world_size in arguments.processes:
        row = run_ranks(world_size, views, N, C, turns)
        results.append(row)
        ours, theirs = (row["seconds"][name] for name in ("ours", "gathered"))
        memory = [row["peak_bytes"][name] / 2**20 for name in ("ours", "gathered")]
        sent = [row["sent_bytes"][name] for name in ("ours", "gathered")]
        print(
            f"{world_size:<10}{spread(ours, 3):26}{spread(theirs, 3):26}{median(theirs) / median(ours):7.1f}"
            f"{memory[0]:8.0f} / {memory[1]:.0f} MiB{sent[0]:>12,} /{sent[1]:>13,}"
            f"{sent[0] / sent[1] if sent[1] else 0:9.2%}",
            flush=True,
        )
        print(
            f"{'':10}relative difference: loss {row['loss_difference']:.0e}, gradient {row['gradient_difference']:.0e}"
        )
    if results[-1]["processes"] > 1:
        print(f"\n{extrapolate(results[-1])}")
    write(arguments.json, where, results)


def extrapolate(row: dict) -> str:
    """Estimate from one row the bytes that a rank sends per step of the 800-epoch recipe, for more ranks.

    Our loss sends vectors with one number per class, for any number of images. The gathered loss sends logits. With a ring
    algorithm, a rank sends 2 (W - 1) / W times the reduced bytes.
    """
    W, per_view = row["processes"], row["views"] * row["C"] * 4
    vectors = row["sent_bytes"]["ours"] * W / (2 * (W - 1)) / per_view
    logits = row["sent_bytes"]["gathered"] * W / (W - 1) / (per_view * row["N"])
    views, classes, N = 8, 15_000, 4096
    calls = row["collectives"]
    lines = [
        f"800-epoch recipe ({views} views, {classes:,} classes in four classifiers, N = {N:,}), bytes that a rank sends per step "
        f"for the loss, ours / gathered; collectives per classifier: {calls['ours']} / {calls['gathered']}"
    ]
    for ranks in (8, 64, 512):
        ours = vectors * views * classes * 4 * 2 * (ranks - 1) / ranks
        gathered = logits * views * classes * 4 * N * (ranks - 1) / ranks
        lines.append(f"{ranks:5} ranks: {ours:13,.0f} / {gathered:13,.0f}  ({ours / gathered:.2%})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

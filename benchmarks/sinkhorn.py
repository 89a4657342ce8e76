"""Compare our codes of a batch with the published formula, and measure the balanced labels of a data set.

The benchmark computes the labels twice: from the whole matrix of scores, and from embeddings and prototypes, whose scores it
computes again in every iteration. The memory of the labels includes the inputs.

    python benchmarks/sinkhorn.py            # codes of 4,096 × 3,000 scores, labels of 100,000 × 3,000 scores
    python benchmarks/sinkhorn.py --quick

The plain form takes the exponential of the scores and scales rows and columns in turns. An error is the largest difference to
the same formula in the log domain in float64.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, peak_memory, seconds_in_turns, spread, write
from src.assignments import balanced_labels, balanced_prototype_labels, sinkhorn

ITERATIONS, LABEL_ITERATIONS, DIM, TEMPERATURE = 3, 5, 128, 0.1
SOLVER = {"lam": 25.0, "tolerance": 0.1, "max_iterations": LABEL_ITERATIONS}


def cosines(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return the cosines of random vectors, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(n, DIM, generator=generator), dim=1) for n in (rows, columns))
    return a @ b.T


def plain(scores: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Compute the published formula. Q is K × B, and its sum is 1."""
    Q = torch.exp(scores / epsilon).T
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(ITERATIONS):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).T


def exact(scores: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Compute the formula in the log domain in float64."""
    logs = scores.double() / epsilon
    for _ in range(ITERATIONS):
        logs = logs - logs.logsumexp(dim=0)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()


def codes(B: int, K: int, turns: int) -> list[dict]:
    """Measure time, peak memory and errors of both sides for several epsilons."""
    rows = []
    for epsilon in (0.05, 0.03, 0.01, 0.005):
        scores = cosines(B, K, 0)
        scores[0] = scores[0] - scores[0].max() + 1  # an image that lies on a prototype: cosine 1
        right = exact(scores, epsilon)
        sides = {
            "ours": lambda s=scores, e=epsilon: sinkhorn(s, e, ITERATIONS),
            "plain": lambda s=scores, e=epsilon: plain(s, e),
        }
        errors = {name: (run().double() - right).abs().max().item() for name, run in sides.items()}
        seconds = seconds_in_turns(sides, turns)
        peaks = {name: peak_memory(run) for name, run in sides.items()}
        rows.append({"B": B, "K": K, "epsilon": epsilon, "seconds": seconds, "peak_bytes": peaks, "errors": errors})
    return rows


def labels(N: int, K: int) -> dict:
    """Measure a few iterations of the solver, on data that prefer some prototypes. A full solve takes more iterations."""
    generator = torch.Generator().manual_seed(1)
    images, prototypes = (
        F.normalize(torch.randn(n, DIM, generator=generator) * torch.linspace(0.2, 2, DIM) + 0.2, dim=1) for n in (N, K)
    )
    found = {}

    def whole():
        logs = (images @ prototypes.T / TEMPERATURE).log_softmax(dim=1)
        found["whole"] = balanced_labels(logs, **SOLVER)

    def anew():
        found["anew"] = balanced_prototype_labels(images, prototypes, TEMPERATURE, **SOLVER)

    inputs = images.nbytes + prototypes.nbytes
    sides = {"anew": anew, "whole": whole}
    peaks, seconds = {}, {}
    for name, run in sides.items():  # one run each, because a run takes minutes
        began = time.perf_counter()
        peaks[name] = inputs + peak_memory(run)
        seconds[name] = [time.perf_counter() - began]
    sizes = torch.bincount(found["anew"], minlength=K)
    return {
        "N": N,
        "K": K,
        "iterations": LABEL_ITERATIONS,
        "seconds": seconds,
        "peak_bytes": peaks,
        "different_labels": (found["anew"] != found["whole"]).sum().item(),
        "sizes": [sizes.min().item(), sizes.max().item()],
    }


def main():
    arguments = parse(parser(__doc__))
    where = machine("torch")
    print(in_words(where), flush=True)
    B, K, N, turns = (1024, 300, 10_000, 3) if arguments.quick else (4096, 3000, 100_000, 5)
    print(f"codes of {B:,} x {K:,}, {ITERATIONS} iterations; median (range) of {turns} turns\n")
    print(f"{'epsilon':8}{'ours, s':24}{'plain, s':24}{'ratio':>6}  {'memory':18}{'largest error':>22}")
    rows = codes(B, K, turns)
    for row in rows:
        ours, theirs = (row["seconds"][name] for name in ("ours", "plain"))
        peaks = [row["peak_bytes"][name] / 2**20 for name in ("ours", "plain")]
        errors = " / ".join(f"{row['errors'][name]:.0e}" for name in ("ours", "plain"))
        print(
            f"{row['epsilon']:<8}{spread(ours, 3):24}{spread(theirs, 3):24}{median(ours) / median(theirs):6.2f}  "
            f"{f'{peaks[0]:.0f} / {peaks[1]:.0f} MiB':18}{errors:>22}",
            flush=True,
        )
    solved = labels(N, K)
    print(
        f"\nlabels of {N:,} x {K:,}, {LABEL_ITERATIONS} iterations; cluster sizes {solved['sizes'][0]} to {solved['sizes'][1]}, "
        f"{solved['different_labels']} labels differ"
    )
    for name, what in (("anew", "scores computed again"), ("whole", "the whole matrix")):
        print(
            f"{what:24}{solved['seconds'][name][0]:8.1f} s, {solved['peak_bytes'][name] / 2**30:.2f} GiB including the inputs"
        )
    write(arguments.json, where, [*rows, solved])


if __name__ == "__main__":
    main()

"""The evaluation of knn_eval.py: classify images by the votes of their nearest neighbours among labelled images, the bank.

Protocol of Self-Classifier, arXiv:2103.10994v3, after Wu et al., arXiv:1805.01978: evaluation views and features of unit
length. Each of the k nearest images votes for its class with the weight exp(similarity / tau).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config import KnnEvalOptions
from ..data.datasets import Images
from ..data.subsets import draw_share, keep_rows, read_list
from ..errors import InputError, printable
from ..logs import percent, table, write_json
from ..neighbors import count_hits
from ..run import make_folder
from .session import Session, open_session

SMALLEST = 1e-12  # smallest length by which a feature is divided, so that a feature of zeros stays zero


def run(options: KnnEvalOptions) -> None:
    """Open the checkpoint and both splits, search the neighbours, write knn_eval.json and print a table."""
    session = open_session(
        options,
        part=options.layer,
        splits=("train", "test"),
        labelled=True,
        batch_size=options.batch_size,
        features_cache=options.features_cache,
        protocol="self_classifier",
    )
    bank, queries = session.splits["train"], session.splits["test"]
    rows, which = choose_bank(options, bank)
    ks = choose_ks(options.k, len(rows), of=f"{len(bank)} training images ({which})")
    if not options.features_cache:  # a cache holds the whole split, because the next evaluation may use another share
        bank, rows = keep_rows(bank, rows), np.arange(len(rows))

    # one forward pass over both splits, then one search for all k
    kept = session.autocast or torch.float32
    bank_features = unit_rows(session.features(bank, split="train", layer=options.layer)[rows], kept)
    query_features = unit_rows(session.features(queries, split="test", layer=options.layer), kept)
    scores = knn_scores(
        bank_features,
        bank.labels[rows],
        queries=query_features,
        query_labels=queries.labels,
        ks=ks,
        tau=options.tau,
        device=session.device,
    )
    if distributed.is_main():
        result = {
            **session.facts(),
            "layer": options.layer,
            "features": bank_features.shape[1],
            "precision": session.precision,
            "tau": options.tau,
            "bank_images": len(rows),
            "bank_share": None if options.bank_list else options.bank_share,
            "bank_list": options.bank_list,
            "bank_seed": options.seed,
            "test_images": len(queries),
            "classes": len(queries.classes),
            "protocol": f"central view, output of the {options.layer} at unit length in {session.precision}; the k most similar of "
            f"{len(rows)} training images ({which}) by dot product, votes weighted exp(similarity / {options.tau:g})",
            "k": {str(k): scores[k] for k in ks},
        }
        write(session, result, which)
    distributed.stop()


def choose_bank(options: KnnEvalOptions, bank: Images) -> tuple[np.ndarray, str]:
    """Return the positions of the labelled images to search, and a description of them.

    Raises:
        InputError: if the list is wrong.
    """
    if options.bank_list:
        rows, which = read_list(bank, options.bank_list, "--bank-list"), f"listed in {options.bank_list}"
    else:
        rows = draw_share(bank.labels.numpy(), options.bank_share, options.seed)
        which = f"{100 * options.bank_share:g} % of each class"
    return rows, which


def choose_ks(wanted: Sequence[int], size: int, *, of: str) -> tuple[int, ...]:
    """Return the numbers of neighbours to score. Of the default numbers, the function takes those that fit and says so.

    If none fits, all images of the bank are the neighbours.

    Args:
        size: number of images in the bank.
        of: description of the images from which the bank was chosen.

    Raises:
        InputError: if a number other than the default is larger than the bank.
    """
    ks = tuple(k for k in wanted if k <= size) or (size,)
    if max(wanted) <= size:
        return ks
    larger = f"--k {max(wanted)} is larger than the bank, {size} of {of}"
    if tuple(wanted) != KnnEvalOptions.k:
        raise InputError(f"{larger}: give a smaller --k or search more images")
    if distributed.is_main():
        print(f"{larger}: scoring --k {' '.join(map(str, ks))} only")
    return ks


def unit_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale (N, F) float32 features to unit length and convert them to `dtype`.

    The scaling happens in place, because a bank may fill half of the memory.
    """
    for rows in features.split(65536):
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
    return features.to(dtype)


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    *,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    tau: float,
    device: torch.device,
) -> dict[int, dict[str, float]]:
    """Compute `metrics.knn_top` on `device`. Every rank has all features and searches for its share of the queries.

    Returns:
        {k: {"top1": fraction, "top5": fraction}}
    """
    mine = slice(distributed.rank(), None, distributed.world_size())
    hits = dict.fromkeys(ks, (0, 0))
    if device.type == "cuda" and 2 * bank.nbytes < torch.cuda.mem_get_info(device)[0]:
        bank = bank.to(device)  # otherwise it is copied piece by piece for every part of the queries
    if len(queries[mine]):
        hits = count_hits(
            bank, bank_labels, queries=queries[mine].to(device), query_labels=query_labels[mine], ks=ks, tau=tau
        )
    summed = distributed.sum_over_ranks(torch.tensor([hits[k] for k in ks]))
    return {
        k: {"top1": first / len(queries), "top5": five / len(queries)}
        for k, (first, five) in zip(ks, summed.tolist(), strict=True)
    }


def write(session: Session, result: dict[str, Any], which: str) -> None:
    """Write knn_eval.json and print a table of it."""
    make_folder(session.folder)
    write_json(session.folder / "knn_eval.json", result)
    print(
        f"{printable(result['data'])}, test split, {result['test_images']:,} images, {result['classes']} classes; "
        f"{result['bank_images']:,} training images searched ({which}); {result['layer']}, tau {result['tau']:g}"
    )
    rows = [[k, percent(score["top1"]), percent(score["top5"])] for k, score in result["k"].items()]
    print(table(["neighbours", "TOP1", "TOP5"], rows))
    print(f"wrote knn_eval.json to {printable(session.folder)}")

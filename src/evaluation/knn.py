"""How well nearest neighbours in a labelled bank name the class of unseen images: what knn_eval.py does.

Protocol of Self-Classifier, arXiv:2103.10994v3, after Wu et al., arXiv:1805.01978: evaluation views, features of unit
length, each of the k nearest images votes for its class with weight exp(similarity / tau).
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
from ..errors import InputError
from ..logs import percent, table, write_json
from ..neighbors import count_hits
from ..run import make_folder
from .session import Session, open_session

SMALLEST = 1e-12  # smallest length that is divided by, so that a feature of zeros stays one


def run(options: KnnEvalOptions) -> None:
    """Open the checkpoint and both splits, search, write knn_eval.json and print its table."""
    session = open_session(
        options,
        part=options.layer,
        splits=("train", "test"),
        labelled=True,
        batch_size=options.batch_size,
        features_cache=options.features_cache,
    )
    bank, queries = session.splits["train"], session.splits["test"]
    rows, which = choose_bank(options, bank)
    if not options.features_cache:  # a cache is for the whole split: the next evaluation may take another share
        bank, rows = keep_rows(bank, rows), np.arange(len(rows))

    # one forward pass over both splits, then one search
    kept = session.autocast or torch.float32
    bank_features = unit_rows(session.features(bank, split="train", layer=options.layer)[rows], kept)
    query_features = unit_rows(session.features(queries, split="test", layer=options.layer), kept)
    scores = knn_scores(
        bank_features,
        bank.labels[rows],
        queries=query_features,
        query_labels=queries.labels,
        ks=options.k,
        tau=options.tau,
        device=session.device,
    )
    if distributed.is_main():
        result = {
            **session.facts(),
            "layer": options.layer,
            "features": bank_features.shape[1],
            "precision": options.precision,
            "tau": options.tau,
            "bank_images": len(rows),
            "bank_share": None if options.bank_list else options.bank_share,
            "bank_list": options.bank_list,
            "bank_seed": options.seed,
            "test_images": len(queries),
            "classes": len(queries.classes),
            "protocol": f"central view, output of the {options.layer} at unit length in {options.precision}; the k most similar of "
            f"{len(rows)} training images ({which}) by dot product, votes weighted exp(similarity / {options.tau:g})",
            "k": {str(k): scores[k] for k in options.k},
        }
        write(session, result, which)
    distributed.stop()


def choose_bank(options: KnnEvalOptions, bank: Images) -> tuple[np.ndarray, str]:
    """Return the rows of the labelled images to search, and in words which they are."""
    if options.bank_list:
        rows, which = read_list(bank, options.bank_list, "--bank-list"), f"listed in {options.bank_list}"
    else:
        rows = draw_share(bank.labels.numpy(), options.bank_share, options.seed)
        which = f"{100 * options.bank_share:g} % of each class's"
    if max(options.k) > len(rows):
        raise InputError(
            f"--k {max(options.k)} is larger than the bank, {len(rows)} of {len(bank)} training images ({which}): "
            "ask for fewer neighbours or search more images"
        )
    return rows, which


def unit_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale (N, F) float32 features to unit length, in place if `dtype` is float32: a bank may fill half the memory."""
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
    """Compute `metrics.knn_top` on `device`; every rank has all features and searches for its share of the queries.

    Returns:
        {k: {"top1": fraction, "top5": fraction}}
    """
    mine = slice(distributed.rank(), None, distributed.world_size())
    hits = dict.fromkeys(ks, (0, 0))
    if device.type == "cuda" and 2 * bank.nbytes < torch.cuda.mem_get_info(device)[0]:
        bank = bank.to(device)  # if there is room; else it is copied piece by piece for every part of the queries
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
    """Write knn_eval.json and print its table."""
    make_folder(session.folder)
    write_json(session.folder / "knn_eval.json", result)
    print(
        f"{result['data']}, test split, {result['test_images']:,} images, {result['classes']} classes; "
        f"{result['bank_images']:,} training images searched ({which}); {result['layer']}, tau {result['tau']:g}"
    )
    rows = [[k, percent(score["top1"]), percent(score["top5"])] for k, score in result["k"].items()]
    print(table(["neighbours", "TOP1", "TOP5"], rows))
    print(f"wrote knn_eval.json to {session.folder}")

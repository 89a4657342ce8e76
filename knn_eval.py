"""Score features by their nearest neighbours: each of the k most similar labelled images votes for its class.

    python knn_eval.py --checkpoint runs/demo/checkpoint.pt                         # digits, seconds
    torchrun --standalone --nproc_per_node=8 knn_eval.py --checkpoint checkpoint.pt --data "$IMAGENET"
    python knn_eval.py --checkpoint moco-v2-800ep --data "$IMAGENET" --bank-share 0.1 --features-cache features

Nothing is trained, so this is the quickest look at a representation. The labelled images are those of the training split,
all of them or a share; the images that are classified are those of the test split.
"""

from src import config


def main() -> None:
    options = config.parse_knn_eval()

    import numpy as np
    import torch
    from torch import nn

    from src import distributed
    from src.data.datasets import check_channels
    from src.data.views import build_views
    from src.evaluation.knn import knn_scores, unit_rows
    from src.evaluation.linear import keep_rows, open_labelled
    from src.features import extract
    from src.pretrained import load_backbone, load_method
    from src.run import results_folder

    # the network, and the data it was trained on unless other data is given
    if options.layer == "head":
        method, state = load_method(options.checkpoint)
    else:
        backbone, state = load_backbone(options.checkpoint, options.arch)
        method = nn.ModuleDict({"backbone": backbone})
    trained = state["config"]
    if not options.data and not trained["data"]:
        raise config.InputError(f"--data is missing: {options.checkpoint} does not say what it was trained on")
    source = options if options.data else config.data_of(trained, options)
    bank, queries = open_labelled(source.data, source.data_root, source.download, source.subset_file)
    check_channels(bank, source.data, trained["channels"])
    folder = results_folder(options.checkpoint, options.output_dir)

    rows, which = choose_bank(options, bank)
    if not options.features_cache:  # a cache is for the whole split: the next evaluation may take another share
        bank, rows = keep_rows(bank, rows), np.arange(len(rows))

    # one forward pass over both splits, then one search
    device = distributed.start(options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    method = method.to(device, memory_format=layout)
    views = build_views(source.data, bank, *(trained[name] for name in config.VIEW_SETTINGS))
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    how = (views, options.layer, options.batch_size, device, options.workers, autocast, options.features_cache)
    kept = autocast or torch.float32
    bank_features = unit_rows(extract(method, bank, "train", *how)[rows], kept)
    query_features = unit_rows(extract(method, queries, "test", *how), kept)
    scores = knn_scores(
        *(bank_features, bank.labels[rows], query_features, queries.labels, options.k, options.tau, device)
    )

    # results
    if distributed.is_main():
        result = {
            "checkpoint": str(options.checkpoint),
            "method": trained["method"],
            "arch": trained["arch"],
            "epochs": state.get("epoch"),
            "seed": trained["seed"],
            "data": source.data,
            "subset_file": source.subset_file,
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
        write(result, which, folder)
    distributed.stop()


def choose_bank(options: config.KnnEvalOptions, bank):
    """The rows of the labelled images that are searched, and which they are in words."""
    from src.data.subsets import draw_share, read_list

    if options.bank_list:
        rows, which = read_list(bank, options.bank_list, "--bank-list"), f"listed in {options.bank_list}"
    else:
        rows = draw_share(bank.labels.numpy(), options.bank_share, options.seed)
        which = f"{100 * options.bank_share:g} % of each class's"
    if max(options.k) > len(rows):
        raise config.InputError(
            f"--k {max(options.k)} is larger than the bank, {len(rows)} of {len(bank)} training images ({which}): "
            "ask for fewer neighbours or search more images"
        )
    return rows, which


def write(result: dict, which: str, folder) -> None:
    """Write knn_eval.json and print its table."""
    from src.logs import percent, table, write_json
    from src.run import make_folder

    make_folder(folder)
    write_json(folder / "knn_eval.json", result)
    print(
        f"{result['data']}, test split, {result['test_images']:,} images, {result['classes']} classes; "
        f"{result['bank_images']:,} training images searched ({which}); {result['layer']}, tau {result['tau']:g}"
    )
    rows = [[k, percent(score["top1"]), percent(score["top5"])] for k, score in result["k"].items()]
    print(table(["neighbours", "TOP1", "TOP5"], rows))
    print(f"wrote knn_eval.json to {folder}")


if __name__ == "__main__":
    config.run_script(main)

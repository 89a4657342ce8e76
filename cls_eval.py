"""Score clusters against labels that training never saw: ACC, NMI, AMI, ARI, a confusion matrix and a gallery.

    python cls_eval.py --checkpoint runs/digits/checkpoint.pt
    python cls_eval.py --checkpoint checkpoint.pt --data ~/pictures --output-dir what-is-in-it
    python cls_eval.py --checkpoint checkpoint.pt --tsne 5                          # and five figures of the features
    python cls_eval.py --checkpoint checkpoint.pt --ensemble --feature-quality
    python cls_eval.py --checkpoint checkpoint.pt --data "$IMAGENET" --superclass 2 living17
    python cls_eval.py --checkpoint moco-v2-800ep --data "$IMAGENET" --kmeans 1000 --fit-share 0.1

The clusters are those of the classifier that training named (the lowest training loss, no label involved) unless
--classifier is given; with --kmeans those of k-means on the features, which needs no classifier. Without labels only the
gallery is drawn.
"""

from dataclasses import fields
from pathlib import Path

from src import config


def main() -> None:
    options = config.parse_cls_eval()

    import numpy as np
    import torch

    from src import distributed, figures
    from src.data.datasets import MemoryImages, open_data
    from src.data.imagenet import class_to_superclass
    from src.data.loaders import single_views
    from src.data.subsets import draw_share, read_list
    from src.data.views import build_views
    from src.evaluation import kmeans
    from src.evaluation.clustering import SCORES, kmeans_on_pixels, score_classifiers, score_superclasses
    from src.evaluation.knn import unit_rows
    from src.evaluation.linear import keep_rows
    from src.evaluation.quality import agreement, align, balance, rankme, silhouette
    from src.evaluation.tsne import choose_images, project
    from src.features import average_clusters, extract, predict_clusters
    from src.logs import percent, table, write_json
    from src.run import choose_folder, make_folder

    # the network, and the data it was trained on unless other data is given
    method, state = load(options)
    trained = state["config"]
    if not options.data and not trained["data"]:
        raise config.InputError(f"--data is missing: {options.checkpoint} does not say what it was trained on")
    source = options if options.data else config.data_of(trained, options)
    where = (source.data_root, source.download, source.subset_file)
    data = open_data(source.data, options.split, *where)
    if data.channels != trained["channels"]:
        raise config.InputError(
            f"--data {source.data}: images have {data.channels} channels, the network takes {trained['channels']}"
        )
    if options.tsne and not (data.labels >= 0).any():
        raise config.InputError(f"--tsne colours images by label, --data {source.data} has none: drop it")
    if options.pixel_kmeans and not isinstance(data, MemoryImages):
        raise config.InputError(
            f"--pixel-kmeans needs small images held in memory, --data {source.data} is a folder: drop it"
        )
    superclasses = {
        choice: class_to_superclass(choice, data.classes, options.hierarchy) for choice in options.superclass
    }
    for choice, (of_class, _) in superclasses.items():
        if not np.isin(data.labels, list(of_class)).any():
            raise config.InputError(f"--superclass {choice}: no image of the {options.split} split belongs to one")
    given = Path(options.checkpoint)
    beside = given.parent if given.is_file() else Path("runs") / given.name  # of a released model's name
    folder = choose_folder(options.output_dir or str(beside / ("kmeans" if options.kmeans else "")), False, "")

    # whose clusters are scored: of k-means, which is fitted on training images, or of a classifier
    if options.kmeans:
        train = data if options.split == "train" else open_data(source.data, "train", *where)
        if options.fit_list:
            rows, which = read_list(train, options.fit_list, "--fit-list"), f"listed in {options.fit_list}"
        else:
            labels = torch.where(train.labels < 0, len(train.classes), train.labels)  # without a label: one more class
            rows = draw_share(labels.numpy(), options.fit_share, options.seed)
            which = f"{100 * options.fit_share:g} % of each class's"
        if options.kmeans > len(rows):
            raise config.InputError(
                f"--kmeans {options.kmeans} is larger than the {len(rows)} images it is fitted on, of {len(train)} "
                f"training images ({which}): ask for fewer clusters or fit on more images"
            )
        names, sizes, chosen, chosen_by = [f"k-means, {options.layer}"], [options.kmeans], 0, "--kmeans"
    else:
        sizes = method.classes
        names = [f"classifier {k}" for k in range(len(sizes))]
        if options.classifier is not None:
            chosen, chosen_by = options.classifier, "--classifier"
        elif state["history"]:
            chosen, chosen_by = state["history"][-1]["classifier"], "lowest training loss"
        else:
            chosen, chosen_by = 0, "being the first"
        if not 0 <= chosen < len(sizes):
            raise config.InputError(f"--classifier {chosen}: this checkpoint has classifiers 0 to {len(sizes) - 1}")
        equals = [k for k, size in enumerate(sizes) if size == sizes[chosen]]
        if options.ensemble and len(equals) == 1:
            raise config.InputError(
                f"--ensemble: classifier {chosen} is the only one with {sizes[chosen]} classes: drop it, or give another "
                "--classifier"
            )

    # the cluster of every image
    device = distributed.start(options.device)
    method = method.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    views = build_views(source.data, data, *(trained[name] for name in config.VIEW_SETTINGS))
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)

    def features_of(images, split: str, layer: str) -> torch.Tensor:
        how = (options.batch_size, device, options.workers, autocast, options.features_cache)
        return extract(method, images, split, views, layer, *how)

    if options.kmeans:
        extracted = features_of(data, options.split, options.layer)
        if options.split == "train":
            fitted_on = extracted[rows]
        elif options.features_cache:  # a cache is for the whole split: the next evaluation may take another share
            fitted_on = features_of(train, "train", options.layer)[rows]
        else:
            fitted_on = features_of(keep_rows(train, rows), "train", options.layer)
        to_cluster = extracted
        if options.normalize:
            fitted_on, to_cluster = (unit_rows(each, torch.float32) for each in (fitted_on, extracted.clone()))
        fit = kmeans.fit(fitted_on.to(device), options.kmeans, options.init, options.restarts, options.seed)
        found = kmeans.assign(to_cluster.to(device), fit.centroids)
        clusters, confidences = (each.cpu().numpy()[None] for each in found)
        predictions = [np.bincount(clusters[0], minlength=options.kmeans)]
        protocol = (
            f"one central view per image, output of the {options.layer}{' at unit length' * options.normalize}; k-means with "
            f"{options.kmeans} clusters, the best of {options.restarts} starts ({options.init}), fitted "
            f"on {len(rows)} training images ({which})"
        )
    else:
        loading = (data, views, options.batch_size, device, options.workers)
        clusters, confidences, predictions = predict_clusters(method, single_views(*loading), len(data), autocast)
        protocol = "one central view per image, arg-max"
        if options.ensemble:
            common = {k: align(clusters[k], clusters[chosen], sizes[chosen]) for k in equals}
            together, _ = average_clusters(method, single_views(*loading), len(data), common, autocast)
    if options.tsne or options.feature_quality:
        known = options.kmeans and options.layer == "backbone"
        features = extracted if known else features_of(data, options.split, "backbone")
    if not distributed.is_main():
        distributed.stop()
        return
    make_folder(folder)

    labels = data.labels.numpy()
    labelled = np.flatnonzero(labels >= 0)
    result = {
        "checkpoint": str(options.checkpoint),
        "method": trained["method"],
        "arch": trained["arch"],
        "epochs": state.get("epoch"),
        "seed": trained["seed"],
        "data": source.data,
        "subset_file": source.subset_file,
        "split": options.split,
        "images": len(data),
        "labelled_images": len(labelled),
        "classifier": None if options.kmeans else chosen,
        "classifier_chosen_by": chosen_by,
        "protocol": f"{protocol}; NMI and AMI arithmetic; ACC by Hungarian matching, over-clustering rule",
        "cluster_sizes": np.bincount(clusters[chosen], minlength=sizes[chosen]).tolist(),
    }
    if options.kmeans:
        settings = {field.name: getattr(options, field.name) for field in fields(config.KMeansOptions)}
        fitted = {"fit_images": len(rows), "inertia": fit.inertia, "iterations": fit.iterations, "best": fit.restart}
        result["kmeans"] = {"clusters": settings.pop("kmeans"), **settings, **fitted, "features": fitted_on.shape[1]}

    # what can be said without labels
    used = [len(np.unique(row)) for row in clusters]
    balances = [balance(prediction) for prediction in predictions]
    quality = {"used": used[chosen], "balance": balances[chosen]}
    if not options.kmeans:
        pairs = agreement(clusters, sizes)
        quality["agreement"] = {str(size): {"ami": ami, "pairs": count} for size, (ami, count) in pairs.items()}
    if options.feature_quality:
        quality |= {"rankme": rankme(features), "silhouette": silhouette(features, clusters[chosen])}
    result["quality"] = quality
    remarks = [
        f"agreement of the {count} pair{'s' * (count > 1)} of classifiers with {size} clusters: AMI {percent(ami)}"
        for size, (ami, count) in ({} if options.kmeans else pairs).items()
    ]
    if options.feature_quality:
        shape = "none" if quality["silhouette"] is None else f"{quality['silhouette']:.3f}"
        remarks.append(
            f"features: RankMe {quality['rankme']:.1f} of {features.shape[1]}; silhouette of the clusters {shape}"
        )

    gallery = folder / "gallery.png"
    if not len(labelled):
        figures.gallery(gallery, data.picture, None, clusters[chosen], confidences[chosen], None, None)
        write_json(folder / "cls_eval.json", result)
        filled = f"{used[chosen]} cluster{'s' * (used[chosen] > 1)}, balance {percent(balances[chosen])}"
        print(f"{len(data)} images in {filled}; no labels, so no scores: see {gallery}", *remarks, sep="\n")
        distributed.stop()
        return

    scores = score_classifiers(labels, clusters)
    mapping = scores[chosen]["mapping"]
    result |= {name: scores[chosen][name] for name in SCORES}
    result["mapping"] = {str(cluster): label for cluster, label in mapping.items()}
    if not options.kmeans:
        result["classifiers"] = [
            {**{name: score[name] for name in (*SCORES, "used")}, "balance": balances[k]}
            for k, score in enumerate(scores)
        ]
    rows = [
        [name + " (chosen)" * (k == chosen and not options.kmeans), str(size), str(used[k]), percent(balances[k])]
        + [percent(score[of]) for of in SCORES]
        for k, (name, size, score) in enumerate(zip(names, sizes, scores, strict=True))
    ]
    if options.ensemble:
        score = score_classifiers(labels, together[None])[0]
        result["ensemble"] = {"members": equals, **{name: score[name] for name in (*SCORES, "used")}}
        rows.append(
            [f"mean of {len(equals)} classifiers", str(sizes[chosen]), str(score["used"]), ""]
            + [percent(score[name]) for name in SCORES]
        )
    if options.pixel_kmeans:
        train = open_data(source.data, "train", source.data_root, False, source.subset_file)
        found = kmeans_on_pixels(train.images.numpy(), data.images[labelled].numpy(), len(data.classes))
        baseline = score_classifiers(labels[labelled], found[None])[0]
        result["pixel_kmeans"] = {name: baseline[name] for name in (*SCORES, "used")}
        rows.append(
            ["k-means on pixels", str(len(data.classes)), str(baseline["used"]), ""]
            + [percent(baseline[name]) for name in SCORES]
        )

    coarse = []
    for choice, (of_class, superclass_names) in superclasses.items():
        found = score_superclasses(labels, clusters[chosen], of_class)
        images = int(np.isin(labels, list(of_class)).sum())
        covered = {"superclasses": len(superclass_names), "classes": len(of_class), "images": images}
        result.setdefault("superclass", {})[choice] = {**covered, **found}
        title = f"level {choice}" if choice.isdecimal() else choice
        coarse += [
            [f"{title}, {protocol}", str(len(superclass_names)), str(len(of_class)), f"{images:,}"]
            + [percent(score[name]) for name in SCORES]
            for protocol, score in found.items()
        ]

    known = {
        "labels": labels[labelled],
        "clusters": clusters[chosen][labelled],
        "mapping": mapping,
        "class_names": data.classes,
    }
    figures.confusion_matrix(folder / "confusion.png", **known)
    figures.gallery(
        gallery, lambda i: data.picture(int(labelled[i])), confidences=confidences[chosen][labelled], **known
    )
    for seed in range(options.tsne):
        shown = choose_images(labels, options.tsne_classes, seed)
        figures.scatter(folder / f"tsne_{seed}.png", project(features[shown].numpy()), labels[shown], data.classes)
    write_json(folder / "cls_eval.json", result)
    print(f"{source.data}, {options.split} split, {len(labelled)} labelled images, {len(data.classes)} classes")
    print(table(["", "clusters", "used", "balance", *(name.upper() for name in SCORES)], rows), *remarks, sep="\n")
    if coarse:
        print(table(["superclasses", "number", "classes", "images", *(name.upper() for name in SCORES)], coarse))
        print("published: clusters matched with classes, ACC of superclasses; throughout: superclasses are the labels")
    drawn = ["confusion.png", "gallery.png", *(f"tsne_{seed}.png" for seed in range(options.tsne))]
    print(f"wrote cls_eval.json, {', '.join(drawn)} to {folder}")
    distributed.stop()


def load(options: config.ClsEvalOptions):
    """The network with what is needed of it, and the rest of the checkpoint."""
    from torch import nn

    from src.pretrained import load_backbone, load_method

    if options.kmeans and options.layer == "backbone":
        backbone, state = load_backbone(options.checkpoint, options.arch)
        return nn.ModuleDict({"backbone": backbone}), state
    try:
        return load_method(options.checkpoint)
    except config.InputError as error:
        if "without classifiers" not in str(error):
            raise
        hint = "drop --layer head" if options.kmeans else "--kmeans K clusters the features of any backbone"
        raise config.InputError(f"{error}; {hint}") from None


if __name__ == "__main__":
    config.run_script(main)

"""Score a trained classifier against labels it never saw: ACC, NMI, AMI, ARI, a confusion matrix and a gallery.

    python cls_eval.py --checkpoint runs/digits/checkpoint.pt
    python cls_eval.py --checkpoint checkpoint.pt --data ~/pictures --output-dir what-is-in-it
    python cls_eval.py --checkpoint checkpoint.pt --tsne 5                          # and five figures of the features

The classifier is the one that training named (the lowest training loss, no label involved) unless --classifier is given.
Without labels only the gallery is drawn.
"""

from pathlib import Path

from src import config


def main() -> None:
    options = config.parse_cls_eval()

    import numpy as np
    import torch

    from src import distributed, figures
    from src.data.datasets import MemoryImages, open_data
    from src.data.loaders import single_views
    from src.data.views import build_views
    from src.evaluation.clustering import SCORES, kmeans_on_pixels, score_classifiers
    from src.evaluation.tsne import choose_images, project
    from src.features import extract, predict_clusters
    from src.logs import percent, table, write_json
    from src.pretrained import load_method
    from src.run import choose_folder, make_folder

    # the method, and the data it was trained on unless other data is given
    method, state = load_method(options.checkpoint)
    trained = state["config"]
    if not options.data and not trained["data"]:
        raise config.InputError(f"--data is missing: {options.checkpoint} does not say what it was trained on")
    source = options if options.data else config.data_of(trained, options)
    data = open_data(source.data, options.split, source.data_root, source.download, source.subset_file)
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
    given = Path(options.checkpoint)
    beside = given.parent if given.is_file() else Path("runs") / given.name  # of a released model's name
    folder = choose_folder(options.output_dir or str(beside), False, "")
    num_classifiers = len(method.classes)
    chosen = (
        options.classifier
        if options.classifier is not None
        else state["history"][-1]["classifier"]
        if state["history"]
        else 0
    )
    if not 0 <= chosen < num_classifiers:
        raise config.InputError(f"--classifier {chosen}: this checkpoint has classifiers 0 to {num_classifiers - 1}")

    # the cluster of every image by every classifier
    device = distributed.start(options.device)
    method = method.to(device)
    views = build_views(source.data, data, *(trained[name] for name in config.VIEW_SETTINGS))
    batches = single_views(data, views, options.batch_size, device, options.workers)
    autocast = None if options.precision == "float32" else getattr(torch, options.precision)
    clusters, confidences = predict_clusters(method, batches, len(data), autocast)
    if options.tsne:
        features = extract(
            method, data, options.split, views, "backbone", options.batch_size, device, options.workers, autocast
        ).numpy()
    if not distributed.is_main():
        return
    make_folder(folder)

    labels = data.labels.numpy()
    labelled = np.flatnonzero(labels >= 0)
    result = {
        "checkpoint": str(options.checkpoint),
        "method": trained["method"],
        "arch": trained["arch"],
        "epochs": state["epoch"],
        "seed": trained["seed"],
        "data": source.data,
        "subset_file": source.subset_file,
        "split": options.split,
        "images": len(data),
        "labelled_images": len(labelled),
        "classifier": chosen,
        "classifier_chosen_by": "--classifier"
        if options.classifier is not None
        else "lowest training loss"
        if state["history"]
        else "being the first",
        "protocol": "one central view per image, arg-max; NMI and AMI arithmetic; ACC by Hungarian matching, over-clustering rule",
        "cluster_sizes": np.bincount(clusters[chosen], minlength=method.classes[chosen]).tolist(),
    }
    gallery = folder / "gallery.png"
    if not len(labelled):
        figures.gallery(gallery, data.picture, None, clusters[chosen], confidences[chosen], None, None)
        write_json(folder / "cls_eval.json", result)
        used = len(np.unique(clusters[chosen]))
        print(f"{len(data)} images in {used} cluster{'s' * (used > 1)}; no labels, so no scores: see {gallery}")
        return

    scores = score_classifiers(labels, clusters)
    mapping = scores[chosen]["mapping"]
    result |= {name: scores[chosen][name] for name in SCORES}
    result["mapping"] = {str(cluster): label for cluster, label in mapping.items()}
    result["classifiers"] = [{name: score[name] for name in (*SCORES, "used")} for score in scores]
    rows = [
        [f"classifier {k}" + " (chosen)" * (k == chosen), str(method.classes[k]), str(scores[k]["used"])]
        + [percent(scores[k][name]) for name in SCORES]
        for k in range(num_classifiers)
    ]
    if options.pixel_kmeans:
        train = open_data(source.data, "train", source.data_root, False, source.subset_file)
        found = kmeans_on_pixels(train.images.numpy(), data.images[labelled].numpy(), len(data.classes))
        baseline = score_classifiers(labels[labelled], found[None])[0]
        result["pixel_kmeans"] = {name: baseline[name] for name in (*SCORES, "used")}
        rows.append(
            ["k-means on pixels", str(len(data.classes)), str(baseline["used"])]
            + [percent(baseline[name]) for name in SCORES]
        )

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
        figures.scatter(folder / f"tsne_{seed}.png", project(features[shown]), labels[shown], data.classes)
    write_json(folder / "cls_eval.json", result)
    print(f"{source.data}, {options.split} split, {len(labelled)} labelled images, {len(data.classes)} classes")
    print(table(["", "clusters", "used", *(name.upper() for name in SCORES)], rows))
    drawn = ["confusion.png", "gallery.png", *(f"tsne_{seed}.png" for seed in range(options.tsne))]
    print(f"wrote cls_eval.json, {', '.join(drawn)} to {folder}")


if __name__ == "__main__":
    config.run_script(main)

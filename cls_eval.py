"""Score clusters against labels that training never saw: ACC, NMI, AMI, ARI, figures, and a list of who is where.

    python cls_eval.py --checkpoint runs/digits/checkpoint.pt
    python cls_eval.py --checkpoint checkpoint.pt --data ~/pictures --output-dir what-is-in-it
    python cls_eval.py --checkpoint checkpoint.pt --tsne 5 --grids 15               # figures of the features and of clusters
    python cls_eval.py --checkpoint checkpoint.pt --ensemble --feature-quality --compare other/checkpoint.pt
    python cls_eval.py --checkpoint checkpoint.pt --data "$IMAGENET" --superclass 2 living17
    python cls_eval.py --checkpoint moco-v2-800ep --data "$IMAGENET" --kmeans 1000 --fit-share 0.1

The clusters are those of the classifier that training named (the lowest training loss, no label involved) unless
--classifier is given; with --kmeans those of k-means on the features, which needs no classifier. Without labels there are
no scores, but figures and the list are written all the same.
"""

from src import config


def main() -> None:
    options = config.parse_cls_eval()

    from src import distributed, unsupervised

    job = unsupervised.open_job(options)
    found = (unsupervised.cluster_by_kmeans if options.kmeans else unsupervised.cluster_by_classifiers)(job)
    others = unsupervised.cluster_by_others(job)
    features = found.features
    if features is None and (options.feature_quality or options.tsne or options.pca):
        features = job.features(job.data, options.split, "backbone")

    if distributed.is_main():
        quality = unsupervised.judge_without_labels(found, features if options.feature_quality else None, others)
        unsupervised.write(job, found, quality, features)
    distributed.stop()


if __name__ == "__main__":
    config.run_script(main)

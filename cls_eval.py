"""Score clusters against labels that training never saw. Writes ACC, NMI, AMI, ARI, figures, and the cluster of every image.

    python cls_eval.py --checkpoint runs/digits
    python cls_eval.py --checkpoint checkpoint.pt --data ~/pictures --output-dir what-is-in-it
    python cls_eval.py --checkpoint checkpoint.pt --tsne 5 --grids 15               # figures of features and clusters
    python cls_eval.py --checkpoint checkpoint.pt --ensemble --feature-quality --compare other/checkpoint.pt
    python cls_eval.py --checkpoint checkpoint.pt --data "$IMAGENET" --superclass 2 living17
    python cls_eval.py --checkpoint moco-v2-800ep --data "$IMAGENET" --kmeans 1000 --fit-share 0.1

The clusters are those of the classifier that training chose, which is the classifier with the lowest training loss.
--classifier selects another one. With --kmeans, the clusters are those of k-means on the features, which needs no classifier.
If the data have no labels, the program prints no scores, but still writes the figures and the list.
"""

from src.signals import end_with_one_line

if __name__ == "__main__":
    end_with_one_line()  # the imports below take a while

from src import config
from src.errors import run_script


def main() -> None:
    options = config.parse_cls_eval()

    from src.evaluation import classification  # imports torch

    classification.run(options)


if __name__ == "__main__":
    run_script(main)

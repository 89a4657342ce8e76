"""Score features by their nearest neighbours: the k most similar labelled images vote for the class of an image.

    python knn_eval.py --checkpoint runs/demo                         # digits, seconds
    torchrun --standalone --nproc_per_node=8 knn_eval.py --checkpoint checkpoint.pt --data "$IMAGENET"
    python knn_eval.py --checkpoint moco-v2-800ep --data "$IMAGENET" --bank-share 0.1 --features-cache features

This is the fastest evaluation of features, because it trains nothing. The labelled images are those of the training split,
all of them or a fraction. The images to classify are those of the test split.
"""

from src.signals import end_with_one_line

if __name__ == "__main__":
    end_with_one_line()  # the imports below take a while

from src import config
from src.errors import run_script


def main() -> None:
    options = config.parse_knn_eval()

    from src.evaluation import knn  # imports torch

    knn.run(options)


if __name__ == "__main__":
    run_script(main)

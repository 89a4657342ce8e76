"""Score a backbone by a linear classifier on its frozen features: top-1 and top-5 accuracy.

    python lincls_eval.py --checkpoint runs/demo                      # digits, seconds
    python lincls_eval.py --checkpoint runs/demo --fast               # tries many learning rates and weight decays at once
    torchrun --standalone --nproc_per_node=8 lincls_eval.py --checkpoint checkpoint.pt --data "$IMAGENET"
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav_2x2 --feature-bn
    python lincls_eval.py --checkpoint swav-800ep --data "$IMAGENET" --preset swav_semi_1 --train-list 1percent.txt

A probe that is stopped (Ctrl-C, SIGTERM) saves a checkpoint first. The same command continues from that step.
"""

from src.signals import end_with_one_line

if __name__ == "__main__":
    end_with_one_line()  # the imports below take a while

from src import config
from src.errors import run_script


def main() -> None:
    options = config.parse_lincls_eval()

    from src.evaluation import linear  # imports torch

    linear.run(options)


if __name__ == "__main__":
    run_script(main)

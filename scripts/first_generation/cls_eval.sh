#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_cls_eval --nodes=1 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=00:10:00
#SBATCH --requeue --open-mode=append
# Self-Classifier, first generation, 800 epochs: the clusters compared with ImageNet's classes, on val/, and pictures of 15 clusters.
# published: none   ours: not run
# cost: at most 0.7 GPU hours per start (1 x 4 GPUs, 00:10:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score first_generation/sc_800ep_train
launch python cls_eval.py --grids 15 --data "$DATASET_PATH" "${SCORED[@]}" "$@"

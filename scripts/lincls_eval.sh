#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_lincls --nodes=4 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=24:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 800 epochs: a linear classifier on its frozen backbone.
# published: linear top-1 74.1   ours: not run
# cost: at most 384 GPU hours per start (4 x 4 GPUs, 24:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score sc_800ep_train
launch python lincls_eval.py --preset self_classifier --data "$DATASET_PATH" --seed "$SEED" "${SCORED[@]}" "$@"

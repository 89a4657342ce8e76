#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_eval --nodes=4 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, first generation, 800 epochs: a linear classifier on its frozen backbone.
# published: none   ours: not run
# cost: at most 96 GPU hours per start (4 x 4 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score first_generation/sc_800ep_train
launch python lincls_eval.py --preset self_classifier --data "$DATASET_PATH" --seed "$SEED" "${SCORED[@]}" "$@"

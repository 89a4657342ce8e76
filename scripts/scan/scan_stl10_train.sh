#!/usr/bin/env bash
#SBATCH --job-name=scan_stl10_train --nodes=1 --gpus-per-node=1 --cpus-per-gpu=16 --mem=32G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SCAN, the second step, STL-10.
# It starts from the run of simclr/simclr_stl10_train.sh, or from PRETRAINED_PATH.
# published: NMI 67.3, ARI 61.8, ACC 79.2 (the authors' best model)   ours: not run
# cost: at most 12 GPU hours per start (1 x 1 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method scan --preset stl10 --data stl10-labelled --data-root "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/simclr_stl10_train$RUN}" --output-dir "$EXPERIMENT_PATH/scan_stl10_train$RUN" "$@"

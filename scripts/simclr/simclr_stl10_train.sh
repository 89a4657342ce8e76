#!/usr/bin/env bash
#SBATCH --job-name=simclr_stl10_train --nodes=1 --gpus-per-node=1 --cpus-per-gpu=16 --mem=32G --time=24:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SimCLR, the first step of SCAN, STL-10.
# published: none   ours: not run
# cost: at most 24 GPU hours per start (1 x 1 GPUs, 24:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method simclr --preset stl10 --data stl10 --data-root "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/simclr_stl10_train$RUN" "$@"

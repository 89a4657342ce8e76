#!/usr/bin/env bash
#SBATCH --job-name=swav_800ep_pretrain --nodes=8 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=50:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, 800 epochs, 2x224 + 6x96.
# published: linear top-1 75.3   ours: not run
# cost: at most 3,200 GPU hours per start (8 x 8 GPUs, 50:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method swav --preset 800ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/swav_800ep_pretrain$RUN" "$@"

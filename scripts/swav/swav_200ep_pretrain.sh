#!/usr/bin/env bash
#SBATCH --job-name=swav_200ep_pretrain --nodes=8 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=13:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, 200 epochs, 2x224 + 6x96.
# published: linear top-1 73.9   ours: not run
# cost: at most 832 GPU hours per start (8 x 8 GPUs, 13:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method swav --preset 200ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/swav_200ep_pretrain$RUN" "$@"

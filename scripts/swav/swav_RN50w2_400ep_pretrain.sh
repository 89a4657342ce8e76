#!/usr/bin/env bash
#SBATCH --job-name=swav_RN50w2_400ep_pretrain --nodes=16 --gpus-per-node=8 --cpus-per-gpu=10 --mem=450G --time=72:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, ResNet-50 twice as wide, 400 epochs, 2x224 + 4x96.
# The authors used GPUs of 32 GB.
# published: linear top-1 77.3   ours: not run
# cost: at most 9,216 GPU hours per start (16 x 8 GPUs, 72:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method swav --preset RN50w2_400ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/swav_RN50w2_400ep_pretrain$RUN" "$@"

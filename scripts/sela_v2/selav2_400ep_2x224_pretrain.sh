#!/usr/bin/env bash
#SBATCH --job-name=selav2_400ep_2x224_pretrain --nodes=8 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=25:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SeLa-v2, 400 epochs, 2x224.
# The authors published no script, so the resources are those of SwAV's 400 epochs.
# published: linear top-1 67.2   ours: not run
# cost: at most 1,600 GPU hours per start (8 x 8 GPUs, 25:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method sela_v2 --preset 400ep_2x224 --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/selav2_400ep_2x224_pretrain$RUN" "$@"

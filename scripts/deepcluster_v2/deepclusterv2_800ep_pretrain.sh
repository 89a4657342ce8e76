#!/usr/bin/env bash
#SBATCH --job-name=deepclusterv2_800ep_pretrain --nodes=8 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=40:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# DeepCluster-v2, 800 epochs, 2x224 + 6x96.
# The authors used GPUs of 32 GB.
# published: linear top-1 75.2   ours: not run
# cost: at most 2,560 GPU hours per start (8 x 8 GPUs, 40:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method deepcluster_v2 --preset 800ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/deepclusterv2_800ep_pretrain$RUN" "$@"

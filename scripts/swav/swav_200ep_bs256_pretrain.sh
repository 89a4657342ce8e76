#!/usr/bin/env bash
#SBATCH --job-name=swav_200ep_bs256_pretrain --nodes=1 --gpus-per-node=4 --cpus-per-gpu=4 --mem=150G --time=72:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, 200 epochs, 2x224 + 6x96, batch 256 with a queue.
# An epoch took the authors 52 minutes, so the run needs three starts.
# published: linear top-1 72.7   ours: not run
# cost: at most 288 GPU hours per start (1 x 4 GPUs, 72:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method swav --preset 200ep_bs256 --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/swav_200ep_bs256_pretrain$RUN" "$@"

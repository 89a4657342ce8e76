#!/usr/bin/env bash
#SBATCH --job-name=sc_400ep_train --nodes=11 --gpus-per-node=6 --cpus-per-gpu=16 --mem=64G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 400 epochs.
# published: NMI 72.9, AMI 52.3, ARI 28.8, ACC 40.2   ours: not run
# cost: at most 3,168 GPU hours per start (11 x 6 GPUs, 48:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 400ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_400ep_train$RUN" "$@"

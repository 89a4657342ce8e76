#!/usr/bin/env bash
#SBATCH --job-name=sc_200ep_train --nodes=11 --gpus-per-node=6 --cpus-per-gpu=16 --mem=64G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 200 epochs.
# published: NMI 72.5, AMI 51.6, ARI 28.1, ACC 39.4   ours: not run
# cost: at most 3,168 GPU hours per start (11 x 6 GPUs, 48:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 200ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_200ep_train$RUN" "$@"

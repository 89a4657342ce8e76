#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_train --nodes=11 --gpus-per-node=6 --cpus-per-gpu=16 --mem=64G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, the main recipe: 800 epochs. Same as train_800ep.sh.
# published: NMI 73.3, AMI 53.1, ARI 29.5, ACC 41.1   ours: not run
# cost: at most 3,168 GPU hours per start (11 x 6 GPUs, 48:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 800ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_800ep_train$RUN" "$@"

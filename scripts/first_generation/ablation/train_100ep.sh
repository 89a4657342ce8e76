#!/usr/bin/env bash
#SBATCH --job-name=sc_100ep_train --nodes=4 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, first generation, 100 epochs: the baseline of the ablations.
# published: none   ours: not run
# cost: at most 96 GPU hours per start (4 x 4 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method self_classifier_v1 --preset 100ep --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/first_generation/sc_100ep_train$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=sc_100ep_train_fixed_cls --nodes=11 --gpus-per-node=6 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 100 epochs, ablation of classifiers_and_classes: classifiers stay at their random initial values.
# published: none   ours: not run
# cost: at most 396 GPU hours per start (11 x 6 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 100ep_fixed_cls --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_100ep_train_fixed_cls$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_pascal_eval --nodes=2 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=0:20:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 800 epochs: scores of the detector that train_pascal.sh trained, on VOC 2007 test.
# published: AP 56.6, AP50 82.4, AP75 62.6   ours: not run
# cost: at most 2.7 GPU hours per start (2 x 4 GPUs, 0:20:00)
DATASET_IS="the folder that holds VOC2007/"
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python detection/evaluate.py --checkpoint "$EXPERIMENT_PATH/sc_800ep_pascal_train$RUN" --data "$DATASET_PATH" \
    --output-dir "$EXPERIMENT_PATH/sc_800ep_pascal_eval$RUN" "$@"

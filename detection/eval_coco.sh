#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_coco_eval --nodes=2 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=0:20:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 800 epochs: scores of the detector that train_coco.sh trained, on COCO val2017.
# published: box AP 41.5, AP50 61.3, AP75 45.0; mask AP 36.1, AP50 58.1, AP75 38.7   ours: not run
# cost: at most 2.7 GPU hours per start (2 x 4 GPUs, 0:20:00)
DATASET_IS="the folder that holds coco/"
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python detection/evaluate.py --checkpoint "$EXPERIMENT_PATH/sc_800ep_coco_train$RUN" --data "$DATASET_PATH" \
    --output-dir "$EXPERIMENT_PATH/sc_800ep_coco_eval$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_coco_train --nodes=4 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 800 epochs: Mask R-CNN R50-C4 on COCO, the 2x schedule with 32 images per step.
# published: box AP 41.5, AP50 61.3, AP75 45.0; mask AP 36.1, AP50 58.1, AP75 38.7   ours: not run
# cost: at most 768 GPU hours per start (4 x 4 GPUs, 48:00:00)
DATASET_IS="the folder that holds coco/"
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python detection/train.py --dataset coco --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/sc_800ep_train$RUN/checkpoint.pt}" \
    --output-dir "$EXPERIMENT_PATH/sc_800ep_coco_train$RUN" "$@"

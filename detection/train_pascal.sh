#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_pascal_train --nodes=4 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 800 epochs: Faster R-CNN R50-C4 on Pascal VOC 07+12, 24,000 steps of 32 images.
# published: AP 56.6, AP50 82.4, AP75 62.6   ours: not run
# cost: at most 96 GPU hours per start (4 x 4 GPUs, 6:00:00)
DATASET_IS="the folder that holds VOC2007/ and VOC2012/"
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python detection/train.py --dataset voc --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/sc_800ep_train$RUN/checkpoint.pt}" \
    --output-dir "$EXPERIMENT_PATH/sc_800ep_pascal_train$RUN" "$@"

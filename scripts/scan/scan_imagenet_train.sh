#!/usr/bin/env bash
#SBATCH --job-name=scan_imagenet_train --nodes=1 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SCAN, the second step, ImageNet.
# It starts from MoCo v2's weights (`python -m src.pretrained get moco-v2-800ep`), or from PRETRAINED_PATH.
# published: NMI 72.0, AMI 51.2, ARI 27.5, ACC 39.9   ours: not run
# cost: at most 192 GPU hours per start (1 x 4 GPUs, 48:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method scan --preset imagenet --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-moco-v2-800ep}" --output-dir "$EXPERIMENT_PATH/scan_imagenet_train$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=scan_imagenet-50_train --nodes=1 --gpus-per-node=1 --cpus-per-gpu=16 --mem=64G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SCAN, the second step, 50 classes of ImageNet.
# It starts from MoCo v2's weights (`python -m src.pretrained get moco-v2-800ep`), or from PRETRAINED_PATH.
# published: NMI 80.5, ARI 63.5, ACC 75.1 (the authors' best model)   ours: not run
# cost: at most 12 GPU hours per start (1 x 1 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method scan --preset imagenet-50 --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-moco-v2-800ep}" --output-dir "$EXPERIMENT_PATH/scan_imagenet-50_train$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=selflabel_imagenet-100_train --nodes=1 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-labelling, the third step of SCAN, 100 classes of ImageNet.
# It starts from the run of scan/scan_imagenet-100_train.sh, or from PRETRAINED_PATH.
# published: NMI 80.8, ARI 57.6, ACC 68.9 (the authors' best model)   ours: not run
# cost: at most 48 GPU hours per start (1 x 4 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method selflabel --preset imagenet-100 --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/scan_imagenet-100_train$RUN}" --output-dir "$EXPERIMENT_PATH/selflabel_imagenet-100_train$RUN" "$@"

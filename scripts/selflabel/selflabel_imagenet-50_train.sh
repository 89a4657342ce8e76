#!/usr/bin/env bash
#SBATCH --job-name=selflabel_imagenet-50_train --nodes=1 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-labelling, the third step of SCAN, 50 classes of ImageNet.
# It starts from the run of scan/scan_imagenet-50_train.sh, or from PRETRAINED_PATH.
# published: NMI 82.2, ARI 66.1, ACC 76.8 (the authors' best model)   ours: not run
# cost: at most 48 GPU hours per start (1 x 4 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method selflabel --preset imagenet-50 --data "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/scan_imagenet-50_train$RUN}" --output-dir "$EXPERIMENT_PATH/selflabel_imagenet-50_train$RUN" "$@"

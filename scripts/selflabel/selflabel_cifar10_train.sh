#!/usr/bin/env bash
#SBATCH --job-name=selflabel_cifar10_train --nodes=1 --gpus-per-node=1 --cpus-per-gpu=16 --mem=32G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-labelling, the third step of SCAN, CIFAR-10.
# It starts from the run of scan/scan_cifar10_train.sh, or from PRETRAINED_PATH.
# published: NMI 79.7, ARI 77.2, ACC 88.3 (the authors' best model)   ours: not run
# cost: at most 12 GPU hours per start (1 x 1 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method selflabel --preset cifar10 --data cifar10 --data-root "$DATASET_PATH" --seed "$SEED" \
    --pretrained "${PRETRAINED_PATH:-$EXPERIMENT_PATH/scan_cifar10_train$RUN}" --output-dir "$EXPERIMENT_PATH/selflabel_cifar10_train$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=sela_cifar_pretrain --nodes=1 --gpus-per-node=4 --cpus-per-gpu=6 --mem=150G --time=24:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SeLa on CIFAR-10, AlexNet on views of 224 pixels, 10 heads of 128 classes.
# The authors' script does not name the resources apart from the four GPUs.
# published: none   ours: not run
# cost: at most 96 GPU hours per start (1 x 4 GPUs, 24:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method sela --preset cifar --data cifar10 --data-root "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sela_cifar_pretrain$RUN" "$@"

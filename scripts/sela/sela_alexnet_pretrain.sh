#!/usr/bin/env bash
#SBATCH --job-name=sela_alexnet_pretrain --nodes=1 --gpus-per-node=4 --cpus-per-gpu=6 --mem=150G --time=72:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SeLa, AlexNet, 10 heads of 3000 classes.
# The authors' script does not name the resources apart from the four GPUs.
# published: none   ours: not run
# cost: at most 288 GPU hours per start (1 x 4 GPUs, 72:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method sela --preset alexnet --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sela_alexnet_pretrain$RUN" "$@"

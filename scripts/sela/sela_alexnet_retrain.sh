#!/usr/bin/env bash
#SBATCH --job-name=sela_alexnet_retrain --nodes=1 --gpus-per-node=4 --cpus-per-gpu=6 --mem=150G --time=72:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SeLa, a new AlexNet on the labels of sela_alexnet_pretrain and on rotations.
# The authors' script does not name the resources apart from the four GPUs.
# published: none   ours: not run
# cost: at most 288 GPU hours per start (1 x 4 GPUs, 72:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --method sela --preset retrain --data "$DATASET_PATH" --seed "$SEED" \
    --labels "$EXPERIMENT_PATH/sela_alexnet_pretrain$RUN/labels.csv" \
    --output-dir "$EXPERIMENT_PATH/sela_alexnet_retrain$RUN" "$@"

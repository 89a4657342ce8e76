#!/usr/bin/env bash
#SBATCH --job-name=sc_100ep_train_bs_2048 --nodes=16 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 100 epochs, ablation of batch_size: 2048 images a step.
# published: none   ours: not run
# cost: at most 384 GPU hours per start (16 x 4 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 100ep_bs_2048 --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_100ep_train_bs_2048$RUN" "$@"

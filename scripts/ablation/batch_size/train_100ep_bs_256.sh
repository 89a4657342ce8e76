#!/usr/bin/env bash
#SBATCH --job-name=sc_100ep_train_bs_256 --nodes=2 --gpus-per-node=4 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 100 epochs, ablation of batch_size: 256 images a step, queue of 16K.
# published: none   ours: not run
# cost: at most 48 GPU hours per start (2 x 4 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 100ep_bs_256 --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_100ep_train_bs_256$RUN" "$@"

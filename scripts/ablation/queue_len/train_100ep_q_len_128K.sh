#!/usr/bin/env bash
#SBATCH --job-name=sc_100ep_train_q_len_128K --nodes=11 --gpus-per-node=6 --cpus-per-gpu=16 --mem=64G --time=6:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# Self-Classifier, 100 epochs, ablation of queue_len: queue of 128K; with a learning rate of 0.2 per 256 images, as in the authors' script.
# published: none   ours: not run
# cost: at most 396 GPU hours per start (11 x 6 GPUs, 6:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python train.py --preset 100ep_q_len_128K --data "$DATASET_PATH" --seed "$SEED" \
    --output-dir "$EXPERIMENT_PATH/sc_100ep_train_q_len_128K$RUN" "$@"

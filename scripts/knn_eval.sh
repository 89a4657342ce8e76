#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_knn_eval --nodes=1 --gpus-per-node=4 --cpus-per-gpu=16 --mem=128G --time=3:00:00
#SBATCH --requeue --open-mode=append
# Self-Classifier, 800 epochs: classify val/ by the 10, 20, 100 and 200 nearest neighbours in train/.
# published: none   ours: not run
# cost: at most 12 GPU hours per start (1 x 4 GPUs, 3:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score sc_800ep_train
launch python knn_eval.py --precision float16 --data "$DATASET_PATH" --seed "$SEED" "${SCORED[@]}" "$@"

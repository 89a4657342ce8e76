#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_20_nn_eval --nodes=1 --gpus-per-node=1 --cpus-per-gpu=64 --mem=128G --time=3:00:00
#SBATCH --requeue --open-mode=append
# Self-Classifier, first generation, 800 epochs: classify val/ by the 20 nearest neighbours in train/. The authors weighted
# votes by the inverse of the distance; here the weight is exp(similarity / 0.1).
# published: none   ours: not run
# cost: at most 3 GPU hours per start (1 x 1 GPUs, 3:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score first_generation/sc_800ep_train
launch python knn_eval.py --k 20 --data "$DATASET_PATH" --seed "$SEED" "${SCORED[@]}" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=simsiam_100ep_kmeans_eval --nodes=1 --gpus-per-node=1 --cpus-per-gpu=64 --mem=128G --time=00:10:00
#SBATCH --requeue --open-mode=append
# SimSiam, 100 epochs: k-means with 1,000 clusters on the features, fitted on 10 % of train/ and compared with the classes of val/.
# Download the weights first: python -m src.pretrained get simsiam-100ep
# To use the authors' list of images: --fit-share 1 --fit-list 10percent.txt
# published: NMI 62.2, AMI 34.9, ARI 11.6, ACC 24.9   ours: not run
# cost: at most 0.2 GPU hours per start (1 x 1 GPUs, 00:10:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python cls_eval.py --kmeans 1000 --fit-share 0.1 --seed "$SEED" --data "$DATASET_PATH" \
    --checkpoint "${PRETRAINED_PATH:-simsiam-100ep}" --output-dir "$EXPERIMENT_PATH/simsiam_100ep_kmeans_eval$RUN" "$@"

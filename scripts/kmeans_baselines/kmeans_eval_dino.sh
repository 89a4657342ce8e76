#!/usr/bin/env bash
#SBATCH --job-name=dino_800ep_kmeans_eval --nodes=1 --gpus-per-node=1 --cpus-per-gpu=64 --mem=128G --time=00:10:00
#SBATCH --requeue --open-mode=append
# DINO, ResNet-50: k-means with 1,000 clusters on the features, fitted on 10 % of train/ and compared with the classes of val/.
# Download the weights first: python -m src.pretrained get dino-resnet50
# To use the authors' list of images: --fit-share 1 --fit-list 10percent.txt
# published: NMI 66.2, AMI 42.3, ARI 15.6, ACC 30.7   ours: not run
# cost: at most 0.2 GPU hours per start (1 x 1 GPUs, 00:10:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
launch python cls_eval.py --kmeans 1000 --fit-share 0.1 --seed "$SEED" --data "$DATASET_PATH" \
    --checkpoint "${PRETRAINED_PATH:-dino-resnet50}" --output-dir "$EXPERIMENT_PATH/dino_800ep_kmeans_eval$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=sc_800ep_cls_eval_superclass_entity30 --nodes=1 --gpus-per-node=1 --cpus-per-gpu=64 --mem=64G --time=00:10:00
#SBATCH --requeue --open-mode=append
# Self-Classifier, 800 epochs: the clusters compared with BREEDS entity30 of ImageNet, on val/. Download the hierarchy first:
# python -m src.data.imagenet get
# published: NMI 72.9, AMI 53.4, ARI 29.8, ACC 81.0   ours: not run
# cost: at most 0.2 GPU hours per start (1 x 1 GPUs, 00:10:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score sc_800ep_train
launch python cls_eval.py --superclass entity30 --data "$DATASET_PATH" \
    "${SCORED[@]}" --output-dir "$EXPERIMENT_PATH/sc_800ep_cls_eval_superclass_entity30$RUN" "$@"

#!/usr/bin/env bash
#SBATCH --job-name=swav_800ep_lincls_eval --nodes=1 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=48:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, 800 epochs: a linear classifier on its frozen backbone. The authors give a command for 8 GPUs; the other resources and
# the limit are our choice. To use the authors' weights:
# python -m src.pretrained get swav-800ep, then export PRETRAINED_PATH=swav-800ep
# published: linear top-1 75.3   ours: not run
# cost: at most 384 GPU hours per start (1 x 8 GPUs, 48:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score swav_800ep_pretrain
launch python lincls_eval.py --preset swav --data "$DATASET_PATH" --seed "$SEED" "${SCORED[@]}" "$@"

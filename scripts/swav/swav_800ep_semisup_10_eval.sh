#!/usr/bin/env bash
#SBATCH --job-name=swav_800ep_semisup_10_eval --nodes=1 --gpus-per-node=8 --cpus-per-gpu=8 --mem=450G --time=12:00:00
#SBATCH --requeue --signal=B:USR1@120 --open-mode=append
# SwAV, 800 epochs: the whole network fine-tuned with 10 % of the labels. The authors give a command for 8 GPUs; the other
# resources and the limit are our choice. To use the authors' list of images: --train-list 10percent.txt
# published: in arXiv:2006.09882, not checked here   ours: not run
# cost: at most 96 GPU hours per start (1 x 8 GPUs, 12:00:00)
. "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/scripts/common.sh" ||
    { echo "submit from the repository's folder, or export REPOSITORY=that folder" >&2; exit 2; }
score swav_800ep_pretrain
launch python lincls_eval.py --preset swav_semi_10 --data "$DATASET_PATH" --seed "$SEED" \
    "${SCORED[@]}" --output-dir "$EXPERIMENT_PATH/swav_800ep_semisup_10_eval$RUN" "$@"

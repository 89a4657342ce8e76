#!/usr/bin/env bash
# Submit the steps of SCAN to Slurm, each after the one before it:
#     scripts/scan/submit_chain.sh cifar10 [options of sbatch]
# The data sets are cifar10, cifar100-20, stl10, imagenet-50, imagenet-100, imagenet-200 and imagenet. On ImageNet the chain starts
# from MoCo v2's weights, so it has no SimCLR step. ImageNet with 1,000 classes has no self-labelling step, as published.
# Set DATASET_PATH and EXPERIMENT_PATH first, as for the scripts of the steps.
cd "${REPOSITORY:-.}" || exit 2
case ${1:-} in
    cifar10 | cifar100-20 | stl10) steps=(simclr scan selflabel) ;;
    imagenet-50 | imagenet-100 | imagenet-200) steps=(scan selflabel) ;;
    imagenet) steps=(scan) ;;
    *)
        echo "submit_chain.sh: expected cifar10, cifar100-20, stl10, imagenet-50, imagenet-100, imagenet-200 or imagenet" >&2
        exit 2
        ;;
esac
name=$1
shift
after=()
for step in "${steps[@]}"; do
    # A step that was requeued has not ended, so the next step waits. If a step fails, Slurm cancels those that depend on it.
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "$@" "scripts/$step/${step}_${name}_train.sh") || exit 1
    echo "$step: job ${job%%;*}"
    after=("--dependency=afterok:${job%%;*}")
done

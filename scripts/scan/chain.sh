#!/usr/bin/env bash
# Run the three steps of SCAN on this machine, and score the clusters after SCAN and after self-labelling:
#     scripts/scan/chain.sh runs/chain --data digits
# The first word is the folder of the runs. The other words are flags of train.py for all steps; the variables SIMCLR_FLAGS,
# SCAN_FLAGS and SELFLABEL_FLAGS hold flags for one step. The same command continues a chain that was stopped.
cd "${REPOSITORY:-.}" || exit 2
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "chain.sh: expected the folder of the runs, then flags of train.py such as --data digits" >&2
    exit 2
fi
folder=$1
shift
python=${PYTHON:-python}
read -ra first <<<"${SIMCLR_FLAGS:-}"
read -ra second <<<"${SCAN_FLAGS:-}"
read -ra third <<<"${SELFLABEL_FLAGS:-}"
$python train.py --method simclr --output-dir "$folder/simclr" "$@" "${first[@]}" || exit
$python train.py --method scan --pretrained "$folder/simclr" --output-dir "$folder/scan" "$@" "${second[@]}" || exit
$python train.py --method selflabel --pretrained "$folder/scan" --output-dir "$folder/selflabel" "$@" "${third[@]}" || exit
for step in scan selflabel; do
    $python cls_eval.py --checkpoint "$folder/$step" || exit
done

# Sourced by every script here; docs/cluster.md says how to use them. What they share: where things are, the seeds of a
# job array, and a launch that survives the time limit.
#
# No master address or port: train.py takes the first host from SLURM_STEP_NODELIST, a port from job and step.

export PYTHONUNBUFFERED=1 # a log that is written while it happens
NAME=${SLURM_JOB_NAME:-$(basename "$0")}

# A name that is not set is one line and status 2, as a wrong flag is.
need() {
    if [ -z "${!1:-}" ]; then
        echo "$NAME: $1 is not set: export $1=$2" >&2
        exit 2
    fi
}
need DATASET_PATH "the folder that holds train/ and val/ of class folders; of CIFAR: the folder of its files"
need EXPERIMENT_PATH "the folder that shall hold a folder for each run"

# sbatch runs a copy of the script elsewhere, so that it cannot look for neighbours by its own location.
cd "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
if [ ! -f train.py ]; then
    echo "$NAME: no train.py in $PWD: submit from the repository's folder, or export REPOSITORY=that folder" >&2
    exit 2
fi

# Each task of an array is another seed in another folder. By its number in the array: SLURM_JOB_ID of one of the tasks is
# the number of the whole array, so that a signal or a requeue meant for that task would reach all.
SEED=${SLURM_ARRAY_TASK_ID:-0}
RUN=${SLURM_ARRAY_TASK_ID:+/seed_$SLURM_ARRAY_TASK_ID}
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}

# What an evaluation scores, in SCORED: the checkpoint of the training whose folder is named, or PRETRAINED_PATH. That is a file, a
# released model's name, or the folder of a run, and then of each task of an array its seed's. Results go beside a checkpoint of
# ours; of one file, the tasks of an array write theirs into folders of their own.
score() {
    local folder=${PRETRAINED_PATH:-$EXPERIMENT_PATH/$1}
    SCORED=(--checkpoint "$folder$RUN/checkpoint.pt")
    if [ -n "${PRETRAINED_PATH:-}" ] && [ ! -d "$folder" ]; then
        SCORED=(--checkpoint "$folder" ${RUN:+--output-dir "$EXPERIMENT_PATH/$NAME$RUN"})
    fi
}

# Ahead of the time limit Slurm sends USR1 to this script alone (--signal=B:USR1). It is passed on as TERM to the tasks:
# they finish the step and save. srun itself must not get it, or it would kill the tasks within seconds, unsaved.
save_and_requeue() {
    echo "job $JOB: told to stop, saving"
    stopping=1
    scancel --signal=TERM "$JOB"
}

# Run a command as one task per GPU, or one per node where there are none, on what was allocated and not what the header
# says: --nodes and --gpus-per-node may have been given to sbatch.
launch() {
    local per_node=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}} nodes=${SLURM_NNODES:-1} stopping='' alone=0 status step
    per_node=${per_node##*:} # of a100:4 the number; salloc sets this name alone
    [ "$per_node" -gt 0 ] 2>/dev/null || per_node=1
    # srun reads these too; the one contradicts what is computed here, the other, if 0, is refused
    unset SLURM_CPUS_PER_GPU
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || unset SLURM_GPUS_PER_NODE
    # The tasks of a training end together. If one has ended, the others wait for it in vain, and are ended after a minute;
    # at once (--kill-on-bad-exit) they would not get to say why. In other evaluations, and in a probe with --fast, the first
    # may go on for long.
    case " $* " in
        *" --fast "*) ;;
        *" train.py "* | *" lincls_eval.py "*) alone=60 ;;
    esac
    # Once on every node, such as the unpacking of the data onto its own disk. Every start does it: a requeued job may have
    # other nodes.
    if [ -n "${NODE_SETUP:-}" ]; then
        srun --ntasks="$nodes" --ntasks-per-node=1 bash -c "$NODE_SETUP" ||
            { echo "$NAME: NODE_SETUP failed on a node" >&2; exit 1; }
    fi
    trap save_and_requeue USR1
    # In the background, because bash lets a signal wait for the command in front.
    srun --label --wait="$alone" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" \
        --cpus-per-task=$((${SLURM_CPUS_ON_NODE:-$per_node} / per_node)) ${CONTAINER:-} "$@" &
    step=$!
    wait "$step"
    status=$?
    while kill -0 "$step" 2>/dev/null; do # it was the signal that ended the waiting
        wait "$step"
        status=$?
    done
    wait "$step" # again, for the signal may have come just as the step ended; bash remembers the status
    status=$?
    # 143 is train.py's for "stopped by TERM, saved". Without the signal it is a step that somebody ended, or the end of the
    # other tasks where one has failed, which would fail again.
    if [ -n "$stopping" ] && [ "$status" = 143 ]; then
        if scontrol requeue "$JOB"; then
            exit 0
        fi
        echo "job $JOB: saved, but it cannot be requeued; submit it again, it goes on" >&2
    fi
    exit "$status"
}

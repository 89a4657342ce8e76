# Every script in this folder sources this file; docs/cluster.md describes how to use them. It sets the paths and the seed of
# a job array, and defines a launch that survives the time limit.
#
# It sets no master address or port: train.py uses the first host in SLURM_STEP_NODELIST and derives the port from job and step.

export PYTHONUNBUFFERED=1 # write the log without delay
NAME=${SLURM_JOB_NAME:-$(basename "$0")}
NAME=${NAME//[^[:print:]]/?} # it is printed, and a job may have any name

# A variable that is not set gives one line and status 2, like a wrong flag.
need() {
    if [ -z "${!1:-}" ]; then
        echo "$NAME: $1 is not set: export $1=$2" >&2
        exit 2
    fi
}
need DATASET_PATH "${DATASET_IS:-the folder that holds train/ and val/ with class folders, or the folder with the files of CIFAR}"
need EXPERIMENT_PATH "the folder for the results, with one subfolder per run"

# sbatch runs a copy of the script in another folder, so the script cannot find other files by its own location.
cd "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
if [ ! -f train.py ]; then
    echo "$NAME: no train.py in $PWD: submit from the repository's folder, or export REPOSITORY=the path of this folder" >&2
    exit 2
fi

# Bash executes commands in the text of a number that it calculates with, as in a[$(command)]. So a variable that should be a
# whole number must consist of digits, without leading zeros, which would make it octal.
need_number() {
    local name value
    for name in "$@"; do
        value=${!name:-0}
        case $value in
            *[!0-9]* | 0?* | ???????????????????*)
                printf '%s: %s is %q, expected a whole number of at most 18 digits: correct it, or unset it\n' "$NAME" "$name" "$value" >&2
                exit 2
                ;;
        esac
    done
}
need_number SLURM_ARRAY_TASK_ID SLURM_ARRAY_JOB_ID SLURM_JOB_ID SLURM_NNODES SLURM_GPUS_ON_NODE SLURM_CPUS_ON_NODE

# Each task of an array has its own seed and its own folder. JOB uses the task's number in the array: one of the tasks has the
# number of the whole array as its SLURM_JOB_ID, so a signal or a requeue for that task would reach all tasks.
SEED=${SLURM_ARRAY_TASK_ID:-0}
RUN=${SLURM_ARRAY_TASK_ID:+/seed_$SLURM_ARRAY_TASK_ID}
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}

# Set SCORED to the flags that name what an evaluation scores: the checkpoint of the training in the given folder, or
# PRETRAINED_PATH. PRETRAINED_PATH is a file, the name of a released model, or a run folder; in a run folder each task of an array
# scores the run of its own seed. Results go next to our own checkpoints. If the tasks of an array score a single file, each task
# writes to its own folder.
score() {
    local folder=${PRETRAINED_PATH:-$EXPERIMENT_PATH/$1}
    SCORED=(--checkpoint "$folder$RUN/checkpoint.pt")
    if [ -n "${PRETRAINED_PATH:-}" ] && [ ! -d "$folder" ]; then
        SCORED=(--checkpoint "$folder" ${RUN:+--output-dir "$EXPERIMENT_PATH/$NAME$RUN"})
    fi
}

# Before the time limit Slurm sends USR1 to this script only (--signal=B:USR1). The script forwards it to the tasks as TERM, and
# they finish the step and save. srun itself must not get the signal: it would kill the tasks within seconds, before they save.
save_and_requeue() {
    echo "job $JOB: received USR1, saving a checkpoint"
    stopping=1
    scancel --signal=TERM "$JOB"
}

# Run a command as one task per allocated GPU, or one per node if there are no GPUs. The header may differ from the allocation,
# because --nodes and --gpus-per-node can be passed to sbatch.
launch() {
    local per_node=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}} nodes=${SLURM_NNODES:-1} stopping='' alone=0 status step
    per_node=${per_node##*:} # the number in a100:4; salloc sets only this variable
    case $per_node in
        '' | *[!0-9]* | 0* | ??????????*) per_node=1 ;;
    esac
    # srun also reads these two variables. The first contradicts the value computed here; srun refuses the second if it is 0.
    unset SLURM_CPUS_PER_GPU
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || unset SLURM_GPUS_PER_NODE
    # The tasks of a training end together. If one task has ended, the others wait for it in vain, so srun ends them after a
    # minute. With --kill-on-bad-exit they would end at once, before they can report the reason. In other evaluations, and in a
    # probe with --fast, the first task may run on for a long time.
    case " $* " in
        *" --fast "*) ;;
        *" train.py "* | *" lincls_eval.py "* | *" detection/"*) alone=60 ;;
    esac
    # Run NODE_SETUP once on every node, for example to unpack the data onto the node's own disk. Every start runs it, because a
    # requeued job may get other nodes.
    if [ -n "${NODE_SETUP:-}" ]; then
        srun --ntasks="$nodes" --ntasks-per-node=1 bash -c "$NODE_SETUP" ||
            { echo "$NAME: NODE_SETUP failed on a node: correct the command" >&2; exit 1; }
    fi
    trap save_and_requeue USR1
    # Run srun in the background, because bash handles a signal only after the foreground command has ended.
    srun --label --wait="$alone" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" \
        --cpus-per-task=$((${SLURM_CPUS_ON_NODE:-$per_node} / per_node)) ${CONTAINER:-} "$@" &
    step=$!
    wait "$step"
    status=$?
    while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
        wait "$step"
        status=$?
    done
    wait "$step" # again: the signal may have arrived just as the step ended; bash remembers the status
    status=$?
    # 143 is train.py's status for "stopped by TERM, saved". Without the signal, somebody ended the step, or one task failed and
    # srun ended the others. Then a requeued job would fail again.
    if [ -n "$stopping" ] && [ "$status" = 143 ]; then
        if scontrol requeue "$JOB"; then
            exit 0
        fi
        echo "job $JOB: the checkpoint is saved, but the job cannot be requeued: submit it again to resume" >&2
    fi
    exit "$status"
}

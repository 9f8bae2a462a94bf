#!/bin/bash
# Sourced by the recipe scripts. At a job's first start this file is the checkout's, after a requeue the snapshot's.
# PYTHON in the environment names another interpreter than the checkout's .venv for the checks on the first node.
set -euo pipefail
# Of each node, before any Python and container: the code itself lies in the run's folder. In one step with Python, ranks
# that srun stops would say that they were told to leave. The wait: srun ends all at the first task that fails, and drops
# words that are on their way; what has refused is not stopped by another's refusal.
SEES_THE_RUN='refuse() { trap "" TERM USR1 USR2; echo "error: pre-flight on $(uname -n): $1" >&2; sleep 1; exit 2; }
[[ -r "$AVATAR_SNAPSHOT/snapshot.json" ]] || refuse "$AVATAR_SNAPSHOT, written by the first node, is not there: \
output_dir must lie on a file system that all nodes share"
[[ -z "$1" ]] || command -v "$1" >/dev/null || refuse "$1 is not there: it must lie on a file system that all nodes \
share, or be on every node, or cluster.python or cluster.runtime must name another"'
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# train [key=value ...]: one training process for every task of the job. Status 0: the run is done.
train() {
  cd "$SLURM_SUBMIT_DIR"
  local python="${PYTHON:-$CODE/.venv/bin/python}" settings
  command -v "$python" >/dev/null || {
    echo "error: $python is missing on $(uname -n): run 'make doctor' in the checkout, or export PYTHON=FILE" >&2
    return 2
  }
  settings=$("$python" "$CODE/slurm/starting.py" "$@") || return
  local command srun_options master run log gpus tmp_gib
  eval "$settings"

  export SLURM_EXPORT_ENV=ALL # for srun; what --export=NONE kept from this job its tasks need from here
  AVATAR_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export AVATAR_NODES MASTER_ADDR="${master//\{node\}/${AVATAR_NODES%% *}}"
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node must not meet
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer inherits --cpus-per-task
  export SLURM_WAIT="${SLURM_WAIT:-300}" # seconds for the other tasks once one has ended: none holds the nodes for ever
  export AVATAR_CHAIN="${AVATAR_CHAIN:-$SLURM_JOB_ID}" # restarts without progress are counted by it

  trap : USR1 USR2 TERM # the tasks get these too, save their state and leave; the batch shell has to outlive them
  local srun=(srun --label --kill-on-bad-exit=1) status=0 outside="${command[0]}"
  local all=("${srun[@]}" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" ${srun_options[@]+"${srun_options[@]}"})
  ((${#srun_options[@]})) && outside="" # pyxis: the interpreter is the image's
  {
    trap : USR1 USR2 TERM # a subshell has its own
    "${srun[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$SEES_THE_RUN" sees "$outside" &&
      "${all[@]}" "${command[@]}" -m slurm.preflight "$run" "$gpus" "$tmp_gib" &&
      "${all[@]}" "${command[@]}" -m megatron_avatar.train "$@"
  } 2>&1 | (trap '' USR1 USR2 TERM && exec tee -a "$log") || status=$?
  "$python" "$CODE/slurm/ending.py" "$run" "$status" "$log" "$@" # done, over, or to be continued
}

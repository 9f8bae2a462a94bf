#!/bin/bash
#SBATCH --job-name=avatar-judge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=12
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# The judge beside a training job, served by vLLM on all GPUs of this one:
#   sbatch slurm/judge.sh [FOLDER] [MODEL] [vLLM's options]
#   sbatch slurm/avatar_7b.sh judge.endpoint=FOLDER ...
# FOLDER (runs/judge) gets a file with the server's address while it serves; submit it again for another replica.
# FOLDER/.for, which submit.py --with-judge writes, names a training job that is held: the judge releases it once it has
# answered a first question, and ends when that job, or one that continues it, has left the queue.
# VLLM names the executable (an environment of its own, or a container's). With AVATAR_ENDPOINT_KEY exported in both jobs
# only those who have the key are answered.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
folder=${1:-runs/judge} model=${2:-OpenGVLab/InternVL3-2B}
shift $(($# < 2 ? $# : 2))
vllm=${VLLM:-vllm}
served="$folder/.for" released="$folder/.released"
fail() { # STATUS WORDS: the training would wait for ever
  echo "error: $2" >&2
  [[ ! -e "$served" || -e "$released" ]] || {
    echo "job $(<"$served"), which was held for this judge, is cancelled: mend this and submit both again" >&2
    scancel "$(<"$served")"
  }
  exit "$1"
}
command -v "$vllm" >/dev/null || fail 2 \
  "$vllm was not found on $(uname -n): pip install vllm into an environment of its own, and export VLLM=FILE"
gpus=${SLURM_GPUS_ON_NODE:-1} port=$((20000 + (SLURM_JOB_ID + 5000) % 10000)) # away from a trainer's MASTER_PORT
address="$folder/$SLURM_JOB_ID" server=
mkdir -p "$folder"
leave() { # the file goes first: nobody is sent to a server that ends
  rm -f "$address"
  [[ -z "$server" ]] || kill "$server" 2>/dev/null || true
  [[ -z "$(jobs -p)" ]] || kill $(jobs -p) 2>/dev/null || true
}
trap leave EXIT
again() { # into the queue, also where the controller is out of reach for some minutes
  for _ in {1..20}; do
    scontrol requeue "$SLURM_JOB_ID" && exit 75
    sleep 15
  done
  exit 75
}
trap 'leave; server=; again' USR1
trap 'exit 143' TERM

export VLLM_API_KEY="${AVATAR_ENDPOINT_KEY:-}" # by the environment, where no process list shows it
[[ -n "$VLLM_API_KEY" ]] || unset VLLM_API_KEY
"$vllm" serve "$model" --port "$port" --data-parallel-size "$gpus" --max-model-len 16384 --trust-remote-code \
  --limit-mm-per-prompt '{"image": 16}' "$@" &
server=$!
answers() { # one question, by HTTP
  local body="{\"model\":\"$model\",\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":\"Yes?\"}]}" status
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
  printf 'POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n' \
    "${VLLM_API_KEY:-none}" >&3
  printf 'Content-Length: %d\r\n\r\n%s' "${#body}" "$body" >&3
  read -r -t 60 _ status _ <&3 && [[ "$status" == 200 ]]
}
until (answers) 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || fail 1 "the server ended before it served; its messages are above"
  sleep 2 &
  wait $!
done
echo "http://$(uname -n):$port/v1" >"$address.part"
mv "$address.part" "$address"
echo "serving $model at $(<"$address"), written to $address"
follow() { # end with the training; Slurm is asked once a minute, and silence means nothing
  local answer
  while sleep "${FOLLOW_S:-60}"; do
    answer=$(squeue --noheader --jobs="$(<"$served")" --format=%T 2>&1) || [[ "$answer" == *nvalid\ job\ id* ]] || continue
    [[ -n "$answer" && "$answer" != *nvalid\ job\ id* ]] || kill -USR2 $$
  done
}
if [[ -e "$served" ]]; then
  trap 'echo "job $(<"$served") has left the queue: the judge ends"; exit 0' USR2
  until [[ -e "$released" ]]; do # also where the controller is out of reach for some minutes
    if scontrol release "$(<"$served")"; then touch "$released"; else sleep 15; fi
  done
  follow &
fi
wait "$server"

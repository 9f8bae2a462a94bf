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
# VLLM names the executable (an environment of its own, or a container's). With AVATAR_ENDPOINT_KEY exported in both jobs
# only those who have the key are answered.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
folder=${1:-runs/judge} model=${2:-OpenGVLab/InternVL3-2B}
shift $(($# < 2 ? $# : 2))
vllm=${VLLM:-vllm}
command -v "$vllm" >/dev/null || {
  echo "error: $vllm was not found on $(uname -n): pip install vllm into an environment of its own, and export VLLM=FILE" >&2
  exit 2
}
gpus=${SLURM_GPUS_ON_NODE:-1} port=$((20000 + (SLURM_JOB_ID + 5000) % 10000)) # away from a trainer's MASTER_PORT
address="$folder/$SLURM_JOB_ID" server=
mkdir -p "$folder"
leave() { # the file goes first: nobody is sent to a server that ends
  rm -f "$address"
  [[ -z "$server" ]] || kill "$server" 2>/dev/null || true
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
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { echo "error: the server ended before it served; its messages are above" >&2; exit 1; }
  sleep 2 &
  wait $!
done
echo "http://$(uname -n):$port/v1" >"$address.part"
mv "$address.part" "$address"
echo "serving $model at $(<"$address"), written to $address"
wait "$server"

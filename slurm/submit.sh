#!/bin/bash
# submit.sh SCRIPT ...: what a recipe's script does where it is typed at a prompt: check, say what the job will do, submit.
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$code/.venv/bin/python}
command -v "$python" >/dev/null || {
  echo "error: $python is missing: run 'make doctor' in $code, or export PYTHON=FILE" >&2
  exit 2
}
echo "checking the settings ..." >&2
exec "$python" "$code/slurm/submit.py" "$@"

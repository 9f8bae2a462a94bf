#!/bin/bash
# What both recipes here do inside of the image: install.sh REQUIREMENTS. The pins go into /avatar, an environment that sees
# the image's own packages; of an image that brings PyTorch, that one stays, with what is built against it (Triton, Apex,
# Transformer Engine).
set -euo pipefail
requirements=$1 wanted=$(mktemp)
unset PIP_CONSTRAINT # NVIDIA's images pin their own packages by it; ours lie apart
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: the image's python3 is older than 3.11: take a newer one" >&2
  exit 1
}
own='^$'
if python3 -c 'import torch' 2>/dev/null; then own='^(torch|triton)=='; fi
grep -vE "$own" "$requirements" >"$wanted"
python3 -m venv --system-site-packages --without-pip /avatar # the image may lack ensurepip
python3 -m pip --python /avatar/bin/python --no-cache-dir --disable-pip-version-check install -r "$wanted"
rm "$wanted"
/avatar/bin/python -c 'import torch, megatron.core, transformers; print("torch", torch.__version__)'

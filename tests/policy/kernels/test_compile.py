"""Every kernel becomes a binary for A100 and H100, on a machine without either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that a block may have


@pytest.mark.slow
def test_every_kernel_compiles_within_shared_memory(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-m", "tests.policy.kernels.compile_all"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    compiled = [name.rpartition(" ")[0] for name in found]
    assert sorted(compiled) == sorted(2 * list(dict.fromkeys(compiled))) and len(compiled) >= 70  # both architectures
    for name in ("attend fp16", "attend bf16 SIZE=64", "attend fp16 QUERIES=16", "decode_rope fp16 BLOCK=32",
                 "norm_backward bf16", "head_backward fp16", "draw_find fp32"):  # fmt: skip
        assert name in compiled
    for name, binary in found.items():
        assert binary["cubin"] > 1000 and binary["shared"] <= SHARED[name.split()[-1]], (name, binary)

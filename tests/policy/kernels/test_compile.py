"""Every kernel becomes a binary for A100, L40 and H100, on a machine without any of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_avatar.policy.kernels import attend

ROOT = Path(__file__).parents[3]
SHARED = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}  # bytes that a block may have


def compiled(folder: Path, *names: str) -> dict:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-m", "tests.policy.kernels.compile_all", *names], cwd=ROOT, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for name, binary in found.items():
        assert binary["cubin"] > 1000 and binary["shared"] <= SHARED[name.split()[-1]], (name, binary)
    return found


@pytest.mark.slow
@pytest.mark.core
def test_the_largest_kernel_compiles_where_there_is_least_shared_memory(tmp_path):
    """Attention in float32, and one small kernel; the rest takes minutes."""
    names = ["attend fp32 sm_89", "swiglu bf16 sm_80"]
    assert sorted(compiled(tmp_path, *names)) == sorted(names)
    assert attend.blocks(4, 56) == (32, 32) and attend.blocks(2, 56) == (64, 64) and attend.blocks(4, 7) == (16, 32)


@pytest.mark.slow
def test_every_kernel_compiles_within_shared_memory(tmp_path):
    names = [name.rpartition(" ")[0] for name in compiled(tmp_path)]
    assert sorted(names) == sorted(3 * list(dict.fromkeys(names))) and len(names) >= 150  # three architectures
    for name in ("attend fp16", "attend fp32", "attend bf16 SIZE=64", "attend fp16 QUERIES=16", "norm_backward fp32",
                 "decode_rope fp16 BLOCK=32", "head_backward fp16", "draw_find fp32"):  # fmt: skip
        assert name in names

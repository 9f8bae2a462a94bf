"""Where the kernels don't run: GPUs that are too old, and machines without Triton. torch's path, said once."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_avatar.policy.kernels import attend, device

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("capability", "missing", "words"),
    [((7, 5), "", "below compute capability 8.0"), ((9, 0), "no module", "Triton is not to be had (no module)"),
     ((8, 0), "", "")],
)  # fmt: skip
def test_what_speaks_against_a_gpu_is_said_once(monkeypatch, caplog, capability, missing, words):
    device.obstacle.cache_clear()
    monkeypatch.setitem(device._state, "on", True)  # a policy that was built before, on a CPU, says torch
    monkeypatch.setattr(device, "MISSING", missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    tensor = SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda", 0))
    assert [device.runs_triton(tensor) for _ in "ab"] == [not words] * 2
    assert caplog.text.count("torch's operations in place") == bool(words) and words in caplog.text
    device.obstacle.cache_clear()


def test_heads_larger_than_tested_take_torchs_attention_said_once(caplog):
    device.fits_head.cache_clear()
    sizes = [64, 80, 128, 256, 256]
    assert [attend.by_kernels(torch.empty(1, size, device="meta")) for size in sizes] == [True] * 3 + [False] * 2
    assert caplog.text.count("heads of at most 128, not 256") == 1


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("a library lacks"), RuntimeError()])
def test_a_broken_triton_is_none(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    found = runpy.run_path(device.__file__)
    assert found["MISSING"] == (str(error) or "RuntimeError") and found["triton"].jit(len) is len


def test_without_triton_the_functions_are_torchs():
    script = """
import sys
sys.modules["triton"] = None
import torch
from megatron_avatar.policy.kernels import attend, draw, head, norm, rope, swiglu
assert norm.norm(torch.ones(2, 8), torch.ones(8), 1e-6).shape == (2, 8)
assert swiglu.swiglu(torch.ones(2, 8)).shape == (2, 4)
print(draw.draw_tokens(torch.eye(3), None, 1.0, torch.zeros(3).bool())[0].tolist())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[0, 1, 2]"

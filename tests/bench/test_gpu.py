"""The GPU benchmark runs whole without a GPU, on a tiny model, with nothing installed that a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LACKING = ("hydra", "omegaconf", "h5py", "nvidia.dali", "av", "wandb", "trl", "transformer_engine", "apex",
           "flash_attn")  # fmt: skip


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_bare_machine(tmp_path):
    script = f"""
import sys
sys.modules.update(dict.fromkeys({LACKING!r}))  # importing one of them fails
from bench.gpu import main
main(["--tiny", "--trace", {str(tmp_path / "trace")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isalpha())
    for part in ("towers", "prefill", "decode", "reference", "update"):
        assert float(found[f"{part}_s"]) > 0
    # Random weights, but generation and training see the same: bfloat16 alone is between them.
    assert 1 < float(found["logprob_error"]) < 1.05
    told = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            told |= json.loads(line)
    assert list(told) == ["step", "encoders", "decode_rows", "recompute", "profiles", "beside", "video", "sure"]
    assert not [part for part in told.values() if "error" in part], told
    assert told["video"] == {"skipped": "av is not installed"}  # on the bare machine
    assert set(told["decode_rows"]) == {"256", "64", "64, no kernels", "4", "4, no graphs", "4, no kernels",
                                        "4, neither"}  # fmt: skip
    update = told["recompute"]
    assert set(update) == {"none", "light", "selective", "full"}
    ratios = {name: part["done_tflops"] / part["needed_tflops"] for name, part in update.items()}
    assert ratios["none"] == pytest.approx(ratios["light"])
    assert ratios["none"] < ratios["selective"] < ratios["full"] < 4 / 3 + 0.1
    assert 0.5 <= told["sure"]["head_entropy"] <= 1 and told["sure"]["logprob_error"] < 1.05
    assert sum(told["sure"]["by_entropy"]["tokens"]) == 2 * 3 * 6
    assert "aten::mm" in done.stderr and told["profiles"]["decode"]["calls"] > 10
    assert {path.name for path in (tmp_path / "trace").iterdir()} == {"decode.json.gz", "update.json.gz"}
    assert float(found["speedup_rows"]) > 1 and float(found["decode_fraction"]) > 0

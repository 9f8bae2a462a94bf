"""Two GPUs: NCCL inside of CUDA graphs at TP2 and PP2, updates, and checkpoints from one layout to the other.

The same steps run on two processes without GPUs, over gloo, which shows that the test itself is right.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import two_ranks
from tests.policy.tiny import tiny_config, tiny_thinker
from tests.ranks import launch


def found(folder: Path, dtype: str) -> dict:
    config = tiny_config(layers=2, qwen=True)
    config.eos_token_id = 7
    tiny_thinker(config).save_pretrained(folder / "hf")
    launch(two_ranks.main, 2, folder, dtype, timeout=280)
    return json.loads((folder / "found.json").read_text())


def check(results: dict, *, error: float, loss: float, norm: float) -> None:
    assert results.keys() == two_ranks.LAYOUTS.keys()
    for name, result in results.items():
        assert result["same"], f"{name}: graphs drew other tokens than steps without"
        assert result["error"] < error, name
        assert set(result["resumed"]) == set(list(results)[: list(results).index(name) + 1])
        for other, (value, size) in result["resumed"].items():
            assert value == pytest.approx(results[other]["second"][0], abs=loss), (name, other)
            assert size == pytest.approx(results[other]["second"][1], rel=norm), (name, other)
    first = [result["first"] for result in results.values()]
    assert first[0][0] == pytest.approx(first[1][0], abs=loss) and first[0][1] == pytest.approx(first[1][1], rel=norm)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_gpus_generate_train_and_pass_checkpoints_on(tmp_path, dtype):
    results = found(tmp_path, dtype)
    assert {result["device"] for result in results.values()} == {"cuda"}
    check(results, error=1.02, loss=1e-2, norm=5e-2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs it is the other test")
def test_two_processes_without_gpus_do_the_same(tmp_path):
    results = found(tmp_path, "float32")
    assert {result["device"] for result in results.values()} == {"cpu"}
    check(results, error=1 + 1e-4, loss=1e-4, norm=1e-3)

"""The figures of bench.gpu's parts that a CPU can hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import gpu, gpu_parts, timing
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.records import Prompt
from tests.policy.tiny import tiny_config

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def test_device_time_is_counted_once():
    """As torch says it: an operation's row with its kernels' time, a kernel's own, and an annotation around both."""
    def row(device, time, annotation=False):
        return SimpleNamespace(device_type=device, self_device_time_total=time, is_user_annotation=annotation)

    rows = [row(CPU, 10.0), row(CUDA, 10.0), row(CUDA, 10.0, True), row(CPU, 0.0, True)]
    assert gpu_parts.rows_of_time(rows, device=True) == [rows[1]]
    assert gpu_parts.rows_of_time(rows, device=False) == [rows[0]]


def test_rows_are_of_torchs_profile():
    recorded, out = gpu_parts.profiled(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    rows = gpu_parts.rows_of_time(recorded.key_averages(), device=False)
    assert {"aten::mm", "aten::ones"} <= {row.key for row in rows} and out.shape == (64, 64)
    assert sum(row.self_cpu_time_total for row in rows) == pytest.approx(recorded.key_averages().self_cpu_time_total)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_model_beside_ours_has_the_same_weights(tmp_path, backend, tied):
    tiny_config(layers=2, tied=tied).save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(), ParallelConfig())
    gpu.fill_at_random(policy)
    ids = np.random.default_rng(0).integers(20, 200, 12)
    batch = pack_groups([Prompt("", "plain", ids, np.tile(np.arange(12), (3, 1)))], [[np.zeros(1, np.int64)]])
    ours = policy.logits(batch)[:12]
    with torch.no_grad():
        theirs = gpu_parts.as_transformers(policy)(input_ids=torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float(ours.std()) > 0.5


@pytest.mark.parametrize(("entropies", "found"), [((5.0, 0.2, 0.7), True), ((5.0,) * 12, False)])
def test_a_sure_head_has_half_a_nat_to_one_or_is_none(monkeypatch, entropies, found):
    told = iter(entropies)
    weight = torch.ones(8, 4)

    def policy(batch, media):
        return torch.stack([torch.zeros(3), torch.full((3,), next(told))])

    policy.output_weight, policy.embed_media = weight, lambda prompts: [None]
    prompt = Prompt("", "plain", np.arange(5), np.tile(np.arange(5), (3, 1)))
    bench = SimpleNamespace(policy=policy, prompts=[prompt], size=gpu.TINY,
                            backend=SimpleNamespace(device=torch.device("cpu")))  # fmt: skip
    if found:
        assert gpu_parts.fill_sure_head(bench) == pytest.approx(0.7) and float(weight[0, 0]) == 40.0  # 32, 48, 40
    else:
        with pytest.raises(ValueError, match="no head of 0.5 to 1.0 nats was found: 5.00"):
            gpu_parts.fill_sure_head(bench)


def test_a_run_that_is_cut_short_leaves_the_parts_that_ended(monkeypatch, tmp_path):
    class Bench:
        def __init__(self, size, backend):
            pass

        def run(self):
            return {"mfu": 0.3}

        def part(self, name, trace):
            if name == list(gpu_parts.PARTS)[2]:
                raise KeyboardInterrupt
            return {"name": name}

    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "Bench", Bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.backends, "start", lambda parallel: None)
    monkeypatch.setattr(gpu.backends, "stop", lambda: None)
    monkeypatch.setattr(timing, "machine", lambda: {})
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--json"])
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["mfu"] == 0.3 and list(kept["parts"]) == list(gpu_parts.PARTS)[:2]

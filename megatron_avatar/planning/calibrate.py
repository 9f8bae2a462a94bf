"""What this machine does in a second, measured with the code that trains: python -m megatron_avatar.doctor --calibrate.

The plan of a dry run counts with these rates instead of peaks and assumed efficiencies. Alone, or on all ranks of a
torchrun or srun step, which then measure the network too. Takes under two minutes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.planning.batches import pack, seen_pairs
from megatron_avatar.planning.memory import drop_gradients, measure_update
from megatron_avatar.planning.meta import shard_on_meta
from megatron_avatar.planning.seconds import forward_flops
from megatron_avatar.policy.backend import Backend, start, stop
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.groups import GroupBatch
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Prompt

ROUNDS = 5
VOCABULARY = 1024  # of the shortened model: its layers are what is measured
DEEP = 16  # layers of the narrow one that decodes: what a step does outside of them counts little
DECODED = (16, 48)  # tokens, few and many
LAST_ID = 100  # a token of text


def calibrate(path: Path) -> dict[str, Any]:
    """Measure, and write `path` (rank 0). Returns what was found: what seconds.read_rates reads, and of what."""
    threads = torch.get_num_threads()
    backend = start(ParallelConfig(threads=threads))
    try:
        found = _measure(backend)
        if backend.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(path.name + ".tmp")
            aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            aside.replace(path)
        backend.barrier()
        return found
    finally:
        stop()


def _measure(backend: Backend) -> dict[str, Any]:
    on_gpu = backend.device.type == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    # Two layers of the 7B and groups of 8k tokens; on a CPU a layer of the 3B and short groups.
    shape, layers, prompt, completion = (
        ("qwen2_5_omni_7b", 2, 4096, 1024) if on_gpu else ("qwen2_5_omni_3b", 1, 64, 16)
    )
    wide, narrow = _read_shape(shape), _read_shape("tiny_base")
    wide["text_config"] |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    wide["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
    wide["audio_config"] |= {"encoder_layers": 1}
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.processor() or platform.machine()})",
        "dtype": dtype,
        "world": backend.world,
        "bandwidth": _bandwidth(backend),
        "network": _network(backend),
    }
    found |= _layer_rates(wide, backend, dtype, pack([(prompt, [completion] * 4)]))
    found["layer_gap_s"] = _layer_gap(narrow, backend, dtype)
    found["graph_gap_s"] = _graph_gap(narrow, backend, dtype)
    return found | {"date": date.today().isoformat(), "torch": torch.__version__, "megatron": version("megatron-core")}


def _read_shape(name: str) -> dict[str, Any]:
    return json.loads((CONFIG_DIR / "shapes" / name / "config.json").read_text(encoding="utf-8"))


def _seconds(backend: Backend, work: Callable[[], Any]) -> float:
    """Median seconds of `work`, after one call that warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        _wait(backend)
        begin = time.perf_counter()
        work()
        _wait(backend)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _wait(backend: Backend) -> None:
    if backend.device.type == "cuda":
        torch.cuda.synchronize()


def _bandwidth(backend: Backend) -> float:
    """Bytes/s that a copy reads and writes, in blocks that no cache holds."""
    count = 1 << (30 if backend.device.type == "cuda" else 26)
    source = torch.zeros(count, dtype=torch.uint8, device=backend.device)
    target = torch.empty_like(source)
    return 2 * count / _seconds(backend, lambda: target.copy_(source))


def _network(backend: Backend) -> float | None:
    """Bytes/s of an all-reduce over all ranks, as each sends and receives them; None for one rank."""
    if backend.world == 1:
        return None
    count = 1 << (28 if backend.device.type == "cuda" else 22)
    tensor = torch.zeros(count // 4, device=backend.device)
    return 2 * count * (backend.world - 1) / backend.world / _seconds(backend, lambda: dist.all_reduce(tensor))


def _layer_rates(config: dict, backend: Backend, dtype: str, batch: GroupBatch) -> dict[str, float | None]:
    """FLOP/s of a short model's forward pass, and of forward and backward; and how much more memory both took than
    the plan counts (None on a CPU, which doesn't tell, and on ranks other than the first)."""
    model, parallel = ModelConfig(dtype=dtype), ParallelConfig()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        policy = _policy(folder, backend, model)
        flops = forward_flops(
            policy.hf_config, tokens=len(batch), pairs=seen_pairs(batch.segments), outputs=len(batch.target_ids)
        )
        here = batch.to(backend.device)
        forward = _seconds(backend, torch.no_grad()(lambda: policy(here)))
        both = _seconds(backend, lambda: policy(here).sum().backward())
        taken = None
        if backend.device.type == "cuda" and backend.rank == 0:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            policy(here).sum().backward()
            taken = torch.cuda.max_memory_allocated() - before
    total = flops.layers + flops.head
    return {
        "forward_flops": total / forward,
        "train_flops": 3 * total / both,
        "memory_ratio": taken and taken / planned_bytes(config, model, parallel, batch),
    }


def planned_bytes(config: dict, model: ModelConfig, parallel: ParallelConfig, batch: GroupBatch) -> int:
    """What the plan counts for forward and backward over a batch, in a process of its own: groups are running here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for that process; this one has its GPU already
    try:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            return pool.submit(_planned_bytes, folder, model, parallel, batch).result()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _planned_bytes(folder: str, model: ModelConfig, parallel: ParallelConfig, batch: GroupBatch) -> int:
    with shard_on_meta(folder, model, parallel, 0, 0) as policy:
        return measure_update(policy, batch).peak


def _layer_gap(config: dict, backend: Backend, dtype: str) -> float:
    """Seconds that a layer's forward pass takes when there is next to nothing to compute."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        policy = _policy(folder, backend, ModelConfig(dtype=dtype))
        batch = pack([(2, [1])]).to(backend.device)
        return _seconds(backend, torch.no_grad()(lambda: policy(batch))) / policy.config.num_layers


def _graph_gap(config: dict, backend: Backend, dtype: str) -> float:
    """Seconds of a layer in a decode step that computes next to nothing: a replayed graph where there is a GPU."""
    text = {key: value for key, value in config["text_config"].items() if key != "layer_types"}  # one a layer
    config = {**config, "text_config": {**text, "num_hidden_layers": DEEP}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        policy = _policy(folder, backend, ModelConfig(dtype=dtype))
        setattr(policy.hf_config, "eos_token_id", policy.vocab_size)  # noqa: B010  (never drawn)
        prompt = Prompt("", "plain", np.full(2, LAST_ID), np.tile(np.arange(2), (3, 1)))
        few, many = (
            _seconds(backend, partial(generate, policy, [prompt], 1, SamplingConfig(max_new_tokens=tokens), [""]))
            for tokens in DECODED
        )
    return max(many - few, 1e-9) / (DECODED[1] - DECODED[0]) / DEEP


def _policy(folder: str, backend: Backend, model: ModelConfig) -> OmniPolicy:
    """A policy with random weights whose gradients are dropped as they come, as Megatron-Core's buffers take them;
    layers that add theirs to such buffers by themselves (Apex, Transformer Engine) find some."""
    policy = build_policy(folder, backend, model, ParallelConfig())
    parameter: Any
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad and policy.config.gradient_accumulation_fusion:
            parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            parameter.grad_added_to_main_grad = False
    drop_gradients(policy)
    return policy.train()

"""What only a GPU can show, in under a minute: its kernels against the CPU's, and a step from sampling to checkpoint.

    python -m pytest -m gpu
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig, SamplingConfig
from megatron_avatar.policy.attention import group_attention
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.kept import Kept
from megatron_avatar.policy.logprobs import completion_logprobs
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Group, Trajectory
from megatron_avatar.resilience import checkpoint
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import KINDS, TEXT, tiny_config, tiny_prompts, tiny_thinker

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    config = tiny_config(layers=2, qwen=True)
    config.eos_token_id = 7
    tiny_thinker(config).save_pretrained(path)
    return path


def make_policy(folder: Path, backend, dtype: str = "bfloat16"):
    policy = build_policy(folder, backend, ModelConfig(dtype=dtype), ParallelConfig(recompute="selective"))
    load_hf(policy, folder)
    return policy


def error_of(policy, prompts, media) -> float:
    """mean exp|difference| of completions sampled now, between what generation records and fresh scores."""
    with torch.no_grad():
        media = policy.embed_media(prompts) if media is None else media
        rows = generate(policy, prompts, 3, SamplingConfig(max_new_tokens=12), list(KINDS), media=media)
        batch = pack_groups(prompts, [[c.token_ids for c in part] for part in rows]).to(policy.backend.device)
        scores = policy(batch, media)[0].cpu().numpy()
    recorded = np.concatenate([c.logprobs for part in rows for c in part])
    return float(np.exp(np.abs(scores - recorded)).mean())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.cpu().double() - theirs.cpu().double()).norm() / theirs.cpu().double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-3)])
def test_group_attention_equals_the_cpu(dtype, tolerance):
    """Value and gradient, ragged completions, 7 queries a key as Qwen has them."""
    prompts = list(tiny_prompts(tiny_config()).values())
    rng = np.random.default_rng(0)
    segments = pack_groups(prompts, [[rng.integers(0, TEXT, n) for n in (40, 3, 17)] for _ in prompts]).segments
    size = int(segments[:, 1].sum())
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, heads, 128, generator=generator) for heads in (14, 2, 2, 14)]

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        *qkv, probe = (x.to(device, dtype) for x in inputs)
        qkv = [x.requires_grad_() for x in qkv]
        output = group_attention(*qkv, segments, 128**-0.5)
        return [output.detach(), *torch.autograd.grad(output, qkv, probe)]

    for ours, theirs in zip(run("cuda", dtype), run("cpu", torch.float32), strict=True):
        assert relative(ours, theirs) < tolerance


def test_log_probabilities_equal_the_cpu():
    """bfloat16 at Qwen's vocabulary, in several chunks: float32 sums, which only the inputs' rounding sets apart."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).div(8).bfloat16() for n in (96, 152_064))
    ids = torch.randint(151_936, (96,), generator=generator)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        scores, entropy = completion_logprobs(
            *inputs, ids.to(device), temperature=0.9, vocab_size=151_936, chunk_logits=1 << 22
        )
        return [scores.detach(), entropy, *torch.autograd.grad(scores.sum(), inputs)]

    ours, theirs = run("cuda", torch.bfloat16), run("cpu", torch.float32)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert float((a.cpu() - b).abs().max()) < 1e-3
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert relative(a, b) < 0.02


def test_training_sees_what_generation_recorded(folder, backend):
    """Prompts of every kind, decoded by CUDA graphs: equal to 2 % in half precision, in float32 to 1e-3."""
    for dtype, limit in (("bfloat16", 1.02), ("float16", 1.02), ("float32", 1.001)):
        policy = make_policy(folder, backend, dtype)
        prompts = list(tiny_prompts(policy.hf_config).values())
        media = policy.embed_media(prompts)
        rows = generate(policy, prompts, 4, SamplingConfig(max_new_tokens=24), list(KINDS), media=media)
        again = generate(policy, prompts, 4, SamplingConfig(max_new_tokens=24), list(KINDS), media=media)
        assert all(
            np.array_equal(a.token_ids, b.token_ids) for x, y in zip(rows, again, strict=True)
            for a, b in zip(x, y, strict=True)
        )  # fmt: skip
        batch = pack_groups(prompts, [[c.token_ids for c in part] for part in rows]).to(backend.device)
        with torch.no_grad():
            scores = policy(batch, media)[0].cpu().numpy()
        recorded = np.concatenate([c.logprobs for part in rows for c in part])
        assert np.exp(np.abs(scores - recorded)).mean() < limit


@pytest.mark.parametrize(("dtype", "train_towers"), [("bfloat16", False), ("bfloat16", True), ("float16", False)])
def test_a_step_in_half_precision_and_its_checkpoint(folder, backend, tmp_path, dtype, train_towers):
    """Updates lower the loss of favoured completions; a restored run takes the same next step."""

    def trainer():
        policy = make_policy(folder, backend, dtype)
        policy.set_train_towers(train_towers)
        optimization = build_optimizer(policy, OptimConfig(schedule="constant"), lr=2e-5, total_steps=20)
        return Learner(policy, optimization, backend, RLConfig(tokens_per_micro_batch=300), train_towers=train_towers)

    one = trainer()
    one.snapshot_reference()
    prompts = list(tiny_prompts(one.policy.hf_config).values())
    media = one.policy.embed_media(prompts)
    sampled = generate(one.policy, prompts, 3, SamplingConfig(max_new_tokens=12), list(KINDS), media=media)
    groups = []
    for prompt, rows in zip(prompts, sampled, strict=True):
        trajectories = [Trajectory(prompt.sample_id, "plain", c, 0.5, {}, 0.0, "", "", 0, 0) for c in rows]
        groups.append(Group(prompt, trajectories, np.array([1, -1, 0], np.float32), np.ones(3, bool)))
    reference = one.reference_logprobs(groups, media)

    def update(learner: Learner) -> dict:
        return learner.update(groups, media, reference, n_on=12, n_off=0, check_logprobs=False)

    first = update(one)
    assert first["logprob_error"] < 1.05 and not first["skipped"] and first["grad_norm"] > 0
    path = checkpoint.save(
        tmp_path, 1, policy=one.policy, optimization=one.optimization, reference=one.reference, state={"note": 1},
        backend=backend, keep=1,
    )  # fmt: skip
    second = update(one)
    assert float(second["loss"]) < float(first["loss"])
    kept = one.policy.kept_generation
    assert isinstance(kept, Kept) and any(decoder._graphs for decoder in kept.decoders)
    assert error_of(one.policy, prompts, None if train_towers else media) < 1.02, "graphs see the weights of now"
    assert one.policy.kept_generation is kept

    other = trainer()
    other.snapshot_reference()
    state = checkpoint.load(
        path, policy=other.policy, optimization=other.optimization, reference=other.reference, backend=backend
    )
    assert state == {"note": 1}
    resumed = update(other)
    assert float(resumed["loss"]) == pytest.approx(float(second["loss"]), abs=1e-4)
    assert resumed["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-2)

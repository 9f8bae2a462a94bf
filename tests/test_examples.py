"""The examples run, and compute what the trainer computes."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Completion, Group, Sample, Trajectory
from megatron_avatar.rl.rewards import own
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import tiny_config, tiny_prompts, tiny_thinker

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_one_step_has_the_trainers_loss(backend, tmp_path):
    """Fresh and replayed completions of one prompt, a policy that has moved since, a reference that hasn't."""
    one_step, config = example("one_step"), tiny_config(layers=2)
    thinker = tiny_thinker(config)
    thinker.save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(path=str(tmp_path)), ParallelConfig())
    load_hf(policy, tmp_path)
    prompt, rng = tiny_prompts(config)["text"], np.random.default_rng(0)
    completions = [Completion(rng.integers(0, 180, n), -4 - rng.random(n, np.float32), True) for n in (3, 5, 1, 4)]
    on, advantages = np.array([True, True, False, False]), np.array([0.7, -1.2, 0.4, -2.0], np.float32)
    rows = [Trajectory("text", "plain", c, 0.5, {}, 0.0, "", "", 0, 0) for c in completions]
    settings = RLConfig(beta=one_step.BETA, alpha=one_step.ALPHA, dual_clip=one_step.DUAL_CLIP)
    assert (settings.shaping.lam, settings.clip_low, settings.clip_high) == (one_step.LAMBDA, *[one_step.CLIP] * 2)
    learner = Learner(policy, build_optimizer(policy, OptimConfig(), lr=1e-3, total_steps=3), backend, settings)
    reference = [[np.full(len(c), -5.0, np.float32) for c in completions]]
    stats = learner.update([Group(prompt, rows, advantages, on)], [None], reference, n_on=2, n_off=2,
                           check_logprobs=False)  # fmt: skip

    def score(ids, tokens):
        logits = thinker(input_ids=torch.cat([torch.tensor(ids), tokens])[None]).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    theirs = one_step.loss([
        one_step.Row(prompt.token_ids.tolist(), ("text", "plain"), torch.from_numpy(c.token_ids),
                     torch.from_numpy(c.logprobs), 0.5, bool(fresh), float(advantage))
        for c, fresh, advantage in zip(completions, on, advantages, strict=True)
    ], score, lambda _, tokens: torch.full((len(tokens),), -5.0))  # fmt: skip
    assert float(stats["loss"]) == pytest.approx(float(theirs), rel=1e-5)


def test_one_step_replays_and_hints():
    one_step = example("one_step")
    torch.manual_seed(0)
    model, memory = one_step.tiny_model(), one_step.Memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(one_step.PATIENCE + 2):
        assert 0 <= one_step.step(model, lambda _, tokens: torch.zeros(len(tokens)), optimizer, "21", memory) <= 1
    assert ("21", "hinted") in memory.buffer and len(memory.buffer["21", "plain"]) == one_step.PATIENCE * one_step.N_ON
    key = ("21", "plain")
    memory.buffer[key][0].reward = 1.0
    (replayed,) = [one_step.replayed_group(memory)]
    assert replayed and all(row.advantage and not row.on_policy for row in replayed)


def test_one_step_is_short():
    assert len((EXAMPLES / "one_step.py").read_text().splitlines()) < 200


def test_the_reward_of_ones_own_is_one(capsys):
    sample = Sample("id", "visual", "train", "what", "Which colour is it?", "red", "free_form")
    for name in ("short", "names_what_is_asked"):
        place = f"{EXAMPLES / 'own_reward.py'}:{name}"
        own.check({name: place})
        own.try_on(name, place, sample)
    assert own.score("short", f"{EXAMPLES / 'own_reward.py'}:short", ["a " * 60], sample) == [0.5]

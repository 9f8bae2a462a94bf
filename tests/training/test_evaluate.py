"""Answers of the policy: which randomness draws them, and what stands for a sample that has none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.records import Completion, Prompt, Sample
from megatron_avatar.training import evaluate

SAMPLES = [Sample(f"s{k}", "v", "eval", "f", "?", "1", "numerical") for k in range(5)]
ALONE = SimpleNamespace(dp=1, dp_rank=0, tp=1, pp=1, all_gather_object_dp=lambda value: [value])


class Loader:
    """Prompts that are their samples' names; s3 is damaged."""

    quarantined = {"s3": "s3.webm is damaged"}

    def get(self, requests):
        made = [Prompt(s.id, variant, np.zeros(1), np.zeros((3, 1))) for s, variant in requests]
        return [None if prompt.sample_id == "s3" else prompt for prompt in made]

    def prefetch(self, requests):
        pass


@pytest.fixture
def ask(monkeypatch):
    """answers(...) of an engine whose completion k of a prompt is (its key, k) in letters; also what it was asked."""
    asked, known = [], []

    def generate(policy, prompts, n, sampling, keys, *, greedy, **_):
        asked.append((keys, greedy))
        rows = []
        for key in keys:
            known.extend(f"{key}#{k}" for k in range(n))
            ids = range(len(known) - n, len(known))
            rows.append([Completion(np.array([k]), np.zeros(1, np.float32), True) for k in ids])
        return rows

    monkeypatch.setattr(evaluate, "generate", generate)
    policy = SimpleNamespace(embed_media=lambda prompts: [None] * len(prompts))
    builder = SimpleNamespace(decode=lambda ids: known[ids[0]])

    def ask(samples=SAMPLES, backend=ALONE, **kwargs):
        found = evaluate.answers(policy, backend, builder, Loader(), samples, sampling=SamplingConfig(), **kwargs)
        return [[a.error or a.text for a in rows] for rows in found]

    ask.asked = asked
    return ask


def test_drawn_answers_depend_on_seed_and_sample_and_on_nothing_else(ask):
    drawn = ask(n=2, greedy=False, seed=3)
    assert len({text for rows in drawn for text in rows}) == 4 * 2 + 1 and not any(greedy for _, greedy in ask.asked)
    assert drawn == ask(n=2, greedy=False, seed=3, batch=2)
    assert drawn[::-1] == ask(SAMPLES[::-1], n=2, greedy=False, seed=3)
    other = ask(n=2, greedy=False, seed=4)
    assert drawn[3] == other[3] == ["s3.webm is damaged"] * 2
    assert all(a != b for k in (0, 1, 2, 4) for a, b in zip(drawn[k], other[k], strict=True))


def test_two_replicas_share_the_samples_and_know_all_answers(ask):
    """Each is asked for its own, as often as the other; what they gather is in the samples' order."""
    parts = []
    for rank in (0, 1):
        own = SimpleNamespace(dp=2, dp_rank=rank, tp=1, pp=1, all_gather_object_dp=lambda v: parts.append(v) or [v])
        with pytest.raises(KeyError):  # the other's are missing as yet
            ask(backend=own, batch=1)
    assert [sorted(part) for part in parts] == [["s0", "s2", "s4"], ["s1", "s3"]]
    assert len(ask.asked) == 6, "a rank without samples calls the engine too, whose ranks wait for each other"
    both = SimpleNamespace(dp=2, dp_rank=0, tp=1, pp=1, all_gather_object_dp=lambda _: parts)
    assert [len(rows) for rows in ask(backend=both)] == [1] * 5


def test_a_held_out_answer_is_right_or_wrong_and_a_damaged_sample_is_wrong(ask, monkeypatch):
    monkeypatch.setattr(evaluate, "answers", lambda *_, sampling, **__: [
        [evaluate.Answer(f"<think>x</think><answer>{text}</answer>")] if text else [evaluate.Answer(error="damaged")]
        for text in ("1", "2", "", "1.0", "one")])  # fmt: skip
    found = evaluate.evaluate(None, ALONE, None, None, SAMPLES, max_new_tokens=8)
    assert found == [1.0, 0.0, 0.0, 1.0, 1.0]

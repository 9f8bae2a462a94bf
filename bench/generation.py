"""Sampling a group of completions a prompt, against transformers' generate of the same weights.

Usage: python -m bench.generation [--json]. Both sample 8 completions of 64 tokens for each of 8 prompts, in float32
at temperature 1 over the full softmax, with as many threads; nothing ends early. Figures are sampled tokens a second,
medians of runs taken in turns, for prompts of 512 and of 2,048 tokens. A first round, not counted, finds out whether
transformers is faster with its default cache or with its static one.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from bench.timing import JSON_HELP, in_turns, medians, report
from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt

PROMPTS, COMPLETIONS, NEW_TOKENS = 8, 8, 64
CACHES = ("dynamic", "static")  # of transformers
VOCABULARY = 4096
THREADS = 2
TEXT = 4000  # ids below are text


def make_model() -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A Thinker of 2 M parameters, random. Its stop token lies beyond the vocabulary, so that nothing ends early."""
    hidden = 128
    config = Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            num_hidden_layers=4,
            hidden_size=hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=512,
            max_position_embeddings=4096,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
        ),
        vision_config=dict(
            depth=1, hidden_size=32, num_heads=2, intermediate_size=64, fullatt_block_indexes=[0],
            out_hidden_size=hidden,
        ),
        audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
                          output_dim=hidden),
        audio_token_index=4090, image_token_index=4091, video_token_index=4092,
        audio_start_token_id=4093, audio_end_token_id=4094, vision_start_token_id=4088, vision_end_token_id=4089,
    )  # fmt: skip
    config.eos_token_id = VOCABULARY
    torch.manual_seed(0)
    return Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def as_policy(model: Qwen2_5OmniThinkerForConditionalGeneration) -> OmniPolicy:
    """Our policy of the same weights; starts the backend."""
    parallel = ParallelConfig(threads=THREADS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        policy = build_policy(folder, backends.start(parallel), ModelConfig(path=folder), parallel)
        load_hf(policy, Path(folder))
    return policy


def make_prompts(length: int) -> list[Prompt]:
    ids = np.random.default_rng(length).integers(0, TEXT, (PROMPTS, length))
    positions = np.tile(np.arange(length), (3, 1))
    return [Prompt(f"{length}/{i}", "plain", row, positions) for i, row in enumerate(ids)]


def contestants(
    policy: OmniPolicy, model: Qwen2_5OmniThinkerForConditionalGeneration, length: int
) -> dict[str, Callable[[], Any]]:
    """The same work by name; each checks that it did it."""
    prompts = make_prompts(length)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    ids = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts]))

    def ours() -> None:
        groups = generate(policy, prompts, COMPLETIONS, sampling, [prompt.sample_id for prompt in prompts])
        assert sum(len(row) for group in groups for row in group) == PROMPTS * COMPLETIONS * NEW_TOKENS

    def transformers(cache: str) -> None:
        rows = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_return_sequences=COMPLETIONS, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
            cache_implementation=cache,
        )  # fmt: skip
        assert rows.shape == (PROMPTS * COMPLETIONS, length + NEW_TOKENS)

    return {"ours": ours, **{cache: functools.partial(transformers, cache) for cache in CACHES}}


def measure(policy: OmniPolicy, model: Qwen2_5OmniThinkerForConditionalGeneration, length: int, rounds: int) -> dict:
    work = contestants(policy, model, length)
    first = medians(in_turns(work, 1, warmup=0))
    cache = min(CACHES, key=first.get)
    seconds = medians(in_turns({"ours": work["ours"], cache: work[cache]}, rounds, warmup=0))
    tokens = PROMPTS * COMPLETIONS * NEW_TOKENS
    return {
        "ours_tok_s": round(tokens / seconds["ours"]),
        "hf_tok_s": round(tokens / seconds[cache]),
        "speedup": round(seconds[cache] / seconds["ours"], 2),
        "hf_cache": cache,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    model = make_model()
    with torch.no_grad():
        policy = as_policy(model)
        result = measure(policy, model, 512, rounds=5) | {"at_2048": measure(policy, model, 2048, rounds=3)}
    backends.stop()
    report("generation", result, as_json=arguments.json, keep=True)


if __name__ == "__main__":
    main()

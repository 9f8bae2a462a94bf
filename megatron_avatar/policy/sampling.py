"""One token a row: the draw, what may be drawn, and the random numbers behind it.

What is recorded is the log-probability under the full softmax at the sampling temperature over the unpadded
vocabulary: what the training forward computes for the same token. Tokens that must not be sampled, top_k and top_p
only renormalise the draw, so they never show in the record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_avatar.config.families import family_of
from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.policy.kernels.draw import draw_tokens, find
from megatron_avatar.policy.model import OmniPolicy

CONTROL_TOKENS = (
    "image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id",
    "audio_start_token_id", "audio_end_token_id", "bos_token_id", "pad_token_id",
)  # fmt: skip


def truncates(sampling: SamplingConfig) -> bool:
    """Whether some tokens of the policy can't be drawn."""
    return sampling.top_k > 0 or sampling.top_p < 1


def draw(
    logits: Tensor, uniforms: Tensor | None, sampling: SamplingConfig, banned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF, its log-probability under the full softmax at the temperature, and the share of
    the probability that top_k and top_p cut off (0 where they are off).

    logits [R, V]; uniforms [R] float64 in [0, 1), None takes the most likely token; banned [V] bool, never drawn.
    top_k keeps the k most likely allowed tokens (and those that tie with the last); top_p of these the fewest
    that reach the share. Returns ids [R] int64, logprobs and shares [R] float32; for logits that are not finite
    some id, and NaN.
    """
    if uniforms is None or not truncates(sampling):
        ids, logprobs = draw_tokens(logits, uniforms, sampling.temperature, banned)
        return ids, logprobs, torch.zeros_like(logprobs)
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    mass = logprobs.masked_fill(banned, float("-inf")).double().exp()
    whole = mass.sum(dim=-1)
    if 0 < sampling.top_k < mass.shape[-1]:
        least = mass.topk(sampling.top_k, dim=-1).values[:, -1:]
        mass = mass.where(mass >= least, 0.0)
    if sampling.top_p < 1:
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(before < sampling.top_p * mass.sum(dim=-1, keepdim=True), 0.0)
        mass = torch.zeros_like(mass).scatter(-1, order, ordered)
    ids = find(mass, mass.cumsum(dim=-1), uniforms[:, None])
    cut = (1 - mass.sum(dim=-1) / whole).clamp(min=0).float()
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0], cut


def _named(policy: OmniPolicy, name: str) -> Any:
    """What config.json calls `name`: Omni's Thinker at the top, VL with the text's settings."""
    found = getattr(policy.hf_config, name, None)
    return getattr(policy.hf_config.text_config, name, None) if found is None else found


def uniforms(key: str, completion: int, count: int) -> np.ndarray:
    """Uniform numbers [count] in [0, 1) of a completion; number t belongs to token t, whatever the count."""
    return keyed_rng(key, completion).random(count)


def stop_token_ids(policy: OmniPolicy) -> list[int]:
    """Tokens that end a completion: `eos_token_id` of the model's config.json (Qwen's <|im_end|>), and what else the
    family's `ends` name."""
    first, *more = (_named(policy, key) for key in family_of(policy.hf_config.model_type).ends)
    if first is None:
        raise ValueError(
            "config.json of the model names no eos_token_id, so a completion would never end: add the id of "
            "<|im_end|> to its (thinker_)config"
        )
    first = [first] if isinstance(first, int) else first
    return list(dict.fromkeys([*first, *(token for token in more if token is not None)]))


def banned_tokens(policy: OmniPolicy) -> Tensor:
    """Control tokens [V] bool: they belong to prompts; a placeholder in a completion would ask for media."""
    stops = stop_token_ids(policy)
    ids = {_named(policy, name) for name in CONTROL_TOKENS} - {None, *stops}
    if len(stops) == 2 and abs(stops[0] - stops[1]) == 2:  # <|im_start|> stands between the two, and VL doesn't name it
        ids.add(sum(stops) // 2)
    banned = torch.zeros(policy.vocab_size, dtype=torch.bool, device=policy.backend.device)
    banned[[i for i in ids if i < policy.vocab_size]] = True
    return banned

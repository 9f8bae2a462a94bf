"""Generation by the policy that trains: every prompt is read once, its n completions decode against one cache.

What is recorded is the log-probability under the full softmax at the sampling temperature over the unpadded
vocabulary: what the training forward computes for the same token. Tokens that must not be sampled (media
placeholders and other control tokens), top_k and top_p only renormalise the draw, so they never show in the record.

Randomness is keyed: one uniform number for each (key, completion index, token position), whatever else is in the
batch and however ranks share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.policy.attention import pack_groups
from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Completion, Prompt

CONTROL_TOKENS = (
    "image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id",
    "audio_start_token_id", "audio_end_token_id", "bos_token_id", "pad_token_id",
)  # fmt: skip


class GenerationStopped(Exception):
    """The `stop` callable asked for the end; nothing was generated. Keyed randomness repeats the call exactly."""


@torch.no_grad()
def generate(
    policy: OmniPolicy,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingConfig,
    keys: Sequence[str],
    *,
    media: Sequence[Tensor | None] | None = None,
    stop: Callable[[], bool] | None = None,
    greedy: bool = False,
) -> list[list[Completion]]:
    """n completions of each prompt, sampled (or the most likely token each time, if `greedy`).

    `keys` name each prompt's randomness (seed, stage, step, sample id, occurrence). `media` is embed_media's list;
    None lets the policy embed. All ranks of a model replica call it alike and get the same result. `stop` is polled
    at every token; the rank that samples (last stage, first tensor rank) decides for its replica.

    A completion ends with a stop token, which belongs to it, or unfinished after sampling.max_new_tokens.
    Raises GenerationStopped when `stop` says so; ValueError for settings out of range.
    """
    if sampling.temperature <= 0 or sampling.max_new_tokens < 1 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"sampling needs temperature > 0, max_new_tokens >= 1, top_k >= 0 and 0 < top_p <= 1, got {sampling}; "
            "for the most likely token each time, ask for greedy generation"
        )
    if len(keys) != len(prompts) or n < 1:
        raise ValueError(f"{len(prompts)} prompts need as many keys, got {len(keys)}, and n >= 1, got {n}")
    if not prompts:
        return []
    stop_ids, banned = stop_token_ids(policy), _banned_tokens(policy)
    media = policy.embed_media(prompts) if media is None else media
    limit, rows = sampling.max_new_tokens, len(prompts) * n
    tokens, logprobs = np.zeros((rows, limit), np.int64), np.zeros((rows, limit), np.float32)
    lengths, finished = np.zeros(rows, np.int64), np.zeros(rows, bool)
    uniforms = None if greedy else np.stack([_uniforms(key, i, limit) for key in keys for i in range(n)])
    starts = np.array([prompt.next_position for prompt in prompts])
    cache = KeyValueCache([len(prompt) for prompt in prompts], n)
    alive = np.arange(len(prompts))  # prompts with unfinished rows; these are the batch

    with _generating(policy, cache):
        logits = _read_prompts(policy, prompts, media, n)
        cache.start()
        for step in range(limit):
            now = (alive[:, None] * n + np.arange(n)).ravel()
            drawn = None
            if logits is not None:
                u = None if uniforms is None else torch.from_numpy(uniforms[now, step]).to(logits.device)
                drawn = draw(logits, u, sampling, banned)
            ids, scores = _agree(policy, drawn, len(now), stop)
            tokens[now, step], logprobs[now, step] = ids, scores
            lengths[now] += ~finished[now]
            finished[now] |= np.isin(ids, stop_ids)
            left = ~finished.reshape(-1, n)[alive].all(axis=1)
            if not left.any() or step + 1 == limit:
                break
            if not left.all():
                alive, ids = alive[left], ids.reshape(-1, n)[left].ravel()
                cache.keep(left.nonzero()[0].tolist())
            logits = _decode(policy, ids, np.repeat(starts[alive] + step, n))
            cache.advance()

    completions = [
        Completion(tokens[row, :length].copy(), logprobs[row, :length].copy(), bool(done))
        for row, (length, done) in enumerate(zip(lengths, finished, strict=True))
    ]
    return [completions[i * n : (i + 1) * n] for i in range(len(prompts))]


def draw(logits: Tensor, uniforms: Tensor | None, sampling: SamplingConfig, banned: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability under the full softmax at the temperature.

    logits [R, V]; uniforms [R] float64 in [0, 1), None takes the most likely token; banned [V] bool, never drawn.
    top_k keeps the k most likely allowed tokens (and those that tie with the last); top_p of these the fewest
    that reach the share. Returns ids [R] int64, logprobs [R] float32.
    """
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    allowed = logprobs.masked_fill(banned, float("-inf"))
    if uniforms is None:
        ids = allowed.argmax(dim=-1, keepdim=True)
    else:
        mass = allowed.double().exp()
        if 0 < sampling.top_k < mass.shape[-1]:
            least = mass.topk(sampling.top_k, dim=-1).values[:, -1:]
            mass = mass.where(mass >= least, 0.0)
        if sampling.top_p < 1:
            ordered, order = mass.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.where(before < sampling.top_p * mass.sum(dim=-1, keepdim=True), 0.0)
            mass = torch.zeros_like(mass).scatter(-1, order, ordered)
        cdf = mass.cumsum(dim=-1)
        total = cdf[:, -1:]
        # Below the total even after rounding, so that the token found always has mass.
        point = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, point, right=True)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def stop_token_ids(policy: OmniPolicy) -> list[int]:
    """Tokens that end a completion: `eos_token_id` of the model's config.json (Qwen's <|im_end|>)."""
    config = policy.hf_config
    ids = getattr(config, "eos_token_id", None)
    ids = getattr(config.text_config, "eos_token_id", None) if ids is None else ids
    if ids is None:
        raise ValueError(
            "config.json of the model names no eos_token_id, so a completion would never end: add the id of "
            "<|im_end|> to its (thinker_)config"
        )
    return [ids] if isinstance(ids, int) else list(ids)


def _banned_tokens(policy: OmniPolicy) -> Tensor:
    """Control tokens [V] bool: they belong to prompts; a placeholder in a completion would ask for media."""
    ids = {getattr(policy.hf_config, name, None) for name in CONTROL_TOKENS} - {None, *stop_token_ids(policy)}
    banned = torch.zeros(policy.vocab_size, dtype=torch.bool, device=policy.backend.device)
    banned[[i for i in ids if i < policy.vocab_size]] = True
    return banned


def _uniforms(key: str, completion: int, count: int) -> np.ndarray:
    """Uniform numbers [count] in [0, 1) of a completion; number t belongs to token t, whatever the count."""
    digest = hashlib.blake2b(f"{key}/{completion}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64))).random(count)


@contextmanager
def _generating(policy: OmniPolicy, cache: KeyValueCache) -> Iterator[None]:
    """Evaluation mode, with `cache` in every core attention of this stage."""
    attentions = [layer.self_attention.core_attention for layer in policy.language_model.decoder.layers]
    training = policy.training
    policy.eval()
    for attention in attentions:
        attention.cache = cache
    try:
        yield
    finally:
        for attention in attentions:
            attention.cache = None
        policy.train(training)


def _read_prompts(
    policy: OmniPolicy, prompts: Sequence[Prompt], media: Sequence[Tensor | None], n: int
) -> Tensor | None:
    """All prompts in one packed row, into the cache; logits [R, V] of the first new token on the last stage."""
    # A group of one completion of one token is the prompt itself, predicting one token.
    one_token = [np.zeros(1, np.int64)]
    batch = pack_groups(prompts, [one_token] * len(prompts)).pad_to(_row_multiple(policy)).to(policy.backend.device)
    hidden = policy.run_pipeline(
        batch.token_ids, batch.positions, batch.segments, media, batch.media_index(policy.placeholder_ids)
    )
    return None if hidden is None else policy.head(hidden[batch.target_index, 0]).repeat_interleave(n, dim=0)


def _decode(policy: OmniPolicy, ids: np.ndarray, positions: np.ndarray) -> Tensor | None:
    """Run one token a row, ids [R] at positions [R]; logits [R, V] of the next on the last stage."""
    device, rows = policy.backend.device, len(ids)
    padding = (0, -rows % _row_multiple(policy))
    token_ids = F.pad(torch.from_numpy(ids).to(device)[None], padding)
    position_ids = F.pad(torch.from_numpy(positions).to(device).expand(3, 1, -1), padding)
    hidden = policy.run_pipeline(token_ids, position_ids, None)
    return None if hidden is None else policy.head(hidden[:rows, 0])


def _row_multiple(policy: OmniPolicy) -> int:
    return policy.backend.tp if policy.config.sequence_parallel else 1


def _agree(
    policy: OmniPolicy, drawn: tuple[Tensor, Tensor] | None, rows: int, stop: Callable[[], bool] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The sampling rank's tokens and log-probabilities [R] on every rank of the replica, on the host.

    All ranks stop, or none: the flag travels with the tokens.
    """
    backend = policy.backend
    packet = torch.zeros(2 * rows + 1, dtype=torch.float64, device=backend.device)  # exact for ids and float32
    if drawn is not None:
        packet[:rows], packet[rows:-1] = drawn
    if stop is not None and stop():
        packet[-1] = 1
    if backend.tp * backend.pp > 1:
        group = parallel_state.get_model_parallel_group()
        dist.broadcast(packet, dist.get_process_group_ranks(group)[-backend.tp], group)
    values = packet.cpu().numpy()
    if values[-1]:
        raise GenerationStopped
    return values[:rows].astype(np.int64), values[rows:-1].astype(np.float32)

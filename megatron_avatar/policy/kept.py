"""Caches, decoders and graphs that live from one call of `generate` to the next, where they are small.

An update changes the weights in place, so a graph that was captured before it is good after it. What makes one useless
is a weight that has moved to another address (a stage's new gradient buffers): then the graphs go, and the rest stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.policy.cache import KeyValueCache, Room
from megatron_avatar.policy.decode import Decoder
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.sampling import banned_tokens

SHARE = 0.1  # of a GPU's memory: what is larger is made anew each time, and leaves its room to the update


@dataclass
class Kept:
    """One decoder and its cache for each lane; `manner` and `room` say for which calls they serve."""

    manner: tuple[object, ...]
    room: Room
    addresses: tuple[int, ...]
    decoders: list[Decoder]


def decoders_for(
    policy: OmniPolicy, room: Room, sampling: SamplingConfig, greedy: bool, lanes: int, token_bytes: int,
    make_cache: Callable[[Room], KeyValueCache],
) -> list[Decoder]:  # fmt: skip
    """A decoder for each lane, its cache empty and of at least `room`: those of the call before where they serve.

    `token_bytes`: of a token's keys and values. All ranks of a model replica call it alike.
    """
    manner = (sampling.temperature, sampling.top_k, sampling.top_p, greedy, lanes)
    addresses = tuple(parameter.data_ptr() for parameter in policy.language_model.parameters())
    kept = policy.kept_generation
    if isinstance(kept, Kept) and kept.manner == manner and covers(kept.room, room):
        for decoder in kept.decoders:
            decoder.cache.clear()
            if kept.addresses != addresses:
                decoder.forget()
        kept.addresses = addresses
        return kept.decoders
    policy.kept_generation = None
    room, stays = settled(room, lanes * token_bytes, memory_of(policy.backend.device))
    banned = banned_tokens(policy)
    decoders = [Decoder(policy, make_cache(room), sampling, banned, greedy) for _ in range(lanes)]
    if stays:
        policy.kept_generation = Kept(manner, room, addresses, decoders)
    return decoders


def kept_bytes(policy: OmniPolicy) -> int:
    """Bytes of the caches that the next call may use again, or gives back."""
    kept = policy.kept_generation
    return sum(decoder.cache.bytes for decoder in kept.decoders) if isinstance(kept, Kept) else 0


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU; none, as nothing stays, of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def settled(room: Room, token_bytes: int, memory: float) -> tuple[Room, bool]:
    """The room that caches get where `room` is needed, and whether they stay while the policy is updated, as those do
    that are small against a GPU's `memory` in bytes. `token_bytes`: of a token's keys and values in all lanes. Plans
    ask it too."""
    for choice in (rounded(room), room):
        if token_bytes * tokens_of(choice) <= SHARE * memory:
            return choice, True
    return room, False


def tokens_of(room: Room) -> int:
    """Tokens whose keys and values a cache of that room holds."""
    return room.pages * room.page + room.rows * room.steps


def covers(room: Room, needed: Room) -> bool:
    """Whether a cache of `room` holds everything that one of `needed` would; larger pages, as many of them, do."""
    return all(a >= b for a, b in zip(astuple(room), astuple(needed), strict=True))


def rounded(room: Room) -> Room:
    """The room with counts of pages and rows raised to powers of two, so that the next call's prompts fit too."""
    names = ("pages", "rows", "pages_per_prompt")
    return replace(room, **{name: 1 << (getattr(room, name) - 1).bit_length() for name in names if getattr(room, name)})

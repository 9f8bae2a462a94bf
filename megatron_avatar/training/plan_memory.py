"""The memory of every rank: parameters counted on its shard, activations by running its step on the meta device.

What is run is the code that trains, so that these numbers follow it. Formulas stand where nothing can be run: the
optimizer's state, the cache of generation and the encoders.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.architecture import PolicyConfig, hears
from megatron_avatar.policy.meta import META, LiveBytes, shard_on_meta
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.training.plan_work import Work

GIB = 2**30
MARGIN = 3 * GIB  # CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation: our assumption
SAMPLING_BYTES = 40  # a logit while a token is drawn: float32 and float64 copies of the row (sampling.py)


@dataclass
class RankMemory:
    """Bytes of one rank. The first items stay through a step; of the last three phases only one is there at a time."""

    tp_rank: int
    pp_rank: int
    parameters: int  # how many, encoders included
    trainable: int
    weights: int
    tower_weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int = 0  # kept for the backward pass, of all micro-batches in flight
    workspace: int = 0  # on top of them, at the worst moment of forward and backward
    cache: int = 0  # keys and values in generation
    generation: int = 0  # on top of them: reading the prompts, drawing tokens
    towers: int = 0  # the encoders' forward pass (and what their backward pass needs, where they train)
    margin: int = MARGIN
    towers_train: bool = False

    @property
    def static(self) -> int:
        return self.weights + self.tower_weights + self.gradients + self.optimizer + self.reference + self.margin

    @property
    def total(self) -> int:
        update = self.activations + self.workspace + (self.towers if self.towers_train else 0)
        return self.static + max(update, self.cache + self.generation, self.towers)


def static_memory(policy: OmniPolicy, model: ModelConfig, parallel: ParallelConfig, work: Work, dp: int) -> RankMemory:
    """What a rank holds before it computes anything."""
    policy.set_train_towers(work.train_towers)
    towers = list(policy.towers.parameters()) if policy.pre_process else []
    everything = list(policy.parameters())
    trainable = [p for p in everything if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    # Two moments, and float32 main weights beside bfloat16 ones.
    state = count * (12 if model.dtype == "bfloat16" else 8)
    adapters = model.lora.rank > 0
    return RankMemory(
        tp_rank=policy.backend.tp_rank,
        pp_rank=policy.backend.pp_rank,
        parameters=sum(p.numel() for p in everything),
        trainable=count,
        weights=parameter_bytes(everything) - parameter_bytes(towers),
        tower_weights=parameter_bytes(towers),
        gradients=4 * count,
        optimizer=-(-state // dp) if parallel.distributed_optimizer else state,
        reference=parameter_bytes(trainable) if work.rl and not adapters else 0,
        towers_train=work.train_towers,
    )


def parameter_bytes(parameters: list[torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass over one micro-batch: kept in between, and at the worst moment."""

    kept: int
    peak: int


def measure_update(policy: OmniPolicy, work: Work) -> PassMemory:
    """Forward and backward over the largest micro-batch on the meta device."""
    batch = work.largest_batch().to(META)
    for parameter in policy.parameters():  # Megatron-Core adds gradients to its buffers at once
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    policy.train()
    with LiveBytes() as memory:
        if not policy.pre_process:
            policy.set_input_tensor(_received(policy, len(batch)))
        output = policy(batch)
        kept = memory.live
        output.backward(torch.empty_like(output))
    return PassMemory(kept, memory.peak)


def measure_reading(policy: OmniPolicy, work: Work) -> int:
    """Peak of reading the fresh prompts, keys and values apart."""
    batch = work.prompts_batch().to(META)
    with torch.no_grad(), LiveBytes() as memory:
        if not policy.pre_process:
            policy.set_input_tensor(_received(policy, len(batch)))
        policy(batch)
    return memory.peak


def _received(policy: OmniPolicy, tokens: int) -> torch.Tensor:
    """What the stage before would send: hidden states of `tokens` packed tokens."""
    share = policy.backend.tp if policy.config.sequence_parallel else 1
    shape = -(-tokens // share), 1, policy.config.hidden_size
    return torch.empty(shape, dtype=policy.config.params_dtype, device=META, requires_grad=torch.is_grad_enabled())


def cache_bytes(policy: OmniPolicy, work: Work, n_on: int) -> int:
    """Keys and values of the fresh prompts, once each, and of all tokens of their completions, on this rank."""
    config = policy.config
    heads = max(1, config.num_query_groups // policy.backend.tp)
    token = 2 * heads * config.kv_channels * config.params_dtype.itemsize * len(policy.language_model.decoder.layers)
    return token * work.fresh * (work.prompt + n_on * work.completion)


def tower_bytes(hf_config: PolicyConfig, work: Work, itemsize: int, prompts: int) -> int:
    """The encoders over the media of `prompts` prompts: one layer's tensors, of all layers where they train.

    A layer holds its input, its norm, q, k, v, attention and its feed-forward's inner tensors side by side.
    """
    vision = hf_config.vision_config
    patches = work.visual * vision.spatial_merge_size**2 * prompts
    width = 8 * vision.hidden_size + 3 * vision.intermediate_size
    peak = patches * width * (vision.depth if work.train_towers else 1)
    if hears(hf_config) and work.audio:
        audio = hf_config.audio_config
        frames = work.audio * 2 * prompts
        width = 8 * audio.d_model + 2 * audio.encoder_ffn_dim
        # Two convolutions come first, over twice as many frames.
        peak = max(peak, frames * width) if not work.train_towers else peak + frames * width * audio.encoder_layers
    kept = (work.visual + work.audio) * prompts * hf_config.text_config.hidden_size
    return (peak + kept) * itemsize


def rank_memories(
    folder: str, model: ModelConfig, parallel: ParallelConfig, work: Work, dp: int, n_on: int, ratio: float = 1.0
) -> list[RankMemory]:
    """Every rank of a model replica. Shards of the same stage differ in nothing but their number.

    `ratio` corrects what is computed with (calibration). Raises ValueError where the model doesn't split.
    """
    ranks = []
    for pp_rank, tp_rank in itertools.product(range(parallel.pp), range(parallel.tp)):
        with shard_on_meta(folder, model, parallel, tp_rank, pp_rank) as policy:
            memory = static_memory(policy, model, parallel, work, dp)
            if tp_rank == 0:
                add_dynamic(memory, policy, work, n_on, ratio)
            else:
                first = ranks[-1]
                for item in ("activations", "workspace", "cache", "generation", "towers"):
                    setattr(memory, item, getattr(first, item))
            ranks.append(memory)
    return ranks


def add_dynamic(memory: RankMemory, policy: OmniPolicy, work: Work, n_on: int, ratio: float) -> None:
    """Fill in what comes and goes within a step."""
    update = measure_update(policy, work)
    in_flight = min(policy.backend.pp - policy.backend.pp_rank, len(work.micro_batches))
    memory.activations = round(ratio * update.kept * in_flight)
    memory.workspace = round(ratio * (update.peak - update.kept))
    if work.fresh:
        memory.cache = cache_bytes(policy, work, n_on)
        drawing = work.fresh * n_on * policy.vocab_size * SAMPLING_BYTES * policy.post_process
        memory.generation = round(ratio * max(measure_reading(policy, work), drawing))
    if policy.pre_process:
        prompts = len(work.completions)
        itemsize = policy.config.params_dtype.itemsize
        memory.towers = round(ratio * tower_bytes(policy.hf_config, work, itemsize, prompts))


def largest(ranks: list[RankMemory]) -> RankMemory:
    return max(ranks, key=lambda rank: rank.total)

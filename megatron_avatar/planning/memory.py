"""The memory of every rank: parameters counted on its shard, activations by running its step on the meta device.

What is run is the code that trains, so that these numbers follow it. Formulas stand where nothing can be run: the
optimizer's state, the cache of generation and the encoders.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_avatar.config.families import family_of
from megatron_avatar.config.schema import Config, ModelConfig, ParallelConfig
from megatron_avatar.planning.batches import micro_batches, reading_batch
from megatron_avatar.planning.meta import META, LiveBytes, shard_on_meta
from megatron_avatar.planning.outline import GIB, itemsizes, margin
from megatron_avatar.planning.work import Work
from megatron_avatar.policy.architecture import PolicyConfig
from megatron_avatar.policy.groups import GroupBatch
from megatron_avatar.policy.kept import settled, tokens_of
from megatron_avatar.policy.lanes import make_jobs, plan_room
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.sampling import truncates
from megatron_avatar.policy.shape import deepstack_layers, hears
from megatron_avatar.policy.towers import ROWS_PER_CALL, audio_window

# A logit while a token is drawn: float32 and float64 copies of the row (sampling.py), or, where the kernel draws, a
# rank's own, those of all ranks, and their copy in one piece.
SAMPLING_BYTES, DRAWN_BYTES = 40, 12


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
    margin: int = 0
    towers_train: bool = False
    cache_stays: bool = False  # while the policy is updated (policy/kept.py)

    @property
    def static(self) -> int:
        return self.weights + self.tower_weights + self.gradients + self.optimizer + self.reference + self.margin

    @property
    def total(self) -> int:
        update = self.activations + self.workspace + (self.towers if self.towers_train else 0)
        stays = self.cache if self.cache_stays else 0
        return self.static + max(update + stays, self.cache + self.generation, self.towers + stays)


def static_memory(
    policy: OmniPolicy, model: ModelConfig, parallel: ParallelConfig, work: Work, dp: int, *, towers_ever: bool = False
) -> RankMemory:
    """What a rank holds before it computes anything. `towers_ever`: the encoders train in some stage of the run, whose
    optimizer then keeps their state in every stage."""
    towers = list(policy.towers.parameters()) if policy.pre_process else []
    everything = list(policy.parameters())
    policy.set_train_towers(work.train_towers or towers_ever)
    count = sum(p.numel() for p in everything if p.requires_grad)
    policy.set_train_towers(work.train_towers)
    trainable = [p for p in everything if p.requires_grad]
    state = count * itemsizes(model)[1]
    return RankMemory(
        tp_rank=policy.backend.tp_rank,
        pp_rank=policy.backend.pp_rank,
        parameters=sum(p.numel() for p in everything),
        trainable=count,
        weights=parameter_bytes(everything) - parameter_bytes(towers),
        tower_weights=parameter_bytes(towers),
        gradients=4 * count,
        optimizer=-(-state // dp) if parallel.distributed_optimizer else state,
        reference=parameter_bytes(trainable) if work.rl else 0,  # a copy of what trains
        towers_train=work.train_towers,
    )


def parameter_bytes(parameters: list[torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass over one micro-batch: kept in between, and at the worst moment."""

    kept: int
    peak: int


def drop_gradients(policy: OmniPolicy) -> None:
    """Free gradients as they come, as Megatron-Core does, which adds them to its buffers at once."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def measure_update(policy: OmniPolicy, batch: GroupBatch) -> PassMemory:
    """Forward and backward of a shard on the meta device over a micro-batch."""
    batch = batch.to(META)
    drop_gradients(policy)
    policy.train()
    with LiveBytes() as memory:
        if not policy.pre_process:
            policy.set_input_tensor(_received(policy, len(batch)))
        output = policy(batch)
        kept = memory.live
        output.backward(torch.empty_like(output))
    return PassMemory(kept, memory.peak)


def measure_reading(policy: OmniPolicy, batch: GroupBatch) -> int:
    """Peak of reading prompts in generation, without their keys and values."""
    batch = batch.to(META)
    with torch.no_grad(), LiveBytes() as memory:
        if not policy.pre_process:
            policy.set_input_tensor(_received(policy, len(batch)))
        policy(batch)
    return memory.peak


def _received(policy: OmniPolicy, tokens: int) -> torch.Tensor:
    """What the stage before would send: hidden states of `tokens` packed tokens."""
    share = policy.backend.tp if policy.config.sequence_parallel else 1
    shape = -(-tokens // share), 1, policy.config.hidden_size
    return torch.empty(shape, dtype=policy.config.pipeline_dtype, device=META, requires_grad=torch.is_grad_enabled())


@dataclass(frozen=True)
class Device:
    """What the plan's GPU is to generation: its bytes (a CPU's caches never stay: 0), and those of a logit that is
    drawn from."""

    memory: float = 0
    sampling: int = SAMPLING_BYTES


def device_of(config: Config) -> Device:
    if config.cluster.gpu == "cpu":
        return Device()
    by_kernel = config.parallel.kernels != "torch" and not truncates(config.rl.sampling)
    return Device(config.cluster.gpu_memory_gib * GIB, DRAWN_BYTES if by_kernel else SAMPLING_BYTES)


def generation_room(policy: OmniPolicy, work: Work, n_on: int, memory: float) -> tuple[int, int, bool]:
    """Bytes of the keys and values that generation would like to hold on a GPU of so much memory, rows that draw a
    token at a time, and whether the cache stays through the update."""
    layers, lanes = policy.language_model.decoder.layers, policy.backend.pp
    attention = layers[0].self_attention
    size = attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head
    token = 2 * len(layers) * size * policy.config.params_dtype.itemsize
    jobs = make_jobs([work.prompt - 1] * work.fresh, n_on, lanes)
    room = plan_room(jobs, work.completion, lanes, 1 << 62)
    rows = room.rows
    room, stays = settled(room, token * lanes, memory)
    return token * lanes * tokens_of(room), rows, stays


def tower_bytes(hf_config: PolicyConfig, work: Work, itemsize: int, prompts: int, tp: int) -> int:
    """The encoders over a tp-th of the media of `prompts` prompts: where they train, what all their layers keep;
    otherwise the larger call of one encoder, of at most ROWS_PER_CALL patches or frames, and all embeddings. The
    factors were measured (tests/planning/test_memory_towers.py holds them against real encoders)."""
    vision, train = hf_config.vision_config, work.train_towers
    hidden, inner, deep = vision.hidden_size, vision.intermediate_size, deepstack_layers(hf_config)
    matrices = family_of(hf_config.model_type).vision_matrices
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if train:
        width += vision.depth * (10 * hidden + 2 * (matrices - 1) * inner) + (6 + 3 * deep) * hidden
    else:  # at 11 the positions' interpolation counts, in encoders that learn them
        width += max(11 * hidden, 6 * hidden + matrices * inner)
    rows = prompts * work.visual * vision.spatial_merge_size**2 / tp
    numbers = [(rows if train else min(rows, ROWS_PER_CALL)) * width]
    if hears(hf_config):
        audio = hf_config.audio_config
        hidden, inner = audio.d_model, audio.encoder_ffn_dim
        layers = audio.encoder_layers * (8 * hidden + 2 * inner) + 7 * hidden if train else 5 * hidden + 2 * inner
        front, frames = 0.0, 2  # of a row of most layers
        if family_of(hf_config.model_type).audio_chunk:  # convolutions in the plane: a quarter, a sixteenth, ...
            front, frames = (2 / 3 if train else 1 / 2) * audio.downsample_hidden_size * audio.num_mel_bins, 8
        rows = audio_tokens(hf_config, work, prompts, tp) * (2 if frames == 2 else 1)
        mel = audio.num_mel_bins * (1 if train else 2)  # together, and cut up
        width = frames * (mel + front) + layers
        numbers.append((rows if train else min(rows, ROWS_PER_CALL / frames)) * width)
    kept = prompts * (work.visual + work.audio) * (1 + deep) * hf_config.text_config.hidden_size
    return round(itemsize * ((sum(numbers) if train else max(numbers)) + kept))


def audio_tokens(hf_config: PolicyConfig, work: Work, prompts: int, tp: int) -> float:
    """The most tokens of sound that one of `tp` ranks encodes: whole windows are shared out, so a window more than the
    mean."""
    window = family_of(hf_config.model_type).audio_tokens(audio_window(hf_config))
    everything = prompts * work.audio
    return min(everything, everything / tp + window) if tp > 1 else everything


def rank_memories(
    folder: str, config: Config, work: Work, dp: int, ratio: float = 1.0, *, every_rank: bool = True
) -> list[RankMemory]:
    """The ranks of a model replica, or of each stage the first: a step takes the same memory on all of a stage's.

    `ratio` corrects what is computed with (calibration). Raises ValueError where the model doesn't split.
    """
    model, parallel, n_on = config.model, config.parallel, config.rl.n_on
    towers_ever = any(stage.train_towers for stage in config.stages.values())
    ranks: list[RankMemory] = []
    for pp_rank, tp_rank in itertools.product(range(parallel.pp), range(parallel.tp if every_rank else 1)):
        with shard_on_meta(folder, model, parallel, tp_rank, pp_rank) as policy:
            memory = static_memory(policy, model, parallel, work, dp, towers_ever=towers_ever)
            memory.margin = margin(config)
            if tp_rank == 0:
                add_dynamic(memory, policy, work, n_on, ratio, device_of(config))
            else:
                first = ranks[-1]
                for item in ("activations", "workspace", "cache", "cache_stays", "generation", "towers"):
                    setattr(memory, item, getattr(first, item))
            ranks.append(memory)
    return ranks


def add_dynamic(
    memory: RankMemory, policy: OmniPolicy, work: Work, n_on: int, ratio: float, device: Device
) -> None:  # fmt: skip
    """Fill in what comes and goes within a step."""
    batches = micro_batches(work)
    update = measure_update(policy, max(batches, key=len))
    in_flight = min(policy.backend.pp - policy.backend.pp_rank, len(batches))
    memory.activations = round(ratio * update.kept * in_flight)
    if policy.pre_process and (deep := deepstack_layers(policy.hf_config)):
        # Rows for the first layers wait through the update, and once more as those of a micro-batch.
        rows = (len(work.completions) + in_flight * work.prompts_together()) * (work.visual + work.audio)
        row = (1 + deep) * policy.config.hidden_size * policy.config.params_dtype.itemsize
        memory.activations += round(ratio * rows * row)
    memory.workspace = round(ratio * (update.peak - update.kept))
    if work.fresh:
        memory.cache, rows, memory.cache_stays = generation_room(policy, work, n_on, device.memory)
        drawing = rows * policy.vocab_size * device.sampling if policy.post_process else 0
        memory.generation = round(ratio * max(measure_reading(policy, reading_batch(work)), drawing))
    if policy.pre_process:
        # Encoders that train run with their micro-batch; frozen ones run once over all prompts.
        prompts = in_flight * work.prompts_together() if work.train_towers else len(work.completions)
        itemsize = policy.config.params_dtype.itemsize
        memory.towers = round(ratio * tower_bytes(policy.hf_config, work, itemsize, prompts, policy.backend.tp))


def largest(ranks: list[RankMemory]) -> RankMemory:
    return max(ranks, key=lambda rank: rank.total)

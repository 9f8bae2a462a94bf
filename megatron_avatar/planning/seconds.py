"""The time of a step, estimated: operations over rates. Rates are a GPU's published peaks times the shares of them
that one H100 reached, or what `doctor --calibrate` measured.

Matrix products limit reading prompts, scoring and updating; memory bandwidth limits decoding. Where a pass has little
to compute, the gaps between kernels limit it instead: a GPU works while the host launches, so the longer of both
counts, and a replayed CUDA graph (decoding) has smaller gaps than operations launched one by one. The reductions of
tensor parallelism come on top: nothing hides them. Not counted: sends between pipeline stages, decoding of media,
rewards, checkpoints, evaluation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from megatron_avatar.config.families import family_of
from megatron_avatar.config.schema import Config
from megatron_avatar.planning.work import Work
from megatron_avatar.policy.micro_batches import lanes_of
from megatron_avatar.policy.shape import Shape, active_inner, experts_of, hears


class Peaks(NamedTuple):
    """Published: dense bfloat16 FLOP/s, bytes/s of memory, and bytes/s a direction of a node's links between its GPUs.
    Assumed: bytes/s a GPU reaches on the network between nodes."""

    flops: float
    bandwidth: float
    network: float
    links: float


PEAKS = {
    "a100": Peaks(312e12, 2.0e12, 20e9, 300e9),
    "h100": Peaks(989e12, 3.35e12, 40e9, 450e9),
    "h200": Peaks(989e12, 4.8e12, 40e9, 450e9),
    "cpu": Peaks(60e9, 10e9, 1e9, 1e9),  # a core or two, in float32
}
MEASURED = "measured"  # as cluster.gpu: the calibration's device, whatever it is


class Shares(NamedTuple):
    """Of a rate: updates, reading and scoring, encoders, bytes/s of decoding."""

    train: float
    forward: float
    encoders: float
    bandwidth: float


# Of the published peaks. On GPUs as measured on 2026-11-26: one H100, the 3B's step (bench/results/gpu.json), products
# that recomputation repeats counted as work (HFU), bytes as a copy moves them. Assumed on a CPU.
MEASURED_ON = "2026-11-26"
EFFICIENCY = {"gpu": Shares(0.40, 0.38, 0.10, 0.90), "cpu": Shares(0.40, 0.45, 0.45, 0.60)}
# Of calibrated rates, which two wide layers reach: what that step reached on the H100 whose layers made 561 TFLOP/s in
# training, 513 forward.
WHOLE_STEP = {"gpu": Shares(0.70, 0.73, 0.19, 1.0), "cpu": Shares(1.0, 1.0, 1.0, 1.0)}
LINK_EFFICIENCY = 0.70  # of a direction's bytes/s, in an all-reduce of a node
# Seconds a layer's forward pass takes however small it is: launched by the host, and in a decode step's CUDA graph. On
# that H100 with 54 kernels a layer; today's has 10, and no GPU has run it yet. Beside them an all-reduce in a node.
LAYER_GAP, GRAPH_GAP = {"gpu": 1.9e-3, "cpu": 1e-3}, {"gpu": 0.35e-3, "cpu": 1e-3}
REDUCE_GAP, REDUCE_GAP_CPU = 15e-6, 200e-6
# Assumed: a product that torch launches from its own loop over experts, where it has no kernel for all of them.
PRODUCT_GAP = 10e-6
GROUPED = ("h100", "h200")  # where torch has one, of bfloat16 (policy/mixture.py's stays_on_device)


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second, in FLOP and bytes; the gaps in seconds; and where the figures come from."""

    train: float
    forward: float
    encoders: float
    bandwidth: float
    network: float
    links: float
    layer_gap: float  # of operations that the host launches
    graph_gap: float  # of a decode step's
    overlaps: bool  # the device computes while the host launches
    grouped: bool  # one kernel computes bfloat16 products of all experts
    reduce_gap: float
    memory_ratio: float
    source: str

    def pass_seconds(self, compute: float, gaps: float) -> float:
        """Of passes that compute so long, and whose gaps add up to so much."""
        return max(compute, gaps) if self.overlaps else compute + gaps


def read_rates(config: Config) -> Rates:
    """Measured rates where cluster.calibration holds such a GPU's, or cluster.gpu=measured takes them whatever their
    device; peaks and assumed efficiencies otherwise. Links between GPUs, and a network that was not measured, are
    always assumed (an H100's where the device isn't known).

    Raises ValueError for a file that doctor --calibrate didn't write, or that is missing where it has to be there.
    """
    gpu, path = config.cluster.gpu, Path(config.cluster.calibration)
    if not path.is_file():
        if gpu == MEASURED:
            raise ValueError(
                f"cluster.gpu={MEASURED} takes the rates of cluster.calibration={path}, which doesn't exist: run "
                f"python -m megatron_avatar.doctor --calibrate {path} on such a GPU, or name a GPU ({', '.join(PEAKS)})"
            )
        return _assumed(gpu)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["device"].lower()
        if gpu == MEASURED:
            gpu = next((name for name in PEAKS if name in device), "h100")
        elif gpu not in device:
            assumed = _assumed(gpu)
            return replace(assumed, source=f"{assumed.source}; {path} is of {found['device']} and was left aside")
        share, assumed = WHOLE_STEP[_kind(gpu)], _assumed(gpu)
        return replace(
            assumed, train=share.train * found["train_flops"], forward=share.forward * found["forward_flops"],
            encoders=share.encoders * found["forward_flops"], bandwidth=share.bandwidth * found["bandwidth"],
            network=found["network"] or PEAKS[gpu].network, layer_gap=found["layer_gap_s"],
            graph_gap=found.get("graph_gap_s") or min(assumed.graph_gap, found["layer_gap_s"]),
            memory_ratio=found["memory_ratio"] or 1.0,
            source=f"rates measured on {found['device']} ({path}), links between GPUs assumed",
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cluster.calibration={path} can't be read ({error!r}): run python -m megatron_avatar.doctor --calibrate "
            "again, or name another file"
        ) from error


def _assumed(gpu: str) -> Rates:
    peaks, kind = PEAKS[gpu], _kind(gpu)
    share = EFFICIENCY[kind]
    where = f"as an H100 reached them on {MEASURED_ON}" if kind == "gpu" else "assumed"
    return Rates(
        train=peaks.flops * share.train, forward=peaks.flops * share.forward, encoders=peaks.flops * share.encoders,
        bandwidth=peaks.bandwidth * share.bandwidth, network=peaks.network, links=peaks.links * LINK_EFFICIENCY,
        layer_gap=LAYER_GAP[kind], graph_gap=GRAPH_GAP[kind], overlaps=kind == "gpu", grouped=gpu in GROUPED,
        reduce_gap=REDUCE_GAP_CPU if gpu == "cpu" else REDUCE_GAP, memory_ratio=1.0,
        source=f"{gpu}'s peaks ({peaks.flops / 1e12:.3g} TFLOP/s, {peaks.bandwidth / 1e12:.3g} TB/s, links of "
        f"{peaks.links / 1e9:.3g} GB/s) at efficiencies {where}: update {share.train:.0%} (recomputation counted), "
        f"forward {share.forward:.0%}, encoders {share.encoders:.0%}, decode {share.bandwidth:.0%} of bandwidth, a "
        f"layer of it at least {GRAPH_GAP[kind] * 1e3:.2g} ms; links assumed at {LINK_EFFICIENCY:.0%}",
    )  # fmt: skip


def _kind(gpu: str) -> str:
    return "cpu" if gpu == "cpu" else "gpu"


@dataclass(frozen=True)
class Flops:
    """FLOP of one forward pass through the whole language model: its layers, of these the feed-forward, the head."""

    layers: float
    feed_forward: float
    head: float


def forward_flops(shape: Shape, tokens: float, pairs: float, outputs: float) -> Flops:
    """`tokens` packed tokens whose queries see `pairs` keys in all, `outputs` of which get logits."""
    text = shape.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    attention = hidden * size * (2 * heads + 2 * text.num_key_value_heads)
    inner = 3 * hidden * active_inner(shape) + hidden * experts_of(shape)
    return Flops(
        layers=layers * (2 * tokens * (attention + inner) + 4 * pairs * heads * size),
        feed_forward=layers * 2 * tokens * inner,
        head=2 * outputs * hidden * text.vocab_size,
    )


def read_weights(shape: Shape, rows: float) -> float:
    """Weights of the language model that a decode step of so many rows reads, each once: of a mixture those of the
    experts to which any row goes, if all are as likely."""
    text, token, experts = shape.text_config, forward_flops(shape, 1, 0, 1), experts_of(shape)
    once = (token.layers + token.head) / 2  # of one row: a multiply-add for each weight
    if not experts:
        return once
    each = 3 * text.hidden_size * text.moe_intermediate_size
    met = experts * (1 - (1 - text.num_experts_per_tok / experts) ** rows)
    return once + text.num_hidden_layers * each * (met - text.num_experts_per_tok)


def update_flops(forward: Flops, recompute: str, *, adapters: bool) -> tuple[float, float]:
    """FLOP of an update whose forward pass takes `forward`: what it needs (MFU), and with what is computed again (HFU),
    the logits among it, which are always made anew in the backward pass."""
    backward = 1 if adapters else 2  # frozen weights need no gradient
    needed = (1 + backward) * (forward.layers + forward.head)
    again = {"full": forward.layers, "selective": forward.feed_forward}.get(recompute, 0.0)
    return needed, needed + again + forward.head


def peaks_of(device: str) -> Peaks | None:
    """Of a GPU by its name as CUDA says it; None where it isn't known."""
    return next((peaks for name, peaks in PEAKS.items() if name != "cpu" and name in device.lower()), None)


def tower_flops(shape: Shape, visual: int, audio: int) -> float:
    """FLOP of the encoders' forward pass over so many visual and audio tokens; windowed attention left out."""
    vision = shape.vision_config
    width, depth, matrices = vision.hidden_size, vision.depth, family_of(shape.model_type).vision_matrices
    block = 4 * width**2 + matrices * width * vision.intermediate_size
    flops = 2.0 * visual * vision.spatial_merge_size**2 * depth * block
    if hears(shape):
        sound, chunk = shape.audio_config, family_of(shape.model_type).audio_chunk
        width, depth = sound.d_model, sound.encoder_layers
        rows = audio if chunk else 2 * audio  # elsewhere two become one token at the end
        flops += 2.0 * rows * depth * (4 * width**2 + 2 * width * sound.encoder_ffn_dim)
        if chunk:  # of the second and third convolution, over a quarter and a sixteenth of the mel spectrum's area
            area = sound.num_mel_bins * 8 * audio * (1 / 16 + 1 / 64)
            flops += 2.0 * area * 9 * sound.downsample_hidden_size**2
    return flops


def step_seconds(
    config: Config, shape: Shape, work: Work, dp: int, trainable: int, rates: Rates
) -> dict[str, float]:
    """Seconds of each part of a step. `trainable`: parameters that the largest rank trains."""
    parallel, text = config.parallel, shape.text_config
    tp, pp, layers = parallel.tp, parallel.pp, text.num_hidden_layers
    micros = work.counts()
    parts = {}
    updates = config.rl.updates_per_rollout if work.rl else 1
    # Frozen encoders see every prompt once. Those that train see fresh ones to generate and as the reference's, and
    # all of them in every update, forward and backward.
    prompts = 2 * work.fresh + 3 * updates * len(work.completions) if work.train_towers else len(work.completions)
    parts["encoders"] = prompts * tower_flops(shape, work.visual, work.audio) / rates.encoders / tp
    if work.fresh:
        parts |= _generation(config, shape, work, rates)
    total, bubble = Flops(0, 0, 0), (len(micros) + pp - 1) / len(micros)
    for tokens, outputs, pairs in micros:
        part = forward_flops(shape, tokens, pairs, outputs)
        total = Flops(*(a + b for a, b in zip(vars(total).values(), vars(part).values(), strict=True)))
    gaps = layers / pp * layer_gap(config, shape, rates) * len(micros) * bubble
    packed = sum(tokens for tokens, *_ in micros)
    moved = experts_seconds(config, shape, packed, rates) / pp * bubble
    reduced = reduction_seconds(config, shape, len(micros), packed, rates) / pp * bubble
    if work.rl:
        fresh = sum(work.completions[: work.fresh]) / sum(work.completions)
        scored = (total.layers + total.head) / rates.forward / tp / pp * bubble
        parts["reference"] = (rates.pass_seconds(scored + moved, gaps) + reduced) * fresh
    # Of a forward pass's gaps: backward has as many for the inputs as for the weights, and as many once more.
    passes = 2 + (not config.model.lora.rank) + (parallel.recompute == "full")
    _, flops = update_flops(total, parallel.recompute, adapters=config.model.lora.rank > 0)
    # Forward, backward, and what is computed again: all, the feed-forward's, or no product.
    reduced *= 2 + {"full": 1, "selective": 0.5, "light": 0, "none": 0}[parallel.recompute]
    moved *= 2 if parallel.recompute in ("full", "selective") else 1
    moved += experts_backward_seconds(config, shape, packed, len(micros), rates) / pp * bubble
    computed = flops / rates.train / tp / pp * bubble + moved
    parts["update"] = updates * (rates.pass_seconds(computed, passes * gaps) + reduced)
    share = dp if parallel.distributed_optimizer else 1
    reduce = 4 * trainable * 2 * (dp - 1) / dp / rates.network
    parts["optimizer"] = updates * (reduce + 30 * trainable / share / rates.bandwidth)
    return parts


def experts_seconds(config: Config, shape: Shape, tokens: float, rates: Rates) -> float:
    """Seconds in which a forward pass over so many tokens moves their rows to a mixture's experts and back: a row for
    each expert of a token's, on every tensor-parallel rank, as its number may not depend on what is chosen. As
    bench.ops counts what no product moves."""
    return _rows_seconds(config, shape, tokens, 4, 2, 5, rates)


def experts_backward_seconds(config: Config, shape: Shape, tokens: float, passes: float, rates: Rates) -> float:
    """The same of a backward pass over so many tokens in `passes` micro-batches. Each adds the gradients of all experts
    to a rank's float32 buffers, whoever was chosen; frozen experts, as with adapters, have none."""
    if config.model.lora.rank or not experts_of(shape):
        return _rows_seconds(config, shape, tokens, 4, 2, 14, rates)
    text = shape.text_config
    weights = 3 * experts_of(shape) * text.hidden_size * text.moe_intermediate_size / config.parallel.tp
    added = passes * text.num_hidden_layers * weights * (_itemsize(config) + 8) / rates.bandwidth
    return added + _rows_seconds(config, shape, tokens, 5, 3, 16, rates)


def _rows_seconds(
    config: Config, shape: Shape, tokens: float, wide: int, whole: int, narrow: int, rates: Rates
) -> float:
    """Each row reads and writes so many numbers as wide as the stream and so many as wide as an expert, each token
    `whole` as wide as the stream; other ranks' rows are set to zero besides."""
    if not experts_of(shape):
        return 0.0
    text, wide = shape.text_config, wide + 2 * (config.parallel.tp > 1)
    rows = text.num_experts_per_tok * (wide * text.hidden_size + narrow * text.moe_intermediate_size)
    moved = tokens * (rows + whole * text.hidden_size) * _itemsize(config)
    return text.num_hidden_layers * moved / rates.bandwidth


def _itemsize(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def one_by_one(config: Config, shape: Shape, rates: Rates) -> bool:
    """Whether torch goes through a mixture's experts on the host, which no CUDA graph can hold."""
    return experts_of(shape) > 0 and not (rates.grouped and config.model.dtype == "bfloat16")


def layer_gap(config: Config, shape: Shape, rates: Rates) -> float:
    """Seconds that the host takes to launch a layer's forward pass: with two products for each of a rank's experts
    where it goes through them."""
    own = experts_of(shape) / config.parallel.tp
    return rates.layer_gap + 2 * own * PRODUCT_GAP * one_by_one(config, shape, rates)


def reduction_seconds(
    config: Config, shape: Shape, passes: float, tokens: float, rates: Rates
) -> float:
    """Seconds that tensor parallelism's reductions take in `passes` passes through all layers over `tokens` hidden
    states in all: two a layer and pass, by a ring. A reduce-scatter and an all-gather (sequence parallelism) count as
    one all-reduce."""
    tp, text = config.parallel.tp, shape.text_config
    if tp == 1:
        return 0.0
    sent = 2 * (tp - 1) / tp * tokens * text.hidden_size * _itemsize(config)
    return 2 * text.num_hidden_layers * (passes * rates.reduce_gap + sent / rates.links)


def _generation(config: Config, shape: Shape, work: Work, rates: Rates) -> dict[str, float]:
    """Reading the fresh prompts and decoding their completions to the full length. As many lanes as stages are under
    way at a time: a stage reads its weights, and waits for its kernels, once a lane, but each lane has its share of the
    rows and prompts alone."""
    text, tp, pp = shape.text_config, config.parallel.tp, config.parallel.pp
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize, launched = _itemsize(config), layer_gap(config, shape, rates)
    graph = launched if one_by_one(config, shape, rates) else rates.graph_gap
    gap, step_gap = (text.num_hidden_layers * gap for gap in (launched, graph))
    jobs = sum(lanes_of(work.fresh, work.completions[0], pp))  # prompts as they are read: some by several lanes
    read = forward_flops(shape, jobs * work.prompt, jobs * work.prompt**2 / 2, jobs)
    busy = min(pp, jobs)  # stages, once all lanes are under way
    moved = experts_seconds(config, shape, jobs * work.prompt, rates)
    rows = sum(work.completions[: work.fresh])
    token = forward_flops(shape, 1, 0, 1)
    weights = itemsize * read_weights(shape, rows / busy)
    key_values = 2 * text.num_key_value_heads * size * itemsize * text.num_hidden_layers
    cache = key_values * (jobs * work.prompt + rows * work.completion / 2) / busy
    compute = rows * (token.layers + token.head) / rates.forward / tp / busy
    decode = rates.pass_seconds(max((weights + cache) / tp / rates.bandwidth, compute), step_gap)
    # Lanes read one after the other: the last stage waits for the first lane, the first for the last.
    reading = ((read.layers + read.head) / rates.forward / tp + moved) / pp * (busy + pp - 1) / busy
    return {
        "read prompts": rates.pass_seconds(reading, gap * (busy + pp - 1) / pp)
        + reduction_seconds(config, shape, busy, jobs * work.prompt, rates) / pp * (busy + pp - 1) / busy,
        "decode": work.completion * (decode + reduction_seconds(config, shape, 1, rows / busy, rates)),
    }

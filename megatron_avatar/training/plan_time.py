"""The time of a step, estimated: operations over rates. Rates are a GPU's published peaks times assumed efficiencies,
or what `doctor --calibrate` measured.

Matrix products limit reading prompts, scoring and updating; memory bandwidth limits decoding, and below that the gap
between kernels. Not counted: decoding of media, rewards, checkpoints, evaluation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_avatar.config.schema import Config
from megatron_avatar.policy.architecture import PolicyConfig, hears
from megatron_avatar.training.plan_work import Work

# Published peaks: dense bfloat16 FLOP/s and bytes/s of HBM, and bytes/s a GPU reaches on a DGX's network.
# `cpu` stands for a core or two, in float32.
PEAKS = {
    "a100": (312e12, 2.0e12, 20e9),
    "h100": (989e12, 3.35e12, 40e9),
    "cpu": (60e9, 10e9, 1e9),
}
TRAIN_EFFICIENCY = 0.40  # of peak FLOP/s, forward and backward
FORWARD_EFFICIENCY = 0.45  # of peak FLOP/s, reading prompts and scoring
DECODE_EFFICIENCY = 0.60  # of peak bandwidth
LAYER_GAP = {"a100": 60e-6, "h100": 50e-6, "cpu": 1e-3}  # seconds a layer's forward pass takes however small it is


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second, in FLOP and bytes; `layer_gap` in seconds; and where the figures come from."""

    train: float
    forward: float
    bandwidth: float
    network: float
    layer_gap: float
    memory_ratio: float
    source: str


def read_rates(config: Config) -> Rates:
    """Measured rates where cluster.calibration holds such a GPU's; peaks and assumed efficiencies otherwise.

    Raises ValueError for a file that doctor --calibrate didn't write.
    """
    gpu, path = config.cluster.gpu, Path(config.cluster.calibration)
    flops, bandwidth, network = PEAKS[gpu]
    assumed = Rates(
        train=flops * TRAIN_EFFICIENCY, forward=flops * FORWARD_EFFICIENCY, bandwidth=bandwidth * DECODE_EFFICIENCY,
        network=network, layer_gap=LAYER_GAP[gpu], memory_ratio=1.0,
        source=f"{gpu}'s peaks ({flops / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s) at assumed efficiencies: "
        f"update {TRAIN_EFFICIENCY:.0%}, forward {FORWARD_EFFICIENCY:.0%}, decode {DECODE_EFFICIENCY:.0%} of bandwidth",
    )  # fmt: skip
    if not path.is_file():
        return assumed
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if gpu not in found["device"].lower():
            note = f"; {path} is of {found['device']} and was left aside"
            return Rates(**{**vars(assumed), "source": assumed.source + note})
        return Rates(
            train=found["train_flops"], forward=found["forward_flops"], bandwidth=found["bandwidth"],
            network=found["network"] or network, layer_gap=found["layer_gap_s"],
            memory_ratio=found["memory_ratio"] or 1.0, source=f"measured on {found['device']} ({path})",
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cluster.calibration={path} can't be read ({error!r}): run python -m megatron_avatar.doctor --calibrate "
            "again, or name another file"
        ) from error


@dataclass(frozen=True)
class Flops:
    """FLOP of one forward pass through the whole language model: its layers, of these the feed-forward, the head."""

    layers: float
    feed_forward: float
    head: float


def forward_flops(hf_config: PolicyConfig, tokens: float, pairs: float, outputs: float) -> Flops:
    """`tokens` packed tokens whose queries see `pairs` keys in all, `outputs` of which get logits."""
    text = hf_config.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    attention = hidden * size * (2 * heads + 2 * text.num_key_value_heads)
    inner = 3 * hidden * text.intermediate_size
    return Flops(
        layers=layers * (2 * tokens * (attention + inner) + 4 * pairs * heads * size),
        feed_forward=layers * 2 * tokens * inner,
        head=2 * outputs * hidden * text.vocab_size,
    )


def seen_pairs(segments: Tensor) -> float:
    """Query-key pairs of a segment table [n, 4] (see groups.py): a segment causally itself, and its whole prefix."""
    length, prefix = segments[:, 1].double(), segments[:, 3].double()
    return float((length * (length + 1) / 2 + length * prefix).sum())


def tower_flops(hf_config: PolicyConfig, visual: int, audio: int) -> float:
    """FLOP of the encoders' forward pass over so many visual and audio tokens; windowed attention left out."""
    vision = hf_config.vision_config
    width, depth = vision.hidden_size, vision.depth
    flops = 2.0 * visual * vision.spatial_merge_size**2 * depth * (4 * width**2 + 3 * width * vision.intermediate_size)
    if hears(hf_config):
        sound = hf_config.audio_config
        width, depth = sound.d_model, sound.encoder_layers
        flops += 2.0 * audio * 2 * depth * (4 * width**2 + 2 * width * sound.encoder_ffn_dim)
    return flops


def step_seconds(
    config: Config, hf_config: PolicyConfig, work: Work, dp: int, trainable: int, rates: Rates
) -> dict[str, float]:
    """Seconds of each part of a step. `trainable`: parameters that the largest rank trains."""
    parallel, text = config.parallel, hf_config.text_config
    tp, pp, layers = parallel.tp, parallel.pp, text.num_hidden_layers
    micros = [(len(b), len(b.target_ids), seen_pairs(b.segments)) for b in work.micro_batches()]
    parts = {}
    towers = tower_flops(hf_config, work.visual, work.audio) * len(work.completions)
    parts["encoders"] = towers / rates.forward / tp * (3 if work.train_towers else 1)
    if work.fresh:
        parts |= _generation(config, hf_config, work, rates)
    total = Flops(0, 0, 0)
    for tokens, outputs, pairs in micros:
        part = forward_flops(hf_config, tokens, pairs, outputs)
        total = Flops(*(a + b for a, b in zip(vars(total).values(), vars(part).values(), strict=True)))
    bubble = (len(micros) + pp - 1) / len(micros)
    gaps = layers / pp * rates.layer_gap * len(micros) * bubble
    if work.rl:
        fresh = sum(work.completions[: work.fresh]) / sum(work.completions)
        parts["reference"] = ((total.layers + total.head) / rates.forward / tp / pp * bubble + gaps) * fresh
    backward = 1 if config.model.lora.rank else 2  # frozen weights need no gradient
    passes = 1 + backward + (parallel.recompute == "full")
    again = total.feed_forward if parallel.recompute == "selective" else 0.0
    flops = passes * total.layers + again + (2 + backward) * total.head  # logits are made again in the backward pass
    updates = config.rl.updates_per_rollout if work.rl else 1
    parts["update"] = updates * (flops / rates.train / tp / pp * bubble + (passes + 1) * gaps)
    share = dp if parallel.distributed_optimizer else 1
    reduce = 4 * trainable * 2 * (dp - 1) / dp / rates.network
    parts["optimizer"] = updates * (reduce + 30 * trainable / share / rates.bandwidth)
    return parts


def _generation(config: Config, hf_config: PolicyConfig, work: Work, rates: Rates) -> dict[str, float]:
    """Reading the fresh prompts and decoding their completions to the full length. Stages work one after the other."""
    text, tp = hf_config.text_config, config.parallel.tp
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    gap = text.num_hidden_layers * rates.layer_gap
    read = forward_flops(hf_config, work.fresh * work.prompt, work.fresh * work.prompt**2 / 2, work.fresh)
    rows = sum(work.completions[: work.fresh])
    token = forward_flops(hf_config, 1, 0, 1)
    weights = (token.layers + token.head) / 2 * itemsize  # each weight is read once and used for one multiply-add
    key_values = 2 * text.num_key_value_heads * size * itemsize * text.num_hidden_layers
    cache = key_values * (work.fresh * work.prompt + rows * work.completion / 2)
    compute = rows * (token.layers + token.head) / rates.forward / tp
    decode = max((weights + cache) / tp / rates.bandwidth, compute) + gap
    return {
        "read prompts": (read.layers + read.head) / rates.forward / tp + gap,
        "decode": work.completion * decode,
    }

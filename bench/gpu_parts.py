"""The parts of bench.gpu that stand alone: each takes the bench and returns its figures; none ends the others.

`sure`: the error between generation and training where the head has 0.5 to 1 nat, by bins of entropy. `decode_rows`:
decoding at 256, 64 and 4 rows, at 64 and 4 also without the package's kernels, at 4 without graphs. `recompute`: the
update by parallel.recompute. `encoders`. `profiles`: what one decode step and one update spend their time on. `beside`:
transformers' generate on as many rows of text, with the same weights. `video`: DALI's decoders and PyAV's.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.planning.seconds import Peaks, forward_flops, peaks_of, tower_flops, update_flops
from megatron_avatar.policy.architecture import RECOMPUTE
from megatron_avatar.policy.decode import Decoder
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.kernels import attend, draw, head, merge, norm, rope, swiglu
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.slots import policy_slots
from megatron_avatar.policy.weights import nested
from megatron_avatar.records import Prompt

Bench = Any  # bench.gpu's class: that module imports this one
ENTROPY, SURE = 0.75, (0.5, 1.0)  # nats that the sure head is made for, and between which it has to be
LEADERS = 512  # one of so many tokens has a chance to lead
KERNELS = (attend, draw, head, merge, norm, rope, swiglu)
ROWS = ((256, 8), (64, 8), (4, 1))  # decoded together, and prompts
TABLE_ROWS = 25


def on_gpu() -> bool:
    return torch.cuda.is_available()


def timed(work: Callable[[], Any]) -> float:
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def published_peak() -> Peaks | None:
    """Of this GPU, where it is known."""
    return peaks_of(torch.cuda.get_device_name()) if on_gpu() else None


def share_of_peak(flops_a_second: float) -> float | None:
    """Of the published FLOP/s; None where that isn't known."""
    peak = published_peak()
    return flops_a_second / peak.flops if peak else None


# ----------------------------------------------------------------------------------------------------------------
# Error between generation and training


@torch.no_grad()
def fill_sure_head(bench: Bench) -> float:
    """Give a few tokens' rows of the head weights so large that the mean entropy of random completions is ENTROPY
    nats; returns it. Their logits lead by more or less, so some tokens are sure and some aren't. ValueError where it
    isn't found."""
    policy, size = bench.policy, bench.size
    weight, rng = policy.output_weight, np.random.default_rng(1)
    leaders = weight[: max(8, len(weight) // LEADERS)]
    base = leaders.clone()
    ids = [[rng.integers(20, size.text_ids, min(64, size.new_tokens)) for _ in range(2)]]
    batch = pack_groups(bench.prompts[:1], ids).to(bench.backend.device)
    media, (low, high) = policy.embed_media(bench.prompts[:1]), (0.0, 64.0)
    entropy, gain = float("nan"), 0.0
    for _ in range(12):
        gain = (low + high) / 2
        leaders.copy_(gain * base)
        entropy = float(policy(batch, media)[1].mean())
        low, high = (gain, high) if entropy > ENTROPY else (low, gain)
        if abs(entropy - ENTROPY) < 0.1:
            break
    if not SURE[0] <= entropy <= SURE[1]:
        raise ValueError(f"no head of {SURE[0]} to {SURE[1]} nats was found: {entropy:.2f} at a gain of {gain:.3g}")
    return entropy


def sure(bench: Bench) -> dict[str, Any]:
    """mean exp|difference| of sampled tokens, of all and by bins of entropy."""
    entropy = fill_sure_head(bench)
    bench.learner.snapshot_reference()
    media = bench.policy.embed_media(bench.prompts)
    groups = bench.groups(bench.generate(bench.size.new_tokens, media))
    stats = bench.groups_update(groups, media)
    return {"head_entropy": entropy, "sampled_entropy": float(stats["entropy_sum"]) / float(stats["tokens"]),
            "logprob_error": float(stats["logprob_error"]), "by_entropy": stats["logprob_error/entropy"]}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Decoding


@contextmanager
def without(policy: OmniPolicy, *, graphs: bool, kernels: bool) -> Iterator[None]:
    """Decode without graphs, without the package's kernels, or without both; caches are made anew."""
    policy.kept_generation = None
    with ExitStack() as patches:
        if graphs:
            patches.enter_context(patch.object(Decoder, "_replay", Decoder.step))
        for module in KERNELS if kernels else ():
            patches.enter_context(patch.object(module, "runs_triton", lambda _: False))
        yield
    policy.kept_generation = None


def decode_speed(bench: Bench, rows: int, prompts: int) -> dict[str, float]:
    """Tokens a second of `rows` rows over `prompts` prompts, and a step's milliseconds, after a call that warms up."""
    media = bench.policy.embed_media(bench.prompts[:prompts])
    tokens = min(128, bench.size.new_tokens)

    def work(new_tokens: int) -> None:
        some = bench.prompts[:prompts]
        generate(bench.policy, some, rows // prompts, SamplingConfig(max_new_tokens=new_tokens),
                 [prompt.sample_id for prompt in some], media=media)  # fmt: skip

    work(tokens)
    few = timed(lambda: work(1))
    seconds = max(timed(lambda: work(tokens)) - few, 1e-9) / max(1, tokens - 1)
    return {"tok_s": rows / seconds, "step_ms": 1e3 * seconds}


def decode_rows(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows, prompts in ROWS:
        prompts = min(prompts, bench.size.prompts)
        found[f"{rows}"] = decode_speed(bench, rows, prompts)
    rows, prompts = ROWS[1]
    with without(bench.policy, graphs=False, kernels=True):
        found[f"{rows}, no kernels"] = decode_speed(bench, rows, min(prompts, bench.size.prompts))
    rows, prompts = ROWS[-1]
    for name, off in {"no graphs": (True, False), "no kernels": (False, True), "neither": (True, True)}.items():
        with without(bench.policy, graphs=off[0], kernels=off[1]):
            found[f"{rows}, {name}"] = decode_speed(bench, rows, prompts)
    return found


@torch.no_grad()
def as_transformers(policy: OmniPolicy) -> Any:
    """transformers' model on the policy's device, with its weights; of one rank that has all of them."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with policy.backend.device:
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            policy.hf_config, dtype=policy.config.params_dtype
        )
    left = dict(model.named_parameters())
    for slot in policy_slots(policy):
        for name, value in zip(slot.shapes, slot.join(slot.parameter), strict=True):
            left.pop(name if name in left else nested(name)).copy_(value)
    assert not left, f"without weights: {', '.join(left)}"
    return model.eval()


def beside(bench: Bench) -> dict[str, Any]:
    """Ours and transformers' generate: 4 rows of text as long as a prompt, the same weights."""
    rows, tokens, device = ROWS[-1][0], min(64, bench.size.new_tokens), bench.backend.device
    length = len(bench.prompts[0])
    ids = np.random.default_rng(2).integers(20, bench.size.text_ids, length)
    prompt = Prompt("text", "plain", ids, np.tile(np.arange(length), (3, 1)))

    def ours(new_tokens: int) -> None:
        generate(bench.policy, [prompt], rows, SamplingConfig(max_new_tokens=new_tokens), ["text"])

    model = as_transformers(bench.policy)
    inputs = torch.from_numpy(ids)[None].expand(rows, -1).to(device)

    def theirs(new_tokens: int) -> None:
        model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=True,
                       min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)  # fmt: skip

    found = {}
    with torch.no_grad():
        for name, work in (("ours", ours), ("transformers", theirs)):
            work(tokens)
            few = timed(lambda work=work: work(1))
            whole = timed(lambda work=work: work(tokens))
            found[f"{name}_tok_s"] = rows * (tokens - 1) / max(whole - few, 1e-9)
            found[f"{name}_read_s"] = few
    return found


# ----------------------------------------------------------------------------------------------------------------
# Updates and encoders


@contextmanager
def recomputing(policy: OmniPolicy, name: str) -> Iterator[None]:
    """parallel.recompute of a policy that is there already."""
    config, layers = policy.config, policy.language_model.decoder.layers
    fields = {key for settings in RECOMPUTE.values() for key in settings}
    before = {key: getattr(config, key) for key in fields}
    flags = [layer.recompute_mlp for layer in layers]
    plain = {key: None for key in fields} | {"recompute_light": False}
    for key, value in (plain | RECOMPUTE[name]).items():
        if key in fields:
            setattr(config, key, value)
    for layer in layers:
        layer.recompute_mlp = False  # the policy sets it for each pass where it is wanted
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        for layer, flag in zip(layers, flags, strict=True):
            layer.recompute_mlp = flag


def recompute(bench: Bench) -> dict[str, Any]:
    """Seconds, MFU and HFU of an update of two groups, and its peak of memory, by what is computed again."""
    media, found = bench.policy.embed_media(bench.prompts[:2]), {}
    groups = bench.groups(bench.generate(bench.size.new_tokens, bench.policy.embed_media(bench.prompts)))[:2]
    prefix, new, count = len(bench.prompts[0]) - 1, bench.size.new_tokens, bench.size.completions
    pairs = prefix * (prefix + 1) / 2 + count * new * prefix + count * new * (new + 1) / 2
    forward = forward_flops(bench.policy.hf_config, prefix + count * new, pairs, count * new)
    for name in RECOMPUTE:
        try:
            with recomputing(bench.policy, name):
                bench.groups_update(groups, media)
                if on_gpu():
                    torch.cuda.reset_peak_memory_stats()
                seconds = min(timed(lambda: bench.groups_update(groups, media)) for _ in range(2))
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
            torch.cuda.empty_cache()
            continue
        needed, done = (len(groups) * flops for flops in update_flops(forward, name, adapters=False))
        found[name] = {
            "seconds": seconds, "needed_tflops": needed / seconds / 1e12, "done_tflops": done / seconds / 1e12,
            "mfu": share_of_peak(needed / seconds), "hfu": share_of_peak(done / seconds),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else None,
        }  # fmt: skip
    return found


def encoders(bench: Bench) -> dict[str, Any]:
    """Seconds of all prompts' media, and the share of the peak."""
    size = bench.size
    bench.policy.embed_media(bench.prompts)
    seconds = min(timed(lambda: bench.policy.embed_media(bench.prompts)) for _ in range(3))
    merge = bench.policy.hf_config.vision_config.spatial_merge_size**2
    visual, audio = int(np.prod(size.grid)) // merge, size.mel_frames // 4
    speed = size.prompts * tower_flops(bench.policy.hf_config, visual, audio) / seconds
    return {"seconds": seconds, "tflops": speed / 1e12, "of_peak": share_of_peak(speed)}


# ----------------------------------------------------------------------------------------------------------------
# Where the time goes


def profiled(work: Callable[[], Any]) -> tuple[Any, Any]:
    """torch's profile of `work`, and what that returned."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu()
    result: list[Any] = []
    if on_gpu():
        torch.cuda.synchronize()  # what was queued before isn't of `work`
    with torch.profiler.profile(activities=activities) as recorded:
        timed(lambda: result.append(work()))
    return recorded, result[0]


def profiled_step(bench: Bench, media: list) -> Any:
    """The profile of the last decode step of a few, which is a graph's replay where there are graphs."""
    few, plain = min(8, bench.size.new_tokens), Decoder.__call__
    steps, recordings = [0], []

    def call(self: Decoder, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] < few:
            return plain(self, *arguments)
        recorded, output = profiled(lambda: plain(self, *arguments))
        recordings.append(recorded)
        return output

    bench.generate(few, media)
    with patch.object(Decoder, "__call__", call):
        bench.generate(few, media)
    return recordings[0]


def rows_of_time(averages: Any, *, device: bool) -> list[Any]:
    """The rows of a profile whose own times add up to the whole: with `device` the kernels, as operations have their
    kernels' time once more, and annotations that of what they surround."""
    kind = torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU
    return [row for row in averages if row.device_type == kind and not row.is_user_annotation]


def profiles(bench: Bench, folder: Path | None = None) -> dict[str, Any]:
    """Prints a table of one decode step of all rows and one of an update of a group; their traces go to `folder`.
    Returns the shares of device time of the largest kernels."""
    media = bench.policy.embed_media(bench.prompts)
    groups = bench.groups(bench.generate(bench.size.new_tokens, media))[:1]
    bench.groups_update(groups, media[:1])
    recordings = {"decode": profiled_step(bench, media),
                  "update": profiled(lambda: bench.groups_update(groups, media[:1]))[0]}  # fmt: skip
    found: dict[str, Any] = {}
    for name, recorded in recordings.items():
        averages = recorded.key_averages()
        key = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
        print(averages.table(sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=60), file=sys.stderr)
        rows = rows_of_time(averages, device=on_gpu())
        whole = sum(getattr(row, key) for row in rows) or 1
        largest = sorted(rows, key=lambda row: -getattr(row, key))[:10]
        found[name] = {"ms": whole / 1e3, "calls": sum(row.count for row in rows),
                       "largest": {row.key[:80]: round(getattr(row, key) / whole, 4) for row in largest}}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(folder / f"{name}.json.gz"))
    return found


# ----------------------------------------------------------------------------------------------------------------
# Video


def video(bench: Bench) -> dict[str, Any]:
    """Clips a second, 16 frames of 8 s of H.264 and HEVC, by DALI and by PyAV in one thread."""
    try:
        import av

        from megatron_avatar.data import dali
        from megatron_avatar.data.decode import decode_frames
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    height, width, count = (720, 1280, 240) if bench.size.new_tokens > 100 else (64, 96, 16)
    wanted, found = np.linspace(0, count - 1, 16).astype(int), {}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for codec, encoder in (("h264", "libx264"), ("hevc", "libx265")):
            path = Path(folder) / f"{codec}.mp4"
            picture = rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            with av.open(str(path), "w") as container:
                stream = container.add_stream(encoder, rate=30)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                for k in range(count):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * k, axis=1), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            ways: dict[str, Callable[[], Any]] = {"pyav": lambda path=path: decode_frames(path, wanted, "pyav")}
            if codec in dali.codecs():
                ways["dali"] = lambda path=path: dali.reader().take(path, wanted)
            for name, work in ways.items():
                work()
                found[f"{codec}_{name}_clips_s"] = 3 / timed(lambda work=work: [work() for _ in range(3)])
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "encoders": encoders, "decode_rows": decode_rows, "recompute": recompute, "profiles": profiles, "beside": beside,
    "video": video, "sure": sure,
}  # fmt: skip

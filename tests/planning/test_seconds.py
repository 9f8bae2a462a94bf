"""What a plan says of work and time, against FLOP that torch counts, rings, and steps that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_avatar.config.load import CONFIG_DIR, load_config
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.planning.batches import micro_batches, pack, seen_pairs
from megatron_avatar.planning.seconds import (
    MEASURED_ON,
    WHOLE_STEP,
    forward_flops,
    read_rates,
    reduction_seconds,
    step_seconds,
)
from megatron_avatar.planning.work import Work, stage_work
from megatron_avatar.policy.architecture import read_config
from tests.planning.models import SIZES, one_rank, plan, save

ROOT = Path(__file__).parents[2]
SHAPES = CONFIG_DIR / "shapes"


def test_flops_are_those_that_torch_counts(tmp_path):
    folder, batch = save(tmp_path, **SIZES["wide"][0]), pack(SIZES["wide"][1])
    with one_rank(folder, ModelConfig(), ParallelConfig()) as policy, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            policy(batch)
        flops = forward_flops(policy.hf_config, len(batch), 0, len(batch.target_ids))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert flops.layers + flops.head == pytest.approx(products, rel=0.01)


def test_pairs_are_what_queries_see():
    batch = pack([(5, [3, 2]), (4, [6])])
    seen = torch.zeros(len(batch), len(batch), dtype=torch.bool)
    for start_, length, prefix, prefix_length in batch.segments.tolist():
        own = slice(start_, start_ + length)
        seen[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
        seen[own, prefix : prefix + prefix_length] = True
    assert seen_pairs(batch.segments) == seen.sum()


def test_a_steps_tokens_follow_from_the_recipe():
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=4"])
    hf_config = read_config(SHAPES / "qwen2_5_omni_7b")
    work = stage_work(config, config.stages["visual"], hf_config, dp=1, longest=False)
    assert (work.visual, work.audio) == (8 * 64, 8 * 25)  # 16 frames in pairs, 8 s
    assert (work.fresh, work.completions, work.completion) == (1, (4, 4), 2048)
    assert sum(map(len, micro_batches(work))) == 2 * (work.prompt - 1 + 4 * 2048)
    longest = stage_work(config, config.stages["visual"], hf_config, dp=1, longest=True)
    assert longest.prompt + longest.completion == config.model.context
    assert max(map(len, micro_batches(longest))) <= config.rl.tokens_per_micro_batch
    assert longest.prompt - 201 <= longest.visual + longest.audio <= longest.prompt
    assert longest.visual / longest.audio == pytest.approx(work.visual / work.audio, rel=1e-3)
    assert longest.prompts_together() == 1
    muted = replace(config, data=replace(config.data, mute=True, blind=True))
    silent = stage_work(muted, config.stages["visual"], hf_config, dp=1, longest=False)
    assert silent.visual == silent.audio == 0


def test_a_videos_times_are_text_where_a_family_has_no_time_axis():
    config = load_config(["recipe=vl3_4b", "dry_run=true"])
    shape = read_config(SHAPES / "qwen3_vl_4b")
    work = stage_work(config, config.stages["visual"], shape, dp=1, longest=False)
    assert (work.visual, work.audio, work.prompt) == (8 * 64, 0, 8 * 64 + 8 * 9 + 200)
    longest = stage_work(config, config.stages["visual"], shape, dp=1, longest=True)
    assert longest.visual == longest.prompt - 200, "pictures, which have no times"
    pictures = replace(config, data=replace(config.data, frame_max_pixels=1024, frame_min_pixels=1024))
    assert stage_work(pictures, config.stages["visual"], shape, dp=1, longest=False).visual == 512, "a picture's"


@pytest.mark.parametrize("longest", [False, True])
@pytest.mark.parametrize("recipe", ["vl3_4b", "vl_7b"])
def test_more_frames_never_plan_fewer_visual_tokens(recipe, longest):
    config = load_config([f"recipe={recipe}", "dry_run=true"])
    (stage,), shape = config.stages.values(), read_config(SHAPES / config.model.shape)
    seen = []
    for frames in (2, 8, 16, 64, 128, 256, 512, 1400):
        for pixels in (config.data.image_max_pixels, 2**23):  # a picture beyond the context, too
            data = replace(config.data, max_frames=frames, image_max_pixels=pixels)
            work = stage_work(replace(config, data=data), stage, shape, dp=1, longest=longest)
            assert work.visual + 200 <= work.prompt <= config.model.context - work.completion
            seen.append(work.visual)
    assert sorted(seen[::2]) == seen[::2] and sorted(seen[1::2]) == seen[1::2]


def test_a_clip_beyond_the_context_leaves_its_times_room():
    """Of 64 tokens and 9 of text a pair."""
    config = load_config(["recipe=vl3_4b", "dry_run=true", "data.max_frames=1400"])
    shape, room = read_config(SHAPES / "qwen3_vl_4b"), config.model.context - config.rl.sampling.max_new_tokens
    work = stage_work(config, config.stages["visual"], shape, dp=1, longest=False)
    assert (work.visual, work.prompt) == (round((room - 200) * 64 / 73), room)


@pytest.mark.slow
def test_more_work_takes_longer():
    def seconds(*overrides: str) -> dict[str, float]:
        return plan("cluster.gpus=4", "cluster.calibration=none", *overrides).stages[0].seconds

    usual = seconds()
    assert seconds("rl.sampling.max_new_tokens=4096")["decode"] >= 2 * usual["decode"] > 0
    assert seconds("parallel.recompute=full")["update"] > usual["update"]
    assert all(value >= usual[part] for part, value in seconds("cluster.gpu=a100").items())
    faster = seconds("cluster.gpu=h200")["decode"]
    assert faster == usual["decode"], "a few rows wait for kernels, not for memory"
    trained = seconds(*(f"stages.{name}.train_towers=true" for name in ("visual", "audio_visual", "localisation")))
    assert trained["encoders"] == pytest.approx(4 * usual["encoders"])  # of 2 prompts: 2 + 3 for one, 3 for the other


def test_reductions_take_the_rings_time(tmp_path):
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=4", "cluster.calibration=none"])
    rates, hf_config = read_rates(config), read_config(SHAPES / "qwen2_5_omni_7b")
    sent = 2 * 28 * 1000 * 3584 * 2 * 2 * 3 / 4  # two a layer, bfloat16, each hidden state there and back
    seconds = reduction_seconds(config, hf_config, 5, 1000, rates)
    assert seconds == pytest.approx(2 * 28 * 5 * 15e-6 + sent / (450e9 * 0.7))
    alone = replace(config, parallel=replace(config.parallel, tp=1))
    assert reduction_seconds(alone, hf_config, 5, 1000, rates) == 0
    slow = replace(rates, links=rates.links / 100, reduce_gap=1e-3)
    work = stage_work(config, config.stages["visual"], hf_config, 1, longest=False)
    usual, slower = (step_seconds(config, hf_config, work, 1, 1, rate) for rate in (rates, slow))
    touched = {part for part in usual if slower[part] > usual[part]}
    assert touched == {"read prompts", "decode", "reference", "update"}


@pytest.mark.parametrize(("prompts", "stages"), [(4, 1), (4, 2), (1, 2), (3, 4)])
def test_lanes_share_rows_and_prompts_and_each_stage_reads_its_weights_for_every_lane(prompts, stages):
    """Ticks counted one by one: in each, every stage works on one lane. Prompts of four rows, the last of `prompts`
    shared out where there are fewer than stages."""
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=4", "cluster.calibration=none"])
    config = replace(config, parallel=replace(config.parallel, tp=1, pp=stages))
    shape, rates = read_config(SHAPES / "qwen2_5_omni_7b"), replace(read_rates(config), layer_gap=0, graph_gap=0)
    work = Work(True, False, 0, 0, 4000, 100, prompts, (4,) * prompts, 32768)
    jobs = {4: 4, 3: 4, 1: min(stages, 4)}[prompts]
    read = forward_flops(shape, 4000, 4000**2 / 2, 1)
    tick = jobs / stages * (read.layers + read.head) / rates.forward / stages  # all jobs of a lane by one stage
    ticks = max(lane + stage + 1 for lane in range(stages) for stage in range(stages))
    token = forward_flops(shape, 1, 0, 1)
    key_values = 2 * 4 * 128 * 2 * 28  # bytes of a token, in all layers
    lane = (token.layers + token.head) + key_values * (jobs * 4000 + 4 * prompts * 50) / stages
    found = step_seconds(config, shape, work, 1, 1, rates)
    assert found["read prompts"] == pytest.approx(tick * ticks)
    assert found["decode"] == pytest.approx(100 * stages * lane / stages / rates.bandwidth)


@pytest.mark.parametrize(("overrides", "passes"), [
    ([], 3), (["parallel.recompute=full"], 4), (["parallel.recompute=none"], 3), (["model.lora.rank=8"], 2),
])  # fmt: skip
def test_an_update_that_waits_for_kernels_takes_its_passes_gaps(overrides, passes):
    """Backward as many as two forward passes, for inputs and weights; one with frozen weights."""
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=4", "cluster.calibration=none",
                          "parallel.recompute=none", *overrides])  # fmt: skip
    config = replace(config, parallel=replace(config.parallel, tp=1))
    rates = replace(read_rates(config), layer_gap=10.0)
    work = Work(True, False, 0, 0, 100, 10, 1, (2,), 1000)
    assert len(micro_batches(work)) == 1
    seconds = step_seconds(config, read_config(SHAPES / "qwen2_5_omni_7b"), work, 1, 1, rates)
    assert seconds["update"] == pytest.approx(passes * 280.0) and seconds["reference"] == pytest.approx(280.0)


CALIBRATION = {"device": "NVIDIA A100-SXM4-40GB", "train_flops": 1e14, "forward_flops": 2e14, "bandwidth": 1e12,
               "network": None, "layer_gap_s": 1e-5, "memory_ratio": 2.0}  # fmt: skip


H100 = {"device": "NVIDIA H100 80GB HBM3", "train_flops": 561e12, "forward_flops": 513e12, "bandwidth": 2.9e12,
        "network": None, "layer_gap_s": 1.9e-3, "memory_ratio": 0.63}  # of 2026-11-26 (docs/log.md)  # fmt: skip


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_plan_of_the_measured_step_comes_near_each_of_its_parts(tmp_path, calibrated):
    """bench/results/gpu.json: the 3B's step on one H100, from that GPU's calibration and from the peaks."""
    kept = json.loads((ROOT / "bench" / "results" / "gpu.json").read_text())
    assert kept["date"] == MEASURED_ON and kept["shape"] == "qwen2_5_omni_3b"
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(H100))
    config = load_config(["recipe=avatar_3b", "dry_run=true", "parallel.tp=1", "parallel.pp=1", "cluster.gpus=1",
                          "parallel.sequence_parallel=false",
                          f"parallel.recompute={kept['recompute']}", "cluster.gpu=h100",
                          f"cluster.calibration={path if calibrated else 'none'}"])  # fmt: skip
    shape = read_config(SHAPES / kept["shape"])
    work = Work(True, False, 12 * 256, 300, kept["prompt_tokens"], kept["new_tokens"], kept["prompts"],
                (kept["completions"],) * kept["prompts"], kept["group_tokens"])  # fmt: skip
    rates = read_rates(config)
    assert ("measured on NVIDIA H100" in rates.source) == calibrated
    seconds = step_seconds(config, shape, work, 1, 3_085_000_000, rates)
    seconds["update"] += seconds.pop("optimizer")
    names = {"encoders": "towers", "read prompts": "prefill"}
    shares = {part: value / kept[f"{names.get(part, part)}_s"] for part, value in seconds.items()}
    assert shares.keys() == {"encoders", "read prompts", "decode", "reference", "update"}
    assert all(0.75 < share < 1.25 for share in shares.values()), shares


def test_gaps_hide_behind_work_on_a_gpu_and_come_on_top_on_a_cpu():
    gpu, cpu = (read_rates(load_config(["recipe=avatar_7b", "dry_run=true", "cluster.calibration=none",
                                        f"cluster.gpu={name}"])) for name in ("h100", "cpu"))  # fmt: skip
    assert gpu.pass_seconds(2.0, 1.5) == 2.0 and gpu.pass_seconds(1.0, 1.5) == 1.5
    assert cpu.pass_seconds(2.0, 1.5) == 3.5
    assert f"a layer of it at least {gpu.graph_gap * 1e3} ms" in gpu.source and "at least 1 ms" in cpu.source
    assert gpu.graph_gap < gpu.layer_gap and MEASURED_ON in gpu.source and MEASURED_ON not in cpu.source


@pytest.mark.slow
def test_measured_rates_replace_assumed_ones(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(CALIBRATION))
    settings = ["cluster.gpus=4", f"cluster.calibration={path}"]
    a100, h100 = (plan(*settings, f"cluster.gpu={gpu}") for gpu in ("a100", "h100"))
    assert a100.rates.train == WHOLE_STEP["gpu"].train * 1e14 and "measured on NVIDIA A100" in a100.rates.source
    assert a100.ranks[0].activations == pytest.approx(2 * h100.ranks[0].activations, rel=1e-6)  # cached tables
    assert "was left aside" in h100.rates.source
    path.write_text(json.dumps(CALIBRATION | {"device": "NVIDIA B900"}))
    assert plan(*settings, "cluster.gpu=measured").rates.train == a100.rates.train
    assert plan(*settings, "cluster.gpu=h200").rates.train != a100.rates.train
    with pytest.raises(ValueError, match=r"cluster.calibration=none, which doesn't exist: run .*--calibrate none"):
        plan("cluster.gpus=4", "cluster.gpu=measured", "cluster.calibration=none")
    path.write_text("{")
    with pytest.raises(ValueError, match="can't be read.*doctor --calibrate"):
        plan("cluster.gpus=4", f"cluster.calibration={path}")

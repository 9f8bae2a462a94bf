"""Settings that only make sense together, and ranges: refused with key and remedy before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from megatron_avatar.config import Config, check_world, load_config, validate

AVATAR = ["recipe=avatar_7b", "model.path=models/omni", "data.manifest=data/manifest.jsonl"]


@pytest.fixture(scope="module")
def tp4() -> Config:
    return load_config(AVATAR)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("model.path=''", "model.path is empty (the folder of Qwen2.5-Omni-7B, 22 GB): write model.path"),
        ("data.manifest=''", "data.manifest is empty"),
        ("output_dir=''", "output_dir is empty"),
        ("cluster.runtime=docker", "cluster.runtime: 'docker' is not one of pyxis, apptainer, singularity"),
        ("cluster.mounts=[/data]", "cluster.mounts: '/data' is no FROM:TO"),
        ("log.watchdog_s=30", "would end a job that waits for data.decode_deadline_s=60.0"),
        ("checkpoint.restarts=0", "checkpoint.restarts=0 must be at least 1"),
        ("model.dtype=float64", "model.dtype: 'float64' is not one of float32, bfloat16, float16"),
        ("model.context=1", "model.context=1 must be at least 2"),
        ("model.lora.rank=-1", "model.lora.rank=-1 must be at least 0"),
        ("model.lora.rank=8 model.lora.alpha=0", "model.lora.alpha=0.0 must be above 0"),
        ("model.lora.rank=8 model.lora.targets=[]", "model.lora.targets is empty: name layers (q_proj, k_proj"),
        ("model.lora.rank=8 model.lora.targets=[wq]", "model.lora.targets: 'wq' is not one of q_proj, k_proj, v_proj"),
        ("parallel.tp=0", "parallel.tp=0 must be at least 1"),
        ("parallel.tp=1 parallel.sequence_parallel=true", "needs parallel.tp of 2 or more"),
        ("parallel.first_stage_layers=0 parallel.pp=2", "parallel.first_stage_layers=0 must be at least 1"),
        ("parallel.first_stage_layers=3", "parallel.first_stage_layers=3 needs parallel.pp of 2 or more"),
        ("parallel.recompute=half", "parallel.recompute: 'half' is not one of none, light, selective, full"),
        ("parallel.kernels=triton", "parallel.kernels: 'triton' is not one of auto, torch"),
        ("data.decoder=ffmpeg", "data.decoder: 'ffmpeg' is not one of auto, dali, pyav"),
        ("data.max_frames=7", "data.max_frames=7: frames are taken in pairs"),
        ("data.min_frames=0", "data.min_frames=0: frames are taken in pairs"),
        ("data.min_frames=18", "data.min_frames=18 is above data.max_frames=16"),
        ("data.frame_min_pixels=60000", "data.frame_min_pixels=60000 is above data.frame_max_pixels=50176"),
        ("data.image_max_pixels=100", "data.image_max_pixels=100 must be at least 784"),
        ("data.fps=0", "data.fps=0.0 must be above 0"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("optim.lr=0", "optim.lr=0.0 must be above 0"),
        ("optim.lr=nan", "optim.lr=nan must be above 0"),
        ("optim.min_lr=1", "optim.min_lr=1.0 must lie in [0, 1e-06]"),
        ("optim.min_lr=1e-7 stages.visual.lr=1e-8", "stages.visual.lr=1e-08 is below optim.min_lr=1e-07"),
        ("optim.schedule=step", "optim.schedule: 'step' is not one of constant, linear, cosine"),
        ("optim.warmup_fraction=2", "optim.warmup_fraction=2.0 must lie in [0, 1]"),
        ("optim.beta2=1", "optim.beta2=1.0 must lie in [0, 1)"),
        ("optim.clip_grad=0", "optim.clip_grad=0.0 must be above 0"),
        ("stages.visual.kind=dpo", "stages.visual.kind: 'dpo' is not one of sft, rl"),
        ("stages.visual.steps=0", "stages.visual.steps=0 must be at least 1"),
        ("stages.visual.prompts_per_step=0", "stages.visual.prompts_per_step=0 must be at least 1"),
        ("stages.visual.data=[]", "stages.visual.data is empty"),
        ("stages.visual.lr=-1", "stages.visual.lr=-1.0 must be above 0"),
        ("stages.visual.kind=sft", "stages.visual.rewards is set, but kind=sft trains on traces"),
        ("stages.visual.rewards.style=1", "'style' is not one of format, accuracy, self, judge"),
        ("stages.visual.rewards.format=0 stages.visual.rewards.accuracy=0", "no weight is above 0"),
        ("stages.visual.rewards.format=-1", "stages.visual.rewards.format=-1.0 must be at least 0"),
        ("rl.n_on=0", "rl.n_on=0 must be at least 1"),
        ("rl.n_off=-1", "rl.n_off=-1 must be at least 0"),
        ("rl.alpha=0", "rl.alpha=0.0 gives rl.n_off=4 no weight"),
        ("rl.beta=-1", "rl.beta=-1.0 must be at least 0"),
        ("rl.revisit_share=1.5", "rl.revisit_share=1.5 must lie in [0, 1]"),
        ("rl.clip_low=1", "rl.clip_low=1.0 must lie in [0, 1)"),
        ("rl.clip_high=0", "rl.clip_high=0.0 must be above 0"),
        ("rl.dual_clip=1.1", "rl.dual_clip=1.1 must be above 1 + rl.clip_high=0.2"),
        ("rl.ratio_level=word", "rl.ratio_level: 'word' is not one of token, sequence"),
        ("rl.guard.stop=1", "rl.guard.stop=1.0 must be above 1, or 0 to switch it off"),
        ("rl.guard.in_a_row=0", "rl.guard.in_a_row=0 must be at least 1"),
        ("rl.sampling.temperature=0", "rl.sampling.temperature=0.0 must be above 0"),
        ("rl.sampling.top_p=0", "rl.sampling.top_p=0.0 must be above 0"),
        ("model.context=2048", "rl.sampling.max_new_tokens=2048 leaves no room for a prompt in model.context=2048"),
        ("rl.shaping.shape=round", "rl.shaping.shape: 'round' is not one of parabolic, uniform,"),
        ("rl.shaping.lam=-0.1", "rl.shaping.lam=-0.1 must be at least 0"),
        ("rl.replay.order=lifo", "rl.replay.order: 'lifo' is not one of advantage, priority, uniform, fifo"),
        ("rl.replay.draw_share=[0.5,0.4,0.2]", "rl.replay.draw_share=[0.5, 0.4, 0.2]: write three shares"),
        ("rl.replay.capacity_share=[1]", "rl.replay.capacity_share=[1.0]: write three shares"),
        ("rl.replay.capacity=0", "rl.replay.capacity=0 must be at least 1"),
        ("rl.replay.temperature=0", "rl.replay.temperature=0.0 must be above 0"),
        ("rl.replay.min_fill=20000", "rl.replay.min_fill=20000 must lie in [0, 10000]"),
        ("rl.hints.patience=0", "rl.hints.patience=0 must be at least 1"),
        ("rl.hints.plain_every=1", "shows every prompt plain, so that no hint is ever seen"),
        ("rl.replay.max_age=2", "rl.replay.max_age=2 steps make 8 completions at most"),
        ("rl.replay.sigma=group", "rl.replay.sigma: 'group' is not one of buffer, batch"),
        ("rl.self_reward=always", "rl.self_reward: 'always' is not one of right, majority"),
        ("rl.std_floor=-0.1", "rl.std_floor=-0.1 must be at least 0"),
        ("rl.shaping.span=tags", "rl.shaping.span: 'tags' is not one of completion, between_tags"),
        ("rl.hints.plain_every=0", "rl.hints.plain_every=0 must be at least 1"),
        ("rl.vcrs_window=0", "rl.vcrs_window=0 must be at least 1"),
        ("rl.hints.kl_threshold=-1", "rl.hints.kl_threshold=-1.0 must be at least 0"),
        ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
        ("log.wandb=online", "log.wandb: 'online' is not one of auto, offline, disabled"),
    ],
)
def test_refused_with_key_and_remedy(tp4, overrides, says):
    tree = OmegaConf.structured(tp4)
    tree.merge_with_dotlist(overrides.split())
    with pytest.raises(ValueError) as error:
        validate(OmegaConf.to_object(tree))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["+cluster.env.WANDB_API_KEY=x"], "cluster.env.WANDB_API_KEY looks like a secret"),
        (["+cluster.env.A-B=x"], "cluster.env: 'A-B' is no name"),
        (["rl.replay.carry_over_stages=true", "stages.audio_visual.kind=sft",
          *(f"~stages.audio_visual.rewards.{name}" for name in ("format", "accuracy", "self"))],
         "can't carry over an sft stage behind an rl stage"),
    ],
)  # fmt: skip
def test_entries_that_are_added_or_left_out_are_checked_too(overrides, says):
    with pytest.raises(ValueError) as error:
        load_config([*AVATAR, *overrides])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rl.sampling.max_new_tokens=16384", "leaves no room for a prompt in model.context=16384: lower the first"),
        ("rl.sampling.max_new_tokens=0", "rl.sampling.max_new_tokens=0 must be at least 1"),
        ("rl.sampling.temperature=0", "rl.sampling.temperature=0.0 must be above 0"),
        ("rl.tokens_per_micro_batch=0", "rl.tokens_per_micro_batch=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("recipe", ["sft_7b", "avatar_7b"])
def test_what_every_kind_of_stage_uses_is_checked(recipe, override, says):
    with pytest.raises(ValueError) as error:
        load_config([f"recipe={recipe}", *AVATAR[1:], override])
    assert says in str(error.value)


def test_grpo_needs_no_off_policy_weight():
    assert load_config([*AVATAR, "ablation=grpo", "rl.alpha=0"]).rl.alpha == 0


def test_a_dry_run_needs_a_shape_and_gpus_only():
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=8"])
    assert config.model.path == "" and config.data.manifest == "" and config.model.shape == "qwen2_5_omni_7b"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("cluster.gpus=-1", "cluster.gpus=-1 must be at least 0"),
        ("cluster.gpus=8 cluster.gpu_memory_gib=0", "cluster.gpu_memory_gib=0.0 must be above 0"),
        ("cluster.gpus=8 cluster.gpu=b900", "cluster.gpu: 'b900' is not one of a100, h100, h200, cpu, measured"),
        ("cluster.gpus=8 model.shape='' parallel=single", "a dry run plans for one of them, as model.shape=NAME"),
        ("cluster.gpus=8 model.shape=qwen parallel=single", "model.shape: 'qwen' is not one of qwen2_5_omni_3b,"),
    ],
)
def test_a_dry_run_is_refused_with_key_and_remedy(overrides, says):
    with pytest.raises(ValueError) as error:
        load_config(["recipe=avatar_7b", "dry_run=true", *overrides.split()])
    assert says in str(error.value)


def test_a_world_that_fits_gives_its_data_parallel_size(tp4):
    assert check_world(tp4, 4) == 1
    wider = replace(tp4, stages={"visual": replace(tp4.stages["visual"], prompts_per_step=6)})
    assert [check_world(wider, world) for world in (4, 8, 12, 16, 24)] == [1, 2, 3, 4, 6]  # dealt out by tokens


@pytest.mark.parametrize(
    ("world", "says"),
    [
        (6, "need a multiple of 4 processes, but 6 were started: start 8"),
        (8, "stages.visual.prompts_per_step=1 leaves some of 2 data-parallel ranks idle: write "
            "stages.visual.prompts_per_step=2 stages.audio_visual.prompts_per_step=2 .*, start 4 processes"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(tp4, world, says):
    with pytest.raises(ValueError, match=says):
        check_world(tp4, world)

"""What types cannot say: ranges, names, and settings that only make sense together.

Every message names the key, the value and the remedy. Nothing here touches a file or a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

from megatron_avatar.config.families import FAMILIES, Family
from megatron_avatar.config.paths import NAMES, missing, refuse
from megatron_avatar.config.schema import LORA_TARGETS, Config, DataConfig, LoraConfig, StageConfig
from megatron_avatar.config.urls import addresses

STAGE_KINDS = ("sft", "rl")
REWARDS = ("format", "accuracy", "self", "judge")
SHAPES = ("parabolic", "uniform", "linear_decay", "linear_incline", "inverse_parabolic", "uniform_matched")
REPLAY_ORDERS = ("advantage", "priority", "uniform", "fifo")
REPLAY_SIGMAS = ("buffer", "batch")
SELF_REWARDS = ("right", "majority")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
RECOMPUTE = ("none", "light", "selective", "full")
RESIDUALS = ("float32", "model")
KERNELS = ("auto", "torch")
DECODERS = ("auto", "dali", "pyav")
RATIO_LEVELS = ("token", "sequence")
SPANS = ("completion", "between_tags")
WANDB_MODES = ("auto", "offline", "disabled")
MEMORIES = ("plan", "all")
RUNTIMES = ("pyxis", "apptainer", "singularity")
GPUS = ("a100", "h100", "h200", "cpu", "measured")


def validate(config: Config) -> None:
    """Raise ValueError naming key, value and remedy for settings that cannot work together."""
    _check_inputs(config)
    _check_data(config)
    _check_optim(config)
    if not config.stages:
        raise ValueError("stages is empty: a recipe needs at least one stage, as stages: {visual: {kind: rl, ...}}")
    for name, stage in config.stages.items():
        _check_stage(f"stages.{name}", stage, config.rl.rewards)
        if stage.lr is not None and stage.lr < config.optim.min_lr:
            raise ValueError(f"stages.{name}.lr={stage.lr} is below optim.min_lr={config.optim.min_lr}: lower that")
    _check_forward(config)
    _check_own_rewards(config)
    if any(stage.kind == "rl" for stage in config.stages.values()):
        _check_rl(config)


def check_world(config: Config, world_size: int) -> int:
    """The data-parallel size of `world_size` processes under tp * pp.

    Raises ValueError where the processes don't divide, or a stage has fewer prompts than there are model replicas.
    """
    parallel = config.parallel
    size = parallel.tp * parallel.pp
    if world_size % size:
        raise ValueError(
            f"parallel.tp={parallel.tp} and parallel.pp={parallel.pp} need a multiple of {size} processes, but "
            f"{world_size} were started: start {math.ceil(world_size / size) * size} or lower one of the two"
        )
    data_parallel = world_size // size
    prompts = {name: stage.prompts_per_step for name, stage in config.stages.items()}
    few = {name: count for name, count in prompts.items() if count < data_parallel}
    if few:
        name, count = next(iter(few.items()))
        remedy = " ".join(f"stages.{name}.prompts_per_step={data_parallel}" for name in few)
        raise ValueError(
            f"stages.{name}.prompts_per_step={count} leaves some of {data_parallel} data-parallel ranks idle: write "
            f"{remedy} (another batch than the recipe's), start {size * min(few.values())} processes, or raise "
            "parallel.tp or parallel.pp"
        )
    return data_parallel


def check_pixels(data: DataConfig, family: Family) -> None:
    """Raise ValueError where a picture would have fewer pixels than one visual token of the family."""
    for key in ("frame_min_pixels", "frame_max_pixels", "image_max_pixels"):
        if (value := getattr(data, key)) < family.token_pixels:
            raise ValueError(f"data.{key}={value} must be at least {family.token_pixels}, one visual token of "
                             f"{family.name}")  # fmt: skip


def _check_inputs(config: Config) -> None:
    if config.dry_run:
        _check_plan(config)
    else:
        refuse(missing(config))
    if not config.output_dir:
        raise ValueError("output_dir is empty: write output_dir=FOLDER, where the run keeps everything that it writes")
    _one_of("model.dtype", config.model.dtype, DTYPES)
    _one_of("model.residual", config.model.residual, RESIDUALS)
    if config.model.shape:
        shapes = sorted(path.name for path in (Path(__file__).parent / "shapes").iterdir())
        _one_of("model.shape", config.model.shape, shapes)
    _one_of("log.wandb", config.log.wandb, WANDB_MODES)
    _at_least("model.context", config.model.context, 2)
    _check_lora(config.model.lora)
    parallel = config.parallel
    for key in ("tp", "pp", "threads"):
        _at_least(f"parallel.{key}", getattr(parallel, key), 1)
    if parallel.first_stage_layers is not None:
        _at_least("parallel.first_stage_layers", parallel.first_stage_layers, 1)
        if parallel.pp == 1:
            raise ValueError(
                f"parallel.first_stage_layers={parallel.first_stage_layers} needs parallel.pp of 2 or more: raise "
                "that, or write parallel.first_stage_layers=null"
            )
    cluster = config.cluster
    for key in ("gpus_per_node", "cpus_per_task", "minutes"):
        _at_least(f"cluster.{key}", getattr(cluster, key), 1)
    _at_least("cluster.signal_s", cluster.signal_s, 0)
    _at_least("cluster.retries", cluster.retries, 0)
    _at_least("cluster.host_memory_gib", cluster.host_memory_gib, 0)
    _one_of("cluster.memory", cluster.memory, MEMORIES)
    for option in cluster.sbatch:
        if not option.startswith("--"):
            raise ValueError(f"cluster.sbatch: '{option}' is no option of sbatch's long form, as --constraint=a100")
    _one_of("cluster.runtime", cluster.runtime, RUNTIMES)
    for mount in cluster.mounts:
        if ":" not in mount:
            raise ValueError(f"cluster.mounts: '{mount}' is no FROM:TO")
    for name, path in cluster.paths.items():
        _one_of("cluster.paths", name, NAMES)
        if not path:
            raise ValueError(f"cluster.paths.{name} is empty: write a path, or take the line out")
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"cluster.env: '{name}' is no name of an environment variable")
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper()):
            raise ValueError(f"cluster.env.{name} looks like a secret, and settings are copied into every run: export "
                             "it where you submit")
    _one_of("parallel.recompute", parallel.recompute, RECOMPUTE)
    _one_of("parallel.kernels", parallel.kernels, KERNELS)
    if parallel.sequence_parallel and parallel.tp == 1:
        raise ValueError("parallel.sequence_parallel=true needs parallel.tp of 2 or more: raise it or switch that off")
    if config.log.watchdog_s and config.log.watchdog_s <= config.data.decode_deadline_s:
        raise ValueError(
            f"log.watchdog_s={config.log.watchdog_s} would end a job that waits for data.decode_deadline_s="
            f"{config.data.decode_deadline_s}: make it longer, or 0 to switch it off"
        )
    judge = config.judge
    if "://" in judge.endpoint:
        addresses(judge.endpoint)
    for key, low in {"frames": 1, "concurrency": 1, "retries": 0, "wait_s": 0}.items():
        _at_least(f"judge.{key}", getattr(judge, key), low)
    _above("judge.deadline_s", judge.deadline_s, 0)
    _between("judge.max_unscored", judge.max_unscored, 0, 1)
    if judge.endpoint and config.log.watchdog_s and config.log.watchdog_s <= judge.deadline_s:
        raise ValueError(f"log.watchdog_s={config.log.watchdog_s} would end a job that waits for judge.deadline_s="
                         f"{judge.deadline_s}: make it longer, or 0 to switch it off")
    _at_least("checkpoint.every", config.checkpoint.every, 1)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    _at_least("checkpoint.minutes", config.checkpoint.minutes, 0)
    _at_least("checkpoint.restarts", config.checkpoint.restarts, 1)
    _at_least("replay_step", config.replay_step, 0)
    _at_least("eval.every", config.eval.every, 0)
    _at_least("eval.samples", config.eval.samples, 1)


def _check_plan(config: Config) -> None:
    """What a dry run needs."""
    cluster = config.cluster
    if not (config.model.path or config.model.shape):
        raise ValueError("model.path and model.shape are empty: a dry run plans for one of them, as model.shape=NAME")
    _at_least("cluster.gpus", cluster.gpus, 0)
    _above("cluster.gpu_memory_gib", cluster.gpu_memory_gib, 0)
    if cluster.gpu not in GPUS:
        raise ValueError(f"cluster.gpu: '{cluster.gpu}' is not one of {', '.join(GPUS)}. Others are measured in two "
                         "minutes: python -m megatron_avatar.doctor --calibrate; then write cluster.gpu=measured")


def _check_lora(lora: LoraConfig) -> None:
    _at_least("model.lora.rank", lora.rank, 0)
    if lora.rank:
        _above("model.lora.alpha", lora.alpha, 0)
        if not lora.targets:
            raise ValueError(f"model.lora.targets is empty: name layers ({', '.join(LORA_TARGETS)}) or write rank=0")
        for name in lora.targets:
            _one_of("model.lora.targets", name, LORA_TARGETS)


def _check_data(config: Config) -> None:
    data = config.data
    _one_of("data.decoder", data.decoder, DECODERS)
    _above("data.fps", data.fps, 0)
    _above("data.decode_deadline_s", data.decode_deadline_s, 0)
    _at_least("data.workers", data.workers, 0)
    for key in ("min_frames", "max_frames"):
        value = getattr(data, key)
        if value < 2 or value % 2:
            raise ValueError(f"data.{key}={value}: frames are taken in pairs, so it must be even and at least 2")
    for low, high in (("min_frames", "max_frames"), ("frame_min_pixels", "frame_max_pixels")):
        low_value, high_value = getattr(data, low), getattr(data, high)
        if low_value > high_value:
            raise ValueError(f"data.{low}={low_value} is above data.{high}={high_value}: lower it or raise the other")
    for key in ("frame_min_pixels", "frame_max_pixels", "image_max_pixels"):
        _at_least(f"data.{key}", getattr(data, key), min(family.token_pixels for family in FAMILIES))


def _check_optim(config: Config) -> None:
    optim = config.optim
    _one_of("optim.schedule", optim.schedule, SCHEDULES)
    _above("optim.lr", optim.lr, 0)
    _between("optim.min_lr", optim.min_lr, 0, optim.lr)
    _between("optim.warmup_fraction", optim.warmup_fraction, 0, 1)
    _at_least("optim.weight_decay", optim.weight_decay, 0)
    _above("optim.eps", optim.eps, 0)
    _above("optim.clip_grad", optim.clip_grad, 0)
    for key in ("beta1", "beta2"):
        _between(f"optim.{key}", getattr(optim, key), 0, 1, open_top=True)


def _check_stage(key: str, stage: StageConfig, own: Collection[str]) -> None:
    if not re.fullmatch(r"\w[\w-]*", key.removeprefix("stages.")):
        raise ValueError(f"{key}: a stage's name is a folder's name: use letters, digits, _ and -")
    _one_of(f"{key}.kind", stage.kind, STAGE_KINDS)
    _at_least(f"{key}.steps", stage.steps, 1)
    _at_least(f"{key}.prompts_per_step", stage.prompts_per_step, 1)
    if not stage.data:
        raise ValueError(f"{key}.data is empty: name the manifest's stages to draw from, as {key}.data=[visual]")
    if stage.lr is not None:
        _above(f"{key}.lr", stage.lr, 0)
    if stage.kind == "sft":
        if stage.rewards:
            raise ValueError(f"{key}.rewards is set, but kind=sft trains on traces: remove it or write {key}.kind=rl")
        return
    for name, weight in stage.rewards.items():
        if name not in (*REWARDS, *own):
            raise ValueError(f"{key}.rewards: '{name}' is not one of {', '.join((*REWARDS, *own))}; one of your own is "
                             f"named by +rl.rewards.{name}=FILE.py:FUNCTION")
        _at_least(f"{key}.rewards.{name}", weight, 0)
    if not sum(stage.rewards.values()) > 0:
        raise ValueError(f"{key}.rewards: no weight is above 0. Give some, as {{format: 0.5, accuracy: 0.5}}")


def _check_own_rewards(config: Config) -> None:
    """Names and places of rewards of one's own; whether there is such a function, rl/rewards/own.py finds out."""
    for name, place in config.rl.rewards.items():
        key = f"rl.rewards.{name}"
        if name in (*REWARDS, "correct") or not name.isidentifier():
            raise ValueError(f"{key}: a reward of one's own needs a name in letters, digits and _, other than "
                             f"{', '.join(REWARDS)} and correct")
        if not re.fullmatch(r"(\w+(\.\w+)*|[^:]+\.py):\w+", place):
            raise ValueError(f"{key}={place}: write module:function, or FILE.py:function")
        if not any(stage.rewards.get(name) for stage in config.stages.values()):
            stage_name = next((k for k, s in config.stages.items() if s.kind == "rl"), "NAME")
            raise ValueError(f"{key}: no stage gives it a weight: write +stages.{stage_name}.rewards.{name}=0.3, or "
                             f"leave {key} out")


def _check_forward(config: Config) -> None:
    """What every kind of stage takes from `rl`: micro-batches, the logits' temperature, evaluation's length."""
    rl = config.rl
    _at_least("rl.tokens_per_micro_batch", rl.tokens_per_micro_batch, 1)
    _above("rl.sampling.temperature", rl.sampling.temperature, 0)
    _at_least("rl.sampling.max_new_tokens", rl.sampling.max_new_tokens, 1)
    if rl.sampling.max_new_tokens >= config.model.context:
        raise ValueError(
            f"rl.sampling.max_new_tokens={rl.sampling.max_new_tokens} leaves no room for a prompt in "
            f"model.context={config.model.context}: lower the first or raise the other"
        )


def _check_rl(config: Config) -> None:
    rl = config.rl
    kinds = [stage.kind for stage in config.stages.values()]
    if rl.replay.carry_over_stages and "sft" in kinds[kinds.index("rl") :]:
        raise ValueError("rl.replay.carry_over_stages=true can't carry over an sft stage behind an rl stage: reorder "
                         "the stages, or write rl.replay.carry_over_stages=false")
    _at_least("rl.n_on", rl.n_on, 1)
    _at_least("rl.n_off", rl.n_off, 0)
    _between("rl.revisit_share", rl.revisit_share, 0, 1)
    _at_least("rl.beta", rl.beta, 0)
    if rl.n_off and not rl.alpha > 0:
        raise ValueError(f"rl.alpha={rl.alpha} gives rl.n_off={rl.n_off} no weight: raise rl.alpha or write rl.n_off=0")
    _between("rl.clip_low", rl.clip_low, 0, 1, open_top=True)
    _above("rl.clip_low", rl.clip_low, 0)
    _above("rl.clip_high", rl.clip_high, 0)
    if rl.dual_clip is not None and not rl.dual_clip > 1 + rl.clip_high:
        raise ValueError(f"rl.dual_clip={rl.dual_clip} must be above 1 + rl.clip_high={rl.clip_high}, or null")
    _one_of("rl.ratio_level", rl.ratio_level, RATIO_LEVELS)
    _one_of("rl.numerical", rl.numerical, ("graded", "exact"))
    _one_of("rl.self_reward", rl.self_reward, SELF_REWARDS)
    _at_least("rl.std_floor", rl.std_floor, 0)
    _at_least("rl.updates_per_rollout", rl.updates_per_rollout, 1)
    _at_least("rl.vcrs_window", rl.vcrs_window, 1)
    _above("rl.advantage_clip", rl.advantage_clip, 0)
    for key in ("exact", "warn", "mask", "stop"):
        if not (getattr(rl.guard, key) == 0 or getattr(rl.guard, key) > 1):
            raise ValueError(f"rl.guard.{key}={getattr(rl.guard, key)} must be above 1, or 0 to switch it off")
    _at_least("rl.guard.in_a_row", rl.guard.in_a_row, 1)

    sampling = rl.sampling
    _at_least("rl.sampling.top_k", sampling.top_k, 0)
    _between("rl.sampling.top_p", sampling.top_p, 0, 1)
    _above("rl.sampling.top_p", sampling.top_p, 0)
    _one_of("rl.shaping.shape", rl.shaping.shape, SHAPES)
    _at_least("rl.shaping.lam", rl.shaping.lam, 0)
    _one_of("rl.shaping.span", rl.shaping.span, SPANS)

    replay = rl.replay
    _one_of("rl.replay.order", replay.order, REPLAY_ORDERS)
    _one_of("rl.replay.sigma", replay.sigma, REPLAY_SIGMAS)
    for key in ("capacity_share", "draw_share"):
        shares = getattr(replay, key)
        if len(shares) != 3 or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"rl.replay.{key}={shares}: write three shares (easy, medium, hard) that sum to 1")
    _at_least("rl.replay.capacity", replay.capacity, 1)
    _above("rl.replay.temperature", replay.temperature, 0)
    _between("rl.replay.min_fill", replay.min_fill, 0, replay.capacity)
    _at_least("rl.replay.max_age", replay.max_age, 0)
    most = rl.n_on * max(stage.prompts_per_step for stage in config.stages.values() if stage.kind == "rl")
    if rl.n_off and 0 < replay.max_age * most < replay.min_fill:
        raise ValueError(f"rl.replay.max_age={replay.max_age} steps make {replay.max_age * most} completions at most, "
                         f"fewer than rl.replay.min_fill={replay.min_fill}, so that nothing is ever replayed: raise "
                         "the first or lower the second")

    hints = rl.hints
    _at_least("rl.hints.patience", hints.patience, 1)
    _between("rl.hints.hysteresis", hints.hysteresis, 0, 1)
    _at_least("rl.hints.plain_every", hints.plain_every, 1)
    if hints.enabled and hints.plain_every == 1:
        raise ValueError("rl.hints.plain_every=1 shows every prompt plain, so that no hint is ever seen: raise it, or "
                         "write rl.hints.enabled=false")
    if hints.kl_threshold is not None:
        _at_least("rl.hints.kl_threshold", hints.kl_threshold, 0)


def _one_of(key: str, value: str, names: Collection[str]) -> None:
    if value not in names:
        raise ValueError(f"{key}: '{value}' is not one of {', '.join(names)}")


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{key}={value} must be at least {low}")


def _above(key: str, value: float, low: float) -> None:
    if not value > low:
        raise ValueError(f"{key}={value} must be above {low}")


def _between(key: str, value: float, low: float, high: float, *, open_top: bool = False) -> None:
    if not (low <= value < high if open_top else low <= value <= high):
        raise ValueError(f"{key}={value} must lie in [{low}, {high}{')' if open_top else ']'}")

"""What a run takes, in a hundredth of a second and without torch: hours, disk, host memory, and whether its weights
fit. A job's time limit and memory come from here; planning/plan.py has every rank's memory to the byte.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import Config, ModelConfig, ParallelConfig, StageConfig
from megatron_avatar.planning.seconds import read_rates, step_seconds
from megatron_avatar.planning.work import stage_work
from megatron_avatar.policy.shape import (
    Shape,
    embedding_parameters,
    experts_of,
    layer_parameters,
    read_shape,
    text_parameters,
    tower_parameters,
)

GIB, TIB = 2**30, 2**40
# A GPU's CUDA context, NCCL's buffers, cuBLAS workspaces and fragmentation; on a CPU the libraries: our assumption.
MARGIN, MARGIN_CPU = 3 * GIB, GIB
DECODER = GIB // 2  # of a GPU, by each process that decodes on it: a CUDA context and its frames, our assumption
# Host memory, our assumptions: a process with its CUDA context and pinned buffers, or on a CPU; one that decodes; and
# what a copy in pieces holds at a time.
PROCESS, PROCESS_CPU, WORKER, PIECE = 6 * GIB, 2 * GIB, 1.5 * GIB, GIB
# A job's time limit over the planned hours, as decoding, rewards, checkpoints and evaluation are not in them.
LIMIT_MARGIN = 2.0
START_MINUTES, LEAST_MINUTES = 20, 60
BATCH = 16  # items that an evaluation answers together
PREPARE_S = 5.0  # seconds of a core that an item's media take to be read and measured, our assumption


@dataclass(frozen=True)
class Layout:
    """gpus (processes) in all, and on a node; replicas of the model."""

    gpus: int
    per_node: int
    dp: int


def layout(config: Config) -> Layout:
    """Of cluster.gpus, or of one replica, spread evenly over nodes of cluster.gpus_per_node; ValueError if it can't."""
    gpus, most = config.cluster.gpus or config.parallel.tp * config.parallel.pp, config.cluster.gpus_per_node
    nodes = -(-gpus // most)
    if gpus % nodes:
        raise ValueError(
            f"{gpus} processes don't spread evenly over {nodes} nodes of cluster.gpus_per_node={most}: choose "
            "cluster.gpus as a multiple of it"
        )
    return of(config, nodes, gpus // nodes)


def of(config: Config, nodes: int, per_node: int) -> Layout:
    """Of a job of so many nodes and processes a node."""
    gpus = nodes * per_node
    return Layout(gpus, per_node, replicas(gpus, config.parallel))


def replicas(gpus: int, parallel: ParallelConfig) -> int:
    """Of the model on so many GPUs; fewer than one takes count as one."""
    return max(1, gpus // (parallel.tp * parallel.pp))


def shape_of(config: Config) -> Shape:
    """Of the recipe's published model, else of the folder at model.path. ValueError where there is neither."""
    return read_shape(CONFIG_DIR / "shapes" / config.model.shape if config.model.shape else config.model.path)


# ---- parameters ----------------------------------------------------------------------------------------------------


def trained_parameters(config: Config, shape: Shape) -> int:
    """Parameters that an optimizer keeps numbers for, of the whole model: trained in any stage."""
    towers = tower_parameters(shape) if any(stage.train_towers for stage in config.stages.values()) else 0
    return towers + (lora_parameters(config, shape) if config.model.lora.rank else text_parameters(shape))


def lora_parameters(config: Config, shape: Shape) -> int:
    """ValueError where adapters are asked for beside a mixture's experts, which take none."""
    text, lora, experts = shape.text_config, config.model.lora, experts_of(shape)
    hidden, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    ends = dict(q_proj=hidden + queries, k_proj=hidden + keys, v_proj=hidden + keys, o_proj=queries + hidden)
    if not experts:
        ends |= dict(gate_proj=hidden + inner, up_proj=hidden + inner, down_proj=inner + hidden)
    if beside := [name for name in lora.targets if name not in ends]:
        raise ValueError(f"model.lora.targets: {', '.join(beside)} are layers of experts, which take no adapters: "
                         f"choose from {', '.join(ends)}")  # fmt: skip
    return text.num_hidden_layers * lora.rank * sum(ends[name] for name in lora.targets)


def rank_parameters(config: Config, shape: Shape) -> tuple[float, int]:
    """Of the largest rank: its share of the language model, and the encoders, which every rank of the first stage has
    whole."""
    text, parallel = shape.text_config, config.parallel
    tp, pp, layers = parallel.tp, parallel.pp, text.num_hidden_layers
    if pp == 1:
        return text_parameters(shape) / tp, tower_parameters(shape)
    first = parallel.first_stage_layers or layers // pp
    rest = (layers - first) / (pp - 1)
    ends = [(first, tower_parameters(shape)), (rest, 0)]
    ranks = [((count * layer_parameters(shape) + embedding_parameters(shape)) / tp, towers) for count, towers in ends]
    return max(ranks, key=sum)


def rank_trained(config: Config, shape: Shape) -> float:
    """Of these the trained ones."""
    text, towers = rank_parameters(config, shape)
    if config.model.lora.rank:
        text = lora_parameters(config, shape) / (config.parallel.tp * config.parallel.pp)
    return text + towers * any(stage.train_towers for stage in config.stages.values())


def margin(config: Config) -> int:
    """Bytes of a rank's GPU that libraries take, its decode workers' among them; on a CPU those of its process."""
    if config.cluster.gpu == "cpu":
        return MARGIN_CPU
    return MARGIN + (config.data.workers * DECODER if config.data.decoder != "pyav" else 0)


def check_weights_fit(config: Config, shape: Shape, where: Layout) -> None:
    """ValueError where weights, gradients and the optimizer alone leave a GPU no room: what plans find in seconds."""
    if config.cluster.gpu == "cpu":
        return
    text, towers = rank_parameters(config, shape)
    weight, state = itemsizes(config.model)
    share = where.dp if config.parallel.distributed_optimizer else 1
    trained = rank_trained(config, shape)
    reference = weight if any(stage.kind == "rl" for stage in config.stages.values()) else 0
    need = ((text + towers) * weight + trained * (4 + state / share + reference) + margin(config)) / GIB
    if need > config.cluster.gpu_memory_gib:
        raise ValueError(
            f"weights, gradients, optimizer and CUDA alone take {need:.0f} GiB of a GPU, which has "
            f"cluster.gpu_memory_gib={config.cluster.gpu_memory_gib:g}: choose another layout (parallel=a100_40g, or "
            "parallel.tp and pp; dry_run=true names one), or more GPUs"
        )


# ---- time ------------------------------------------------------------------------------------------------------------


def stage_hours(config: Config, where: Layout) -> dict[str, float]:
    """Estimated hours of each stage."""
    shape, rates = shape_of(config), read_rates(config)
    trainable = round(rank_trained(config, shape))
    hours = {}
    for name, stage in config.stages.items():
        work = stage_work(config, stage, shape, where.dp, longest=False)
        seconds = step_seconds(config, shape, work, where.dp, trainable, rates)
        hours[name] = stage.steps * sum(seconds.values()) / 3600
    return hours


def evaluation_hours(config: Config, where: Layout, items: int, completions: int = 1) -> float:
    """Estimated hours of answering `items`, each with a clip at the configuration's frames and at full length."""
    shape = shape_of(config)
    asked = StageConfig(steps=1, prompts_per_step=BATCH * where.dp)
    work = stage_work(config, asked, shape, where.dp, longest=False)
    work = replace(work, completions=(completions,) * work.fresh)
    seconds = step_seconds(config, shape, work, where.dp, 0, read_rates(config))
    part = sum(seconds[name] for name in ("encoders", "read prompts", "decode"))
    return math.ceil(items / (BATCH * where.dp)) * part / 3600


def preparation_hours(items: int, cores: int) -> float:
    """Estimated hours of preparing a benchmark."""
    return items * PREPARE_S / cores / 3600


def limit_minutes(hours: float, most: int, margin: float = LIMIT_MARGIN) -> int:
    """A job's time limit: the planned hours with a margin, in steps of ten minutes, an hour at least and `most` at
    most. A run that takes longer goes on in the next job."""
    wanted = START_MINUTES + 60 * margin * hours
    return min(most, max(LEAST_MINUTES, 10 * math.ceil(wanted / 10)))


# ---- disk ------------------------------------------------------------------------------------------------------------


def itemsizes(model: ModelConfig) -> tuple[int, int]:
    """Bytes of a weight, and of what AdamW keeps for it: two moments, and in half precision float32 main weights."""
    return (4, 8) if model.dtype == "float32" else (2, 12)


def weights_bytes(config: Config, shape: Shape) -> int:
    """Of a checkpoint's weights alone: a milestone, or about an export."""
    adapters = lora_parameters(config, shape) if config.model.lora.rank else 0
    return itemsizes(config.model)[0] * (text_parameters(shape) + tower_parameters(shape) + adapters)


def checkpoint_bytes(config: Config, shape: Shape) -> int:
    """Weights, the optimizer's numbers, and a stage's reference."""
    weight, state = itemsizes(config.model)
    reference = weight if any(stage.kind == "rl" for stage in config.stages.values()) else 0
    return weights_bytes(config, shape) + trained_parameters(config, shape) * (state + reference)


def left_bytes(config: Config, shape: Shape) -> int:
    """What a run leaves once it is done."""
    whole = config.checkpoint.keep * checkpoint_bytes(config, shape) if config.checkpoint.keep_finished else 0
    return whole + (len(config.checkpoint.milestones) + len(config.stages)) * weights_bytes(config, shape)


def kept_bytes(config: Config, shape: Shape) -> int:
    """The most that a run keeps: its checkpoints, one more while it is written, milestones, an export a stage."""
    whole, weights = checkpoint_bytes(config, shape), weights_bytes(config, shape)
    return (config.checkpoint.keep + 1) * whole + (len(config.checkpoint.milestones) + len(config.stages)) * weights


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_space(config: Config) -> str:
    """What is to be said about the space for a run; empty where all that it keeps will fit.

    Raises ValueError where not even one checkpoint does.
    """
    folder, shape = Path(config.output_dir), shape_of(config)
    size, most = checkpoint_bytes(config, shape), kept_bytes(config, shape)
    there = existing(folder)
    free = shutil.disk_usage(there).free
    if free < size:
        raise ValueError(
            f"output_dir={folder}: a checkpoint takes about {size / GIB:.1f} GiB, but the disk of {there} has "
            f"{free / GIB:.1f} GiB free: make room there, or choose another output_dir"
        )
    begun = sum(path.stat().st_size for own in ("checkpoints", "milestones", "export")
                for path in (folder / own).rglob("*") if path.is_file())  # fmt: skip
    if free + begun < most:
        return (f"output_dir={folder}: the run keeps up to {most / GIB:.0f} GiB (checkpoints of {size / GIB:.1f}), and "
                f"{free / GIB:.0f} GiB are free: lower checkpoint.keep or checkpoint.milestones, or make "
                "room")  # fmt: skip
    return ""


# ---- host memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node: its processes, and a checkpoint's copy on top, whole or in pieces."""

    processes: float
    copy: float
    pieces: float

    @property
    def whole(self) -> float:
        return self.processes + self.copy

    @property
    def least(self) -> float:
        return self.processes + min(self.copy, self.pieces)  # a small model's copy is no larger than a piece


def host_memory(config: Config, where: Layout) -> HostMemory:
    """What a training takes of a node's host memory. A checkpoint is copied there so that training may go on while it
    is written; where there is no room it is written in pieces, and training waits."""
    cpu = config.cluster.gpu == "cpu"
    processes = where.per_node * ((PROCESS_CPU if cpu else PROCESS) + config.data.workers * WORKER)
    shape = shape_of(config)
    ranks = config.parallel.tp * config.parallel.pp
    weight, state = itemsizes(config.model)
    if cpu:  # weights, gradients, optimizer and reference live there too
        text, towers = rank_parameters(config, shape)
        processes += where.per_node * (text + towers) * (2 * weight + 4 + state)
    optimizer = trained_parameters(config, shape) * state
    once = checkpoint_bytes(config, shape) - optimizer  # weights and reference: the first replica's
    shared = where.gpus if config.parallel.distributed_optimizer else ranks
    copy = once * min(1.0, where.per_node / ranks) + optimizer * min(1.0, where.per_node / shared)
    return HostMemory(processes, copy, where.per_node * PIECE)


def preparation_memory(cores: int) -> float:
    """Bytes of a node that prepares media, a process a core."""
    return PROCESS_CPU + cores * WORKER


def evaluation_memory(config: Config, where: Layout) -> float:
    """Bytes of a node that answers a benchmark."""
    return host_memory(config, where).processes

"""Typed settings. Importing this needs neither torch nor Megatron.

A recipe (config/recipe/*.yaml) names every number that a paper row depends on; a paper row is a
recipe plus an `ablation=` override and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

INSTRUCTION = (
    "Think it through between <think> and </think>, then give only the answer between <answer> and </answer>: "
    "of listed options the letter, otherwise the result or a short answer."
)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen linear layers of the language model. A stage's reference policy is a copy of what
    trains: the adapters, and the encoders where they train."""

    rank: int = 0  # 0: off, all weights of the language model train
    alpha: float = 32.0  # adapters count alpha / rank
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # layers by their Hugging Face names


@dataclass
class ModelConfig:
    """Where weights, tokenizer and architecture come from: one Hugging Face folder."""

    path: str = ""  # folder with config.json, safetensors, tokenizer; empty: as config/paths.py finds it
    cold_start: str = ""  # recipe whose export (runs/RECIPE/export/sft) is begun with where it is there
    shape: str = ""  # the published model that the recipe is for; a dry run needs no folder: config/shapes/SHAPE
    context: int = 16384  # prompt + completion tokens; a longer prompt is refused
    dtype: str = "float32"  # float32 | bfloat16 | float16 (with loss scaling); main weights are float32 in each
    residual: str = "float32"  # float32 | model: the stream that branches add to; the latter rounds it in every layer
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ParallelConfig:
    """World size = tp * pp * dp; dp follows from the number of processes."""

    tp: int = 1
    pp: int = 1
    first_stage_layers: int | None = None  # layers of the first stage, which carries the encoders; null: even stages
    sequence_parallel: bool = False
    recompute: str = "none"  # none | light (norms, SwiGLU) | selective (feed-forward) | full (every layer)
    distributed_optimizer: bool = False  # main weights and moments sharded over the data-parallel ranks
    kernels: str = "auto"  # auto (ours, Transformer Engine's, Apex's, FlashAttention-3 where a test agrees) | torch
    threads: int = 1  # CPU threads a rank; pinned, so that sums are made in one order


@dataclass
class ClusterConfig:
    """A site: what its nodes are, how jobs start there. config/cluster/example.yaml explains the keys."""

    gpus: int = 0  # in all; 0: those of one replica, tp * pp
    gpu_memory_gib: float = 80.0
    gpu: str = "h100"  # a100 | h100 | h200 | cpu: its peaks, or its calibration; measured: the calibration's device
    calibration: str = "runs/calibration.json"  # what doctor --calibrate measured
    gpus_per_node: int = 4  # tasks a node: one process a GPU (cpu: processes)
    cpus_per_task: int = 12
    minutes: int = 1440  # the longest job; a run continues in another
    signal_s: int = 300  # before the time limit: the run saves its state and goes back into the queue
    partition: str = ""  # these for what is checked and submitted; sbatch has its own options and variables
    account: str = ""
    qos: str = ""
    cpu_partition: str = ""  # of jobs without a GPU (data, reports); empty: as the others
    sbatch: list[str] = field(default_factory=list)  # further options, as --constraint=a100
    memory: str = "plan"  # of a node: plan (asked for as planned) | all
    host_memory_gib: float = 0.0  # that a node has for jobs; 0: not known
    retries: int = 3  # failed attempts of a sweep's or graph's task that are made good by another
    modules: list[str] = field(default_factory=list)  # environment modules loaded before training
    container: str = ""  # image; empty: none
    runtime: str = "pyxis"  # pyxis | apptainer | singularity
    mounts: list[str] = field(default_factory=list)  # FROM:TO, beside the working directory
    paths: dict[str, str] = field(default_factory=dict)  # of models and data, by the names in config/paths.py
    gres: str = "gpu:{n}"  # sbatch's --gres for n tasks a node, of a type gpu:a100:{n}; empty: a site without GRES
    tmp_gib: float = 1.0  # that a node's temporary folder must have free; 0: not looked at
    master: str = "{node}"  # MASTER_ADDR: the first node's name as the others reach it
    python: str = ""  # interpreter of training; empty: the one that checks, or the image's python3
    env: dict[str, str] = field(default_factory=dict)  # of every rank: NCCL and fabric settings go here


# Keys of `data` that change how a prompt comes to be and not what it is.
HOW_DECODED = ("manifest", "decoder", "workers", "decode_deadline_s")


@dataclass
class DataConfig:
    manifest: str = ""  # JSONL; media paths are relative to its folder
    instruction: str = INSTRUCTION  # last line of every prompt: SFT, RL, hinted, protocol ours; empty: none
    system: str = ""  # system prompt; empty: the chat template's own
    decoder: str = "auto"  # auto | dali | pyav
    fps: float = 2.0  # frames sampled a second
    min_frames: int = 4
    max_frames: int = 16
    frame_max_pixels: int = 50176
    frame_min_pixels: int = 50176  # the smaller of 100,352 (Qwen's) and frame_max_pixels
    image_max_pixels: int = 401408
    workers: int = 1  # decode processes a rank; 0 decodes in the trainer's own process
    decode_deadline_s: float = 60.0
    mute: bool = False  # drop sound (evaluation control)
    blind: bool = False  # drop pictures (evaluation control)


@dataclass
class OptimConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_fraction: float = 0.05
    schedule: str = "linear"  # constant | linear | cosine, after the warm-up
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class StageConfig:
    """One stage of the curriculum. kind sft trains on traces, rl on rewards."""

    kind: str = "rl"  # sft | rl
    data: list[str] = field(default_factory=list)  # manifest stages this stage draws from
    steps: int = 0
    prompts_per_step: int = 8  # fresh prompts (rl) or examples (sft) a step, over all ranks
    rewards: dict[str, float] = field(default_factory=dict)  # format, accuracy, self, judge, names of rl.rewards
    lr: float | None = None  # overrides optim.lr
    train_towers: bool = False


@dataclass
class SamplingConfig:
    temperature: float = 1.0
    top_k: int = 0  # 0: off. Off by default: a replayed token may have left today's top-k
    top_p: float = 1.0
    max_new_tokens: int = 2048


@dataclass
class ShapingConfig:
    """Temporal Advantage Shaping. Shapes: parabolic, uniform, linear_decay, linear_incline, inverse_parabolic,
    uniform_matched."""

    shape: str = "parabolic"
    lam: float = 0.3
    span: str = "completion"  # what the weighting runs over: completion (paper) | between_tags (without the tags)


@dataclass
class ReplayConfig:
    """Stratified replay (paper, replay buffer). n_off = 0 in RLConfig switches it off."""

    capacity: int = 10000
    capacity_share: list[float] = field(default_factory=lambda: [0.25, 0.35, 0.40])  # easy, medium, hard
    draw_share: list[float] = field(default_factory=lambda: [0.25, 0.35, 0.40])
    live: bool = True  # draw only what has an advantage under today's R-bar; False: the paper's draw
    order: str = "advantage"  # advantage (by |A|) | priority (released: w_reward A - w_kl KL) | uniform | fifo
    temperature: float = 1.0  # of the weights of advantage and priority
    w_reward: float = 1.0  # these two of priority
    w_kl: float = 0.1
    sigma: str = "buffer"  # sigma_off: of the rewards in the buffer | batch: of the step's replayed ones (paper)
    min_fill: int = 10
    max_age: int = 100  # steps; 0: no limit (paper)
    carry_over_stages: bool = False


@dataclass
class HintConfig:
    """Hint injection and withdrawal (paper, hints). A completion is solved where evaluation would call it right."""

    enabled: bool = True
    patience: int = 3  # plain visits in a row without a solved completion
    hysteresis: float = 0.05  # withdrawn when plain R-bar stands this far (in rank) above the hard tier
    plain_every: int = 4  # every n-th visit of a hinted prompt stays plain
    kl_threshold: float | None = None  # the paper's own test; off by default


@dataclass
class GuardConfig:
    """Limits of the error between generation and training: mean exp|difference of log-probabilities| of a step's, or a
    completion's, fresh tokens; 1 where they agree. 0 switches a limit off."""

    exact: float = 1.05  # in float32, where only a fault differs: a step above it ends the run at once
    warn: float = 1.05  # a step above it is warned about, with the likely cause
    mask: float = 2.0  # a completion above it takes no part in the update, and isn't replayed
    stop: float = 1.3  # a step above it, masked ones left out, isn't applied ...
    in_a_row: int = 3  # ... and after so many in a row the run ends


@dataclass
class RLConfig:
    n_on: int = 4
    n_off: int = 4
    revisit_share: float = 0.25
    alpha: float = 1.0  # weight of the off-policy term
    beta: float = 0.1  # weight of the KL term
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0  # bound on the ratio where the advantage is negative; null: none (paper)
    ratio_level: str = "token"  # token | sequence
    routing_replay: bool = False  # a mixture's fresh completions take the experts in the update that generation chose
    updates_per_rollout: int = 1
    numerical: str = "graded"  # reward of a number: graded (relative error, the paper) | exact (released trainer)
    rewards: dict[str, str] = field(default_factory=dict)  # of one's own: NAME -> module:function or FILE.py:function
    self_reward: str = "right"  # agreement counts where the majority is right | majority: always (paper)
    std_floor: float = 0.05  # of a group's standard deviation; 0: none (paper)
    vcrs: bool = True  # off-policy baseline R-bar; False: the off-policy batch mean
    vcrs_window: int = 20
    advantage_clip: float = 5.0
    tokens_per_micro_batch: int = 16384
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    hints: HintConfig = field(default_factory=HintConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class JudgeConfig:
    """Who gives the judge reward: a vision-language model behind an OpenAI-compatible endpoint (slurm/judge.sh serves
    one), or, without an endpoint, the rule-based judge, which knows synthetic scenes only."""

    endpoint: str = ""  # http://HOST:PORT/v1, several with commas, or the folder where judge.sh puts it
    model: str = "OpenGVLab/InternVL3-2B"  # as the server calls it
    frames: int = 8  # of those that the policy saw
    concurrency: int = 32  # requests in flight, of each model replica
    deadline_s: float = 60.0  # for one completion, retries included; without a verdict by then it is masked
    retries: int = 3
    wait_s: float = 900.0  # for the server to come up, before training starts
    max_unscored: float = 0.2  # the run stops once more of the last 100 completions stay without a verdict


@dataclass
class CheckpointConfig:
    every: int = 50  # steps
    minutes: float = 30.0  # beside that, so long after the one before; 0: by steps alone
    keep: int = 2
    keep_finished: bool = True  # false: a run that is done keeps its exports and milestones alone
    milestones: list[int] = field(default_factory=list)  # global steps whose weights stay
    restarts: int = 3  # automatic ones in a row without a later checkpoint, before a job gives up


@dataclass
class EvalConfig:
    """The held-out evaluation during training; 0 switches it off."""

    every: int = 0
    samples: int = 64


@dataclass
class LogConfig:
    wandb_project: str = "megatron-avatar"
    watchdog_s: float = 1800.0  # without a sign of life, before a hung job ends to be continued; 0: off
    wandb: str = "auto"  # auto (online with WANDB_API_KEY, else offline) | offline | disabled


@dataclass
class Config:
    name: str = ""  # the recipe's name, shown everywhere
    seed: int = 0
    output_dir: str = ""
    dry_run: bool = False  # plan memory and time of every rank, start nothing
    replay_step: int = 0  # run this logged step of output_dir again and compare, changing nothing; 0: train
    continue_changed: bool = False  # go on with a run that was started with other settings
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)  # in order; override as stages.NAME.steps=10
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

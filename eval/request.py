"""What an evaluation was asked for: the command's own settings, and the engine's. Read in a second, without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.asking.benchmark import PROTOCOLS, as_asked, load_benchmark
from megatron_avatar.config import Config, load_config
from megatron_avatar.config.checks import check_family
from megatron_avatar.config.load import apply
from megatron_avatar.config.paths import check_model, home, refuse
from megatron_avatar.config.world import world_size

CONTROLS = ("", "mute", "blind", "trained")


@dataclass
class Request:
    """The command's own settings; see eval/run.py."""

    model: str = ""
    benchmark: str = ""
    data: str = ""
    out: str = ""
    step: int = 0
    revision: str = ""
    protocol: str = "ours"
    control: str = ""
    n: int = 1
    temperature: float = 0.0  # 0: greedy
    limit: int = 0
    batch: int = 16
    prepared: str = ""
    system: str = ""
    family: str = ""
    seed: int = 0

    @property
    def stem(self) -> str:
        """BENCHMARK.PROTOCOL, with -CONTROL or -gN behind it."""
        more = [self.control] if self.control else []
        return ".".join([self.benchmark, "-".join([self.protocol, *more, *([f"g{self.n}"] if self.n > 1 else [])])])


def parse(arguments: list[str]) -> tuple[Request, Config, list[str]]:
    """Request, the engine's configuration, and the judge's settings. ValueError naming the key and the remedy."""
    names = {f.name for f in fields(Request)}
    arguments = [home(item) for item in arguments]
    pairs = [item.partition("=") for item in arguments]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"{wrong[0]!r} is not key=value; python -m eval.run without arguments shows what there is")
    own = {key: value for key, _, value in pairs if key in names}
    judge = [item for item in arguments if item.startswith("judge.")]
    settings = [item for item in arguments if item.partition("=")[0] not in names and item not in judge]
    try:
        request = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Request), own))
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    assert isinstance(request, Request)
    for key in ("model", "benchmark", "data", "out"):
        if not getattr(request, key):
            raise ValueError(f"{key} is missing: write {key}=...")
    for key, choices in (("protocol", PROTOCOLS), ("control", CONTROLS)):
        if getattr(request, key) not in choices:
            raise ValueError(f"{key}={getattr(request, key)}: choose one of {', '.join(filter(None, choices))}")
    if request.control == "trained" and request.benchmark != "held_out":
        raise ValueError("control=trained asks a manifest's training prompts: write benchmark=held_out data=MANIFEST")
    if request.n < 1 or request.batch < 1 or request.limit < 0 or request.temperature < 0:
        raise ValueError("n and batch must be at least 1, limit and temperature 0 or above")
    if request.n > 1 and not request.temperature:
        raise ValueError(f"n={request.n}: several greedy completions would be the same; write temperature=1")
    return request, engine_config(request, settings), judge


def engine_config(request: Request, settings: list[str]) -> Config:
    """A recipe's configuration with the model's folder, or that of the run that `model` names, under the protocol's
    frames and lengths, and the control."""
    run = Path(request.model) / "config.yaml"
    if run.is_file():
        if groups := [item for item in settings if "." not in item.partition("=")[0]]:
            raise ValueError(f"{groups[0]}: {request.model} is a run with its own; write single keys (parallel.tp=2)")
        try:
            saved = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run))
            apply(saved, settings)
            config = OmegaConf.to_object(saved)
        except OmegaConfBaseException as error:
            raise ValueError(f"{run}: {str(error).splitlines()[0]}") from None
        if world_size() == 1:
            single = {"tp": 1, "pp": 1, "first_stage_layers": None, "sequence_parallel": False}
            config.parallel = replace(config.parallel, **single)
    else:
        refuse(check_model(request.model, "model"))
        if request.step:
            raise ValueError(f"step={request.step}: a Hugging Face folder has no steps; name the run's folder")
        fixed = [f"model.path={request.model}", "data.manifest=-", f"output_dir={request.out}"]
        config = load_config([*settings, *fixed])
    assert isinstance(config, Config)
    check_family(config)
    benchmark = load_benchmark(request.benchmark)
    protocol = benchmark.protocols[request.protocol]
    given = {item.partition("=")[0] for item in settings}
    data = {key: value for key, value in protocol.data.items() if f"data.{key}" not in given}
    own = {key: getattr(config.data, key) for key in ("instruction", "system") if f"data.{key}" in given}
    config.data = replace(as_asked(replace(config.data, **data), protocol), **own)
    if request.control in ("mute", "blind"):
        config.data = replace(config.data, **{request.control: True})
    if protocol.context and "model.context" not in given:
        config.model.context = protocol.context
    if protocol.new_tokens and "rl.sampling.max_new_tokens" not in given:
        config.rl.sampling.max_new_tokens = protocol.new_tokens
    return config

"""Predictions of one model on one benchmark, on the training engine.

    python -m eval.run model=FOLDER benchmark=NAME data=FOLDER out=FOLDER recipe=avatar_7b [key=value ...]
    python -m eval.run model=RUN step=300 benchmark=held_out data=data/manifest.jsonl out=FOLDER
    python -m eval.run --fixture NAME        (a benchmark's own small records, replies and scores computed by hand)

    model=FOLDER       a Hugging Face folder, or a run: its newest checkpoint, or step=N
    data=FOLDER        the benchmark as its owners publish it (or OWNER/NAME of the hub with revision=COMMIT);
                       benchmark=held_out takes a manifest
    protocol=ours      or released: as the published scripts do it, their quirks listed
    control=mute       or blind: without sound, without pictures
    n=8 temperature=1  completions of each item, drawn in place of the greedy one
    limit=100          the first items only; tables show such results as partial
    prepared=FOLDER    of the measured media (runs/benchmarks/NAME)
    judge.endpoint=URL where the owners let a language model read or judge replies (judge.model=NAME)
    system=NAME family=NAME seed=N   what tables call it

Other settings are the recipe's (parallel.tp=2, model.context=...). Several processes (torchrun, srun) share the items.
Writes out/BENCHMARK.PROTOCOL.jsonl, one line a completion, and .meta.json beside it. The same command continues.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval import fixture, prepare
from eval.asking.benchmark import PROTOCOLS, Benchmark, load_benchmark
from eval.asking.items import Prepared, read_prepared
from eval.asking.prompts import as_asked, as_sample
from eval.predict import lock_of, on_first, predict
from eval.score import rescore
from eval.scoring.ask import asker
from eval.scoring.predictions import Prediction, check_names
from eval.scoring.summary import show, summarise
from megatron_avatar.config import Config, load_config
from megatron_avatar.config.asked import asked, other_words, read_asked
from megatron_avatar.config.load import apply
from megatron_avatar.config.paths import check_model, home, refuse
from megatron_avatar.config.world import check_processes, world_size
from megatron_avatar.files import replacing
from megatron_avatar.locks import held
from megatron_avatar.records import Sample
from megatron_avatar.resilience import ended

BATCHES_A_WRITE = 4  # within one call the decoding of a batch overlaps with the answering of the one before
CONTROLS = ("", "mute", "blind")


@dataclass
class Request:
    """The command's own settings; see the module's docstring."""

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
        """BENCHMARK.PROTOCOL, with -mute, -blind or -gN behind it."""
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
    benchmark = load_benchmark(request.benchmark)
    check_names(benchmark)
    protocol = benchmark.protocols[request.protocol]
    given = {item.partition("=")[0] for item in settings}
    data = {key: value for key, value in protocol.data.items() if f"data.{key}" not in given}
    own = {key: getattr(config.data, key) for key in ("instruction", "system") if f"data.{key}" in given}
    config.data = replace(as_asked(replace(config.data, **data), protocol), **own)
    if request.control:
        config.data = replace(config.data, **{request.control: True})
    if protocol.context and "model.context" not in given:
        config.model.context = protocol.context
    if protocol.new_tokens and "rl.sampling.max_new_tokens" not in given:
        config.rl.sampling.max_new_tokens = protocol.new_tokens
    return config


def settings_hash(config: Config, request: Request, benchmark: Benchmark, weights: Path, fingerprint: str) -> str:
    """16 hex digits that change with whatever can change a completion: weights, items, prompts, decoding, length."""
    files = [
        (file.relative_to(weights).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(weights.rglob("*"))
        if file.is_file() and file.suffix in (".json", ".safetensors", ".distcp")
    ]
    data = {key: value for key, value in asdict(config.data).items() if key not in ("manifest", "workers")}
    words = _words(benchmark, request, config)
    drawn = [request.n, request.temperature, request.seed if request.temperature else 0]
    if request.temperature:
        drawn += [config.rl.sampling.top_k, config.rl.sampling.top_p]
    length = [config.rl.sampling.max_new_tokens, config.model.context]
    parts = [files, fingerprint, data, words, drawn, length, config.model.dtype]
    return _digest(parts)


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _words(benchmark: Benchmark, request: Request, config: Config) -> list[Any]:
    """What of protocol and settings stands in a prompt."""
    protocol = benchmark.protocols[request.protocol]
    own = [protocol.prompt, protocol.option, protocol.instruction, protocol.interleaved]
    return [config.data.system, config.data.instruction, *own]


# ---- the engine ------------------------------------------------------------------------------------------------


def run(request: Request, config: Config, judge: list[str]) -> list[Prediction]:
    """Build the policy and predict the benchmark into `out`. Returns the predictions on rank 0, nothing on the others.

    Raises ValueError for anything of the user's that can't be used, and where another evaluation writes to `out`.
    """
    with ExitStack() as alone:  # until the scores are written
        return _run(request, config, judge, alone)


def _run(request: Request, config: Config, judge: list[str], alone: ExitStack) -> list[Prediction]:
    from megatron_avatar.data.loader import MediaLoader
    from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
    from megatron_avatar.policy.backend import start, stop
    from megatron_avatar.policy.build import build_policy
    from megatron_avatar.policy.weights import load_hf
    from megatron_avatar.resilience import checkpoint
    from megatron_avatar.training.evaluate import answers

    began = time.monotonic()
    benchmark = load_benchmark(request.benchmark)
    protocol = benchmark.protocols[request.protocol]
    out = Path(request.out) / f"{request.stem}.jsonl"
    resumed = out.exists()
    asking = asker(judge, out.parent / "asked")
    backend = start(config.parallel, seed=config.seed)
    try:
        prepared = _prepare(request, benchmark, backend)
        on_first(backend.rank, backend.all_gather_object, lambda: alone.enter_context(held(lock_of(out), "eval.run")))
        tokenizer = load_tokenizer(config.model.path)
        policy = build_policy(config.model.path, backend, config.model, config.parallel)
        weights = Path(request.model)
        if (weights / "config.yaml").is_file():
            weights = checkpoint.find(weights, request.step or None, backend)
            state = checkpoint.load(weights, policy=policy, optimization=None, reference=None, backend=backend)
            trained = state.get("asked")
        else:
            load_hf(policy, config.model.path)
            trained = read_asked(config.model.path)
        if protocol.as_trained and backend.rank == 0 and (different := other_words(trained, config.data)):
            print(f"warning: {request.model} is asked in other words than in its training: {different}",
                  file=sys.stderr)  # fmt: skip
        sampling = replace(config.rl.sampling, temperature=request.temperature or 1.0)
        room = config.model.context - sampling.max_new_tokens
        builder = PromptBuilder(tokenizer, policy.hf_config, config.data, room)
        items = prepared.items[: request.limit or None]
        samples = [fitting(builder, as_sample(item, protocol, benchmark.name)) for item in items]
        loader = MediaLoader(builder, prepared.root, config.data.workers, config.data.decode_deadline_s)

        def answer(part: Sequence[Sample]) -> list[list[Any]]:
            return answers(policy, backend, builder, loader, part, sampling=sampling, n=request.n,
                           greedy=not request.temperature, seed=request.seed, batch=request.batch)  # fmt: skip

        settings = settings_hash(config, request, benchmark, weights, prepared.dataset["fingerprint"])
        try:
            predictions = predict(
                answer,
                benchmark,
                items,
                samples,
                out,
                protocol=request.protocol,
                settings=settings,
                chunk=BATCHES_A_WRITE * request.batch * backend.dp,
                n=request.n,
                rank=backend.rank,
                share=backend.all_gather_object,
            )
        finally:
            loader.close()
        if backend.rank:
            return []
        _write_meta(out, request, config, benchmark, prepared, settings, backend, time.monotonic() - began, trained)
    finally:
        stop()
    return _score_anew(out, asking, predictions) if resumed or asking is not None else predictions


def fitting(builder: Any, sample: Sample) -> Sample:
    """The sample, without its clips' sound where the prompt is too long with it (long films); nothing is cut short."""
    if not any(m.audio_in_video for m in sample.media):
        return sample
    try:
        builder.length(sample)
        return sample
    except ValueError:
        return replace(sample, media=tuple(replace(m, audio_in_video=False) for m in sample.media))


def _prepare(request: Request, benchmark: Benchmark, backend: Any) -> Prepared:
    """Rank 0 prepares, the others read; a user's mistake is raised on all."""
    if benchmark.name == "held_out":
        return prepare.held_out(Path(request.data))
    folder = Path(request.prepared or f"runs/benchmarks/{benchmark.name}")

    def work() -> None:
        prepare.prepare(benchmark, request.data, folder, revision=request.revision)

    on_first(backend.rank, backend.all_gather_object, work)
    found = read_prepared(folder)
    if (odd := found.dataset.get("unreadable")) and backend.rank == 0:
        print(f"{len(odd)} records of {request.data} make no item, as {odd[0]}", file=sys.stderr)
    return found


def _score_anew(out: Path, asking: Any, predictions: list[Prediction]) -> list[Prediction]:
    """The predictions by today's rules, for older attempts may have had others, and with what a judge says of them."""
    scored = {(line["id"], line["k"]): line for line in rescore(out, asking)}
    return [scored[line["id"], line["k"]] for line in predictions]


def _write_meta(
    out: Path, request: Request, config: Config, benchmark: Benchmark, prepared: Prepared, settings: str,
    backend: Any, seconds: float, trained: dict[str, str] | None,
) -> None:  # fmt: skip
    """What tables say about the predictions; seconds and GPU hours are those of all attempts together."""
    from megatron_avatar.training.provenance import about

    path = out.with_name(f"{request.stem}.meta.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("settings") != settings:
        before = {}
    origin = about(backend)
    meta = {
        "benchmark": benchmark.name, "protocol": request.protocol, "control": request.control, "n": request.n,
        "temperature": request.temperature, "system": request.system, "family": request.family, "seed": request.seed,
        "model": request.model, "step": request.step, "dataset": prepared.dataset, "limit": request.limit,
        "settings": settings, "prompts": _digest(_words(benchmark, request, config)),
        "asked": asked(config.data), "trained_with": trained,
        "quirks": list(benchmark.protocols[request.protocol].quirks),
        "aggregate": asdict(benchmark.aggregate), "data": asdict(config.data), "dtype": config.model.dtype,
        "new_tokens": config.rl.sampling.max_new_tokens, "context": config.model.context,
        **origin, "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(before.get("seconds", 0.0) + seconds, 1),
        "gpu_hours": round(before.get("gpu_hours", 0.0) + origin["gpus"] * seconds / 3600, 4),
    }  # fmt: skip
    with replacing(path) as file:
        file.write(json.dumps(meta, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Evaluate from the command line; returns the exit status."""
    if not arguments:
        print(__doc__)
        return 2
    try:
        if arguments[0] == "--fixture":
            return fixture.check(arguments[1:])
        request, config, judge = parse(arguments)
        check_processes(config, "eval.run", arguments)
        predictions = run(request, config, judge)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        ended.tell(status := ended.REFUSED if isinstance(error, ValueError) else ended.FAILED)
        return status
    if predictions:
        summary = summarise(load_benchmark(request.benchmark), predictions)
        show(summary, f"{request.model}: {request.stem}")
        for prediction in predictions:
            if prediction["error"] is not None:
                print(f"failed: {prediction['id']}: {prediction['error']}")
    return 0


if __name__ == "__main__":
    ended.leave_on_signals()  # what is answered is kept, and the same command continues
    sys.exit(main(sys.argv[1:]))

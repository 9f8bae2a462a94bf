"""An evaluation on the training engine: media prepared, policy built, items answered, predictions written."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval import prepare
from eval.asking.benchmark import Benchmark, load_benchmark
from eval.asking.items import Prepared, read_prepared
from eval.asking.prompts import as_sample
from eval.predict import on_first, predict
from eval.request import Request
from eval.score import rescore
from eval.scoring.ask import asker
from eval.scoring.predictions import Prediction, check_names, lock_of
from megatron_avatar.config import Config
from megatron_avatar.config.asked import asked, other_words, read_asked
from megatron_avatar.config.schema import HOW_DECODED
from megatron_avatar.files import replacing
from megatron_avatar.locks import held
from megatron_avatar.records import Sample

BATCHES_A_WRITE = 4  # within one call the decoding of a batch overlaps with the answering of the one before


def settings_hash(config: Config, request: Request, benchmark: Benchmark, weights: Path, fingerprint: str) -> str:
    """16 hex digits that change with whatever can change a completion: weights, items, prompts, decoding, length."""
    files = [
        (file.relative_to(weights).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(weights.rglob("*"))
        if file.is_file() and file.suffix in (".json", ".safetensors", ".distcp")
    ]
    data = {key: value for key, value in asdict(config.data).items() if key == "decoder" or key not in HOW_DECODED}
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
    check_names(benchmark)
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
        sampling = replace(config.rl.sampling, temperature=request.temperature or 1.0)
        room = config.model.context - sampling.max_new_tokens
        builder = PromptBuilder(tokenizer, policy.hf_config, config.data, room)
        items = prepared.items[: request.limit or None]
        samples = [fitting(builder, as_sample(item, protocol, benchmark.name)) for item in items]
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
        return prepare.held_out(Path(request.data), "train" if request.control == "trained" else "eval")
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

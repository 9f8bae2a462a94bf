"""Greedy predictions of one system on the held-out samples of a manifest.

    python -m eval.run --model runs/demo/avatar/export/localisation --manifest runs/demo/data/manifest.jsonl \
        --recipe tiny_avatar --split eval --out runs/demo/eval/avatar.jsonl [--mute] [--blind] [key=value ...]

One JSON line a sample, with all that scoring again needs. Stopped and started again, it goes on with the
samples that are missing. Several processes (torchrun, srun) share the samples as the recipe's layout says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from eval.score import Prediction
from eval.stats import estimates
from megatron_avatar.config import Config, load_config
from megatron_avatar.records import Sample

Answer = Callable[[Sequence[Sample]], list[Prediction]]
BATCHES_A_WRITE = 4  # within one call the decoding of a batch overlaps with the answering of the one before


def predict(
    answer: Answer,
    samples: Sequence[Sample],
    out: Path,
    *,
    settings: str,
    chunk: int,
    rank: int = 0,
    share: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Prediction]:
    """Answer the samples that `out` lacks, `chunk` at a time; all predictions in the order of `samples`.

    Rank 0 alone touches the file; `share` (an all-gather) tells the others what it holds. Predictions made
    under other `settings` are not mixed in: their file is renamed to `out`.old first.
    """
    known = share(_resume(out, settings) if rank == 0 else None)[0]
    missing = [sample for sample in samples if sample.id not in known]
    starts = range(0, len(missing), chunk)
    for start in track(starts, out.stem, console=Console(stderr=True), disable=rank != 0 or not missing):
        fresh = [{**prediction, "settings": settings} for prediction in answer(missing[start : start + chunk])]
        known |= {prediction["id"]: prediction for prediction in fresh}
        if rank == 0:
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in fresh)
    return [known[sample.id] for sample in samples]


def _resume(out: Path, settings: str) -> dict[str, Prediction]:
    """Predictions in `out` by sample id; a last line that a kill has cut is taken out of the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        return {}
    known: dict[str, Prediction] = {}
    whole = 0
    with open(out, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                prediction = json.loads(line)
                other = prediction["settings"] != settings
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{out}, line {number}: no prediction ({error!r}); remove the line or the file"
                ) from None
            if other:
                out.replace(out.with_name(out.name + ".old"))
                return {}
            known[prediction["id"]] = prediction
            whole += len(line)
    with open(out, "rb+") as file:
        file.truncate(whole)
    return known


def settings_hash(config: Config, split: str) -> str:
    """16 hex digits that change with whatever can change a prediction: weights, data, decoding, length."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(config.model.path).iterdir())
        if file.suffix in (".json", ".safetensors")
    ]
    data = {key: value for key, value in asdict(config.data).items() if key not in ("manifest", "workers")}
    manifest = hashlib.sha256(Path(config.data.manifest).read_bytes()).hexdigest()
    parts = [weights, data, manifest, split, asdict(config.model), config.rl.sampling.max_new_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run(config: Config, split: str, out: Path, batch: int) -> list[Prediction]:
    """Build the policy from `config.model.path`, and predict the split of `config.data.manifest` into `out`.

    Returns the predictions on rank 0, nothing on the others. Raises ValueError for an empty split or a file that
    can't be used.
    """
    from megatron_avatar.data.loader import MediaLoader
    from megatron_avatar.data.manifest import load_manifest
    from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
    from megatron_avatar.policy.backend import start, stop
    from megatron_avatar.policy.model import build_policy
    from megatron_avatar.policy.weights import load_hf
    from megatron_avatar.training.evaluate import evaluate

    manifest = Path(config.data.manifest)
    # A clip that is missing is a failed item, and failed items stay in the denominator.
    samples = load_manifest(manifest, split=split, check_media=False)
    if not samples:
        raise ValueError(f"{manifest}: no sample has split '{split}'; choose another --split")
    backend = start(config.parallel, seed=config.seed)
    try:
        tokenizer = load_tokenizer(config.model.path)
        policy = build_policy(config.model.path, backend, config.model, config.parallel)
        load_hf(policy, config.model.path)
        builder = PromptBuilder(tokenizer, policy.hf_config, config.data, config.model.context)
        loader = MediaLoader(builder, manifest.parent, config.data.workers, config.data.decode_deadline_s)

        def answer(part: Sequence[Sample]) -> list[Prediction]:
            length = config.rl.sampling.max_new_tokens
            return evaluate(policy, backend, builder, loader, part, max_new_tokens=length, batch=batch)

        try:
            predictions = predict(
                answer,
                samples,
                out,
                settings=settings_hash(config, split),
                chunk=BATCHES_A_WRITE * batch * backend.dp,
                rank=backend.rank,
                share=backend.all_gather_object,
            )
            return predictions if backend.rank == 0 else []
        finally:
            loader.close()
    finally:
        stop()


def main(arguments: list[str]) -> int:
    """Evaluate one system from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder to evaluate")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL; media paths are relative to its folder")
    parser.add_argument("--recipe", required=True, help="recipe whose decoding, lengths and layout are used")
    parser.add_argument("--split", default="eval")
    parser.add_argument("--out", type=Path, required=True, help="predictions, one JSON object a line")
    parser.add_argument("--batch", type=int, default=16, help="samples decoded together on a rank")
    parser.add_argument("--mute", action="store_true", help="control: drop all sound")
    parser.add_argument("--blind", action="store_true", help="control: drop all pictures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    chosen = parser.parse_args(arguments)
    try:
        config = load_config([
            f"recipe={chosen.recipe}", f"model.path={chosen.model}", f"data.manifest={chosen.manifest}",
            f"output_dir={chosen.out.parent}", f"data.mute={chosen.mute}", f"data.blind={chosen.blind}",
            *chosen.overrides,
        ])  # fmt: skip
        predictions = run(config, chosen.split, chosen.out, chosen.batch)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [p for p in predictions if p["error"] is not None]
    for name, estimate in estimates(predictions).items():
        print(f"{name:<16} {estimate.value:6.1%}  [{estimate.low:.1%}, {estimate.high:.1%}]  n = {estimate.n}")
    for prediction in failed:
        print(f"failed, counted as wrong: {prediction['id']}: {prediction['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

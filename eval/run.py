"""Predictions of one model on one benchmark, on the training engine.

    python -m eval.run model=FOLDER benchmark=NAME data=FOLDER out=FOLDER recipe=avatar_7b [key=value ...]
    python -m eval.run model=RUN step=300 benchmark=held_out data=data/manifest.jsonl out=FOLDER
    python -m eval.run --benchmarks [NAME]   (where the benchmarks are, how large, and what fetches them)
    python -m eval.run --fixture NAME        (a benchmark's own small records, replies and scores computed by hand)

    model=FOLDER       a Hugging Face folder, or a run: its newest checkpoint, or step=N
    data=FOLDER        the benchmark as its owners publish it (or OWNER/NAME of the hub with revision=COMMIT);
                       benchmark=held_out takes a manifest
    protocol=ours      or released: as the published scripts do it, their quirks listed
    control=mute       or blind: without sound, without pictures; trained: a manifest's training prompts (held_out)
    n=8 temperature=1  completions of each item, drawn in place of the greedy one
    limit=100          the first items only; tables show such results as partial
    prepared=FOLDER    of the measured media (runs/benchmarks/NAME)
    judge.endpoint=URL where the owners let a language model read or judge replies (judge.model=NAME)
    system=NAME family=NAME seed=N   what tables call it

Other settings are the recipe's (parallel.tp=2, model.context=...). Several processes (torchrun, srun) share the items.
Writes out/BENCHMARK.PROTOCOL.jsonl, one line a completion, and .meta.json beside it. The same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

from eval import sources
from eval.asking.benchmark import load_benchmark
from eval.request import parse
from megatron_avatar import first_words
from megatron_avatar.config.world import check_processes
from megatron_avatar.resilience import ended


def main(arguments: list[str]) -> int:
    """Evaluate from the command line; returns the exit status."""
    try:
        return _main(arguments)
    except Exception:
        ended.tell_failure()  # else the others, told to leave, are all that the launcher hears of
        raise


def _main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    try:
        if arguments[0] == "--benchmarks":
            return sources.show(arguments[1:])
        if arguments[0] == "--fixture":
            from eval import fixture

            return fixture.check(arguments[1:])
        request, config, judge = parse(arguments)
        check_processes(config, "eval.run", arguments)
        first_words.tell(f"{request.benchmark}: loading torch, to answer with {request.model} ...")
        from eval.engine import run  # torch only once the request is sound
        from eval.scoring.summary import show, summarise

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
        print(f"answers: {Path(request.out) / request.stem}.jsonl")
    return 0


if __name__ == "__main__":
    ended.leave_on_signals()  # what is answered is kept, and the same command continues
    sys.exit(main(sys.argv[1:]))

"""Predictions scored again without a GPU, and the scores of a system. Intervals and comparisons: eval/scoring/stats.py.

    python -m eval.score FILE.jsonl ... [judge.endpoint=URL judge.model=NAME]

A prediction is one line of a file of eval/run.py: a completion with all that scoring it again needs. The command scores
the lines of each file anew by today's rules, asks the language model where a benchmark's owners use one, and writes the
file in place of the old one, whole or not at all. Every item counts, failed ones as wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from eval.asking.benchmark import load_benchmark
from eval.scoring.predictions import Prediction, check_names, lock_of, read_predictions, score_line
from eval.scoring.stats import estimates
from megatron_avatar.files import replacing
from megatron_avatar.locks import held


def system_scores(predictions: list[Prediction]) -> dict[str, float]:
    """results.json's entry for one system: accuracy overall and by family, and the number of samples n."""
    scores = {name: estimate.value for name, estimate in estimates(predictions).items()}
    return {**scores, "n": len(predictions)}


def rescore(path: Path, asking: Any = None) -> list[Prediction]:
    """Score a file anew and replace it; `asking` (eval/scoring/ask.py) first fills in what a language model says."""
    predictions = read_predictions(path)
    if predictions:
        benchmark = load_benchmark(predictions[0]["benchmark"])
        check_names(benchmark)
        if asking is not None:
            predictions = asking(benchmark, predictions)
        predictions = [score_line(benchmark, line) for line in predictions]
        with replacing(path) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
    return predictions


def main(arguments: list[str]) -> int:
    from eval.scoring.ask import asker
    from eval.scoring.summary import show, summarise

    files, settings = [Path(item) for item in arguments if "=" not in item], [i for i in arguments if "=" in i]
    try:
        if not files:
            raise ValueError("usage: python -m eval.score FILE.jsonl ... [judge.endpoint=URL judge.model=NAME]")
        for path in files:
            with held(lock_of(path), "eval.score"):
                predictions = rescore(path, asker(settings, path.parent / "asked"))
            if predictions:
                show(summarise(load_benchmark(predictions[0]["benchmark"]), predictions), str(path))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

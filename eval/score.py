"""Predictions: reading, scoring again without a GPU, scores of a system. Intervals and comparisons: eval/stats.py.

    python -m eval.score FILE.jsonl ... [judge.endpoint=URL judge.model=NAME]

A prediction is one line of a file of eval/run.py: a completion with all that scoring it again needs. The command scores
the lines of each file anew by today's rules, asks the language model where a benchmark's owners use one, and writes the
file in place of the old one, whole or not at all. Every item counts, failed ones as wrong.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark, load_benchmark
from eval.metrics import METRICS
from eval.parsers import PARSERS
from megatron_avatar.rl.rewards import format_reward

Prediction = dict[str, Any]


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of one system; ValueError naming file and line for a damaged file or a repeated completion."""
    predictions, seen = [], {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                prediction = json.loads(line)
                key = (prediction["id"], prediction["k"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no prediction ({error!r}); run eval.run again") from None
            if key in seen:
                raise ValueError(f"{path}, line {number}: {key[0]!r} is also on line {seen[key]}; remove one of them")
            seen[key] = number
            predictions.append(prediction)
    return predictions


def score_line(benchmark: Benchmark, line: Prediction) -> Prediction:
    """The line with `answer`, `scores`, `format` and `counted` by the rules of its protocol.

    A failed item scores nothing; protocols that drop it from the denominator have it marked `counted: false`.
    """
    protocol = benchmark.protocols[line["protocol"]]
    failed = line["error"] is not None
    answer = None if failed else PARSERS[protocol.parser[line["kind"]]](line["text"], line)
    scores = METRICS[protocol.metric[line["kind"]]](answer, line)
    counted = line["kind"] not in protocol.left_out and not (failed and protocol.failed == "dropped")
    return {**line, "answer": answer, "scores": scores, "format": format_reward(line["text"]), "counted": counted}


def correct(prediction: Prediction) -> float:
    """The headline's score of a prediction."""
    return prediction["scores"]["accuracy"]


def family(prediction: Prediction) -> str:
    return prediction["groups"]["family"][0]


def families(predictions: Iterable[Prediction]) -> list[str]:
    """Families in the order in which they first appear."""
    return list(dict.fromkeys(map(family, predictions)))


def system_scores(predictions: list[Prediction]) -> dict[str, float]:
    """results.json's entry for one system: accuracy overall and by family, and the number of samples n."""
    from eval.stats import estimates

    scores = {name: estimate.value for name, estimate in estimates(predictions, resamples=1).items()}
    return {**scores, "n": len(predictions)}


def majority_scores(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy of always giving a family's most frequent answer: what a system without perception can reach."""
    hits = {
        name: Counter(p["gold"].casefold() for p in predictions if family(p) == name).most_common(1)[0][1]
        for name in families(predictions)
    }
    sizes = Counter(map(family, predictions))
    by_family = {name: hits[name] / sizes[name] for name in hits}
    return {"overall": sum(hits.values()) / len(predictions), **by_family} if predictions else {}


def rescore(path: Path, asking: Any = None) -> list[Prediction]:
    """Score a file anew and replace it; `asking` (eval/ask.py) fills in what a language model has to say first."""
    predictions = read_predictions(path)
    if predictions:
        benchmark = load_benchmark(predictions[0]["benchmark"])
        if asking is not None:
            predictions = asking(benchmark, predictions)
        predictions = [score_line(benchmark, line) for line in predictions]
        aside = path.with_suffix(".tmp")
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
        aside.replace(path)
    return predictions


def main(arguments: list[str]) -> int:
    from eval.ask import asker
    from eval.summary import show, summarise

    files = [Path(item) for item in arguments if "=" not in item]
    try:
        if not files:
            raise ValueError("usage: python -m eval.score FILE.jsonl ... [judge.endpoint=URL judge.model=NAME]")
        for path in files:
            predictions = rescore(path, asker([item for item in arguments if "=" in item], path.parent / "asked"))
            if predictions:
                show(summarise(load_benchmark(predictions[0]["benchmark"]), predictions), str(path))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

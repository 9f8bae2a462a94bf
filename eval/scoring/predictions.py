"""A prediction: one line of a file of eval/run.py, a completion with all that scoring it again needs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.asking.benchmark import FOLDER, Benchmark, kinds_of
from eval.scoring.metrics import METRICS
from eval.scoring.parsers import PARSERS
from megatron_avatar.rl.rewards import format_reward

Prediction = dict[str, Any]


def check_names(benchmark: Benchmark) -> None:
    """Raise ValueError naming file, key and choices where a protocol names a parser or a metric that isn't there."""
    for name, protocol in benchmark.protocols.items():
        for key, table, known in (("parser", protocol.parser, PARSERS), ("metric", protocol.metric, METRICS)):
            for kind in kinds_of(benchmark):
                if table[kind] not in known:
                    raise ValueError(
                        f"{FOLDER / benchmark.name}.yaml: protocols.{name}.{key}.{kind} is {table[kind]!r}; write one "
                        f"of {', '.join(known)}"
                    )


def lock_of(path: Path) -> Path:
    """The lock file of whoever writes predictions to `path`."""
    return path.with_suffix(".lock")


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


def majority_scores(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy of always giving a family's most frequent answer: what a system without perception can reach."""
    hits = {
        name: Counter(p["gold"].casefold() for p in predictions if family(p) == name).most_common(1)[0][1]
        for name in families(predictions)
    }
    sizes = Counter(map(family, predictions))
    by_family = {name: hits[name] / sizes[name] for name in hits}
    return {"overall": sum(hits.values()) / len(predictions), **by_family} if predictions else {}

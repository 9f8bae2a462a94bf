"""What the benchmarks share: fair timing, the machine's description, and the JSON that is kept."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

JSON_HELP = "print one line of JSON; with the defaults of all other arguments, keep it in bench/results/ too"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "trl")


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant, `rounds` of each, one after the other in every round, so that all of them meet the
    same state of the machine. `warmup` rounds before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warmup, rounds):
        for name, work in contestants.items():
            gc.collect()
            _wait()
            start = time.perf_counter()
            work()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor or GPU, threads and versions: what a figure depends on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def signed(result: dict[str, Any]) -> dict[str, Any]:
    """With what it was measured on, and when."""
    return {**result, "machine": machine(), "date": date.today().isoformat()}


def write(name: str, result: dict[str, Any]) -> None:
    """Keep a result in bench/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(signed(result), indent=1) + "\n")


def report(name: str, result: dict[str, Any], *, as_json: bool, keep: bool) -> None:
    """Print the result, with `as_json` as one line; `keep` writes that to bench/results/NAME.json too.

    A benchmark asks to keep what its default arguments gave: other figures don't compare with those kept there.
    """
    if as_json and keep:
        write(name, result)
    result = signed(result)
    if as_json:
        print(json.dumps(result), flush=True)
        return
    for key, value in result.items():
        print(f"{key:<24} {value}", flush=True)


def is_default(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Whether all arguments but --json are the parser's defaults."""
    return all(value == parser.get_default(name) for name, value in vars(arguments).items() if name != "json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

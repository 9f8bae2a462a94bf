"""Rewards of one's own: a function of a module or a file, run by the workers that are killed (bounded.py).

    rl.rewards.NAME=module:function     or     rl.rewards.NAME=folder/file.py:function
    stages.STAGE.rewards.NAME=0.3

The function takes (text, sample) and returns a number in [0, 1], or NaN where it has no verdict.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.bounded import DEADLINE_S, bounded

log = logging.getLogger(__name__)
PROMISE = "a reward takes (text, sample) and returns a number from 0 to 1, or nan for no verdict"


class OwnRewardFailed(RuntimeError):
    """A function of the user's raised, or returned what is no reward."""


@cache
def find(place: str) -> Callable[[str, Sample], float]:
    """The function that `place` names. Raises ValueError with the remedy where it can't be one."""
    where, _, name = place.rpartition(":")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise ValueError(f"{where} needs a package that is not installed here ({error})") from error
        remedy = f"write FILE.py:{name}, or put its folder on PYTHONPATH"
        raise ValueError(f"there is no module {where} here: {remedy}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{where} is no file, seen from {Path.cwd()}: correct the path") from error
    except (Exception, SystemExit) as error:  # whatever the user's file does while it is read
        raise ValueError(f"{where} can't be imported: {_last_words(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"{where} has no function {name}; it has {', '.join(named) or 'none'}")
    try:
        inspect.signature(function).bind("text", None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} can't be called with two arguments ({error}): {PROMISE}") from error
    return function


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    path = path.resolve()
    name = f"own_reward_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"  # two files may have one stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    sys.path.insert(0, str(path.parent))  # what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def digest(place: str) -> str | None:
    """SHA-256 of the file that holds the function, in hexadecimal; None for a module without a source file."""
    where = place.rpartition(":")[0]
    find(place)
    file = where if where.endswith(".py") else getattr(sys.modules[where], "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def check(rewards: Mapping[str, str]) -> None:
    """ValueError that names the setting, for the first place that holds no reward. Imports the user's modules."""
    for name, place in rewards.items():
        try:
            find(place)
        except ValueError as error:
            raise ValueError(f"rl.rewards.{name}={place}: {error}") from error


def score(name: str, place: str, texts: Sequence[str], sample: Sample) -> list[float]:
    """The function's verdict on each text. A text that it computes on for too long earns 0, as everywhere.

    Raises OwnRewardFailed, naming function and sample, where it raises or returns what is no reward.
    """
    return [_verdict(name, place, _ask(name, place, text, sample), sample) for text in texts]


def try_on(name: str, place: str, sample: Sample) -> None:
    """Score a right answer and an empty text, before a run begins. Raises ValueError as `score` would fail, and where a
    text would earn 0 because nothing came back; warns where neither gets a verdict."""
    verdicts = []
    for text in (f"<think>It is so.</think><answer>{sample.answer}</answer>", ""):
        try:
            said = _ask(name, place, text, sample)
            verdicts.append(_verdict(name, place, said, sample))
        except OwnRewardFailed as error:
            raise ValueError(str(error)) from error
        if said is None:
            raise ValueError(f"rl.rewards.{name}: {place} computes for more than {DEADLINE_S:g} s, waits too long or "
                             f"crashes on sample {sample.id} and {text!r}: a run would give such texts 0")  # fmt: skip
    if all(map(math.isnan, verdicts)):
        log.warning("rl.rewards.%s: %s has no verdict (nan) on a right answer and none on an empty text of sample %s: "
                    "where it never has one, its weight goes to the other rewards", name, place, sample.id)  # fmt: skip


def _ask(name: str, place: str, text: str, sample: Sample) -> tuple[str, Any] | None:
    try:
        return bounded(_call, place, text, sample)
    except RuntimeError as error:  # the function ended its process, or none can be started
        raise OwnRewardFailed(f"rl.rewards.{name}: {place} on sample {sample.id}: {error}") from error


def _call(place: str, text: str, sample: Sample) -> tuple[str, Any]:
    """In the worker: what the function says, in plain values, so that nothing of the user's has to be pickled."""
    try:
        left = signal.setitimer(signal.ITIMER_PROF, 0)[0]
        function = find(place)  # imports, the first time: no text pays for that
        signal.setitimer(signal.ITIMER_PROF, left)
        value = function(text, sample)
        if isinstance(value, bool | numbers.Real) or getattr(value, "ndim", None) == 0:  # numpy's and torch's scalars
            return "value", float(value)
        return "odd", f"{value!r:.80}"
    except (Exception, SystemExit) as error:
        return "raised", _last_words(error)


def _verdict(name: str, place: str, said: tuple[str, Any] | None, sample: Sample) -> float:
    if said is None:  # killed: bounded has told why
        return 0.0
    kind, value = said
    if kind == "value" and (math.isnan(value) or 0 <= value <= 1):
        return value
    what = f"raised {value}" if kind == "raised" else f"returned {value}"
    raise OwnRewardFailed(f"rl.rewards.{name}: {place} {what} on sample {sample.id}, but {PROMISE}")


def _last_words(error: BaseException) -> str:
    """Type, message and the line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"

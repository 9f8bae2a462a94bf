"""What a benchmark is: eval/benchmarks/NAME.yaml over _common.yaml, typed and checked.

A file says where the owners' records are, which column is what, how a question is asked and an answer read and scored
under each protocol, and how scores become the headline. There is no code of a single benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_avatar.config.schema import DataConfig

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PROTOCOLS = ("ours", "released")
KINDS = ("choice", "letters", "yes_no", "number", "math", "text")  # forms of an answer
GOLDS = ("as_is", "letter", "text", "index")
MEDIA = ("video", "image", "audio")
FAILED = ("wrong", "dropped")


@dataclass
class Source:
    """The owners' publication. `files`: patterns of the record files below data=FOLDER, those of the first pattern that
    matches are read; `items`: how many questions the owners count."""

    dataset: str = ""  # OWNER/NAME of the hub
    split: str = ""
    files: list[str] = field(default_factory=list)
    items: int = 0
    note: str = ""  # what a user has to know to get it
    media: str = ""  # how many, and how large where that is known


@dataclass
class Records:
    """Owners' columns -> item. A value is a column's name, or a template with columns in braces; `_key` is a row's key
    where the owners' file is an object, `_file` the record file's stem, `_folder` its folder's name, `_row` the row's
    number in it.

    columns: made of others: NAME: {column: NAME, values: {theirs, or /REGEX/ of theirs: ours}}, or {column: NAME, take:
    REGEX}, whose first group is the value. unfold: a column that holds a list of questions, or /REGEX/ of columns with
    one question each. options: a column; none where the question holds them (`letters` are then those that may be
    answered). answer_is: how the gold is written. kind: an answer's form, or {column: NAME, values: ...} in the same
    way. marks: regular expression of media's places in question and options. media: list of {video|image|audio: path,
    column or list; start, end: columns of seconds; fps: of a folder of frames}. A column may be empty or absent where
    it ends with `?`. groups: breakdowns; keep: columns for scoring; asked: what a language model (Protocol.ask) reads
    as the question, empty for the prompt.
    """

    columns: dict[str, dict[str, Any]] = field(default_factory=dict)

    id: str = ""
    question: str = ""
    answer: str = ""
    unfold: str = ""
    options: str = ""
    letters: str = "ABCDEFGHIJ"
    answer_is: str = "as_is"
    kind: Any = "choice"
    marks: str = ""
    media: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    asked: str = ""


@dataclass
class Protocol:
    """How questions are asked and answers scored. By kind of answer: instruction, parser and metric (names in
    eval/scoring/parsers.py and metrics.py), ask (extract or judge: what a language model at judge.endpoint does,
    eval/scoring/ask.py)."""

    as_trained: bool = False  # data.instruction and data.system of the settings stand in the prompt, as in training
    system: str = ""
    prompt: str = "{question}\n{options}\n{instruction}"
    option: str = "{letter}. {text}"  # one line an option; "list": as Python writes the list
    interleaved: bool = True  # media where the question marks them; false: pictures, clips, sounds, and then the text
    instruction: dict[str, str] = field(default_factory=dict)
    parser: dict[str, str] = field(default_factory=dict)
    metric: dict[str, str] = field(default_factory=dict)
    ask: dict[str, str] = field(default_factory=dict)
    new_tokens: int = 0  # 0: the recipe's
    context: int = 0  # prompt and reply together; 0: the recipe's
    data: dict[str, Any] = field(default_factory=dict)  # of the settings' data: frames, pixels, mute
    failed: str = "wrong"  # what an item without an answer counts as
    left_out: list[str] = field(default_factory=list)  # kinds of answers that the protocol doesn't count
    quirks: list[str] = field(default_factory=list)  # of the published scripts, shown beside the numbers


@dataclass
class Aggregate:
    """The headline: mean of `metric` over the items (over: ""), or of a breakdown's values' means, where the values
    listed in `merge` are averaged into one first."""

    metric: str = "accuracy"
    over: str = ""
    merge: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Benchmark:
    name: str = ""
    title: str = ""
    base: str = "_common"  # the file that this one changes, whose own base comes first; empty: none
    source: Source = field(default_factory=Source)
    records: Records = field(default_factory=Records)
    protocols: dict[str, Protocol] = field(default_factory=dict)
    aggregate: Aggregate = field(default_factory=Aggregate)


def as_asked(data: DataConfig, protocol: Protocol) -> DataConfig:
    """The settings with the words that the protocol puts into every prompt: those of training, or its own."""
    return data if protocol.as_trained else replace(data, instruction="", system=protocol.system)


def names() -> list[str]:
    """The benchmarks that there are, the project's own `held_out` included."""
    return sorted(path.stem for path in FOLDER.glob("[a-z]*.yaml"))


@cache
def load_benchmark(name: str) -> Benchmark:
    """The benchmark `name`. Raises ValueError naming file, key and choices."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file() or name.startswith("_"):
        raise ValueError(f"benchmark={name}: choose one of {', '.join(names())}")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Benchmark), *_layers(name), {"name": name}))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    assert isinstance(found, Benchmark)
    try:
        _check(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def _layers(name: str) -> list[Any]:
    """The file `name`, and before it those that it changes."""
    own = OmegaConf.load(FOLDER / f"{name}.yaml")
    base = own.get("base", "" if name.startswith("_") else Benchmark.base)
    return [*(_layers(base) if base else []), own]


def kinds_of(benchmark: Benchmark) -> list[str]:
    """The forms of answers that its records can have."""
    kind = benchmark.records.kind
    return list(dict.fromkeys(kind["values"].values())) if isinstance(kind, dict) else [kind]


def _check(benchmark: Benchmark) -> None:
    def one_of(key: str, value: str, choices: Any) -> None:
        if value not in choices:
            raise ValueError(f"{key} is {value!r}; write one of {', '.join(choices)}")

    records = benchmark.records
    one_of("records.answer_is", records.answer_is, GOLDS)
    for name, made in records.columns.items():
        if "column" not in made or len(made.keys() & {"values", "take"}) != 1:
            raise ValueError(f"records.columns.{name} needs `column`, and `values` or `take`")
    for medium in records.media:
        if len(medium.keys() & set(MEDIA)) != 1 or medium.keys() - {*MEDIA, "start", "end", "fps"}:
            kinds = ", ".join(MEDIA)
            raise ValueError(f"records.media: {dict(medium)} needs one of {kinds}; start, end and fps may follow")
    if tuple(sorted(benchmark.protocols)) != PROTOCOLS:
        raise ValueError(f"protocols must be {' and '.join(PROTOCOLS)}")
    for kind in kinds_of(benchmark):
        one_of("records.kind", kind, KINDS)
        for name, protocol in benchmark.protocols.items():
            for key, table in (("parser", protocol.parser), ("metric", protocol.metric)):
                if kind not in table:
                    raise ValueError(f"protocols.{name}.{key} lacks the kind {kind!r} of its records")
            one_of(f"protocols.{name}.failed", protocol.failed, FAILED)
            if protocol.as_trained and protocol.system:
                raise ValueError(f"protocols.{name} has a system prompt of its own beside as_trained=true: drop one")
            for left in protocol.left_out:
                one_of(f"protocols.{name}.left_out", left, kinds_of(benchmark))
    over = benchmark.aggregate.over
    if over and over not in records.groups:
        raise ValueError(f"aggregate.over is {over!r}, which is no breakdown of records.groups")

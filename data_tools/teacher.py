"""What the teachers' tools share: a manifest's samples, one after the other, each asked about at an endpoint.

What a sample got is kept in a file beside the manifest as soon as it is known, so that an interrupted run continues
where it stopped; the new manifest takes the old one's place at the end, by one rename.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.container import Fit
from megatron_avatar.data.decode import decode_audio, decode_frames, decode_image, plan_frames
from megatron_avatar.data.features import SAMPLE_RATE
from megatron_avatar.data.manifest import parsed, sample_from_dict, sample_to_dict
from megatron_avatar.endpoint import Endpoint, Messages, Replies, body_of
from megatron_avatar.files import replacing, unwritable
from megatron_avatar.locks import held
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.bounded import bounded

PICTURE_SIDE = 448  # pixels of a teacher's frame at most
DECODE_S = 120.0
TRIES = 20  # samples whose media can't be read, before the teacher is asked without having answered first
AHEAD = 4  # samples in work for each question in flight


class Task(Protocol):
    """What is asked about a sample, and what is made of the answers. `field` is the manifest's key that it fills."""

    field: str
    attempts: int

    def wants(self, sample: Sample) -> bool:
        """Whether this sample is to be asked about at all."""
        ...

    def messages(self, sample: Sample, root: Path, refused: str | None) -> list[Messages]:
        """The questions of one attempt; `refused` says why the attempt before was refused. ValueError: no question."""
        ...

    def accept(self, sample: Sample, answers: list[Any]) -> tuple[str | None, str]:
        """The field's value, or None, and the outcome in few words."""
        ...

    def fill(self, sample: Sample, value: str) -> Sample:
        """The sample with the value."""
        ...


def annotate(
    manifest: Path, out: Path, task: Task, endpoint: Endpoint, *, concurrency: int, version: str
) -> tuple[Counter[str], Counter[str]]:
    """Fill `task.field` of every sample that wants it; returns outcomes, and refusals of single attempts, by reason.

    Samples without a usable answer keep the field empty and are asked about again by the next run.
    """
    kept = Replies(out.with_name(f"{out.stem}.{task.field}s"), "kept")
    outcomes, refusals = Counter(), Counter()

    def work(sample: Sample) -> tuple[Sample, str]:
        if not task.wants(sample):
            return sample, "left as it is"
        key = _key(version, endpoint.model, sample)
        value = kept.get(key)
        if value is not None:
            return task.fill(sample, value), "accepted"
        refused = None
        for _ in range(task.attempts):
            try:
                questions = task.messages(sample, manifest.parent, refused)
            except ValueError as error:
                return sample, f"media: {str(error)[:80]}"
            answers = endpoint.ask(questions)
            if any(answer is None for answer in answers):
                return sample, "no answer"
            value, refused = task.accept(sample, answers)
            if value is not None:
                kept.put(key, value)
                return task.fill(sample, value), "accepted"
            refusals[refused] += 1
        return sample, f"refused: {refused}"

    with (
        replacing(out) as file,
        ThreadPoolExecutor(concurrency) as threads,
        Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as bar,
    ):
        line = bar.add_task(f"{task.field}s", total=sum(1 for _ in open(manifest, "rb")))
        for samples in _chunks(read_samples(manifest), AHEAD * concurrency):
            for sample, outcome in threads.map(work, samples):
                file.write(json.dumps(sample_to_dict(sample), ensure_ascii=False) + "\n")
                outcomes[outcome] += 1
                bar.advance(line)
    return outcomes, refusals


def read_samples(manifest: Path) -> Iterator[Sample]:
    """A manifest's samples, one at a time. ValueError naming file and line for one that is none."""
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest; make one with python -m data_tools.prepare")
    with open(manifest, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield sample_from_dict(parsed(line, f"{manifest}, line {number}"))
                except ValueError as error:
                    raise ValueError(f"{manifest}, line {number}: {error}") from None


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while chunk := list(itertools.islice(samples, size)):
        yield chunk


def _key(version: str, model: str, sample: Sample) -> str:
    return hashlib.sha256(json.dumps([version, model, sample_to_dict(sample)]).encode()).hexdigest()


def clip_pictures(sample: Sample, root: Path, count: int) -> list[bytes]:
    """JPEGs of at most `count` frames of each video, and of each picture, at most 448 pixels a side.

    Decoded in a process that can be killed. Raises ValueError for media that cannot be read.
    """
    shown = bounded(_decode_pictures, sample, root, count, deadline_s=DECODE_S)
    if shown is None:
        raise ValueError(f"{', '.join(m.path for m in sample.media)} cannot be decoded")
    return shown


def _decode_pictures(sample: Sample, root: Path, count: int) -> list[bytes]:
    frames: list[np.ndarray] = []
    for media in sample.media:
        if media.kind == "video":
            scale = min(1.0, PICTURE_SIDE / max(media.height, media.width))
            size = max(1, round(scale * media.height)), max(1, round(scale * media.width))
            plan, fit = plan_frames(media, DataConfig(max_frames=count)), Fit((media.height, media.width), size)
            frames += list(decode_frames(root / media.path, plan, "pyav", fit))
        elif media.kind == "image":
            frames += list(decode_image(root / media.path))
    jpegs = []
    for frame in frames:
        picture, buffer = Image.fromarray(frame), io.BytesIO()
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        picture.save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return jpegs


def sound_parts(sample: Sample, root: Path, seconds: float) -> list[dict[str, Any]]:
    """The sample's sound as parts of messages, WAV of at most `seconds` each. ValueError for what cannot be read."""
    parts = bounded(_decode_sound, sample, root, seconds, deadline_s=DECODE_S)
    if parts is None:
        raise ValueError(f"the sound of {', '.join(m.path for m in sample.media)} cannot be decoded")
    return parts


def _decode_sound(sample: Sample, root: Path, seconds: float) -> list[dict[str, Any]]:
    parts = []
    for media in sample.media:
        path = media.path if media.kind == "audio" else media.audio_path
        if path is None:
            continue
        waveform, size = decode_audio(root / path, in_video=media.kind == "video"), int(seconds * SAMPLE_RATE)
        for start in range(0, len(waveform), size):
            buffer = io.BytesIO()
            soundfile.write(buffer, waveform[start : start + size], SAMPLE_RATE, format="WAV", subtype="PCM_16")
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    return parts


def json_field(name: str) -> Callable[[str], str]:
    """A reader of replies that are one JSON object with one text, as {"hint": "..."}, after thoughts or in a fence."""

    def read(reply: str) -> str:
        try:
            entry = json.loads(body_of(reply))
        except (ValueError, RecursionError):
            raise ValueError("a reply that is no JSON object") from None
        if not isinstance(entry, dict) or set(entry) != {name} or not isinstance(entry[name], str):
            raise ValueError(f"a reply that is not one text under the key {name}")
        if reason := unwritable(entry[name]):
            raise ValueError(f"a reply that is no text: {reason}")
        return " ".join(entry[name].split())

    return read


def text_schema(name: str) -> dict[str, Any]:
    """The JSON schema of what `json_field` reads."""
    texts = {name: {"type": "string"}}
    return {"type": "object", "properties": texts, "required": [name], "additionalProperties": False}


def arguments(description: str, model: str) -> argparse.ArgumentParser:
    """The options that all of these tools have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--endpoint", required=True, help="http://HOST:PORT/v1, or the folder that judge.sh writes to")
    parser.add_argument("--model", default=model, help=f"as the server calls it (default: {model})")
    parser.add_argument("--out", type=Path, help="another manifest, in the same folder (default: the same one)")
    parser.add_argument("--concurrency", type=int, default=16, help="questions in flight")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds for an answer, retries included")
    parser.add_argument("--wait", type=float, default=900.0, help="seconds for the server to come up")
    return parser


def run(
    args: argparse.Namespace, task: Task, endpoint: Endpoint, version: str, read: Callable[[str], Any] | None = None
) -> int:
    """Check the endpoint, annotate, report beside the manifest; returns the exit status. The first question has to get
    an answer that `read` (the endpoint's own reader) takes, before anything is asked in earnest."""
    out = args.out or args.manifest
    try:
        if out.parent.resolve() != args.manifest.parent.resolve():
            raise ValueError(f"--out {out} must lie in {args.manifest.parent}: media paths are relative to it")
        with held(out.with_name(out.name + ".lock"), f"the tool that writes {task.field}s"):
            if (probe := first_question(args.manifest, task)) is not None:
                endpoint.wait_until_ready(args.wait, probe, read)
            outcomes, refusals = annotate(args.manifest, out, task, endpoint, concurrency=args.concurrency,
                                          version=version)  # fmt: skip
            report = _report(out, endpoint, outcomes, refusals)
            with replacing(out.with_name(f"{out.stem}.{task.field}s.json")) as file:
                file.write(json.dumps(report, indent=2) + "\n")
    except (OSError, ValueError, RuntimeError) as error:  # the last from workers that can't do their part
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OSError | ValueError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    table = Table("outcome", "samples", title=f"{out}: {task.field}s")
    for outcome, count in outcomes.most_common():
        table.add_row(outcome, str(count))
    console = Console(markup=False)  # outcomes quote paths and replies
    console.print(table)
    if refusals:
        attempts = outcomes["accepted"] + sum(refusals.values())
        console.print(f"refused: {sum(refusals.values())} of {attempts} answers "
                      f"({', '.join(f'{reason}: {n}' for reason, n in refusals.most_common())})")  # fmt: skip
    asked = sum(n for outcome, n in outcomes.items() if outcome != "left as it is")
    return 0 if not asked or outcomes["accepted"] else 1


def first_question(manifest: Path, task: Task) -> Messages | None:
    """What the task asks first; None where it has nothing to ask."""
    wanted = (sample for sample in read_samples(manifest) if task.wants(sample))
    for sample in itertools.islice(wanted, TRIES):
        with suppress(ValueError):  # its media can't be read, which is said in its turn
            return task.messages(sample, manifest.parent, None)[0]
    return None


def _report(out: Path, endpoint: Endpoint, outcomes: Counter[str], refusals: Counter[str]) -> dict[str, Any]:
    attempts = outcomes["accepted"] + sum(refusals.values())
    return {
        "manifest": out.name, "model": endpoint.model, "outcomes": dict(outcomes), "refused attempts": dict(refusals),
        "refused rate": sum(refusals.values()) / attempts if attempts else None, "failures": endpoint.failures,
    }  # fmt: skip

"""A benchmark tried on a few records in its owners' form: `python -m eval.run --fixture NAME ...` (all: every one).

eval/fixtures/NAME.yaml holds records as the owners' files have them, the media to make, replies, and the scores that a
person computed from these replies by hand. Everything but the model is the real thing: records, media, prompts,
parsers, metrics, aggregation.

    records     file -> its content; {$image: COLOR} becomes the bytes of a picture, in base64 in a table
    media       file -> {kind: video|image|audio|frames|damaged, seconds, sound}; files that aren't listed are missing
    replies     item -> text, or {ours: text, released: text}
    asked       item -> {extracted, judged}: what a language model said about the reply
    expected    protocol -> {headline, metrics, breakdowns, counts}: percentages (errors as they are), by hand
"""

from __future__ import annotations

import base64
import csv
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.table import Table

from eval.asking.benchmark import Benchmark, as_asked, load_benchmark
from eval.asking.prompts import as_sample
from eval.predict import predict
from eval.prepare import prepare
from eval.scoring.predictions import Prediction, score_line
from eval.scoring.summary import ERRORS, as_json, summarise
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.policy.architecture import read_config
from megatron_avatar.records import Sample
from megatron_avatar.training.evaluate import Answer

FOLDER = Path(__file__).parent / "fixtures"
MODEL = Path(__file__).resolve().parents[1] / "assets" / "tiny_base"  # whose tokenizer makes the prompts
SMALL = {"max_frames": 8, "frame_min_pixels": 3136, "frame_max_pixels": 7056, "image_max_pixels": 7056}
SIDE, RATE, SOUND = 64, 8, 16_000


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_fixture(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"--fixture {name}: choose all, or one of {', '.join(names())}")
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


def check(chosen: Sequence[str]) -> int:
    """Try the fixtures and print what was measured beside what a person computed; 1 where they differ."""
    wrong = 0
    for name in names() if list(chosen) == ["all"] else chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows = differences(name, Path(folder))
        table = Table("protocol", "what", "measured", "by hand", title=f"fixture {name}")
        for protocol, what, measured, by_hand in rows:
            same = _same(measured, by_hand)
            wrong += not same
            style = None if same else "bold red"
            table.add_row(protocol, what, _shown(measured), _shown(by_hand), style=style)
        Console().print(table)
    if not chosen:
        raise ValueError(f"--fixture NAME: choose all, or one of {', '.join(names())}")
    return int(wrong > 0)


def differences(name: str, folder: Path) -> list[tuple[str, str, float | None, float | None]]:
    """(protocol, what, measured, by hand) of all that the fixture expects, and of breakdowns that it forgot."""
    fixture, benchmark = load_fixture(name), load_benchmark(name)
    write_data(fixture, folder / "data")
    rows = []
    for protocol, expected in fixture["expected"].items():
        predictions = predictions_of(benchmark, fixture, protocol, folder)
        found = _numbers(as_json(summarise(benchmark, predictions)))
        by_hand = _flat(expected)
        rows += [(protocol, key, found.get(key), by_hand.get(key)) for key in sorted(_asked(found, by_hand))]
    return rows


def predictions_of(benchmark: Benchmark, fixture: dict[str, Any], protocol: str, folder: Path) -> list[Prediction]:
    """The lines that eval.run would write if the model gave the fixture's replies; every prompt is built."""
    prepared = prepare(benchmark, str(folder / "data"), folder / "prepared", processes=1)
    rules = benchmark.protocols[protocol]
    data = as_asked(DataConfig(decoder="pyav", **SMALL), rules)
    builder = PromptBuilder(load_tokenizer(MODEL), read_config(MODEL), data, 100_000)
    samples = [as_sample(item, rules, benchmark.name) for item in prepared.items]
    replies = fixture["replies"]
    if unknown := replies.keys() - {item.id for item in prepared.items}:
        raise ValueError(f"eval/fixtures/{benchmark.name}.yaml: replies to {sorted(unknown)}, which are no items")

    def answer(part: Sequence[Sample]) -> list[list[Answer]]:
        for sample in part:
            builder.build(sample, prepared.root)
        texts = [replies[s.id] if isinstance(replies[s.id], str) else replies[s.id][protocol] for s in part]
        return [[Answer(text, len(builder.completion_ids(text)), True)] for text in texts]

    out = folder / f"{benchmark.name}.{protocol}.jsonl"
    lines = predict(answer, benchmark, prepared.items, samples, out, protocol=protocol, settings="fixture", chunk=4)
    asked = fixture.get("asked", {})
    return [score_line(benchmark, {**line, **asked.get(line["id"], {})}) for line in lines]


# ---- what is compared ------------------------------------------------------------------------------------------


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    """Headline, metrics and breakdowns in percent, and the counts, by dotted name."""
    headline = summary["headline"]
    found = {"headline": 100 * headline["value"]} if headline is not None else {}
    for name, estimate in summary["metrics"].items():
        found[f"metrics.{name}"] = estimate["value"] * (1 if name in ERRORS else 100)
    for group, values in summary["breakdowns"].items():
        found |= {f"breakdowns.{group}.{value}": 100 * estimate["value"] for value, estimate in values.items()}
    return found | {f"counts.{name}": count for name, count in summary["counts"].items()}


def _flat(tree: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _asked(found: dict[str, float], by_hand: dict[str, float]) -> set[str]:
    return set(by_hand) | {key for key in found if key == "headline" or key.startswith("breakdowns.")}


def _same(measured: float | None, by_hand: float | None) -> bool:
    return measured is not None and by_hand is not None and abs(measured - by_hand) < 0.006  # two decimals by hand


def _shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"


# ---- records and media -----------------------------------------------------------------------------------------


def write_data(fixture: dict[str, Any], folder: Path) -> None:
    """The owners' files and media, made below `folder`."""
    for name, content in fixture["records"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_records(path, _with_pictures(content))
    for name, medium in fixture.get("media", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_medium(path, **medium)


def _write_records(path: Path, content: Any) -> None:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(content))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        case ".tsv":
            with open(path, "w", newline="") as file:
                table = csv.DictWriter(file, list(content[0]), delimiter="\t")
                table.writeheader()
                table.writerows({name: _in_table(value) for name, value in row.items()} for row in content)
        case _:
            raise AssertionError(path)


def _with_pictures(content: Any) -> Any:
    if isinstance(content, dict) and "$image" in content:
        return {"bytes": picture(content["$image"]), "path": None}
    if isinstance(content, dict):
        return {key: _with_pictures(value) for key, value in content.items()}
    return [_with_pictures(value) for value in content] if isinstance(content, list) else content


def _in_table(value: Any) -> Any:
    return base64.b64encode(value["bytes"]).decode() if isinstance(value, dict) and "bytes" in value else value


def picture(color: str) -> bytes:
    """PNG of a plain colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_medium(path: Path, kind: str, seconds: float = 2.0, sound: bool = False) -> None:
    """A made clip, picture, sound, folder of frames, or a file that is none of these."""
    if kind == "image":
        path.write_bytes(picture("navy"))
    elif kind == "damaged":
        path.write_bytes(b"no medium")
    elif kind == "frames":
        path.mkdir()
        for number in range(round(seconds * RATE)):
            (path / f"{number:05d}.png").write_bytes(picture("olive" if number % 2 else "teal"))
    elif kind == "audio":
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * SOUND)) / SOUND)
        soundfile.write(path, tone, SOUND)
    else:
        _write_clip(path, seconds, sound)


def _write_clip(path: Path, seconds: float, sound: bool) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SOUND, layout="mono") if sound else None
        for number in range(round(seconds * RATE)):
            pixels = np.full((SIDE, SIDE, 3), 40, np.uint8)
            pixels[8:24, 3 * number % 48 : 3 * number % 48 + 16] = (220, 60, 40)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * SOUND)) / SOUND)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = SOUND
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=SOUND, frame_size=1024)
            for chunk in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(audio.encode(chunk))
            container.mux(audio.encode(None))

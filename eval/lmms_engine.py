"""The training engine behind lmms-eval: its visuals as media, its requests as questions, their answers without tags."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data_tools.prepare.damage import Refused
from data_tools.prepare.store import Handling, Source, read_card, store
from eval.engine import fitting
from megatron_avatar.config import Config
from megatron_avatar.data.picture import to_rgb
from megatron_avatar.data.prompt import MEDIUM
from megatron_avatar.records import Media, Sample
from megatron_avatar.rl.rewards.format import parse

NO_ANSWER = "no answer"  # some tasks leave an empty reply out of the denominator, or find it right
SUFFIXES = {
    "image": {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"},
    "audio": {".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"},
}


@dataclass(frozen=True)
class Question:
    """A request as the engine takes it; `trouble` says why one of its media can't be used."""

    sample: Sample
    generation: dict[str, Any]
    trouble: str = ""


def source(visual: Any) -> Source:
    """What a task calls a visual: a picture, decoded sound, or the path of a picture, sound or video."""
    if isinstance(visual, Image.Image):
        written = io.BytesIO()
        try:
            to_rgb(visual).save(written, "PNG")
        except (OSError, ValueError) as error:
            raise Refused("not_media", f"a picture that can't be read: {error}") from None
        return Source("image", data=written.getvalue())
    if isinstance(visual, str | os.PathLike):
        path = Path(visual).expanduser().absolute()
        kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), "video")
        return Source(kind, str(path))
    try:  # a dictionary, or a decoder that is read like one: samples [n] or [channels, n]
        samples, rate = visual["array"], visual["sampling_rate"]
    except (TypeError, KeyError, ValueError):
        raise Refused("not_media", f"{type(visual).__name__} is no picture, sound or path") from None
    written = io.BytesIO()
    try:
        soundfile.write(written, np.asarray(samples).T, int(rate), format="WAV", subtype="FLOAT")
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise Refused("not_media", f"sound that can't be read: {error}") from None
    return Source("audio", data=written.getvalue())


def flat(visuals: Any) -> Iterator[Any]:
    """Visuals of a document one by one, however a task nests them."""
    if isinstance(visuals, list | tuple):
        for visual in visuals:
            yield from flat(visual)
    elif visuals is not None:
        yield visuals


def question(name: str, text: str, visuals: Any, generation: dict[str, Any], handling: Handling) -> Question:
    """A request with its media measured into `handling.out`, at once: decoded pictures are not kept."""
    media, trouble = [], ""
    for visual in flat(visuals):
        try:
            given = source(visual)
            card = read_card(Path(handling.out), store(given, handling), given.kind)
            if "refused" in card:
                raise Refused(card["refused"], card["detail"])
            media.append(Media(**{**card["media"], "pts": tuple(card["media"].get("pts", ())) or None}))
        except Refused as refused:
            trouble = f"{visual if isinstance(visual, str) else type(visual).__name__}: {refused}"
    placed = re.sub(r"<media_\d+>", MEDIUM, text)  # how tasks mark the places of their visuals
    text = placed if placed.count(MEDIUM) == len(media) else text
    sample = Sample(id=name, stage="", split="test", family="", question=text, answer="", problem_type="other",
                    media=tuple(media))  # fmt: skip
    return Question(sample, generation, trouble)


def final_answer(text: str, until: Sequence[str] = ()) -> str:
    """The answer block, or without one what follows the reasoning; cut at the first of `until` in it."""
    answer = parse(text)[1]
    answer = text.rpartition("</think>")[2] if answer is None else answer
    for stop in until:
        answer = answer.partition(stop)[0]
    return answer.strip()


class Responder:
    """The engine behind a list of requests. All ranks call `answer` together, each with requests of its own."""

    def __init__(self, config: Config, media: str = ""):
        from megatron_avatar.data.loader import MediaLoader
        from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
        from megatron_avatar.policy.backend import start
        from megatron_avatar.policy.build import build_policy
        from megatron_avatar.policy.weights import load_hf

        self.config, self.stack = config, contextlib.ExitStack()
        self.backend = start(config.parallel, seed=config.seed)
        if not media:
            mine = self.stack.enter_context(tempfile.TemporaryDirectory()) if self.backend.rank == 0 else ""
            media = self.backend.broadcast_object(mine)
        self.handling = Handling("/", media, str(Path(media) / "scratch"), codec="needed")
        Path(self.handling.scratch).mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(config.model.path)
        self.policy = build_policy(config.model.path, self.backend, config.model, config.parallel)
        self.limit = config.rl.sampling.max_new_tokens
        self.builder = PromptBuilder(tokenizer, self.policy.hf_config, config.data, config.model.context - self.limit)
        load_hf(self.policy, config.model.path)
        self.loader = MediaLoader(self.builder, Path(media), config.data.workers, config.data.decode_deadline_s)
        self.stack.callback(self.loader.close)
        self._asked: Counter[str] = Counter()

    def question(self, name: str, text: str, visuals: Any, generation: dict[str, Any]) -> Question:
        """A request that may be repeated: each time it is drawn anew."""
        self._asked[name] += 1
        return question(f"{name}/{self._asked[name]}", text, visuals, generation, self.handling)

    def answer(self, questions: Sequence[Question], batch: int = 1) -> list[str]:
        """The answer to each of this rank's questions; NO_ANSWER, and a line on stderr, where media can't be used."""
        gathered: list[list[Question]] = self.backend.all_gather_object(list(questions))
        everybody = {q.sample.id: q for rank in gathered for q in rank}  # lmms-eval pads a rank's by repeating some
        alike: dict[str, list[Question]] = {}
        for q in everybody.values():
            alike.setdefault(repr(self._sampling(q.generation)), []).append(q)
        found: dict[str, str] = {}
        for group in alike.values():
            found |= self._complete(group, batch)
        return [found[q.sample.id] for q in questions]

    def close(self) -> None:
        from megatron_avatar.policy.backend import stop

        self.stack.close()
        stop()

    def _sampling(self, generation: dict[str, Any]) -> tuple[Any, bool]:
        """Settings, and whether greedy: as in transformers a temperature counts with do_sample alone."""
        sampling = replace(self.config.rl.sampling, max_new_tokens=min(
            self.limit, int(generation.get("max_new_tokens") or self.limit)))  # fmt: skip
        if not generation.get("do_sample"):
            return sampling, True
        drawn = {key: generation[key] for key in ("temperature", "top_p", "top_k") if generation.get(key)}
        return replace(sampling, **drawn), False

    def _complete(self, group: list[Question], batch: int) -> dict[str, str]:
        from megatron_avatar.training.evaluate import Answer, answers

        sampling, greedy = self._sampling(group[0].generation)
        asked = [fitting(self.builder, q.sample) for q in group if not q.trouble]
        completed = answers(
            self.policy, self.backend, self.builder, self.loader, asked, sampling=sampling, greedy=greedy,
            seed=self.config.seed, batch=batch,
        )  # fmt: skip
        by_id = {sample.id: row[0] for sample, row in zip(asked, completed, strict=True)}
        replies = {}
        for q in group:
            reply = by_id.get(q.sample.id, Answer(error=q.trouble))
            if reply.error is not None and self.backend.rank == 0:
                print(f"{q.sample.id}: not answered: {reply.error}", file=sys.stderr)
            until = q.generation.get("until") or []
            until = [until] if isinstance(until, str) else until
            replies[q.sample.id] = (final_answer(reply.text, until) if reply.error is None else "") or NO_ANSWER
        return replies

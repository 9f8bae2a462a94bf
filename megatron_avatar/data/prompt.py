"""A sample becomes a prompt: chat template, media placeholders, 3-axis positions, features.

The layout (token ids and positions) follows from the manifest alone, before any file is opened, so
that a prompt that is too long is known before training. Decoded media must then agree with it.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_avatar.config.families import FAMILIES, MERGE, TEMPORAL_PATCH, Family, family_of
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.config.validate import check_pixels
from megatron_avatar.data import dali, features
from megatron_avatar.data.chat import Chat
from megatron_avatar.data.container import STALE, Fit, MediaError
from megatron_avatar.data.decode import decode_audio, decode_frames, decode_image, prefers_dali
from megatron_avatar.data.expand import Expander, line
from megatron_avatar.data.plan import MediaPlan, count_tokens, plan_media
from megatron_avatar.files import is_machines, unwritable
from megatron_avatar.records import MediaKind, Prompt, Sample, Variant

DECODED_AHEAD = 4
END = "<|im_end|>"
MEDIUM = "<|medium|>"  # in a question: here stands the next of its media; without any they come first
# For a prompt that is too long, by what takes most of it.
REMEDIES = {
    "video": "lower data.max_frames or data.frame_max_pixels",
    "image": "lower data.image_max_pixels",
    "audio": "set data.mute=true or cut its sound",
    "text": "shorten its text",
}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; ValueError that names the folder where it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no usable tokenizer (tokenizer.json, tokenizer_config.json): model.path needs it beside the "
            f"weights; download or export it again ({str(error).splitlines()[0][:120]})"
        ) from error


def check_words(chat: Chat, key: str, text: str) -> None:
    """ValueError where the tokenizer can't hold the `text` of a setting: it doesn't know a word or give it back
    (spaces may go)."""
    tokenizer = chat.tokenizer
    back = str(tokenizer.decode(chat.text_ids(text), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    unknown = tokenizer.unk_token_id
    lost = [word for word in text.split() if unknown is not None and unknown in chat.text_ids(word)]
    if lost:
        why = f"doesn't know {', '.join(map(repr, lost[:5]))}"
    elif MEDIUM in text:
        why = f"needs {MEDIUM} for the places of media in questions"
    elif "".join(back.split()) != "".join(text.split()):
        why = f"gives back {back!r}"
    else:
        return
    raise ValueError(f"{key}={text!r}: the tokenizer of model.path {why}. Write other words, or {key}='' for none")


def check_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, keys: Sequence[str]) -> None:
    """ValueError where ids that the model's configuration names are no control tokens of the tokenizer, each its own,
    or where the tokenizer has more tokens than the model."""
    where = tokenizer.name_or_path or "model.path"
    named: dict[int, str] = {}
    for key in keys:
        index, remedy = getattr(config, key), "its files belong to another model; download or export the folder again"
        if index not in tokenizer.added_tokens_decoder:
            raise ValueError(f"{where}: config.json has {key}={index}, which the tokenizer beside it doesn't have as a "
                             f"control token: {remedy}")  # fmt: skip
        if (other := named.setdefault(index, key)) != key:
            raise ValueError(f"{where}: config.json has {index} as {other} and as {key}: {remedy}")
    if len(tokenizer) > (room := config.text_config.vocab_size):
        raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {room}: take "
                         "the model's own tokenizer, or make its embeddings and head larger (resize_token_embeddings)")


def check_sizes(config: Any, family: Family) -> None:
    """ValueError where the model's configuration has other sizes than its family, which features and counts follow."""
    vision = config.vision_config
    found = {
        "patch_size": (vision.patch_size, family.patch),
        "temporal_patch_size": (vision.temporal_patch_size, TEMPORAL_PATCH),
        "spatial_merge_size": (vision.spatial_merge_size, MERGE),
    }
    if family.hears:
        found["num_mel_bins"] = (config.audio_config.num_mel_bins, features.MEL_BINS)
        found[family.position_rate] = (attrgetter(family.position_rate)(config), family.audio_rate)
    if family.audio_chunk:
        found["n_window"] = (config.audio_config.n_window, family.audio_chunk // 2)
    wrong = [f"{key} is {theirs} instead of {ours}" for key, (theirs, ours) in found.items() if theirs != ours]
    if wrong:
        raise ValueError(f"config.json: {', '.join(wrong)}, which {family.name} has; set model.path to such a model")


class PromptBuilder:
    """Builds prompts for one tokenizer and one Hugging Face configuration of a family (Omni's whole, or its Thinker's).

    `data.instruction` ends every prompt, `data.system` replaces the template's own system prompt. `end_id` is the token
    that ends a completion. Instances can be pickled to decode workers. Raises ValueError for a model of another kind,
    fewer pixels than a visual token has, a template that begins the reasoning, and tokens or words that the tokenizer
    doesn't have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hf_config: Any, data: DataConfig, context: int):
        config = getattr(hf_config, "thinker_config", hf_config)
        self.family = family = features.with_colours(family_of(hf_config.model_type), tokenizer.name_or_path)
        check_sizes(config, family)
        check_pixels(data, family)
        self.tokenizer, self.data, self.context = tokenizer, data, context
        around = ("vision_start_token_id", "vision_end_token_id") if family.timestamps else ()
        sounds = ("audio_token_id", "audio_start_token_id", "audio_end_token_id") if family.hears else ()
        check_tokens(tokenizer, config, ("image_token_id", "video_token_id", *around, *sounds))
        self.placeholders: dict[MediaKind, int] = {"image": config.image_token_id, "video": config.video_token_id}
        if family.hears:
            self.placeholders["audio"] = config.audio_token_id
        self.expand = Expander(config, family, self.placeholders)
        if family.timestamps:
            place = [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
            self.video_tokens = tuple(tokenizer.convert_ids_to_tokens(place))
        self.chat = Chat(tokenizer, self.placeholders, family)
        check_words(self.chat, "data.instruction", data.instruction)
        check_words(self.chat, "data.system", data.system)
        self.end_id = int(tokenizer.convert_tokens_to_ids(END))  # type: ignore[arg-type]  # of one token

    def completion_ids(self, text: str) -> np.ndarray:
        """Token ids [L] int64 of a completion, end token included."""
        return np.array([*self.chat.text_ids(text), self.end_id], np.int64)

    def decode(self, ids: np.ndarray) -> str:
        """Text of token ids [L], special tokens dropped."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text of each of the token ids [L] by itself, in the tokenizer's own alphabet: ASCII reads as it is."""
        return list(self.tokenizer.convert_ids_to_tokens(ids.tolist()))

    def length(self, sample: Sample, variant: Variant = "plain") -> int:
        """Prompt tokens P, from the manifest alone: no file is opened. Raises ValueError beyond the context."""
        return self._template(sample, self._plans(sample), variant)[1]

    @property
    def ahead(self) -> int:
        """Samples that a decode worker takes at once: DALI begins with the next while one is made."""
        return DECODED_AHEAD if prefers_dali(self.data.decoder) else 1

    def announce(self, requests: Sequence[tuple[Sample, Variant]], root: Path) -> None:
        """Let DALI begin with the videos of the samples that are going to be built, in this order."""
        clips: list[tuple[Path, np.ndarray, Fit | None]] = []
        for sample, _ in requests:
            for media in sample.media:
                plan = plan_media(media, self.data, self.family)
                if plan is not None and plan.indices is not None and os.path.isfile(root / media.path):
                    clips.append((root / media.path, plan.indices, plan.fit))
        dali.reader().announce(clips)

    def build(self, sample: Sample, root: Path, variant: Variant = "plain") -> Prompt:
        """Decodes the sample's media below `root` and builds its prompt.

        Raises ValueError for a prompt beyond the context, MediaError for a damaged file or one that is not what the
        manifest says.
        """
        plans = self._plans(sample)
        token_ids, positions = self._layout(sample, plans, variant)
        root = Path(root)
        patches = [_read(self._patches, plan, root) for plan in plans if plan.grid[0]]
        mels = [_read(_mel, plan, root) for plan in plans if plan.mel_frames]
        return Prompt(
            sample_id=sample.id,
            variant=variant,
            token_ids=token_ids,
            positions=positions,
            pixels=torch.cat(patches) if patches else None,
            grid_thw=torch.tensor([plan.grid for plan in plans if plan.grid[0]]) if patches else None,
            mel=torch.cat(mels, dim=1) if mels else None,
            mel_lengths=torch.tensor([mel.shape[1] for mel in mels]) if mels else None,
        )

    def _plans(self, sample: Sample) -> list[MediaPlan]:
        try:
            plans = [plan for media in sample.media if (plan := plan_media(media, self.data, self.family)) is not None]
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from None
        if not self.family.hears and any(plan.mel_frames for plan in plans):
            hearing = " or ".join(family.name for family in FAMILIES if family.hears)
            raise ValueError(
                f"sample {sample.id} has sound, which {self.family.name} doesn't hear; set data.mute=true to leave "
                f"sound out, or model.path to a folder of {hearing}"
            )
        return plans

    def _patches(self, plan: MediaPlan, root: Path) -> torch.Tensor:
        """[N, 6 * patch * patch] float32."""
        path, fit = root / plan.media.path, plan.fit
        if plan.indices is not None:
            return features.patchify(decode_frames(path, plan.indices, self.data.decoder, fit), self.family)[0]
        picture = decode_image(path)
        fit.check(path, picture.shape[1:3])
        twice = np.repeat(features.resize(picture, *fit.size), TEMPORAL_PATCH, axis=0)
        return features.patchify(twice, self.family)[0]

    def _text(self, sample: Sample, variant: Variant) -> str:
        lines = [sample.question]
        lines += [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, sample.choices, strict=False)]
        if variant == "hinted":
            if not sample.hint:
                raise ValueError(f"sample {sample.id} has no hint; add `hint` to its manifest line or disable hints")
            lines.append(f"Hint: {sample.hint}")
        lines += [self.data.instruction] if self.data.instruction else []
        return "\n".join(lines)

    def _content(self, sample: Sample, plans: list[MediaPlan], variant: Variant) -> list[dict[str, str]]:
        """The user's turn: media first, or where the question has a MEDIUM for each of them."""
        first, *texts = self._text(sample, variant).split(MEDIUM)
        if not texts:
            kinds: list[dict[str, str]] = [{"type": plan.kind} for plan in plans]
            return [*kinds, {"type": "text", "text": first}]
        if len(texts) != len(sample.media):
            raise ValueError(
                f"sample {sample.id}: its question has {len(texts)} places for {len(sample.media)} media; write one "
                f"{MEDIUM} for each, or none"
            )
        kept = {id(plan.media): plan.kind for plan in plans}  # data.mute and data.blind leave some out
        content = [{"type": "text", "text": first}]
        for media, text in zip(sample.media, texts, strict=True):
            content += [{"type": kept[id(media)]}] if id(media) in kept else []
            content.append({"type": "text", "text": text})
        return _joined(content)

    def _template(self, sample: Sample, plans: list[MediaPlan], variant: Variant) -> tuple[list[int], int]:
        """Token ids with one placeholder for each of `_blocks`, and the prompt's length P once they are expanded."""
        own = self.data.system
        system = [{"role": "system", "content": [{"type": "text", "text": own}]}] if own else []
        content = self._content(sample, plans, variant)
        if reason := unwritable("".join(part.get("text", "") for part in content)):
            raise ValueError(f"sample {sample.id}: of its text {reason}; correct it in the manifest")
        spread = partial(self._spread, plans) if self.family.timestamps else str
        template = self.chat.prompt_ids([*system, {"role": "user", "content": content}], spread)
        blocks = [block for plan in plans for block in self._blocks(plan)]
        if [i for i in template if i in self.placeholders.values()] != [self.placeholders[b.kind] for b in blocks]:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(list(self.placeholders.values())))
            raise ValueError(
                f"sample {sample.id}: the tokenized prompt does not hold one placeholder for each of its "
                f"{len(plans)} media; check the chat template, which has to write {names}"
            )
        counts = [count_tokens(plan, self.family) for plan in plans]
        parts = {kind: sum(count[kind] for count in counts) for kind in REMEDIES if kind != "text"}
        parts["text"] = len(template) - len(blocks)
        if (length := sum(parts.values())) > self.context:
            if self.family.timestamps:  # a time, start and end belong to the video
                times = [time for plan in plans if plan.kind == "video" for time in plan.timestamps]
                told = sum(len(self.chat.text_ids(time)) + 2 for time in times)
                parts |= {"video": parts["video"] + told, "text": parts["text"] - told}
            remedy = REMEDIES[max(parts, key=parts.__getitem__)]
            what = f"its prompt has {length} tokens, the context {self.context}"
            raise ValueError(f"sample {sample.id}: {what}; {remedy}, or raise model.context")
        return template, length

    def _layout(self, sample: Sample, plans: list[MediaPlan], variant: Variant) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [P] with placeholders expanded, and positions [3, P] float32 (temporal, height, width).

        Fractions are rounded once, here: transformers, which rounds each sum, may differ in the last place.
        """
        template, length = self._template(sample, plans, variant)
        media = [place for place, token in enumerate(template) if token in self.placeholders.values()]
        blocks = [block for plan in plans for block in self._blocks(plan)]
        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        start = 0.0
        starts, ends = [0, *(place + 1 for place in media)], [*media, len(template)]
        for first, last, block in zip(starts, ends, [*blocks, None], strict=True):
            ids.append(np.array(template[first:last], np.int64))
            positions.append(line(last - first) + start)
            start += last - first
            if block is not None:
                block_ids, block_positions, advance = self.expand(block)
                ids.append(block_ids)
                positions.append(block_positions + start)
                start += advance
        token_ids = np.concatenate(ids)
        assert len(token_ids) == length
        return token_ids, np.concatenate(positions, axis=1).astype(np.float32)

    def _blocks(self, plan: MediaPlan) -> list[MediaPlan]:
        """What one placeholder each stands for: the medium, or each pair of a video's frames, its time before it."""
        if not (self.family.timestamps and plan.kind == "video"):
            return [plan]
        return [replace(plan, grid=(1, *plan.grid[1:]))] * plan.grid[0]

    def _spread(self, plans: list[MediaPlan], text: str) -> str:
        """The template's text with a video's place (start, placeholder and end, or the placeholder alone) once for each
        pair of its frames, behind their time.

        As transformers' releases up to 4.57 wrote it: later ones leave the template's start and end around the whole.
        """
        start, video, end = self.video_tokens
        clips = iter([plan for plan in plans if plan.kind == "video"])

        def place(found: re.Match[str]) -> str:
            plan = next(clips, None)  # a template that writes more of them is refused afterwards
            return found[0] if plan is None else "".join(f"{time}{start}{video}{end}" for time in plan.timestamps)

        return re.sub(f"{re.escape(start + video + end)}|{re.escape(video)}", place, text)


def _joined(content: list[dict[str, str]]) -> list[dict[str, str]]:
    """The parts without empty texts, those side by side as one: what their border forms belongs to the text."""
    joined: list[dict[str, str]] = []
    for part in content:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        elif part.get("text") != "":
            joined.append(part)
    return joined


def _read(read: Callable[[MediaPlan, Path], torch.Tensor], plan: MediaPlan, root: Path) -> torch.Tensor:
    """What `read` makes of a medium. MediaError also where a decoder raises something else on foreign bytes."""
    try:
        return read(plan, root)
    except MediaError:
        raise
    except Exception as error:
        if is_machines(error):
            raise
        path = plan.media.audio_path if read is _mel and plan.media.audio_path else plan.media.path
        raise MediaError(root / path, f"can't be decoded ({type(error).__name__}: {error})") from error


def _mel(plan: MediaPlan, root: Path) -> torch.Tensor:
    """[128, L] float32."""
    media = plan.media
    path = root / (media.path if media.kind == "audio" else str(media.audio_path))
    waveform = decode_audio(path, in_video=media.kind == "video", most=media.audio_samples)
    if len(waveform) != media.audio_samples:
        raise MediaError(path, f"holds {len(waveform)} samples, the manifest says {media.audio_samples}", STALE)
    return features.log_mel(waveform)

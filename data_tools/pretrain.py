"""Pretrain the tiny base: the Thinker's own classes learn to describe clips, to look and to copy (`make base`).

    python -m data_tools.pretrain --out assets/tiny_base
    python -m data_tools.pretrain --start assets/tiny_base --run b --steps 1200 --clips 2000 --on-ladder 0.5
    python -m data_tools.pretrain --start assets/tiny_base --run c --steps 800 --clips 1500 --on-ladder 0.5

Like the paper's base it then perceives and reads, but doesn't know the <think>, <answer> format, and that looking
comes before answering. What it is taught stands in data_tools/lessons.py. Its clips go through real files and the
trainer's own prompt builder, drawn with a key of their own, once; lessons are drawn anew each time a clip is met.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, track
from torch.nn import functional
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from data_tools.families import LETTERS
from data_tools.lessons import ON_LADDER, Lesson, Shown, descriptions, draw_demo, draw_lessons, draw_shown
from data_tools.synthesize import clip_media, keyed_rng, write_clip
from data_tools.tiny_omni3 import tiny_omni3_config
from data_tools.tokenizer import SPECIAL, build_tokenizer
from data_tools.world import COLORS, SHAPES
from megatron_avatar.config.families import OMNI, OMNI3, Family
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.records import Prompt, Sample

VIEW = DataConfig(fps=4.0, min_frames=8, max_frames=8, frame_max_pixels=7056, frame_min_pixels=7056, decoder="pyav",
                  instruction="")  # fmt: skip
SEEING, SEEN = 1000, 16  # updates that learn to perceive, clips of one of them
FEW, MANY = (1, 1, 0), (4, 3, 0)  # texts beside a clip then, and after it (lessons.draw_lessons)
AGAIN = (1, 1, 8)  # in a training that goes on: letters come last
KEEP = 250  # updates between two states on disk
Example = tuple[Prompt, list[tuple[np.ndarray, np.ndarray]]]  # clip; of each lesson what is given and what is learned


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5OmniThinkerConfig:
    """Qwen2.5-Omni's Thinker with about 2 M parameters; every dimension divides for TP 2."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.05,
    }
    audio = {
        "encoder_layers": 2,
        "d_model": 128,
        "encoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "output_dim": 128,
        "initializer_range": 0.05,
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        user_token_id=tokenizer.convert_tokens_to_ids("Ġuser"),
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
    )


class Base(NamedTuple):
    """How a tiny base is made: its family, its configuration and class in transformers, the pixels of a frame, and
    where it is kept."""

    family: Family
    config: Callable[[PreTrainedTokenizerBase], Any]
    model: Any
    pixels: int
    folder: str

    @property
    def view(self) -> DataConfig:
        return replace(VIEW, frame_min_pixels=self.pixels, frame_max_pixels=self.pixels)


BASES = {
    "omni": Base(OMNI, tiny_config, Qwen2_5OmniThinkerForConditionalGeneration, 84 * 84, "assets/tiny_base"),
    "omni3": Base(OMNI3, tiny_omni3_config, Qwen3OmniMoeThinkerForConditionalGeneration, 96 * 96, "assets/tiny_omni3"),
}


# --- examples -------------------------------------------------------------------------------------


def film(builder: PromptBuilder, folder: Path, key: str, shown: Shown) -> Prompt:
    """A clip, written, read back and removed, as the beginning of a prompt."""
    media = clip_media(key, shown.scene)
    write_clip((media, shown.scene), folder)
    sample = Sample(key, "base", "base", "describe", "Describe the clip.", "", "free_form", (), (media,))
    prompt = builder.build(sample, folder)
    for path in (media.path, media.audio_path):
        if path:
            (folder / path).unlink()
    end = builder.tokenizer.convert_tokens_to_ids(builder.family.vision_end)
    shared = int(np.flatnonzero(prompt.token_ids == end)[0]) + 1
    prompt.token_ids, prompt.positions = prompt.token_ids[:shared], prompt.positions[:, :shared]
    return prompt


def turns(builder: PromptBuilder, lessons: list[Lesson]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of what is given and of what is learned, of each lesson."""
    given = [f"{one.request}<|im_end|>\n<|im_start|>assistant\n{one.begun}" for one in lessons]
    ids = map(np.array, builder.tokenizer(given)["input_ids"])
    return [(before, builder.completion_ids(one.told)) for before, one in zip(ids, lessons, strict=True)]


def describing(builder: PromptBuilder, folder: Path, key: str) -> Example:
    """A fresh clip of the demo's world with descriptions of all its aspects."""
    rng = keyed_rng("base", key)
    shown = draw_demo(rng)
    return film(builder, folder, key, shown), turns(builder, descriptions(shown, rng))


def film_all(builder: PromptBuilder, run: str, count: int, on_ladder: float) -> list[tuple[Prompt, Shown]]:
    """`count` clips, this share of them of the ladder, the others of the demo's world, with what they show; `run` keys
    them."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "clips").mkdir()
        shown = [(f"{run}-{k}", draw_shown(keyed_rng("base", f"{run}-{k}"), on_ladder)) for k in range(count)]
        drawn = track(shown, "filming", console=Console(stderr=True))
        return [(film(builder, Path(name), key, one), one) for key, one in drawn]


def description_logits(
    model: Qwen2_5OmniThinkerForConditionalGeneration, batch: list[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [sum L, vocabulary] at the target tokens of a batch, and the targets [sum L].

    A clip's descriptions share its tokens: each sees the clip and itself, its positions go on from the clip's end.
    """
    rows = [_row(prompt, turns) for prompt, turns in batch]
    width = max(row["ids"].size for row in rows)
    ids, turn, target = (np.stack([_pad(row[key], width) for row in rows]) for key in ("ids", "turn", "target"))
    positions = np.stack([_pad(row["positions"], width) for row in rows], 1)
    ids, turn, target, positions = (torch.from_numpy(x) for x in (ids, turn, target, positions))
    sees = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    mask = (sees & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    embedded = model.get_input_embeddings()(ids)
    prompts = [prompt for prompt, _ in batch]
    with_sound = [p for p in prompts if p.mel is not None]
    towers = model.model
    seen = towers.visual(torch.cat([p.pixels for p in prompts]), torch.cat([p.grid_thw for p in prompts]))
    shown = ids == model.config.video_token_id
    embedded = _fill(embedded, shown, seen.pooler_output)
    deep = getattr(seen, "deepstack_features", None)
    beside = {} if deep is None else {"visual_pos_masks": shown, "deepstack_visual_embeds": deep}
    if with_sound:
        mels, lengths = torch.cat([p.mel for p in with_sound], 1), torch.cat([p.mel_lengths for p in with_sound])
        heard = towers.audio_tower(mels, feature_lens=lengths).last_hidden_state
        embedded = _fill(embedded, ids == model.config.audio_token_id, heard)
    hidden = towers.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False, **beside
    ).last_hidden_state
    told = target > 0
    return model.lm_head(hidden[told]), target[told]


def _row(prompt: Prompt, turns: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays [S]: token ids, turn (0: the clip), the next token where it is told (0: elsewhere), positions [3, S]."""
    pieces = [np.concatenate([asked, told[:-1]]) for asked, told in turns]
    first = prompt.positions[0, -1] + 1
    return {
        "ids": np.concatenate([prompt.token_ids, *pieces]),
        "turn": np.repeat(np.arange(len(turns) + 1), [len(prompt), *map(len, pieces)]),
        "target": np.concatenate(
            [np.zeros(len(prompt), np.int64)]
            + [np.concatenate([np.zeros(len(asked) - 1, np.int64), told]) for asked, told in turns]
        ),
        "positions": np.concatenate(
            [prompt.positions, *(np.tile(first + np.arange(len(p)), (3, 1)) for p in pieces)], axis=1
        ),
    }


def _pad(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


def _fill(embedded: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return embedded.masked_scatter(where[..., None].expand_as(embedded), features)


# --- held-out accuracy ----------------------------------------------------------------------------

WORD_CLASSES = {
    "shape": set(SHAPES),
    "color": set(COLORS),
    "act": {"still", "moves", "flashes", "appears", "slides"},
    "count": {"one", "two", "three", "four"},
}


@torch.no_grad()
def told_right(model: torch.nn.Module, examples: list[Example]) -> list[list[np.ndarray]]:
    """Of each lesson of each example which of its tokens [L] the model would say next, given a right beginning.

    Where all of them are true, the greedy reply is the lesson, word for word.
    """
    found = []
    for start in range(0, len(examples), 16):
        batch = examples[start : start + 16]
        logits, targets = description_logits(model, batch)
        right = (logits.argmax(-1) == targets).numpy()
        for _, lessons in batch:
            ends = np.cumsum([len(told) for _, told in lessons])
            found.append(np.split(right[: ends[-1]], ends[:-1]))
            right = right[ends[-1] :]
    return found


def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, float]:
    """Share of words told right, given a right beginning, by class of word; sentences of sound by their first word."""
    hits = defaultdict(list)
    for (_, lessons), right in zip(examples, told_right(model, examples), strict=True):
        for (_, target), flags in zip(lessons, right, strict=True):
            for name, index in _classed(tokenizer, target):
                hits[name].append(bool(flags[index]))
    return {name: float(np.mean(values)) for name, values in sorted(hits.items())}


def _classed(tokenizer: PreTrainedTokenizerBase, target: np.ndarray) -> Iterator[tuple[str, int]]:
    """(class, index) of the words of a description that tell something."""
    words = [tokenizer.convert_ids_to_tokens(int(i)).removeprefix("Ġ") for i in target]
    if "is" in words:  # a list of letters: their order is free
        yield from (("letter", index) for index, word in enumerate(words) if word in LETTERS)
        return
    sentence = 0
    for index, word in enumerate(words):
        if word == ".":
            sentence = index + 1
            continue
        end = words.index(".", index) if "." in words[index:] else len(words)
        heard = bool(set(words[sentence:end]) & {"tone", "tones", "beep", "beeps", "chirp", "noise", "sound"})
        if heard and word not in ("tone", "tones", "beep", "beeps", "sound", "changes", "from", "to"):
            beeps, pattern = {"beep", "beeps"} & set(words[sentence:end]), words[sentence] == "tones"
            yield "beeps" if beeps else "pattern" if pattern else "sound", index
        elif not heard:
            classes = [name for name, members in WORD_CLASSES.items() if word in members]
            if classes:
                yield classes[0], index
            elif word in ("early", "middle", "late"):
                yield "when", index
            elif word in ("left", "center", "right", "up", "down"):
                yield ("direction" if words[index - 1] == "slides" else "column"), index


# --- training -------------------------------------------------------------------------------------


def pretrain(
    base: Base, out: Path, steps: int, batch_size: int, lr: float, clips: int, on_ladder: float, start: Path | None,
    run: str, threads: int,
) -> None:  # fmt: skip
    """Train for `steps` updates and save the folder (bfloat16), every KEEP updates too.

    The first SEEING of them meet the demo's clips alone, many of them with few texts, until colours and shapes are
    told apart: with few clips and many texts that comes late. `start` goes on from an earlier folder that perceives;
    `run` keys the clips, so that it sees new ones.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(base.family)
    config = base.config(tokenizer)
    model = base.model(config)
    if start:
        model = base.model.from_pretrained(start, dtype=torch.float32)
    builder = PromptBuilder(tokenizer, config, base.view, context=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    filmed, rng = film_all(builder, run, clips, on_ladder), keyed_rng("lessons", run)
    seeing = 0 if start else SEEING
    demo = [k for k, (_, shown) in enumerate(filmed) if not shown.on_ladder]
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task("pretraining", total=steps, loss="")
        for step in range(steps):
            for group in optimizer.param_groups:  # warm-up, then constant, then a fall over the last third
                group["lr"] = lr * min(1.0, (step + 1) / 100, max(0.02, 3 * (1 - step / steps)))
            early = step < seeing
            chosen = rng.choice(demo, SEEN) if early else rng.integers(len(filmed), size=batch_size)
            texts = FEW if early else AGAIN if start else MANY
            batch = [(filmed[k][0], turns(builder, draw_lessons(filmed[k][1], rng, texts))) for k in chosen]
            logits, targets = description_logits(model, batch)
            loss = functional.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(task, advance=1, loss=f"loss {loss.item():.3f}")
            if step % KEEP == KEEP - 1:
                save(model, tokenizer, out)
    save(model, tokenizer, out)
    report = evaluate(model, builder, tokenizer)
    print(json.dumps({k: round(v, 3) for k, v in report.items()}))


def evaluate(
    model: torch.nn.Module, builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, n: int = 200
) -> dict[str, float]:
    """Held-out accuracy of the description by class of word."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "clips").mkdir()
        examples = [describing(builder, Path(name), f"heldout-{i}") for i in range(n)]
    return accuracy(model, tokenizer, examples)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """The Hugging Face folder, weights in bfloat16; the model itself stays as it is."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=BASES, default="omni", help="omni3: a tiny Qwen3-Omni")
    parser.add_argument("--out", type=Path, help="by default where the family's base is kept, in assets")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=6, help="clips of an update")
    parser.add_argument("--clips", type=int, default=3000, help="clips that are filmed")
    parser.add_argument("--on-ladder", type=float, default=ON_LADDER, help="share of the ladder among them")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="go on from this folder")
    parser.add_argument("--run", default="a", help="key of the clips")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not 0 <= args.on_ladder <= (1 if args.start else 0.9):
        parser.error(f"--on-ladder {args.on_ladder}: a share, at most 0.9 without --start: perceiving needs the demo's")
    base = BASES[args.family]
    out = args.out or Path(base.folder)
    pretrain(base, out, args.steps, args.batch, args.lr, args.clips, args.on_ladder, args.start, args.run, args.threads)


if __name__ == "__main__":
    main()

"""Qwen3-VL's prompts against transformers' processors and get_rope_index, and against what older releases wrote."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLModel, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

from megatron_avatar.config.families import VL3
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.chat import chat_template
from megatron_avatar.data.features import patchify, smart_resize, unpatchify
from megatron_avatar.data.prompt import MEDIUM, PromptBuilder, plan_media
from megatron_avatar.records import Media, Sample
from tests.data.media import VL_SPECIAL, make_qwen_tokenizer, make_video, make_vl3_config

TOKENIZER = make_qwen_tokenizer(VL_SPECIAL)
CONFIG = make_vl3_config(TOKENIZER)
DATA = DataConfig(
    instruction="", fps=4.0, frame_min_pixels=32 * 32, frame_max_pixels=96 * 96, max_frames=64, image_max_pixels=65536
)
TRIPLE = "<|vision_start|><|video_pad|><|vision_end|>"
# As the published folders' template treats what prompts hold: no system prompt of its own, media by their type.
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for content in message.content %}"
    "{%- if content.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def builder(data=DATA, context=1_000_000):
    return PromptBuilder(TOKENIZER, CONFIG, data, context)


def sample(*media, **fields):
    base = dict(id="s", stage="1", split="train", family="f", question="what moves ?", answer="A")
    return Sample(**base | dict(problem_type="multiple_choice", media=media) | fields)


def layout(asked, data=DATA, variant="plain", own=None):
    own = own or builder(data)
    return *own._layout(asked, plans := own._plans(asked), variant), plans


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Oracle(Qwen3VLModel):
    """transformers' get_rope_index without the weights."""

    def __init__(self):
        self.__dict__.update(config=CONFIG)


class Processor(Qwen3VLProcessor):
    """transformers', whose video processor comes below."""

    def check_argument_for_proper_class(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def processing():
    """transformers' module of the video processor, which its package shows only beside torchvision."""
    name = "transformers.models.qwen3_vl.video_processing_qwen3_vl"
    path = Path(transformers.__file__).parent / "models" / "qwen3_vl" / "video_processing_qwen3_vl.py"
    hidden, spec = sys.modules.pop(name, None), importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
    if hidden is not None:
        sys.modules[name] = hidden


def rope_index(token_ids, plans):
    """Positions [3, P] by transformers."""
    grids = {kind: [p.grid for p in plans if p.kind == kind] for kind in ("image", "video")}
    ids = torch.from_numpy(token_ids)[None]
    positions, _ = Oracle().get_rope_index(
        ids,
        (ids == CONFIG.image_token_id).int() + 2 * (ids == CONFIG.video_token_id).int(),
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        attention_mask=torch.ones_like(ids),
    )
    return positions[:, 0].numpy()


sides = st.fixed_dictionaries({"height": st.integers(40, 300), "width": st.integers(40, 300)})
images = st.builds(lambda p: Media("i", "image", **p), sides)
videos = st.builds(
    lambda p, frames, fps: Media("v", "video", **p, frame_count=frames, fps=fps),
    sides, st.integers(1, 600), st.sampled_from([1.0, 8.0, 23.976, 25.0, 30.0]),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(images, videos), max_size=4), st.sampled_from([0.3, 1.0, 2.0, 4.0]))
def test_positions_equal_transformers(media, fps):
    token_ids, positions, plans = layout(sample(*media), replace(DATA, fps=fps))
    assert np.array_equal(positions, rope_index(token_ids, plans)) and positions.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(st.lists(videos, min_size=1, max_size=2), st.sampled_from(["", " at ", "see:\n", "a <"]))
def test_tokens_are_those_of_the_text_that_transformers_expands(clips, before):
    """In place of the template's triple, as its releases up to 4.57 put it; words and times may share tokens."""
    asked = sample(*clips, question="".join(f"{before}{MEDIUM}" for _ in clips) + " what moves ?")
    token_ids, _, plans = layout(asked)
    processor = Processor.__new__(Processor)
    processor.__dict__.update(video_token="<|video_pad|>", vision_start_token="<|vision_start|>",
                              vision_end_token="<|vision_end|>",
                              video_processor=type("", (), {"merge_size": 2, "temporal_patch_size": 2}))  # fmt: skip
    places = "".join(f"{before}{TRIPLE}" for _ in clips)
    text = f"<|im_start|>user\n{places} what moves ?<|im_end|>\n<|im_start|>assistant\n"
    for plan in plans:
        metadata = VideoMetadata(plan.media.frame_count, fps=plan.media.fps, frames_indices=plan.indices)
        inputs = {"video_grid_thw": np.array([plan.grid]), "video_metadata": [metadata]}
        text = text.replace(TRIPLE, processor.replace_video_token(inputs, 0).replace("video_pad", "kept"), 1)
    text = text.replace("kept", "video_pad")
    assert token_ids.tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_pair_of_frames_follows_its_time_and_nothing_surrounds_the_whole():
    """The golden form: 4 frames of 25 a second at 0, 0.4, 0.76 and 1.16 s; 2 x 3 tokens a pair."""
    clip = Media("v", "video", 30, 25.0, None, 64, 96)
    token_ids, positions, (plan,) = layout(sample(clip), replace(DATA, max_frames=4))
    assert plan.indices.tolist() == [0, 10, 19, 29] and plan.grid == (2, 4, 6)
    pad = "<|video_pad|>"
    assert text_of(token_ids) == (
        f"<|im_start|>user\n<0.2 seconds><|vision_start|>{pad * 6}<|vision_end|>"
        f"<1.0 seconds><|vision_start|>{pad * 6}<|vision_end|>what moves ?<|im_end|>\n<|im_start|>assistant\n"
    )
    first, second = np.split(positions[:, token_ids == CONFIG.video_token_id], 2, axis=1)
    assert (first - first[0, 0]).tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2]
    end = positions[:, np.flatnonzero(token_ids == CONFIG.vision_end_token_id)[0]]
    assert (end == first[0, 0] + 3).all(), "after the larger of height and width"
    assert np.array_equal(second - second[0, 0], first - first[0, 0])


def test_times_of_a_clip_of_variable_frame_rate_are_its_own():
    """Seconds after the first frame, which players show at 0; halves go to the even digit, as Python prints them."""
    clip = Media("v", "video", 6, 0.0, (5.0, 5.75, 7.0, 7.5, 9.0, 10.0), 64, 64)
    plan = plan_media(clip, replace(DATA, fps=8.0, min_frames=6), VL3)
    assert plan.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.timestamps == ["<0.4 seconds>", "<2.2 seconds>", "<4.5 seconds>"], "0.375, 2.25 and 4.5"


def test_pictures_equal_the_processors(tmp_path):
    """Tokens, patches and grids of two pictures, the smaller enlarged to 64 tokens."""
    rng = np.random.default_rng(0)
    media, pictures = [], []
    for name, (height, width) in {"a.png": (90, 120), "b.png": (400, 460)}.items():
        pictures.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
        pictures[-1].save(tmp_path / name)
        media.append(Media(name, "image", height=height, width=width))
    prompt = builder(replace(DATA, image_max_pixels=131_072)).build(sample(*media), tmp_path)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\n{place}{place}what moves ?<|im_end|>\n<|im_start|>assistant\n"
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half,
                                               min_pixels=65_536, max_pixels=131_072)  # fmt: skip
    theirs = Processor(image_processor, TOKENIZER)(text=[text], images=pictures, return_tensors="pt")
    assert np.array_equal(prompt.token_ids, theirs["input_ids"][0])
    assert torch.equal(prompt.grid_thw, theirs["image_grid_thw"]) and prompt.grid_thw[0].prod() >= 256
    assert prompt.pixels.shape[1] == 1536
    torch.testing.assert_close(prompt.pixels, theirs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (320, 32)])
def test_videos_equal_the_processors(processing, size):
    frames = np.random.default_rng(1).integers(0, 256, (6, *size, 3), np.uint8)
    planes = (torch.from_numpy(frames.transpose(0, 3, 1, 2))[None] / 255 - 0.5) / 0.5
    theirs, *cells = processing.Qwen3VLVideoProcessor.patchify(None, planes, 16, 2, 2)
    pixels, grid = patchify(frames, VL3)
    assert grid.tolist() == cells
    torch.testing.assert_close(pixels, theirs[0], atol=1e-6, rtol=0)
    assert np.array_equal(unpatchify(pixels, tuple(grid.tolist()), VL3), frames)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 384), st.sampled_from([9216, 65_536, 786_432]))
@example(1080, 1920, 384, 786_432)  # the clip's budget: 64 tokens a pair
@example(20, 300, 4, 65_536)  # narrower than a token
def test_a_clips_size_is_the_processors(processing, h, w, pairs, most):
    """`size` of its processor: the published 25,165,824 pixels over all frames, or what the settings give each."""
    data = DataConfig(instruction="", fps=1.0, max_frames=2 * pairs, frame_min_pixels=1024, frame_max_pixels=most)
    media = Media("v", "video", 2 * pairs, 1.0, None, h, w)
    longest = min(2 * pairs * most, 25_165_824)
    try:
        expected = processing.smart_resize(2 * pairs, h, w, 2, 32, 2 * pairs * 1024, longest)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            plan_media(media, data, VL3)
        return
    plan = plan_media(media, data, VL3)
    assert plan.size == expected and plan.grid == (pairs, expected[0] // 16, expected[1] // 16)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 700), st.sampled_from([1.0, 2.0, 4.0, 8.0, 25.0]), st.sampled_from([0.3, 1.0, 2.0]),
       st.integers(30, 300), st.integers(30, 300))  # fmt: skip
@example(7, 1.0, 2.0, 300, 300)  # fewer frames than are wanted, of which there is an odd number
@example(5, 1.0, 1.0, 100, 100)
def test_odd_numbers_of_frames_are_kept_and_filled_up(processing, frames, fps, sampled, h, w):
    """Frames, times, size and grid are those of transformers' processors, whose last frame is shown twice."""
    data = replace(DATA, fps=sampled, min_frames=4, max_frames=32)
    plan = plan_media(Media("v", "video", frames, fps, None, h, w), data, VL3)
    theirs = processing.Qwen3VLVideoProcessor
    settings_ = type("", (), {"min_frames": 4, "max_frames": 32})
    chosen = theirs.sample_frames(settings_, VideoMetadata(frames, fps=fps), fps=sampled)
    count = len(chosen)
    times = Processor._calculate_timestamps(None, chosen.tolist(), fps)
    assert plan.indices.tolist() == [*chosen, *chosen[-1:].repeat(count % 2)]
    assert plan.timestamps == [f"<{time:.1f} seconds>" for time in times]
    size = processing.smart_resize(count, h, w, 2, 32, count * data.frame_min_pixels, count * data.frame_max_pixels)
    shown = torch.arange(count)[None, :, None, None, None].expand(1, count, 3, *size).float()
    rows, *grid = theirs.patchify(None, shown, 16, 2, 2)
    assert plan.size == size and plan.grid == tuple(grid)
    assert {*rows[0, -1].tolist()} == {float(count - 1), float(count - 2 + count % 2)}, "the oracle fills up so"


def test_a_clip_of_an_odd_number_of_frames_is_built(tmp_path):
    make_video(tmp_path / "v.webm", frames=5, h=64, w=64)
    asked = sample(Media("v.webm", "video", 5, 8.0, None, 64, 64))
    prompt = builder(replace(DATA, fps=8.0)).build(asked, tmp_path)
    assert prompt.grid_thw.tolist() == [[3, 4, 4]] and "<0.5 seconds>" in text_of(prompt.token_ids)
    frames = unpatchify(prompt.pixels, (3, 4, 4), VL3)
    assert np.array_equal(frames[4], frames[5]) and not np.array_equal(frames[3], frames[4])


@pytest.mark.parametrize("key", ["frame_min_pixels", "frame_max_pixels", "image_max_pixels"])
def test_fewer_pixels_than_a_tokens_are_refused(key):
    with pytest.raises(ValueError, match=f"data.{key}=784 must be at least 1024, one visual token of Qwen3-VL"):
        builder(replace(DATA, **{key: 784}))


@pytest.mark.parametrize("key", ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"])
def test_a_tokenizer_without_the_configurations_tokens_is_refused(key):
    config, tokenizer = make_vl3_config(TOKENIZER), make_qwen_tokenizer(VL_SPECIAL)
    setattr(config, key, 250_000)
    tokenizer.name_or_path = "models/other"
    with pytest.raises(ValueError, match=f"models/other: config.json has {key}=250000, which the tokenizer"):
        PromptBuilder(tokenizer, config, DATA, 1000)


def test_a_thinking_edition_is_refused(caplog):
    tokenizer = make_qwen_tokenizer(VL_SPECIAL)
    tokenizer.chat_template = TEMPLATE.replace("assistant\\n", "assistant\\n<think>\\n")
    assert tokenizer.chat_template != TEMPLATE
    tokenizer.name_or_path = "models/Qwen3-VL-4B-Thinking"
    with pytest.raises(ValueError, match="models/Qwen3-VL-4B-Thinking: its chat .* in <think>.* the Instruct edition"):
        PromptBuilder(tokenizer, CONFIG, DATA, 1000)


def test_pictures_of_any_size_stay_within_the_settings():
    assert smart_resize(10, 10, 65_536, 65_536, 32) == (256, 256)
    plan = plan_media(Media("i", "image", height=500, width=500), replace(DATA, image_max_pixels=4096), VL3)
    assert plan.grid == (1, 4, 4), "below what the family enlarges to, the setting holds"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    make_video(root / "v.webm", frames=16, h=96, w=128)
    return root, sample(Media("v.webm", "video", 16, 8.0, None, 96, 128), hint="it slides")


@pytest.mark.parametrize("variant", ["plain", "hinted"])
def test_build_holds_all_features(clip, variant):
    root, asked = clip
    prompt = builder().build(asked, root, variant)
    assert prompt.grid_thw.tolist() == [[4, 4, 6]] and prompt.pixels.shape == (96, 1536) and prompt.mel is None
    assert (prompt.token_ids == CONFIG.video_token_id).sum() == 24 and len(prompt) == builder().length(asked, variant)
    assert ("Hint: it slides" in text_of(prompt.token_ids)) == (variant == "hinted")
    assert prompt.next_position == prompt.positions.max() + 1
    blind = builder(replace(DATA, blind=True)).build(asked, root, variant)
    assert "seconds" not in text_of(blind.token_ids) and blind.pixels is None


def test_the_folders_template_is_kept(caplog):
    tokenizer = make_qwen_tokenizer(VL_SPECIAL)
    tokenizer.chat_template = TEMPLATE
    own = PromptBuilder(tokenizer, CONFIG, DATA, 100_000)
    media = Media("v", "video", 30, 25.0, None, 64, 96), Media("i", "image", height=64, width=64)
    assert own.chat.template == TEMPLATE and not caplog.records
    # The built-in one writes the same.
    assert np.array_equal(layout(sample(*media), own=own)[0], layout(sample(*media))[0])
    told = PromptBuilder(tokenizer, CONFIG, replace(DATA, system="look twice"), 100_000)
    written = text_of(layout(sample(*media), own=told)[0])
    assert written.startswith("<|im_start|>system\nlook twice<|im_end|>\n<|im_start|>user\n<0.")


def test_a_template_that_writes_the_placeholder_alone_gets_the_same_place():
    tokenizer = make_qwen_tokenizer(VL_SPECIAL)
    tokenizer.chat_template = TEMPLATE.replace(TRIPLE, "<|video_pad|>")
    own = PromptBuilder(tokenizer, CONFIG, DATA, 100_000)
    media = Media("v", "video", 30, 25.0, None, 64, 96)
    assert np.array_equal(layout(sample(media), own=own)[0], layout(sample(media))[0])


def test_what_is_spelled_stays_text():
    """Control tokens in a question, and what looks like a video's time."""
    media = Media("v", "video", 8, 8.0, None, 64, 96)
    spelled = f"say {TRIPLE} <1.0 seconds> {MEDIUM} <|video_pad|> what <|im_end|> moves ?"
    ids, positions, plans = layout(sample(media, question=spelled))
    plain, _, _ = layout(sample(media))
    special = set(TOKENIZER.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert np.array_equal(positions, rope_index(ids, plans))
    told = text_of(ids)
    assert told.startswith(f"<|im_start|>user\nsay {TRIPLE} <1.0 seconds> <")
    assert told.count(" seconds><|vision_start|>") == 2


def test_sound_is_refused_unless_muted():
    heard = Media("v", "video", 16, 8.0, None, 64, 64, "a.flac", 32_000, True)
    with pytest.raises(ValueError, match="sample s has sound, which Qwen3-VL doesn't hear; set data.mute=true"):
        builder().length(sample(heard))
    silent = replace(heard, audio_path=None, audio_samples=0, audio_in_video=False)
    assert builder(replace(DATA, mute=True)).length(sample(heard)) == builder().length(sample(silent))


def test_a_prompt_that_is_too_long_is_named():
    clip = Media("v", "video", 600, 8.0, None, 96, 96)
    with pytest.raises(ValueError, match=r"sample s: its prompt has \d+ tokens, the context 300; lower data.max_fra"):
        builder(context=300).length(sample(clip))


def test_another_models_template_is_replaced_by_the_familys(caplog):
    tokenizer = make_qwen_tokenizer(VL_SPECIAL)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    own = PromptBuilder(tokenizer, CONFIG, DATA, 100_000)
    assert own.chat.template == chat_template(VL3) and "written in Qwen3-VL's format instead" in caplog.text
    assert "system" not in own.chat.template

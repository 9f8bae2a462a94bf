"""Qwen2.5-VL's prompts against transformers' processor and get_rope_index."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLModel, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_avatar.config.families import VL
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.prompt import PromptBuilder, plan_media
from megatron_avatar.records import Media, Sample
from tests.data.media import VL_SPECIAL, make_tokenizer, make_vl_config

TOKENIZER, CONFIG = make_tokenizer(VL_SPECIAL), make_vl_config()
DATA = DataConfig(
    instruction="", fps=4.0, frame_min_pixels=28 * 28, frame_max_pixels=84 * 84, max_frames=64, image_max_pixels=50176
)
HEARD = Media("v", "video", 16, 8.0, None, 84, 84, "a.flac", 32_000, True)


def builder(data=DATA):
    return PromptBuilder(TOKENIZER, CONFIG, data, 100_000)


def sample(*media):
    return Sample(
        id="s", stage="1", split="train", family="f", question="what moves ?", answer="A",
        problem_type="multiple_choice", media=media,
    )  # fmt: skip


class Oracle(Qwen2_5_VLModel):
    """transformers' get_rope_index without the weights."""

    def __init__(self):
        self.__dict__.update(config=CONFIG)


def rope_index(token_ids, plans):
    """Positions [3, P] by transformers."""
    grids = {kind: [p.grid for p in plans if p.kind == kind] for kind in ("image", "video")}
    ids = torch.from_numpy(token_ids)[None]
    positions, _ = Oracle().get_rope_index(
        ids,
        (ids == CONFIG.image_token_id).int() + 2 * (ids == CONFIG.video_token_id).int(),
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        torch.tensor([p.seconds_per_grid for p in plans if p.kind == "video"]),
        attention_mask=torch.ones_like(ids),
    )
    return positions[:, 0].numpy()


sides = st.fixed_dictionaries({"height": st.integers(40, 200), "width": st.integers(40, 200)})
images = st.builds(lambda p: Media("i", "image", **p), sides)
videos = st.builds(
    lambda p, frames, fps: Media("v", "video", **p, frame_count=frames, fps=fps),
    sides, st.integers(1, 600), st.sampled_from([1.0, 8.0, 23.976, 25.0, 30.0]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(images, videos), max_size=4), st.sampled_from([0.3, 1.0, 2.0, 4.0]))
def test_positions_equal_transformers(media, fps):
    data = replace(DATA, fps=fps)
    token_ids, positions = builder(data)._layout(sample(*media), plans := builder(data)._plans(sample(*media)), "plain")
    assert np.array_equal(positions, rope_index(token_ids, plans))


def test_a_long_video_takes_its_time_on_the_first_axis():
    """An hour in 64 frames: 32 pairs, 2 positions a second. The text goes on after the picture's width."""
    data = replace(DATA, fps=2.0)
    hour = Media("v", "video", 86_400, 24.0, None, 84, 84)
    ids, positions = builder(data)._layout(sample(hour), [plan_media(hour, data, VL)], "plain")
    times, (start,) = positions[0, ids == CONFIG.video_token_id], np.flatnonzero(ids == CONFIG.vision_start_token_id)
    assert np.array_equal(times[::9] - times[0], np.arange(32) * 225)
    (end,) = np.flatnonzero(ids == CONFIG.vision_end_token_id)
    assert (positions[:, end] == positions[:, start] + 1 + 3).all()


class Processor(Qwen2_5_VLProcessor):
    """transformers' for pictures: its video processor would ask for torchvision."""

    def check_argument_for_proper_class(self, *args, **kwargs):
        pass


def test_pictures_equal_the_processors(tmp_path):
    """Tokens, patches and grids of two pictures, from the conversation as Qwen writes it."""
    rng = np.random.default_rng(0)
    media, pictures = [], []
    for name, (height, width) in {"a.png": (90, 120), "b.png": (300, 260)}.items():
        pictures.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
        pictures[-1].save(tmp_path / name)
        media.append(Media(name, "image", height=height, width=width))
    prompt = builder().build(sample(*media), tmp_path)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{place}{place}what moves ?<|im_end|>\n<|im_start|>assistant\n"
    )
    image_processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=DATA.image_max_pixels)
    processor = Processor(image_processor, TOKENIZER, type("VideoProcessor", (), {"merge_size": 2})())
    theirs = processor(text=[text], images=pictures, return_tensors="pt")
    assert np.array_equal(prompt.token_ids, theirs["input_ids"][0])
    assert torch.equal(prompt.grid_thw, theirs["image_grid_thw"])
    torch.testing.assert_close(prompt.pixels, theirs["pixel_values"], atol=1e-6, rtol=0)
    assert (theirs["mm_token_type_ids"][0].numpy() == (prompt.token_ids == CONFIG.image_token_id)).all()


def test_sound_is_refused_unless_muted():
    with pytest.raises(ValueError, match="sample s has sound, which Qwen2.5-VL doesn't hear; set data.mute=true"):
        builder().length(sample(HEARD))
    with pytest.raises(ValueError, match="sample s has sound"):
        builder(replace(DATA, blind=True)).length(sample(HEARD))
    silent = replace(HEARD, audio_path=None, audio_samples=0, audio_in_video=False)
    muted = builder(replace(DATA, mute=True)).length(sample(HEARD, Media("a", "audio", audio_samples=16_000)))
    assert muted == builder().length(sample(silent))


def test_a_placeholder_that_is_spelled_stays_text():
    spelled = replace(sample(), question="what <|video_pad|> moves ?")
    ids = builder()._layout(spelled, [], "plain")[0]
    assert not set(ids) & set(builder().placeholders.values())


@pytest.mark.parametrize("key", ["image_token_id", "video_token_id"])
def test_a_tokenizer_without_the_configurations_tokens_is_refused(key):
    config = make_vl_config()
    setattr(config, key, 250_000)
    with pytest.raises(ValueError, match=f"config.json has {key}=250000, which the tokenizer beside it doesn't have"):
        PromptBuilder(TOKENIZER, config, DATA, 1000)


def test_of_an_odd_number_of_frames_the_last_is_left_out():
    assert plan_media(Media("v", "video", 7, 8.0, None, 84, 84), replace(DATA, fps=8.0), VL).grid[0] == 3

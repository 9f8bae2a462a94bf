"""Qwen3-Omni's prompts against transformers' processor and get_rope_index."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from megatron_avatar.config.families import OMNI3
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.chat import chat_template
from megatron_avatar.data.prompt import MEDIUM, PromptBuilder, load_tokenizer, plan_media
from megatron_avatar.records import Media, Sample
from tests.data.media import OMNI3_SPECIAL, make_audio, make_omni3_config, make_qwen_tokenizer, make_video

TOKENIZER = make_qwen_tokenizer(OMNI3_SPECIAL)
CONFIG = make_omni3_config(TOKENIZER)
DATA = DataConfig(
    instruction="", fps=4.0, frame_min_pixels=32 * 32, frame_max_pixels=96 * 96, max_frames=64, image_max_pixels=65536
)
NAMES = {CONFIG.audio_start_token_id: "[", CONFIG.audio_end_token_id: "]", CONFIG.video_token_id: "v",
         CONFIG.audio_token_id: "a"}  # fmt: skip
CLOSE = 2**-21  # of a position: transformers rounds every sum of them to float32


def builder(data=DATA, context=1_000_000):
    return PromptBuilder(TOKENIZER, CONFIG, data, context)


def sample(*media, **fields):
    base = dict(id="s", stage="1", split="train", family="f", question="what moves ?", answer="A")
    return Sample(**base | dict(problem_type="multiple_choice", media=media) | fields)


def layout(asked, data=DATA):
    own = builder(data)
    return *own._layout(asked, plans := own._plans(asked), "plain"), plans


class Oracle(modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration):
    """transformers' get_rope_index without the weights."""

    def __init__(self):
        self.__dict__.update(config=CONFIG, spatial_merge_size=CONFIG.vision_config.spatial_merge_size)


class Processor(Qwen3OmniMoeProcessor):
    """transformers', without what it is made of."""

    video_processor = type("", (), {"merge_size": 2})
    audio_bos_token, audio_eos_token, video_token, audio_token = "[", "]", "v", "a"

    def __init__(self):
        pass


def rope_index(token_ids, plans, audio_in_video):
    """Positions [3, P] by transformers."""
    grids = {kind: torch.tensor([p.grid for p in plans if p.kind == kind]) for kind in ("image", "video")}
    ids = torch.from_numpy(token_ids)[None]
    positions, _ = Oracle().get_rope_index(
        ids,
        grids["image"] if len(grids["image"]) else None,
        grids["video"] if len(grids["video"]) else None,
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=audio_in_video,
        audio_seqlens=torch.tensor([p.mel_frames for p in plans if p.mel_frames]),
        second_per_grids=torch.tensor([p.seconds_per_grid for p in plans if p.kind == "video"]),
    )
    return positions[:, 0].numpy()


def times(plan):
    """A video's times in positions, in the precision of the processor and of get_rope_index."""
    return np.arange(plan.grid[0]) * plan.seconds_per_grid * 13, np.arange(plan.grid[0], dtype=np.float32) * np.float32(
        plan.seconds_per_grid
    ) * np.float32(13)


def undecided(plan):
    """Whether a picture comes so near to a sound token that transformers' two precisions may order them otherwise."""
    exact, rounded = times(plan)
    near = np.abs(exact - np.rint(exact)) < 1e-3
    return bool(plan.mel_frames and (near & ~((exact == np.rint(exact)) & (rounded == np.rint(exact)))).any())


pictures = st.fixed_dictionaries({"height": st.integers(40, 200), "width": st.integers(40, 200)})
sounds = st.integers(1, 40 * 16_000)
clips = st.fixed_dictionaries(
    {"frame_count": st.integers(1, 600), "fps": st.sampled_from([1.0, 3.0, 8.0, 23.976, 25.0, 30.0])}
)
images = st.builds(lambda p: Media("i", "image", **p), pictures)
silent = st.builds(lambda p, c: Media("v", "video", **p, **c), pictures, clips)
heard = st.builds(
    lambda p, c, n: Media("v", "video", **p, **c, audio_path="a", audio_samples=n, audio_in_video=True),
    pictures, clips, sounds,
)  # fmt: skip
audios = st.builds(lambda n: Media("a", "audio", audio_samples=n), sounds)
# transformers takes one audio-in-video flag for all videos of a call, so a layout has videos of one sort
layouts = st.one_of(
    st.tuples(st.just(False), st.lists(st.one_of(images, silent, audios), max_size=4)),
    st.tuples(st.just(True), st.lists(st.one_of(images, heard, audios), min_size=1, max_size=4)),
)


@settings(max_examples=150, deadline=None)
@given(layouts, st.sampled_from([0.3, 1.0, 2.0, 3.0, 4.0]), st.sampled_from([8, 64]))
def test_positions_equal_transformers(case, fps, max_frames):
    audio_in_video, media = case
    token_ids, positions, plans = layout(sample(*media), replace(DATA, fps=fps, max_frames=max_frames))
    assume(not any(undecided(plan) for plan in plans))
    expected = rope_index(token_ids, plans, audio_in_video)
    assert positions.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(positions, expected, rtol=CLOSE, atol=0)
    whole = [plan for plan in plans if plan.grid[0] > 1 and (times(plan)[1] % 1).any()]
    assert whole or np.array_equal(positions, expected), "whole positions are exact"


@settings(max_examples=150, deadline=None)
@given(heard, st.sampled_from([0.3, 1.0, 2.0, 3.0, 4.0]))
@example(Media("v", "video", 13, 1.0, None, 64, 64, "a", 13 * 16_000, True), 1.0)  # every time is a sound token's
def test_interleaving_equals_the_processors(media, fps):
    plan = plan_media(media, replace(DATA, fps=fps), OMNI3)
    ids, positions, _ = builder().expand(plan)
    expected = Processor().replace_video_with_audio_token(
        {"video_grid_thw": np.array([plan.grid]), "video_second_per_grid": [plan.seconds_per_grid]},
        0,
        {"num_audio_tokens": np.array([OMNI3.audio_tokens(plan.mel_frames)])},
        0,
        position_id_per_seconds=13.0,
    )
    assert "".join(NAMES[i] for i in ids.tolist()) == expected
    # Also where get_rope_index would order them otherwise, a token has the position of its own time.
    ticks = positions[0, ids == CONFIG.audio_token_id]
    assert np.array_equal(ticks, 1 + np.arange(len(ticks)))
    shown = positions[0, ids == CONFIG.video_token_id].reshape(plan.grid[0], -1)
    assert np.array_equal(shown, np.broadcast_to(1 + times(plan)[1].astype(np.float64)[:, None], shown.shape))


def test_sound_goes_between_pictures_by_time():
    """The golden form: 4 pairs of frames of 3 a second at 0, 8.67, 17.33 and 26, among 35 sound tokens at 0 to 34."""
    clip = Media("v", "video", 8, 3.0, None, 64, 96, "a", 43_200, True)
    token_ids, positions, (plan,) = layout(sample(clip), replace(DATA, fps=3.0))
    assert plan.grid == (4, 4, 6) and plan.mel_frames == 270 and plan.seconds_per_grid == 2 / 3
    text = TOKENIZER.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    picture, tick = "<|video_pad|>" * 6, "<|audio_pad|>"
    assert text == (
        f"<|im_start|>user\n<|vision_start|><|audio_start|>{picture}{tick * 9}{picture}{tick * 9}{picture}{tick * 8}"
        f"{picture}{tick * 9}<|audio_end|><|vision_end|>what moves ?<|im_end|>\n<|im_start|>assistant\n"
    )
    (first,) = np.flatnonzero(token_ids == CONFIG.vision_start_token_id)
    shown = positions[:, token_ids == CONFIG.video_token_id] - positions[0, first]
    assert np.allclose(np.unique(shown[0]), [2, 10 + 2 / 3, 19 + 1 / 3, 28], atol=1e-5)
    assert np.array_equal(shown[1:], 2 + np.array([[0, 0, 0, 1, 1, 1] * 4, [0, 1, 2] * 8]))
    heard_ = positions[:, token_ids == CONFIG.audio_token_id] - positions[0, first]
    assert np.array_equal(heard_, np.tile(np.arange(2, 37), (3, 1)))
    ends = [positions[:, token_ids == i][:, 0] - positions[0, first]
            for i in (CONFIG.audio_start_token_id, CONFIG.audio_end_token_id, CONFIG.vision_end_token_id)]  # fmt: skip
    assert np.array_equal(ends, np.repeat([[1], [37], [38]], 3, axis=1)), "each has a position of its own"
    assert not np.allclose(np.trunc(positions), rope_index(token_ids, (plan,), True)), "cut to whole positions shows"


def test_text_goes_on_after_the_fraction():
    silent_ = Media("v", "video", 8, 3.0, None, 64, 64)
    token_ids, positions, (plan,) = layout(sample(silent_), replace(DATA, fps=3.0, max_frames=6))
    assert plan.grid == (3, 4, 4) and plan.seconds_per_grid == 8 / 9
    (first,) = np.flatnonzero(token_ids == CONFIG.vision_start_token_id)
    (end,) = np.flatnonzero(token_ids == CONFIG.vision_end_token_id)
    after = positions[:, end:] - positions[0, first]
    assert np.allclose(after, 1 + 2 * 13 * 8 / 9 + 1 + np.arange(after.shape[1]), atol=1e-5)
    prompt = builder(replace(DATA, fps=3.0, max_frames=6, blind=True)).build(sample(silent_), ".")
    assert prompt.next_position == len(prompt), "without pictures all is whole"


def test_pictures_equal_the_processors(tmp_path):
    """Patches and grids of two pictures, the smaller enlarged to 4 tokens of Qwen2.5's size, as its utilities say."""
    rng = np.random.default_rng(0)
    processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=3136,
                                         max_pixels=65_536)  # fmt: skip
    for name, (height, width) in {"a.png": (33, 90), "b.png": (400, 460)}.items():
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        picture.save(tmp_path / name)
        prompt = builder().build(sample(Media(name, "image", height=height, width=width)), tmp_path)
        theirs = processor([picture], return_tensors="pt")
        assert torch.equal(prompt.grid_thw, theirs["image_grid_thw"])
        torch.testing.assert_close(prompt.pixels, theirs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("changed", "says"), [
    (dict(position_id_per_seconds=25), "position_id_per_seconds is 25 instead of 13"),
    (dict(audio_config={"n_window": 100}), "n_window is 100 instead of 50"),
    (dict(audio_config={"num_mel_bins": 80}), "num_mel_bins is 80 instead of 128"),
    (dict(vision_config={"patch_size": 14}), "patch_size is 14 instead of 16"),
])  # fmt: skip
def test_other_sizes_are_refused(changed, says):
    """25 positions a second is what transformers' class takes where config.json says nothing."""
    with pytest.raises(ValueError, match=f"config.json: {says}, which Qwen3-Omni has"):
        PromptBuilder(TOKENIZER, make_omni3_config(TOKENIZER, **changed), DATA, 1000)


@pytest.mark.parametrize("key", ["audio_token_id", "audio_start_token_id", "audio_end_token_id"])
def test_a_tokenizer_without_the_sounds_tokens_is_refused(key):
    with pytest.raises(ValueError, match=f"config.json has {key}=250000, which the tokenizer"):
        PromptBuilder(TOKENIZER, make_omni3_config(TOKENIZER, **{key: 250_000}), DATA, 1000)


@pytest.mark.parametrize(("changed", "says"), [
    (dict(audio_start_token_id=CONFIG.audio_end_token_id), "as audio_start_token_id and as audio_end_token_id"),
    (dict(image_token_id=5), "config.json has image_token_id=5, which the tokenizer .* as a control token"),
    (dict(text_config={"vocab_size": 300}), r"the tokenizer has \d+ tokens, the model's vocab_size is 300"),
])  # fmt: skip
def test_tokens_of_another_model_are_refused(changed, says):
    """They would stand in prompts without a word: the sound's begin and end come from config.json alone."""
    with pytest.raises(ValueError, match=says):
        PromptBuilder(TOKENIZER, make_omni3_config(TOKENIZER, **changed), DATA, 1000)


def test_the_folders_colours_are_taken(tmp_path):
    tokenizer = make_qwen_tokenizer(OMNI3_SPECIAL)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.5, 0.75], "image_std": [1, 1, 1]}')
    Image.fromarray(np.full((64, 64, 3), 51, np.uint8)).save(tmp_path / "i.png")
    own = PromptBuilder(load_tokenizer(tmp_path), CONFIG, DATA, 1000)
    prompt = own.build(sample(Media("i.png", "image", height=64, width=64)), tmp_path)
    shown = prompt.pixels.view(-1, 3, 512).unique(dim=2)[0, :, 0]
    torch.testing.assert_close(shown, 0.2 - torch.tensor([0.25, 0.5, 0.75]))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    make_video(root / "v.webm", h=96, w=96)
    make_audio(root / "a.flac")
    return root, sample(Media("v.webm", "video", 16, 8.0, None, 96, 96, "a.flac", 32_000, True))


def test_build_holds_all_features(clip):
    root, asked = clip
    prompt = builder().build(asked, root)
    assert prompt.grid_thw.tolist() == [[4, 6, 6]] and prompt.pixels.shape == (144, 1536)
    assert prompt.mel.shape == (128, 200) and prompt.mel_lengths.tolist() == [200]
    assert (prompt.token_ids == CONFIG.video_token_id).sum() == 36
    assert (prompt.token_ids == CONFIG.audio_token_id).sum() == 26
    assert len(prompt) == builder().length(asked) and prompt.next_position == prompt.positions.max() + 1
    muted = builder(replace(DATA, mute=True)).build(asked, root)
    assert muted.mel is None and not {CONFIG.audio_token_id, CONFIG.audio_start_token_id} & {*muted.token_ids.tolist()}
    blind = builder(replace(DATA, blind=True)).build(asked, root)
    assert blind.pixels is None and CONFIG.vision_start_token_id not in blind.token_ids


def test_the_template_says_media_as_the_published_one(caplog):
    own = builder()
    assert own.chat.template == chat_template(OMNI3) and not caplog.records and "system" not in own.chat.template
    media = Media("a", "audio", audio_samples=1600), Media("i", "image", height=64, width=64)
    token_ids, _, _ = layout(sample(*media, question=f"what {MEDIUM} moves {MEDIUM} ?"))
    text = TOKENIZER.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == (
        "<|im_start|>user\nwhat <|audio_start|><|audio_pad|><|audio_pad|><|audio_end|> moves "
        f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|> ?<|im_end|>\n<|im_start|>assistant\n"
    )

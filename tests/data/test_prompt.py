"""Prompt layout against transformers' own processor and get_rope_index."""

import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import normalizers
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from data_tools.tokenizer import build_tokenizer
from megatron_avatar.config.families import OMNI
from megatron_avatar.config.schema import INSTRUCTION, DataConfig
from megatron_avatar.data.chat import Chat, chat_template
from megatron_avatar.data.decode import MediaError
from megatron_avatar.data.features import log_mel
from megatron_avatar.data.prompt import MEDIUM, PromptBuilder, check_words, load_tokenizer, plan_media
from megatron_avatar.records import Media, Sample
from tests.data.media import make_audio, make_config, make_tokenizer, make_video

TOKENIZER, CONFIG = make_tokenizer(), make_config()
DATA = DataConfig(
    instruction="", fps=4.0, frame_min_pixels=28 * 28, frame_max_pixels=84 * 84, max_frames=64, image_max_pixels=50176
)


def builder(data=DATA, context=100_000):
    return PromptBuilder(TOKENIZER, CONFIG, data, context)


def sample(*media, **fields):
    base = dict(id="s", stage="1", split="train", family="f", question="what moves ?", answer="A")
    return Sample(**base | dict(problem_type="multiple_choice", media=media) | fields)


class Oracle(modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration):
    """transformers' get_rope_index without the weights."""

    def __init__(self):
        self.__dict__.update(config=CONFIG, spatial_merge_size=CONFIG.vision_config.spatial_merge_size)


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


pictures = st.fixed_dictionaries({"height": st.integers(40, 200), "width": st.integers(40, 200)})
sounds = st.integers(321, 40 * 16_000)
clips = st.fixed_dictionaries(
    {"frame_count": st.integers(1, 600), "fps": st.sampled_from([1.0, 8.0, 23.976, 25.0, 30.0])}
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
@given(layouts, st.sampled_from([0.3, 1.0, 2.0, 4.0]), st.sampled_from([8, 64]))
def test_positions_equal_transformers(layout, fps, max_frames):
    audio_in_video, media = layout
    data = replace(DATA, fps=fps, max_frames=max_frames)
    token_ids, positions = builder(data)._layout(sample(*media), plans := builder(data)._plans(sample(*media)), "plain")
    assert np.array_equal(positions, rope_index(token_ids, plans, audio_in_video))


@settings(max_examples=100, deadline=None)
@given(heard, st.sampled_from([0.3, 1.0, 2.0, 4.0]))
def test_interleaving_equals_transformers(media, fps):
    plan = plan_media(media, replace(DATA, fps=fps), OMNI)
    ids, _, _ = builder().expand(plan)

    class Processor(Qwen2_5OmniProcessor):
        video_processor = type("", (), {"merge_size": 2})
        audio_bos_token, audio_eos_token, video_token, audio_token = "[", "]", "v", "a"

        def __init__(self):
            pass

    expected = Processor().replace_video_with_audio_token(
        {"video_grid_thw": np.array([plan.grid]), "video_second_per_grid": [plan.seconds_per_grid]},
        0,
        {"num_audio_tokens": np.array([OMNI.audio_tokens(plan.mel_frames)])},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    names = {CONFIG.audio_start_token_id: "[", CONFIG.audio_end_token_id: "]"}
    names |= {CONFIG.video_token_id: "v", CONFIG.audio_token_id: "a"}
    assert "".join(names[i] for i in ids.tolist()) == expected


def test_seconds_per_grid_are_those_really_sampled():
    clip = Media("v", "video", 16, 8.0, None, 84, 84)
    assert plan_media(clip, DATA, OMNI).seconds_per_grid == 0.5  # 8 frames of 2 s
    long = replace(clip, frame_count=480)
    assert plan_media(long, replace(DATA, max_frames=8), OMNI).seconds_per_grid == 15.0  # 8 frames of 60 s, not 2 / fps


@pytest.mark.parametrize(("frames", "grid"), [(768, (384, 24, 46)), (96, (48, 52, 92)), (16, (8, 52, 92))])
def test_a_long_video_stays_within_the_budget_of_the_whole_clip(frames, grid):
    """Per frame 90,316,800 / T * 2 pixels, at 768 frames 235,200: of 1280 x 720, 12.99 by 23.09 tokens,
    rounded down. Shorter clips keep the frame's own limit, which 26 by 46 tokens don't reach."""
    data = DataConfig(instruction="", fps=1.0, max_frames=768, frame_max_pixels=1_016_064)
    plan = plan_media(Media("v", "video", frames * 25, 25.0, None, 720, 1280), data, OMNI)
    assert plan.grid == grid and len(plan.indices) == frames
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] * 196 <= 90_316_800


def test_each_video_has_its_own_sound_flag():
    """A clip without sound beside one with: the tokens of each are those that it has alone."""
    mute = Media("v", "video", 16, 8.0, None, 84, 84)
    loud = replace(mute, audio_path="a", audio_samples=32_000, audio_in_video=True)
    both = builder()._layout(sample(loud, mute), [plan_media(m, DATA, OMNI) for m in (loud, mute)], "plain")
    alone = [builder()._layout(sample(m), [plan_media(m, DATA, OMNI)], "plain") for m in (loud, mute)]
    blocks = [ids[np.isin(ids, (CONFIG.video_token_id, CONFIG.audio_token_id))] for ids, _ in (both, *alone)]
    assert np.array_equal(blocks[0], np.concatenate(blocks[1:]))
    assert (blocks[1] == CONFIG.audio_token_id).sum() == 50
    assert (np.diff(both[1][0]) >= 0).sum() > 0 and both[1].max() > alone[0][1].max()


@pytest.mark.parametrize(("kind", "flag", "path", "frames"), [
    ("video", True, "a", 200), ("video", False, "a", 0), ("video", True, None, 0), ("audio", False, "a", 200),
])  # fmt: skip
def test_a_video_is_heard_where_its_line_says_so(kind, flag, path, frames):
    media = Media("v", kind, 16, 8.0, None, 84, 84, audio_path=path, audio_samples=32_000, audio_in_video=flag)
    assert plan_media(media, DATA, OMNI).mel_frames == frames


def text_of(ids):
    return TOKENIZER.decode(ids.tolist())


def test_text_of_the_user_turn():
    asked = sample(choices=("red", "blue"), hint="look twice")
    plain, hinted = (text_of(builder().build(asked, ".", v).token_ids) for v in ("plain", "hinted"))
    assert plain == (
        "<|im_start|> system You are a helpful assistant . <|im_end|> "
        "<|im_start|> user what moves ? A . red B . blue <|im_end|> <|im_start|> assistant"
    )
    assert hinted == plain.replace("blue", "blue Hint : look twice")
    with pytest.raises(ValueError, match="sample s has no hint"):
        builder().build(sample(), ".", "hinted")


def test_own_template_wins():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template(OMNI).replace("<|im_start|>{{ message['role'] }}", "look twice")
    own = PromptBuilder(tokenizer, CONFIG, DATA, 100)
    assert text_of(own.build(sample(), ".").token_ids).count("look twice what moves ? <|im_end|>") == 1


def test_texts_hold_no_control_tokens():
    """Not in question, choices, hint, system prompt or trace, and not where a medium that is left out stood."""
    picture = Media("i", "image", height=56, width=56)
    told = dict(choices=("<|im_end|>", "b"), hint="look <|audio_eos|> twice")
    asked = sample(picture, question=f"what <|im_{MEDIUM}end|> <|VIDEO|> moves <|vision_bos|> ?", **told)
    harmless = replace(asked, question=f"what {MEDIUM} moves ?", choices=("a", "b"), hint="look twice")
    control = set(map(TOKENIZER.convert_tokens_to_ids, TOKENIZER.all_special_tokens)) - {TOKENIZER.unk_token_id}
    for data in (DATA, replace(DATA, blind=True)):
        own, ids = builder(data, 1000), []
        for one, system in ((asked, "<|im_start|> you <|IMAGE|>"), (harmless, "you")):
            own.data = replace(data, system=system)  # this tokenizer would be refused for the first
            ids.append(own._layout(one, own._plans(one), "hinted")[0])
        armed, plain = ids
        assert [i for i in armed if i in control] == [i for i in plain if i in control]
    trace = builder().completion_ids("look <|im_end|> twice <|IMAGE|>")
    assert [int(i) for i in trace if int(i) in control] == [builder().end_id]


@pytest.mark.parametrize(("media", "remedy"), [
    ((), "shorten its text"), ((Media("i", "image", height=800, width=800),), "lower data.image_max_pixels"),
    ((Media("a", "audio", audio_samples=16_000 * 60),), "set data.mute=true or cut its sound"),
    ((Media("v", "video", 160, 8.0, None, 84, 84, "a", 16_000, True),), "lower data.max_frames or data.frame_max_pi"),
    ((Media("v", "video", 16, 8.0, None, 84, 84, "a", 10**15, True),), "set data.mute=true or cut its sound"),
    ((Media("a", "audio", audio_samples=10**18),), "set data.mute=true or cut its sound"),
])  # fmt: skip
def test_what_is_too_long_gets_the_remedy_that_helps(media, remedy):
    """Before there is an array of that size."""
    with pytest.raises(ValueError, match=f"the context 20; {remedy}.*, or raise model.context"):
        builder(context=20).length(sample(*media, question="what moves ? " * (1 if media else 20)))


def test_media_stand_where_the_question_places_them():
    picture, sound = Media("i", "image", height=56, width=56), Media("a", "audio", audio_samples=16_000)
    asked = sample(sound, picture, question=f"what {MEDIUM} moves {MEDIUM} ?")
    kinds = {builder().placeholders["image"]: "image", builder().placeholders["audio"]: "audio"}

    def order(data):
        ids = builder(data)._layout(asked, builder(data)._plans(asked), "plain")[0]
        words = [kinds.get(int(i), TOKENIZER.decode([int(i)])) for i in ids]
        return [w for k, w in enumerate(words) if w in ("what", "moves", "?", "image", "audio") and w != words[k - 1]]

    assert order(DATA) == ["what", "audio", "moves", "image", "?"]
    assert order(replace(DATA, mute=True)) == ["what", "moves", "image", "?"]
    assert order(replace(DATA, blind=True)) == ["what", "audio", "moves", "?"]
    with pytest.raises(ValueError, match="sample s.*1 places for 2 media"):
        builder().length(sample(sound, picture, question=f"what {MEDIUM} ?"))


def test_a_system_prompt_replaces_the_templates_own():
    own = PromptBuilder(TOKENIZER, CONFIG, replace(DATA, system="look twice"), 100)
    assert text_of(own.build(sample(), ".").token_ids).startswith("<|im_start|> system look twice <|im_end|>")


def test_the_instruction_ends_every_prompt_plain_and_hinted():
    own = PromptBuilder(TOKENIZER, CONFIG, replace(DATA, instruction="look twice ."), 100)
    asked = sample(question="what moves ?", choices=("red", "blue"), hint="think")
    for variant, hint in (("plain", ""), ("hinted", "Hint : think ")):
        text = text_of(own.build(asked, ".", variant).token_ids)
        assert f"A . red B . blue {hint}look twice . <|im_end|>" in text
        assert own.length(asked, variant) == len(own.build(asked, ".", variant))
    placed = sample(Media("i", "image", height=84, width=84), question=f"what {MEDIUM} moves ?")  # media in between
    token_ids, _ = own._layout(placed, own._plans(placed), "plain")
    assert text_of(token_ids).endswith("moves ? look twice . <|im_end|> <|im_start|> assistant")


@pytest.mark.parametrize(("words", "why"), [
    ("look closely , think", "doesn't know 'closely', ','"),
    (f"look {MEDIUM} twice", f"doesn't know '{re.escape(MEDIUM)}'"),
])  # fmt: skip
@pytest.mark.parametrize("key", ["instruction", "system"])
def test_words_that_the_tokenizer_cannot_hold_are_refused(words, why, key):
    with pytest.raises(ValueError, match=f"^data.{key}='look .*tokenizer of model.path {why}.* data.{key}='' for none"):
        PromptBuilder(TOKENIZER, CONFIG, replace(DATA, **{key: words}), 100)


def test_the_default_instruction_is_held_by_the_tiny_tokenizer_and_asks_for_the_tags():
    """Byte by byte, since the tiny world knows few of its words; spaces may go, letters may not."""
    tokenizer = build_tokenizer()
    chat = Chat(tokenizer, {}, OMNI)
    check_words(chat, "data.instruction", INSTRUCTION)
    with pytest.raises(ValueError, match=f"needs {re.escape(MEDIUM)} for the places of media"):
        check_words(chat, "data.system", f"{MEDIUM} look")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert INSTRUCTION.count(tag) == 1
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="gives back '.*think it through"):
        check_words(chat, "data.instruction", INSTRUCTION)
    assert "twice" not in text_of(builder().build(sample(), ".").token_ids)


def test_completion_round_trip():
    ids = builder().completion_ids("think red")
    assert ids.dtype == np.int64 and ids[-1] == builder().end_id == TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert builder().decode(ids) == "think red"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    make_video(root / "v.webm")
    make_audio(root / "a.flac")
    media = Media("v.webm", "video", 16, 8.0, None, 84, 84, "a.flac", 32_000, True)
    return root, sample(media)


def test_build_holds_all_features(clip):
    root, asked = clip
    prompt = builder().build(asked, root)
    assert prompt.grid_thw.tolist() == [[4, 6, 6]] and prompt.pixels.shape == (144, 1176)
    assert prompt.mel.shape == (128, 200) and prompt.mel_lengths.tolist() == [200]
    assert (prompt.token_ids == CONFIG.video_token_id).sum() == 36
    assert (prompt.token_ids == CONFIG.audio_token_id).sum() == 50
    assert prompt.positions.shape == (3, len(prompt)) and len(prompt) == builder().length(asked)
    assert prompt.token_ids.dtype == np.int64 and prompt.positions.dtype == np.float32
    assert prompt.pixels.dtype == prompt.mel.dtype == torch.float32
    assert prompt.grid_thw.dtype == prompt.mel_lengths.dtype == torch.int64
    assert torch.equal(prompt.mel, log_mel(soundfile.read(root / "a.flac", dtype="float32")[0]))


def test_mute_and_blind(clip):
    root, asked = clip
    muted, blind, both = (
        builder(replace(DATA, mute=m, blind=b)).build(asked, root)
        for m, b in ((True, False), (False, True), (True, True))
    )
    assert muted.mel is None and muted.grid_thw.tolist() == [[4, 6, 6]]
    assert not np.isin(muted.token_ids, (CONFIG.audio_token_id, CONFIG.audio_start_token_id)).any()
    assert blind.pixels is None and blind.mel.shape == (128, 200)
    assert not np.isin(blind.token_ids, (CONFIG.video_token_id, CONFIG.vision_start_token_id)).any()
    assert both.pixels is None and both.mel is None
    assert text_of(both.token_ids) == text_of(builder().build(sample(), root).token_ids)


def test_one_frame_and_mute_clips_are_legal(tmp_path):
    make_video(tmp_path / "one.webm", frames=1)
    media = Media("one.webm", "video", 1, 8.0, None, 84, 84, audio_in_video=True)
    prompt = builder().build(sample(media), tmp_path)
    assert prompt.grid_thw.tolist() == [[1, 6, 6]] and prompt.mel is None
    assert not np.isin(prompt.token_ids, (CONFIG.audio_token_id, CONFIG.audio_start_token_id)).any()
    pair = prompt.pixels.view(36, 3, 2, 196)
    assert torch.equal(pair[:, :, 0], pair[:, :, 1])


def test_images_are_shown_twice_and_features_follow_the_order_of_the_media(clip):
    root, asked = clip
    Image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save(root / "i.png")
    make_audio(root / "b.flac", seconds=1.0)
    image = Media("i.png", "image", height=90, width=120)
    prompt = builder().build(sample(image, *asked.media, Media("b.flac", "audio", audio_samples=16_000)), root)
    assert prompt.grid_thw.tolist() == [[1, 6, 8], [4, 6, 6]] and prompt.mel_lengths.tolist() == [200, 100]
    alone = builder().build(asked, root)
    assert torch.equal(prompt.pixels[48:], alone.pixels) and torch.equal(prompt.mel[:, :200], alone.mel)
    assert (prompt.pixels[:48] == prompt.pixels[:1]).all()  # one colour


def test_refusals(clip, tmp_path):
    root, asked = clip
    with pytest.raises(ValueError, match=r"sample s: its prompt has \d+ tokens, the context 50; .* model.context"):
        builder(context=50).build(asked, tmp_path / "not opened")
    (media,) = asked.media
    with pytest.raises(MediaError, match="v.webm: is 84x84 pixels, the manifest says 112x84; measure it again"):
        builder().build(sample(replace(media, width=112)), root)
    with pytest.raises(MediaError, match="a.flac: holds 32000 samples, the manifest says 48000"):
        builder().build(sample(replace(media, audio_samples=48_000)), root)
    with pytest.raises(ValueError, match="sample s: a picture of 9000x40 has an aspect ratio above 200; crop it"):
        builder().length(sample(Media("i", "image", height=40, width=9000)))
    with pytest.raises(ValueError, match="config.json: patch_size is 16 instead of 14, which Qwen2.5-Omni has"):
        PromptBuilder(TOKENIZER, make_config(vision_config={"patch_size": 16}), DATA, 100)


@pytest.mark.parametrize("key", ["audio_start_token_id", "audio_end_token_id"])
def test_a_tokenizer_without_the_tokens_around_a_videos_sound_is_refused(key):
    config = make_config()
    setattr(config, key, 250_000)
    with pytest.raises(ValueError, match=f"config.json has {key}=250000, which the tokenizer beside it doesn't have"):
        PromptBuilder(TOKENIZER, config, DATA, 1000)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni_thinker"}')
    with pytest.raises(ValueError, match=f"{tmp_path} has no usable tokenizer"):
        load_tokenizer(tmp_path)

"""The memory that a plan counts for the encoders, against real ones, and their sharing out over ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.planning import memory as plans
from megatron_avatar.planning.memory import audio_tokens, tower_bytes
from megatron_avatar.planning.meta import LiveBytes
from megatron_avatar.planning.work import Work
from megatron_avatar.policy import towers
from megatron_avatar.policy.architecture import read_config
from megatron_avatar.policy.towers import audio_window, share_out
from tests.planning.models import one_rank
from tests.policy.tiny import (
    tiny_config,
    tiny_omni3_config,
    tiny_omni3_prompts,
    tiny_prompts,
    tiny_vl3_config,
    tiny_vl_prompts,
)

PUBLISHED = {name: read_config(CONFIG_DIR / "shapes" / name) for name in ("qwen2_5_omni_7b", "qwen3_omni_30b")}
# Frames of a window, and tokens.
WINDOWS = {"qwen2_5_omni_7b": (200, 50), "qwen3_omni_30b": (800, 104)}


@pytest.mark.parametrize("train_towers", [False, True])
@pytest.mark.parametrize(("config", "prompts", "kind", "visual", "audio"), [
    (tiny_config, tiny_prompts, "audio_in_video", 24, 100), (tiny_vl3_config, tiny_vl_prompts, "video", 24, 0),
    (tiny_omni3_config, tiny_omni3_prompts, "audio_in_video", 24, 35),
], ids=["omni", "vl3", "omni3"])  # fmt: skip
def test_encoders_take_about_what_is_planned(tmp_path, config, prompts, kind, visual, audio, train_towers):
    config().save_pretrained(tmp_path)
    folder, prompt = str(tmp_path), prompts(config())[kind]
    work = Work(True, train_towers, visual, audio, prompt=150, completion=9, fresh=1, completions=(2,), budget=99)
    with one_rank(folder, ModelConfig(), ParallelConfig()) as policy:
        policy.set_train_towers(train_towers)
        with LiveBytes() as memory:
            media = policy.embed_media([prompt] * 8, grad=train_towers)
        real = memory.live if train_towers else memory.peak
        planned = tower_bytes(policy.hf_config, work, itemsize=4, prompts=8, tp=1)
    assert len(media) == 8 and planned == pytest.approx(real, rel=0.25)


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize(("config", "prompts", "audio"), [(tiny_config, tiny_prompts, 100),
                                                          (tiny_omni3_config, tiny_omni3_prompts, 35)],
                         ids=["omni", "omni3"])  # fmt: skip
def test_a_call_takes_so_many_frames(tmp_path, monkeypatch, config, prompts, audio, calls):
    """Sound alone, of 8 prompts in so many calls."""
    config().save_pretrained(tmp_path)
    prompt = prompts(config())["audio"]
    frames = int(prompt.mel_lengths.sum())
    for module in (towers, plans):
        monkeypatch.setattr(module, "ROWS_PER_CALL", 8 * frames // calls)
    work = Work(True, False, 0, audio, prompt=150, completion=9, fresh=1, completions=(2,), budget=99)
    with one_rank(str(tmp_path), ModelConfig(), ParallelConfig()) as policy:
        with LiveBytes() as memory:
            policy.embed_media([prompt] * 8)
        planned = tower_bytes(policy.hf_config, work, itemsize=4, prompts=8, tp=1)
    assert planned == pytest.approx(memory.peak, rel=0.15)


@given(st.sampled_from(sorted(PUBLISHED)), st.integers(1, 3000), st.integers(1, 6), st.sampled_from([1, 2, 4, 8]))
def test_ranks_share_out_whole_windows(name, tenths, prompts, tp):
    """The fullest rank, when sounds of so many tenths of a second are cut as the encoders cut them."""
    config, (window, tokens) = PUBLISHED[name], WINDOWS[name]
    assert audio_window(config) == window
    frames = 10 * tenths
    sizes = [min(window, frames - start) for _ in range(prompts) for start in range(0, frames, window)]
    borders = share_out(sizes, tp)
    fullest = max(np.diff(np.cumsum([0, *sizes])[borders])) * tokens / window
    heard = round(frames * tokens / window)
    work = Work(True, False, 0, heard, prompt=1, completion=9, fresh=1, completions=(2,), budget=99)
    planned = audio_tokens(config, work, prompts, tp)
    assert fullest - prompts <= planned <= prompts * heard
    assert planned <= prompts * heard / tp + (tokens if tp > 1 else 0)

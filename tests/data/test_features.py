"""Features against transformers' own processors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import _get_feat_extract_output_lengths as lengths
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as oracle
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths as lengths3

from megatron_avatar.config.families import OMNI, OMNI3
from megatron_avatar.data.features import log_mel, patchify, resize, smart_resize, unpatchify, with_colours


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28 * 28, 3136, 50176]), st.integers(50176, 1_000_000)
)
def test_smart_resize_equals_transformers(h, w, low, high):
    if max(h, w) / min(h, w) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(h, w, low, high, 28)
    else:
        assert smart_resize(h, w, low, high, 28) == oracle.smart_resize(h, w, 28, low, high)


@pytest.mark.parametrize("size", [(84, 84), (100, 250), (480, 331), (30, 50)])
def test_image_patches_equal_transformers(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = oracle.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176})(
        Image.fromarray(picture), return_tensors="pt"
    )
    resized = resize(picture[None], *smart_resize(*size, 3136, 50176, 28))
    pixels, grid = patchify(np.repeat(resized, 2, axis=0), OMNI)
    assert torch.equal(grid, expected["image_grid_thw"][0])
    assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_frames_in_planes_are_resized_and_cut_as_pillow_resizes_each(count):
    frames = np.random.default_rng(count).integers(0, 256, (count, 3, 61, 90), dtype=np.uint8).transpose(0, 2, 3, 1)
    expected = [np.asarray(Image.fromarray(np.ascontiguousarray(f)).resize((84, 56), Image.Resampling.BICUBIC))
                for f in frames]  # fmt: skip
    small = resize(frames, 56, 84)
    assert np.array_equal(small, np.stack(expected)) and small.transpose(0, 3, 1, 2).flags.c_contiguous
    if count % 2 == 0:
        assert torch.equal(patchify(small, OMNI)[0], patchify(np.stack(expected), OMNI)[0])


def test_video_patches_hold_both_frames_of_a_pair():
    """A video patch is the image patch of its first frame beside the image patch of its second."""
    frames = np.random.default_rng(1).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    pixels, grid = patchify(frames, OMNI)
    assert grid.tolist() == [2, 4, 6]
    process = oracle.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176})
    single = [process(Image.fromarray(f), return_tensors="pt")["pixel_values"].view(24, 3, 2, 196) for f in frames]
    for pair in range(2):
        patches = pixels.view(2, 24, 3, 2, 196)[pair]
        assert torch.equal(patches[:, :, 0], single[2 * pair][:, :, 0])
        assert torch.equal(patches[:, :, 1], single[2 * pair + 1][:, :, 1])


@pytest.mark.parametrize("samples", [321, 479, 480, 16_000, 32_000, 40_123])
@pytest.mark.parametrize("kind", ["noise", "click", "silence"])
def test_log_mel_equals_whisper(samples, kind):
    waveform = np.zeros(samples, np.float32)
    if kind == "noise":
        waveform[:] = np.random.default_rng(samples).normal(0, 0.1, samples)
    elif kind == "click":  # loudest at the very end, where the padding decides
        waveform[-30:] = 0.9
    whisper = WhisperFeatureExtractor(feature_size=128, chunk_length=4)
    expected = whisper(waveform, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    length = int(expected["attention_mask"].sum())
    mel = log_mel(waveform)
    assert mel.shape == (128, length)
    torch.testing.assert_close(mel, expected["input_features"][0, :, :length], rtol=0, atol=1e-6)


def test_audio_tokens_equal_transformers():
    assert all(OMNI.audio_tokens(n) == lengths(n) for n in range(3, 3000))
    assert all(OMNI3.audio_tokens(n) == lengths3(n) for n in range(1, 3000))
    assert OMNI.audio_tokens(200) == 2 * OMNI.audio_rate and OMNI3.audio_tokens(200) == 2 * OMNI3.audio_rate


def test_colours_are_those_of_the_folders_preprocessor(tmp_path):
    assert with_colours(OMNI3, "") is OMNI3 and with_colours(OMNI3, tmp_path) is OMNI3
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "patch_size": 16}))
    own = with_colours(OMNI3, tmp_path)
    assert own == replace(OMNI3, mean=(0.1, 0.2, 0.3))
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels, _ = patchify(frames, own)
    plain = patchify(frames, replace(OMNI3, mean=(0.0,) * 3, std=(1.0,) * 3))[0].view(4, 3, -1)
    expected = (plain - torch.tensor(own.mean)[:, None]) / 0.5
    torch.testing.assert_close(pixels.view(4, 3, -1), expected, rtol=0, atol=1e-6)
    assert np.array_equal(unpatchify(pixels, (1, 2, 2), own), frames)
    for wrong in ('{"image_std": [0.5, 0.5]}', '{"image_mean": 3}', '{"image_std": [0, 1, 1]}', "{"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="preprocessor_config.json.*: download it again"):
            with_colours(OMNI3, tmp_path)

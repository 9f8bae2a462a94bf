"""What is read from config.json: all of Omni, its Thinker, VL as published and as saved, and what is refused."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import architecture
from megatron_avatar.policy.architecture import placeholder_ids, read_config, read_model_type, transformer_config
from megatron_avatar.policy.sampling import banned_tokens, stop_token_ids
from megatron_avatar.policy.shape import hears
from tests.policy.tiny import AUDIO, IMAGE, VIDEO, tiny_config, tiny_omni3_config, tiny_vl3_config, tiny_vl_config

SHAPES = Path(architecture.__file__).parents[1] / "config" / "shapes"

# As Qwen2.5-VL-7B-Instruct is published: the language model's settings lie beside the others, not in a text_config.
PUBLISHED = dict(
    model_type="qwen2_5_vl",
    bos_token_id=151643,
    eos_token_id=151645,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    image_token_id=151655,
    video_token_id=151656,
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=128000,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    sliding_window=32768,
    use_sliding_window=False,
    tie_word_embeddings=False,
    vocab_size=152064,
    vision_config=dict(depth=32, hidden_size=1280, out_hidden_size=3584, tokens_per_second=2),
)

# As Qwen3-VL-4B-Instruct is: no key of sliding windows, and the older name of what rotates.
PUBLISHED3 = dict(
    model_type="qwen3_vl",
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    tie_word_embeddings=True,
    text_config=dict(
        model_type="qwen3_vl_text", attention_bias=False, bos_token_id=151643, eos_token_id=151645, head_dim=128,
        hidden_size=2560, intermediate_size=9728, max_position_embeddings=262144, num_attention_heads=32,
        num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06, rope_theta=5000000, vocab_size=151936,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    ),
    vision_config=dict(
        model_type="qwen3_vl", depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=16,
        num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17], out_hidden_size=2560,
    ),
)  # fmt: skip


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_vl_as_published(tmp_path):
    config = read_config(write(tmp_path, PUBLISHED))
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_key_value_heads, text.vocab_size) == (
        28,
        3584,
        4,
        152064,
    )
    assert (text.rms_norm_eps, text.eos_token_id, config.tie_word_embeddings) == (1e-6, 151645, False)
    assert text.rope_parameters["mrope_section"] == [16, 24, 24] and text.rope_parameters["rope_theta"] == 1e6
    assert config.vision_config.tokens_per_second == 2
    assert not hears(config) and placeholder_ids(config) == (151655, 151656)


def test_qwen3_vl_as_published(tmp_path):
    config = read_config(write(tmp_path, PUBLISHED3))
    ours = transformer_config(config, ModelConfig(), ParallelConfig(tp=4), on_cpu=True)
    assert (ours.kv_channels, ours.num_query_groups, ours.hidden_size, ours.num_layers) == (128, 8, 2560, 36)
    assert ours.qk_layernorm and not ours.add_qkv_bias and ours.mrope_interleaved
    assert ours.mrope_section == [24, 20, 20] and config.text_config.rope_parameters["rope_theta"] == 5e6
    assert config.tie_word_embeddings and not hears(config) and placeholder_ids(config) == (151655, 151656)


def test_qwen3_omni_as_published(tmp_path):
    """A folder with a talker, of whose parts the Thinker's is read."""
    thinker = json.loads((SHAPES / "qwen3_omni_30b" / "config.json").read_text())
    whole = dict(model_type="qwen3_omni_moe", thinker_config=thinker, talker_config={}, code2wav_config={})
    config = read_config(write(tmp_path, whole))
    ours = transformer_config(config, ModelConfig(), ParallelConfig(tp=8, pp=2), on_cpu=True)
    assert (ours.experts, ours.experts_per_token, ours.expert_inner, ours.normed_shares) == (128, 8, 768, True)
    assert (ours.kv_channels, ours.num_query_groups, ours.hidden_size, ours.num_layers) == (128, 4, 2048, 48)
    assert ours.qk_layernorm and not ours.add_qkv_bias and ours.mrope_interleaved
    assert hears(config) and placeholder_ids(config) == (151655, 151656, 151675)
    with pytest.raises(ValueError, match="thinker_config, which the policy is built from"):
        read_config(write(tmp_path, dict(model_type="qwen3_omni_moe")))
    with pytest.raises(ValueError, match="leaves the first stage no room|less than the 3 .*deepstack"):
        transformer_config(config, ModelConfig(), ParallelConfig(pp=24), on_cpu=True)


@pytest.mark.parametrize("pp, first, match", [
    (16, None, "pp=16 doesn't divide the 36 layers .*: write parallel.first_stage_layers=6 "),
    (18, None, "first stage would have 2 layers, less than the 3 .*deepstack.*: write parallel.first_stage_layers=19 "),
    (8, 1, "first stage would have 1 layers, less than the 3 .*deepstack.*: write parallel.first_stage_layers=8 "),
    (35, None, "pp=35 leaves the first stage no room for the 3 layers .*deepstack.*: lower it"),
])  # fmt: skip
def test_layouts_that_cut_deepstack_are_refused(tmp_path, pp, first, match):
    config = read_config(write(tmp_path, PUBLISHED3))
    with pytest.raises(ValueError, match=match):
        transformer_config(config, ModelConfig(), ParallelConfig(pp=pp, first_stage_layers=first), on_cpu=True)


def test_every_class_gives_the_same_parts(tmp_path):
    configs = {
        "qwen2_5_omni": Qwen2_5OmniConfig(thinker_config=tiny_config().to_dict(), enable_audio_output=False),
        "qwen2_5_omni_thinker": tiny_config(),
        "qwen2_5_vl": tiny_vl_config(),
        "qwen3_vl": tiny_vl3_config(),
        "qwen3_omni_moe": Qwen3OmniMoeConfig(thinker_config=tiny_omni3_config().to_dict(), enable_audio_output=False),
        "qwen3_omni_moe_thinker": tiny_omni3_config(),
    }
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
        assert read_model_type(tmp_path / name) == name
        read = read_config(tmp_path / name)
        assert (read.text_config.hidden_size, read.vision_config.depth) == (64, 4 if "3" in name else 2)
        assert hears(read) == ("omni" in name)
        assert placeholder_ids(read) == ((IMAGE, VIDEO, AUDIO) if hears(read) else (IMAGE, VIDEO))


def test_reading_all_of_omni_says_nothing(tmp_path):
    """Of its other parts transformers warns on every reading, on every rank."""
    said, handler = [], logging.Handler()
    handler.emit = said.append
    whole = Qwen2_5OmniConfig(thinker_config=tiny_config().to_dict())
    whole.save_pretrained(tmp_path)
    logging.getLogger("transformers").addHandler(handler)
    try:
        logging.Logger.warning_once.cache_clear()
        Qwen2_5OmniConfig.from_pretrained(tmp_path)
        logging.Logger.warning_once.cache_clear()
        warnings, thinker = len(said), read_config(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert len(said) == warnings > 0
    found, wanted = (json.loads(json.dumps(config.to_dict())) for config in (thinker, whole.thinker_config))
    assert found == wanted


def test_control_tokens_are_found_wherever_a_config_names_them(tmp_path):
    def tokens(config):
        policy = SimpleNamespace(hf_config=config, vocab_size=152_064, backend=SimpleNamespace(device="cpu"))
        return stop_token_ids(policy), set(banned_tokens(policy).nonzero().flatten().tolist())

    media = {151652, 151653, 151655, 151656}
    stops, banned = tokens(read_config(write(tmp_path, PUBLISHED)))
    assert stops == [151645, 151643]  # <|im_end|> and <|endoftext|>, as VL's own generation
    assert banned == media | {151644}  # <|im_start|>, which config.json doesn't name
    assert tokens(read_config(write(tmp_path, PUBLISHED3))) == (stops, banned)

    for shape in ("qwen2_5_omni_7b", "qwen2_5_omni_3b"):
        stops, banned = tokens(read_config(SHAPES / shape))
        assert stops == [151645] and banned == media | {151643, 151644, 151646, 151647, 151648}


@pytest.mark.parametrize("change, match", [
    (dict(model_type="qwen2_vl"), "model_type is 'qwen2_vl'.*point model.path to .* Qwen2.5-Omni, Qwen2.5-VL, "),
    (dict(model_type="qwen3_vl_moe"), "model_type is 'qwen3_vl_moe' .*in another layout.*take a dense Qwen3-VL"),
    (PUBLISHED3 | {"text_config": PUBLISHED3["text_config"] | {"attention_bias": True}}, "attention_bias"),
    (dict(use_sliding_window=True), "sliding windows"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}), "scaled"),
    (dict(rope_scaling=None), "one-dimensional"),
])  # fmt: skip
def test_what_the_policy_does_not_compute_is_refused(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        read_config(write(tmp_path, PUBLISHED | change))


@pytest.mark.parametrize("change", [dict(decoder_sparse_step=2), dict(mlp_only_layers=[3]),
                                    dict(shared_expert_intermediate_size=512)], ids=str)  # fmt: skip
def test_mixtures_of_another_kind_are_refused(tmp_path, change):
    config = json.loads((SHAPES / "qwen3_omni_30b" / "config.json").read_text())
    config["text_config"] |= change
    with pytest.raises(ValueError, match="config.json: dense layers beside mixtures, and experts that all tokens "):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize(("change", "says"), [
    ({"num_experts": 256}, "num_experts 256.*at most 255"), ({"num_experts_per_tok": 129}, "num_experts_per_tok 129"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
])  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(tmp_path, change, says):
    config = json.loads((SHAPES / "qwen3_omni_30b" / "config.json").read_text())
    config["text_config"] |= change
    with pytest.raises(ValueError, match=says):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize(("part", "change", "says"), [
    ("text_config", {"num_experts": "128"}, "can't be taken .*num_experts.*correct it"),
    ("text_config", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ("text_config", {"num_key_value_heads": 3}, "num_key_value_heads 3 make no decoder"),
    ("text_config", {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 16, 16]}}, "whose sum is 64"),
    ("text_config", {"rope_scaling": {"rope_type": "default", "mrope_section": None}}, "None is not three numbers"),
    ("vision_config", {"deepstack_visual_indexes": [8, 16, 27]}, "not of 27 blocks, each once"),
    ("vision_config", {"deepstack_visual_indexes": [8, 8, 16]}, "not of 27 blocks, each once"),
    ("vision_config", {"out_hidden_size": 4096}, "out_hidden_size 4096 is not text_config.hidden_size 2048"),
    ("vision_config", {"num_heads": 7}, "not a multiple of num_heads 7"),
    ("audio_config", {"output_dim": 1024}, "output_dim 1024 is not text_config.hidden_size 2048"),
    ("audio_config", {"n_window_infer": 50}, "n_window_infer 50 is less than the 100 frames"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(tmp_path, part, change, says):
    config = json.loads((SHAPES / "qwen3_omni_30b" / "config.json").read_text())
    if "rope_scaling" in change:
        config["text_config"].pop("rope_parameters", None)
    config[part] |= change
    with pytest.raises(ValueError, match=f"config.json: .*{says}"):
        read_config(write(tmp_path, config))


def test_quantized_editions_are_refused(tmp_path):
    for name in ("qwen3_omni_30b", "qwen3_vl_8b"):
        config = json.loads((SHAPES / name / "config.json").read_text())
        with pytest.raises(ValueError, match=r"quantization_config \(fp8\).*edition in bfloat16"):
            read_config(write(tmp_path, config | {"quantization_config": {"quant_method": "fp8"}}))


def test_folders_without_a_configuration_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json doesn't exist: point model.path to"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED)[:100])
    with pytest.raises(ValueError, match="config.json is not JSON.*download or export it again"):
        read_config(tmp_path)

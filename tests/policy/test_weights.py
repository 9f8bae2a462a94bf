"""Hugging Face folders in and out: classes, shards, dtypes, and folders that are wrong or can't be written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import thinker_logits, tiny_config, tiny_prompts, tiny_thinker
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy import weights
from megatron_avatar.policy.model import build_policy
from megatron_avatar.policy.weights import export_hf, load_hf


@pytest.fixture(scope="module")
def backend():
    yield backends.start(ParallelConfig())
    backends.stop()


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A Thinker's folder in float32, with a tokenizer file."""
    folder = tmp_path_factory.mktemp("thinker")
    tiny_thinker(tiny_config(layers=2)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


@pytest.fixture
def copy(thinker, tmp_path):
    return shutil.copytree(thinker, tmp_path / "copy")


def load(folder, backend):
    policy = build_policy(folder, backend, ModelConfig(), ParallelConfig())
    load_hf(policy, folder)
    return policy


def edit(folder, change):
    """Apply `change` to the folder's tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_full_class_in_shards_comes_back_as_the_full_class(backend, tmp_path):
    """Names, shards, talker and speakers; transformers loads it and computes the same logits."""
    config = Qwen2_5OmniConfig(thinker_config=tiny_config(layers=2).to_dict(), enable_audio_output=False)
    full, source, out = Qwen2_5OmniForConditionalGeneration(config), tmp_path / "source", tmp_path / "out"
    full.thinker = tiny_thinker(full.config.thinker_config)
    full.save_pretrained(source)
    edit(source, lambda tensors: tensors.update({"talker.model.norm.weight": torch.randn(8, dtype=torch.bfloat16)}))
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(whole)}
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name in whole if weight_map[name] == file}, source / file)
    (source / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    torch.save({}, source / "spk_dict.pt")

    export_hf(load(source, backend), out, source)
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == whole.keys()
    assert all(torch.equal(exported[name], whole[name]) and exported[name].dtype == whole[name].dtype for name in whole)
    prompt = tiny_prompts(full.config.thinker_config)["audio_in_video"]
    again = Qwen2_5OmniForConditionalGeneration.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(thinker_logits(again.thinker, prompt), thinker_logits(full.thinker, prompt))


def test_bfloat16_files_and_large_exports(thinker, backend, tmp_path, monkeypatch):
    """fp32 parameters take bf16 files exactly, and an export in bf16 says so; large ones are sharded with an index."""
    source, out = tmp_path / "source", tmp_path / "out"
    Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(thinker, dtype=torch.bfloat16).save_pretrained(source)
    policy = load(source, backend)
    assert policy.language_model.output_layer.weight.dtype == torch.float32
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    export_hf(policy, out, source, dtype=torch.bfloat16)
    index = json.loads((out / weights.INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(2 * parameter.numel() for parameter in policy.parameters())
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source).state_dict()
    ours = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out).state_dict()  # dtype from config.json
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


def test_export_replaces_an_older_folder_and_copies_the_tokenizer(thinker, backend, tmp_path):
    policy, out = load(thinker, backend), tmp_path / "new" / "out"
    export_hf(policy, out, thinker)
    (out / "stale").touch()
    with torch.no_grad():
        policy.language_model.decoder.final_layernorm.weight.fill_(3)
    export_hf(policy, out, thinker)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in thinker.iterdir())
    assert (out / "tokenizer.json").read_text() == '{"made": "up"}'
    assert load_file(out / "model.safetensors")["model.norm.weight"].eq(3).all()
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left aside"


def test_failed_export_keeps_the_older_folder(thinker, backend, tmp_path, monkeypatch):
    policy, out = load(thinker, backend), tmp_path / "out"
    export_hf(policy, out, thinker)
    before = (out / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="out failed.*No space left"):
        export_hf(policy, out, thinker)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_tensors_are_all_named(copy, backend):
    def change(tensors):
        del tensors["visual.merger.ln_q.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)

    edit(copy, change)
    with pytest.raises(ValueError) as error:
        load(copy, backend)
    assert "visual.merger.ln_q.weight is missing" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight has shape [3, 4] instead of [128, 64]" in str(error.value)
    assert "model.layers.2.mlp.up_proj.weight is unexpected" in str(error.value)


def test_truncated_or_absent_file_is_named(copy, backend):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors can't be read"):
        load(copy, backend)
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors can't be read"):
        load(copy, backend)

"""Hugging Face folders in and out: classes, shards, dtypes, and folders that are wrong or can't be written."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import weights
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.safetensors_folder import INDEX
from megatron_avatar.policy.weights import export_hf, load_hf
from tests.policy.tiny import FAMILIES, thinker_logits, tiny_config, tiny_omni3_prompts, tiny_prompts, tiny_thinker
from tests.policy.tiny_omni import tiny_omni
from tests.policy.tiny_omni3 import tiny_whole_omni3


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


def tensors_of(folder):
    """name -> (file, tensor) of all safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: (path.name, value) for path in files for name, value in load_file(path).items()}


def same_tensors(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[n][1], other[n][1]) and one[n][1].dtype == other[n][1].dtype for n in one)


def test_full_class_in_shards_comes_back_as_the_full_class(backend, tmp_path):
    """Names, shards, dtypes, talker, vocoder and voices; transformers loads it and computes the same logits."""
    source, out = tmp_path / "source", tmp_path / "out"
    full = tiny_omni(source, max_shard_size="400KB")
    for path in source.glob("*.safetensors"):  # some of the talker's tensors in another dtype
        save_file({n: t.bfloat16() if "talker" in n and "norm" in n else t for n, t in load_file(path).items()}, path)
    (source / "pytorch_model.bin").write_text("weights of another format")
    (source / "pytorch_model.bin.index.json").write_text("{}")

    export_hf(load(source, backend), out, source)
    before, after = tensors_of(source), tensors_of(out)
    assert same_tensors(before, after)
    assert len({file for file, _ in after.values()}) >= 3
    assert {name: file for name, (file, _) in before.items()} == {name: file for name, (file, _) in after.items()}
    assert {name.split(".")[0] for name in after} == {"thinker", "talker", "token2wav"}
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "pytorch_model.bin", "pytorch_model.bin.index.json"
    }  # fmt: skip
    prompt = tiny_prompts(full.config.thinker_config)["audio_in_video"]
    again = Qwen2_5OmniForConditionalGeneration.from_pretrained(out).eval()
    assert again.has_talker and all(
        torch.equal(one, other.to(one.dtype)) for one, other in zip(again.parameters(), full.parameters(), strict=True)
        if one.dtype == torch.float32
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(thinker_logits(again.thinker, prompt), thinker_logits(full.thinker, prompt))


@pytest.mark.parametrize("name, tied, style", [("vl", False, "hub"), ("vl", False, "nested"), ("vl3", False, "nested"),
                                               ("vl3", True, "nested")])  # fmt: skip
def test_vl_in_both_styles_of_names(backend, tmp_path, name, tied, style):
    """`model.layers.*` and `visual.*` as Qwen2.5-VL on the hub, or both below `model`: the export has the source's."""
    source, out, family = tmp_path / "source", tmp_path / "out", FAMILIES[name]
    model = family.model(family.config(layers=3, tied=tied))
    model.save_pretrained(source)
    if style == "nested" and name == "vl":
        save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    names = tensors_of(source)
    assert any(name.startswith("model.language_model.layers") for name in names) == (style == "nested")
    assert ("lm_head.weight" in names) != tied
    policy = load(source, backend)
    export_hf(policy, out, source)
    assert same_tensors(tensors_of(out), tensors_of(source))
    prompt = family.prompts(model.config)["video"]
    again = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        theirs = family.logits(model, prompt)
        assert torch.equal(family.logits(again, prompt), theirs)
    ours = policy.logits(pack_groups([prompt], [[prompt.token_ids[:1]]]), policy.embed_media([prompt]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_qwen3_omnis_experts_come_back_one_by_one_beside_the_talker(backend, tmp_path):
    """Names of the full class, each expert its own; what the policy lacks goes through; transformers loads it."""
    source, out = tmp_path / "source", tmp_path / "out"
    full = tiny_whole_omni3(source)
    names = tensors_of(source)
    assert {name.split(".")[0] for name in names} == {"thinker", "talker", "code2wav"}
    assert sum(".mlp.experts." in name and name.startswith("thinker.model.layers.") for name in names) == 3 * 8 * 3
    policy = load(source, backend)
    export_hf(policy, out, source)
    assert same_tensors(tensors_of(out), names)
    again = Qwen3OmniMoeForConditionalGeneration.from_pretrained(out).eval()
    prompt = tiny_omni3_prompts(full.config.thinker_config)["audio_in_video"]
    with torch.no_grad():
        theirs = thinker_logits(again.thinker, prompt)
        assert torch.equal(theirs, thinker_logits(full.thinker, prompt))
    ours = policy.logits(pack_groups([prompt], [[prompt.token_ids[:1]]]), policy.embed_media([prompt]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    def change(tensors):
        del tensors["thinker.model.layers.1.mlp.experts.5.up_proj.weight"]

    edit(source, change)
    with pytest.raises(ValueError, match="thinker.model.layers.1.mlp.experts.5.up_proj.weight is missing"):
        load(source, backend)


def test_bfloat16_files(thinker, backend, tmp_path):
    """fp32 parameters take bf16 files exactly; an export in bf16 says so and gives the source's bytes back."""
    source, out = tmp_path / "source", tmp_path / "out"
    Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(thinker, dtype=torch.bfloat16).save_pretrained(
        source, max_shard_size="100KB"
    )
    policy = load(source, backend)
    assert policy.language_model.output_layer.weight.dtype == torch.float32
    export_hf(policy, out, source, dtype=torch.bfloat16)
    assert same_tensors(tensors_of(out), tensors_of(source))
    index = json.loads((out / INDEX).read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(2 * parameter.numel() for parameter in policy.parameters())
    again = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}  # from config.json


def peak_growth(action):
    """By how many bytes the process's resident memory, mapped files included, rises above its start meanwhile."""

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = status("VmRSS")
    action()
    return status("VmHWM") - start


def test_memory_stays_below_a_shard_and_a_layer(backend, tmp_path):
    """112 MiB of weights in 12 files: less than a file and a layer more, on the way in and on the way out."""
    config = tiny_config(layers=12)
    config.text_config.hidden_size, config.text_config.intermediate_size = 256, 6144
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 16, 2
    config.vision_config.out_hidden_size = config.audio_config.output_dim = 256
    with no_init_weights():
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number)
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="10MB")
    files = [path.stat().st_size for path in source.glob("*.safetensors")]
    layer = sum(2 * parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    assert len(files) >= 12 and sum(files) > 5 * (max(files) + layer)
    policy = build_policy(source, backend, ModelConfig(dtype="bfloat16"), ParallelConfig())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # its own pages don't count
    slack = 2 << 20  # Python's own, and the folder's listing
    for work in (lambda: load_hf(policy, source), lambda: export_hf(policy, out, source)):
        # The least of three: other threads of the process take pages now and then.
        assert min(peak_growth(work) for _ in range(3)) < max(files) + layer + slack
    kept = []
    control = peak_growth(lambda: kept.extend(value.clone() for _, value in tensors_of(source).values()))
    assert control > 5 * (max(files) + layer), "the measure sees what is held"
    assert same_tensors(tensors_of(out), tensors_of(source))


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

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(OSError, match="out failed.*No space left"):
        export_hf(policy, out, thinker)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_cut_off_between_its_renames_loses_nothing(thinker, backend, tmp_path, monkeypatch):
    policy, out = load(thinker, backend), tmp_path / "out"
    export_hf(policy, out, thinker)
    content = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / "out.old")  # a kill between the two renames leaves these
    (tmp_path / "out.writing").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_write_model", lambda *args: 1 / 0)
        with pytest.raises(OSError, match="out failed: ZeroDivisionError"):
            export_hf(policy, out, thinker)
    assert (out / "model.safetensors").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_for_another_source_is_refused(thinker, backend, tmp_path):
    other = tmp_path / "other"
    tiny_thinker(tiny_config(layers=3)).save_pretrained(other)
    with pytest.raises(OSError, match="other has no model.layers.2.*not the policy's source"):
        export_hf(load(other, backend), tmp_path / "out", shutil.copytree(thinker, tmp_path / "x" / "other"))
    assert not (tmp_path / "out").exists()


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


def test_quantized_tensors_are_refused(copy, backend):
    """Float8 and whole numbers, whose scales lie elsewhere, would be taken as the weights themselves."""
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.float8_e4m3fn, torch.int8):
        edit(copy, lambda tensors: tensors.update({name: tensors[name].float().to(dtype)}))  # noqa: B023
        with pytest.raises(ValueError, match=f"up_proj.weight is {str(dtype)[6:]}, quantized. Take its edition in bfl"):
            load(copy, backend)


def test_a_head_that_is_missing_is_said_with_the_key(copy, backend):
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight is missing. Write tie_word_embeddings true"):
        load(copy, backend)


def sharded(folder):
    """Spread the folder's tensors over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("kept", [0, 5, 1000, 0.5, -1])
def test_half_written_file_is_named(copy, backend, kept):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="model.safetensors can't be read.*half written"):
        load(copy, backend)


def test_absent_files_and_broken_indices_are_named(copy, backend):
    weight_map = sharded(copy)
    load(copy, backend)
    second = copy / "model-00002-of-00002.safetensors"
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map | {"more": second.name}}))
    with pytest.raises(ValueError, match="00002-of-00002.safetensors lacks more, which.*index.json names"):
        load(copy, backend)
    second.unlink()
    with pytest.raises(ValueError, match="00002-of-00002.safetensors doesn't exist, but.*index.json names it"):
        load(copy, backend)
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map | {"more": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="index.json names '../elsewhere.safetensors', which is no file of this"):
        load(copy, backend)
    (copy / INDEX).write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="index.json can't be read"):
        load(copy, backend)
    (copy / INDEX).unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        load(copy, backend)


def test_weights_of_another_architecture_are_refused(copy, backend):
    """A config.json of Qwen2.5-Omni over the weights of something else, of a mixture with fused experts too."""
    for name, remedy in (("attention.wq.weight", "Download it again"),
                         ("mlp.experts.gate_up_proj", "Save its experts one by one")):  # fmt: skip
        save_file({f"model.layers.0.{name}": torch.zeros(64, 64)}, copy / "model.safetensors")
        with pytest.raises(ValueError, match=f"don't match its config.json.*is missing.*and .* more.*{remedy}"):
            load(copy, backend)

"""Folders, sizes and space, as they are judged before anything is built or submitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_avatar.config import checks, load_config, save_config
from megatron_avatar.config.load import CONFIG_DIR


@pytest.fixture
def config(tmp_path):
    shutil.copytree(CONFIG_DIR / "shapes" / "qwen2_5_omni_7b", tmp_path / "model")
    return load_config(["recipe=avatar_7b", f"model.path={tmp_path / 'model'}", "data.manifest=d",
                        f"output_dir={tmp_path / 'run'}", "checkpoint.keep=2", "checkpoint.milestones=[1]"])


def test_a_checkpoint_of_another_model_is_refused_in_numbers(config):
    checks.check_same_model(config)
    folder = Path(config.output_dir) / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    sizes = checks.model_sizes(config)
    (folder / "state.json").write_text(json.dumps({"model": sizes}))
    checks.check_same_model(config)
    (folder / "state.json").write_text(json.dumps({"model": {**sizes, "hidden_size": 2048}}))
    with pytest.raises(ValueError, match="hidden_size 3584 instead of 2048"):
        checks.check_same_model(config)
    (folder / "state.json").write_text("torn")
    checks.check_same_model(config)  # named and passed over when it is loaded


@pytest.mark.parametrize(("shape", "name"), [
    ("qwen3_omni_30b", "num_experts"), ("qwen3_omni_30b", "num_experts_per_tok"),
    ("qwen3_omni_30b", "moe_intermediate_size"), ("qwen3_omni_30b", "head_dim"), ("qwen3_vl_4b", "head_dim"),
])  # fmt: skip
def test_models_that_differ_in_one_size_are_told_apart(config, shape, name):
    """Of a mixture that routes a token to fewer experts every weight would load."""
    path = Path(config.model.path) / "config.json"
    shutil.copy(CONFIG_DIR / "shapes" / shape / "config.json", path)
    config.model.shape = shape
    folder = Path(config.output_dir) / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"model": checks.model_sizes(config)}))
    checks.check_same_model(config)
    found = json.loads(path.read_text())
    was = found["text_config"][name]
    found["text_config"][name] = was // 2
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"another model than .* \({name} {was // 2} instead of {was}\)"):
        checks.check_same_model(config)
    assert checks.other_shape(config) == f"{name} {was // 2} instead of {was}"


def test_a_dense_model_does_not_go_on_as_a_mixture_and_older_checkpoints_do(config):
    folder = Path(config.output_dir) / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    dense = checks.model_sizes(config)
    (folder / "state.json").write_text(json.dumps({"model": {name: dense[name] for name in checks.SIZES}}))
    checks.check_same_model(config)  # of a release that knew five sizes
    (folder / "state.json").write_text(json.dumps({"model": {**dense, "num_experts": 128}}))
    with pytest.raises(ValueError, match="num_experts 0 instead of 128"):
        checks.check_same_model(config)


@pytest.mark.parametrize("shape", sorted(path.name for path in (CONFIG_DIR / "shapes").iterdir()))
def test_sizes_are_found_in_every_kind_of_folder(config, shape, tmp_path):
    config.model.path, config.model.shape = str(CONFIG_DIR / "shapes" / shape), shape
    assert checks.model_sizes(config)["hidden_size"] > 0 and checks.other_shape(config) == ""
    whole = json.loads((CONFIG_DIR / "shapes" / shape / "config.json").read_text())
    (tmp_path / "omni").mkdir()
    (tmp_path / "omni" / "config.json").write_text(json.dumps({"thinker_config": whole}))
    config.model.path = str(tmp_path / "omni")
    assert checks.other_shape(config) == ""


@pytest.mark.parametrize(("recipe", "shape", "says"), [
    ("avatar_7b", "qwen3_vl_8b", r"is a Qwen3-VL, but the recipe \(model.shape=qwen2_5_omni_7b\) is for Qwen2.5-Omni"),
    ("vl3_8b", "qwen2_5_vl_7b", r"is a Qwen2.5-VL, but .* is for Qwen3-VL: .* model.shape='' parallel=single"),
    ("vl3_4b", "qwen2_5_omni_3b", "is a Qwen2.5-Omni, but the recipe"),
])  # fmt: skip
def test_a_recipe_of_another_family_is_refused(recipe, shape, says):
    config = load_config([f"recipe={recipe}", f"model.path={CONFIG_DIR / 'shapes' / shape}", "data.manifest=d"])
    with pytest.raises(ValueError, match=says):
        checks.check_family(config)
    config.model.shape = ""  # of no published model: nothing to compare with
    checks.check_family(config)


def test_replayed_routes_of_a_dense_model_are_refused_before_there_is_a_folder():
    wanted = ["dry_run=true", "rl.routing_replay=true"]
    checks.check_family(load_config(["recipe=omni3_lora", *wanted]))
    with pytest.raises(ValueError, match="rl.routing_replay=true, but Qwen3-VL is dense"):
        checks.check_family(load_config(["recipe=vl3_8b", *wanted]))


def test_fewer_pixels_than_a_token_of_the_family_are_refused_before_there_is_a_folder():
    few = ["dry_run=true", "data.frame_min_pixels=800", "data.frame_max_pixels=800"]
    checks.check_family(load_config(["recipe=avatar_7b", *few]))
    with pytest.raises(ValueError, match="data.frame_min_pixels=800 must be at least 1024, one visual token of Qwen3-"):
        checks.check_family(load_config(["recipe=vl3_8b", *few]))


def test_a_folder_of_no_family_is_refused_with_the_reason(config, tmp_path):
    checks.check_family(config)
    path = Path(config.model.path) / "config.json"
    quantized = '{"model_type": "qwen2_5_omni", "thinker_config": {"quantization_config": {"quant_method": "awq"}}}'
    for text, says in (('{"model_type": "qwen3_vl_moe"}', "in another layout"), ("[]", "config.json: "), ("{", ": "),
                       (quantized, r"quantization_config \(awq\).*bfloat16")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            checks.check_family(config)
    path.unlink()
    checks.check_family(config)  # not there yet, or refused elsewhere


def test_a_run_of_other_settings_goes_on_only_when_told(config):
    Path(config.output_dir).mkdir()
    save_config(config, Path(config.output_dir) / "config.yaml")
    assert checks.check_same_run(config) == {}
    config.seed = 5
    with pytest.raises(ValueError, match="seed was 0, now 5.*continue_changed=true"):
        checks.check_same_run(config)
    config.continue_changed = True
    assert checks.check_same_run(config) == {"seed": (0, 5)}


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    checks.check_folder(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ValueError, match="nothing can be written into"):
            checks.check_folder(folder)


def test_a_site_may_set_paths(tmp_path, monkeypatch):
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    site = "# @package _global_\ncluster: {gpus_per_node: 8}\ndata: {manifest: /datasets/manifest.jsonl}\n"
    (tmp_path / "config" / "cluster" / "site.yaml").write_text(site)
    monkeypatch.setattr("megatron_avatar.config.load.CONFIG_DIR", tmp_path / "config")
    monkeypatch.setenv("AVATAR_CLUSTER", "site")
    config = load_config(["recipe=avatar_7b", "model.path=m"])
    assert config.data.manifest == "/datasets/manifest.jsonl" and config.cluster.gpus_per_node == 8
    assert load_config(["recipe=avatar_7b", "model.path=m", "data.manifest=x"]).data.manifest == "x"

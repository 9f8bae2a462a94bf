"""Where models and data are looked for, and what is said where they aren't."""

from __future__ import annotations

import json
import os

import pytest

from megatron_avatar.config import load_config, save_config
from megatron_avatar.config.paths import NAMES, check_inputs, check_model, fill, missing, origin, variable
from megatron_avatar.config.schema import Config


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """An empty working directory, and an environment without paths."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(variable(name), raising=False)


def folder(path, *names):
    path.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors", "tokenizer.json"):
        (path / name).write_text("{}")
    return path


def test_the_command_line_comes_first_then_the_cold_start_the_environment_and_the_site(tmp_path, monkeypatch):
    site = "+cluster.paths.model_7b=/site/7b", "+cluster.paths.data=/site/m.jsonl"
    found = load_config(["recipe=avatar_7b", *site])
    assert (found.model.path, found.data.manifest) == ("/site/7b", "/site/m.jsonl")
    assert origin(found) == "cluster.paths.model_7b, without a cold start"
    monkeypatch.setenv("AVATAR_MODEL_7B", "~/7b")
    monkeypatch.setenv("AVATAR_DATA", "/env/m.jsonl")
    found = load_config(["recipe=avatar_7b", *site])
    assert found.model.path == os.path.expanduser("~/7b") and found.data.manifest == "/env/m.jsonl"
    assert origin(found) == "AVATAR_MODEL_7B, without a cold start"
    assert origin(load_config(["recipe=sft_7b"])) == "AVATAR_MODEL_7B"
    folder(tmp_path / "runs/sft_7b/export/sft")
    found = load_config(["recipe=avatar_7b"])
    assert found.model.path == "runs/sft_7b/export/sft" and origin(found) == "the cold start's export of sft_7b"
    assert load_config(["recipe=grpo_7b"]).model.path == "runs/sft_7b/export/sft"
    found = load_config(["recipe=avatar_7b", "model.path=m"])
    assert found.model.path == "m" and origin(found) == "as named"


def test_a_run_goes_on_with_the_model_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setenv("AVATAR_MODEL_7B", "/models/a b")
    monkeypatch.setenv("AVATAR_DATA", "/m.jsonl")
    config = load_config(["recipe=avatar_7b"])
    (tmp_path / "runs/avatar_7b").mkdir(parents=True)
    save_config(config, tmp_path / "runs/avatar_7b/config.yaml")
    folder(tmp_path / "runs/sft_7b/export/sft")
    assert load_config(["recipe=avatar_7b"]).model.path == "/models/a b"


def test_a_cold_start_that_is_not_done_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("AVATAR_MODEL_7B", "/models/7b")
    folder(tmp_path / "runs/sft_7b", "config.yaml")
    with pytest.raises(ValueError, match="runs/sft_7b has begun a cold start that isn't done"):
        load_config(["recipe=avatar_7b", "data.manifest=m"])
    assert load_config(["recipe=avatar_7b", "data.manifest=m", "model.path=/x"]).model.path == "/x"


@pytest.mark.parametrize(
    ("recipe", "model", "data"),
    [("avatar_7b", "AVATAR_MODEL_7B", "AVATAR_DATA"), ("sft_3b", "AVATAR_MODEL_3B", "AVATAR_DATA"),
     ("vl_7b", "AVATAR_MODEL_VL_7B", "AVATAR_DATA_VL"), ("vl3_8b", "AVATAR_MODEL_VL3_8B", "AVATAR_DATA"),
     ("grpo_vl3_4b", "AVATAR_MODEL_VL3_4B", "AVATAR_DATA"), ("omni3_lora", "AVATAR_MODEL_OMNI3", "AVATAR_DATA")],
)  # fmt: skip
def test_everything_that_is_missing_is_named_at_once_with_how_to_give_it(recipe, model, data):
    with pytest.raises(ValueError) as error:
        load_config([f"recipe={recipe}"])
    for words in ("2 things are missing", "model.path=FOLDER", f"export {model}=PATH", "site's cluster.paths",
                  "hf download Qwen/", "data.manifest=FILE", f"export {data}=PATH", "prepare --sources"):
        assert words in str(error.value)


def test_a_plan_and_a_tiny_recipe_look_for_nothing(monkeypatch):
    monkeypatch.setenv("AVATAR_MODEL_7B", "/models/7b")
    assert load_config(["recipe=avatar_7b", "dry_run=true"]).model.path == ""
    config = Config()
    fill(config)
    assert len(missing(config)) == 2 and "AVATAR" not in " ".join(missing(config))


def test_a_wrong_folder_is_told_by_what_it_lacks(tmp_path):
    assert check_model(str(folder(tmp_path / "whole"))) == []
    (line,) = check_model(str(folder(tmp_path / "cut", "config.json", "vocab.json")))
    assert "lacks weights:" in line and "download it again" in line
    assert check_model(str(tmp_path / "cut"), needs=("config.json", "tokenizer")) == []
    (line,) = check_model("Qwen/Qwen2.5-Omni-3B")
    assert "hf download Qwen/Qwen2.5-Omni-3B --local-dir models/Qwen2.5-Omni-3B" in line
    for path in ("/models/omni", "cut/omni", "a/b/c", "../x"):  # no name of the hub, or a folder beside which it isn't
        (line,) = check_model(path)
        assert "is no folder, seen from" in line and "hf download" not in line


def test_a_manifest_is_looked_at(tmp_path):
    config = Config()
    config.model.path, config.data.manifest = str(folder(tmp_path / "m")), str(tmp_path / "manifest.jsonl")
    assert "doesn't exist, seen from" in check_inputs(config)[0]
    (tmp_path / "manifest.jsonl").touch()
    assert "is empty: prepare it again" in check_inputs(config)[0]
    (tmp_path / "manifest.jsonl").write_text(json.dumps({}))
    assert check_inputs(config) == []

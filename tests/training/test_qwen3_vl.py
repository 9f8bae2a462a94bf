"""A tiny Qwen3-VL through the product's own commands: trained, exported, evaluated."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from eval.run import main as evaluate
from eval.scoring.predictions import read_predictions
from megatron_avatar.config.families import VL3
from megatron_avatar.data.chat import chat_template
from megatron_avatar.train import main
from tests.training.small import ROOT, arguments
from tests.training.test_loop import metrics

BASE = ROOT / "assets" / "tiny_base"
TOKENS = dict(image_token_id="<|IMAGE|>", video_token_id="<|VIDEO|>", vision_start_token_id="<|vision_bos|>",
              vision_end_token_id="<|vision_eos|>")  # fmt: skip
SETTINGS = ("model.shape=''", "data.mute=true", "data.frame_min_pixels=9216", "data.frame_max_pixels=9216")

VOWELS = """def vowels(text, sample):
    return sum(map(text.count, "aeiou")) / max(1, len(text))
"""  # a random model earns nothing else


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights under the shipped tokenizer, whose template says media with the tokens that it has."""
    folder = tmp_path_factory.mktemp("vl3")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = chat_template(replace(VL3, **{
        key.removesuffix("_token_id"): name for key, name in TOKENS.items()
    }))  # fmt: skip
    tokenizer.save_pretrained(folder)
    text = dict(
        vocab_size=len(tokenizer), num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=128, rope_parameters=dict(rope_type="default", rope_theta=5e6,
        mrope_section=[6, 5, 5]), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64,
                  num_position_embeddings=36, deepstack_visual_indexes=[0, 1, 3])  # fmt: skip
    ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in TOKENS.items()}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_and_is_exported_and_evaluated(world, folder, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "vowels.py").write_text(VOWELS)
    given = arguments(world, out, f"model.path={folder}", *SETTINGS, f"+rl.rewards.vowels={tmp_path}/vowels.py:vowels",
                      "+stages.visual.rewards.vowels=1")  # fmt: skip
    given = [item for item in given if "audio_visual" not in item and "localisation" not in item]
    # The real command: workers of a reward of one's own would outlive the tests' forked ranks.
    command = [sys.executable, "-m", "megatron_avatar.train", *given, "~stages.audio_visual", "~stages.localisation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "chat template" not in done.stderr, "the folder's own is taken"
    records = metrics(out)
    assert len(records) == 2 and all(abs(record["logprob_error"] - 1) < 1e-5 for record in records)
    assert records[1]["replay/completions"] == 16, "their prompts are made anew"

    export = out / "export" / "visual"
    before, after = (Qwen3VLForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, export))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if ".visual." not in name}, "frozen encoder, all else trained"

    command = ["benchmark=held_out", f"data={world / 'data' / 'manifest.jsonl'}", "batch=2", "limit=4",
               "rl.sampling.max_new_tokens=8", "data.workers=0", *SETTINGS]  # fmt: skip
    for model, name in ((out, "run"), (export, "export")):
        own = [] if model is out else ["recipe=tiny_avatar"]
        assert evaluate([f"model={model}", f"out={tmp_path / name}", *command, *own]) == 0
    answers = [[(p["id"], p["text"], p["error"]) for p in read_predictions(tmp_path / name / "held_out.ours.jsonl")]
               for name in ("run", "export")]  # fmt: skip
    assert answers[0] == answers[1] and len(answers[0]) == 4 and not any(error for *_, error in answers[0])


def test_a_recipe_of_omni_refuses_it(world, folder, tmp_path, capsys):
    assert main([*arguments(world, tmp_path / "run"), f"model.path={folder}"]) == 2
    assert "is a Qwen3-VL, but the recipe (model.shape=tiny_base) is for Qwen2.5-Omni" in capsys.readouterr().err
    other = tmp_path / "moe"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl_moe"}))
    assert main([*arguments(world, tmp_path / "run"), f"model.path={other}", "model.shape=''"]) == 2
    assert "take a dense Qwen3-VL" in capsys.readouterr().err and not (tmp_path / "run").exists()

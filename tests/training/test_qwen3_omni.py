"""A tiny Qwen3-Omni through the product's own commands: trained on videos with sound, exported, evaluated."""

import subprocess
import sys

import pytest
import torch
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from data_tools.pretrain import BASES, save
from data_tools.tokenizer import build_tokenizer
from eval.run import main as evaluate
from eval.scoring.predictions import read_predictions
from tests.training.small import ROOT, arguments
from tests.training.test_loop import metrics
from tests.training.test_qwen3_vl import VOWELS

BASE = BASES["omni3"]
SETTINGS = ("model.shape=tiny_omni3", "data.frame_min_pixels=9216", "data.frame_max_pixels=9216")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("omni3"), build_tokenizer(BASE.family)
    torch.manual_seed(0)
    save(BASE.model(BASE.config(tokenizer)), tokenizer, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_and_is_exported_and_evaluated(world, folder, tmp_path):
    """Positions in fractions, from the prompt to the replayed update."""
    out = tmp_path / "run"
    (tmp_path / "vowels.py").write_text(VOWELS)
    given = arguments(world, out, f"model.path={folder}", *SETTINGS, f"+rl.rewards.vowels={tmp_path}/vowels.py:vowels",
                      "+stages.audio_visual.rewards.vowels=1")  # fmt: skip
    given = [item for item in given if not item.startswith(("stages.visual.", "stages.localisation."))]
    # The real command: workers of a reward of one's own would outlive the tests' forked ranks.
    command = [sys.executable, "-m", "megatron_avatar.train", *given, "~stages.visual", "~stages.localisation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "chat template" not in done.stderr, "the folder's own is taken"
    records = metrics(out)
    assert len(records) == 2 and all(abs(record["logprob_error"] - 1) < 1e-5 for record in records)
    assert all(record["routing_flips"] == 0 for record in records)
    assert records[1]["replay/completions"] == 16, "their prompts are made anew"

    export = out / "export" / "audio_visual"
    before, after = (Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
                     for path in (folder, export))  # fmt: skip
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    towers = {name for name in after if name.startswith(("model.visual.", "model.audio_tower."))}
    assert moved == {*after} - towers, "frozen encoders, all else trained"

    command = ["benchmark=held_out", f"data={world / 'data' / 'manifest.jsonl'}", "batch=2", "limit=4",
               "rl.sampling.max_new_tokens=8", "data.workers=0", *SETTINGS]  # fmt: skip
    for model, name in ((out, "run"), (export, "export")):
        own = [] if model is out else ["recipe=tiny_avatar"]
        assert evaluate([f"model={model}", f"out={tmp_path / name}", *command, *own]) == 0
    answers = [[(p["id"], p["text"], p["error"]) for p in read_predictions(tmp_path / name / "held_out.ours.jsonl")]
               for name in ("run", "export")]  # fmt: skip
    assert answers[0] == answers[1] and len(answers[0]) == 4 and not any(error for *_, error in answers[0])

"""The benchmarks' contestants can still be built, agree, and give the figures that are kept; sizes are tiny."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import carried, generation, group_update, logprobs, timing
from megatron_avatar.policy import backend as backends


@pytest.fixture
def process():
    """Stops the backend that a benchmark starts, and gives the test's process its threads back."""
    threads = torch.get_num_threads()
    yield
    if torch.distributed.is_initialized():
        backends.stop()
    torch.set_num_threads(threads)


def kept(name: str) -> dict:
    return json.loads((timing.RESULTS / f"{name}.json").read_text())


def names(result: dict) -> set[str]:
    return result.keys() | {"machine", "date"}


def test_an_update_is_the_same_packed_by_rows_and_by_trl(process):
    contest, result = group_update.compare(24, rounds=1)
    assert 0 < result["largest_difference"] < 1e-4
    assert names(result) | {"sweep"} == kept("group_update").keys()
    assert min(result[f"{name}_s"] for name in ("ours", "rows", "trl", "replay")) > 0
    with torch.no_grad():
        contest.policy.language_model.output_layer.weight[3] += 0.1
    assert contest.largest_difference(group_update.make_step(24, 1)) > 1e-3  # a comparison that sees a difference


def test_generation_samples_as_many_tokens_as_transformers(process, monkeypatch):
    for name, size in {"PROMPTS": 2, "COMPLETIONS": 3, "NEW_TOKENS": 4}.items():
        monkeypatch.setattr(generation, name, size)
    model = generation.make_model()
    with torch.no_grad():
        result = generation.measure(generation.as_policy(model), model, 16, rounds=1)
    assert names(result) | {"at_2048"} == kept("generation").keys()
    assert result["ours_tok_s"] > 0 and result["hf_cache"] in generation.CACHES


def test_log_probabilities_are_those_of_the_full_logits():
    result = logprobs.compare(tokens=8, size=16, rounds=1)
    assert names(result) == kept("logprobs").keys()
    assert result["largest_difference"] < (1e-4 if result["dtype"] == "torch.float32" else 0.1)


@pytest.mark.slow
def test_what_stages_move_adds_up_in_bfloat16(process):
    """At the published learning rate and length of a stage; the figures stand in docs/log.md."""
    found = carried.carried()
    print(found)  # shown by pytest -s
    assert names(found) == kept("carried").keys()
    assert found["carried"] == 1
    first, second, third = found["differ"]
    assert 0.1 < first < 0.3 and second > first + 0.1 and third > second + 0.1
    rebuilt = found["rebuilt"]
    assert rebuilt["carried"] < 0.3 and rebuilt["differ"][2] < rebuilt["differ"][0] + 0.03  # what carrying is for


def test_results_are_kept_for_the_default_arguments_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    for line, files in ((["--json", "--rounds", "2"], 0), ([], 0), (["--json"], 1)):
        arguments = parser.parse_args(line)
        keep = timing.is_default(parser, arguments)
        timing.report("figures", {"seconds": 1.5}, as_json=arguments.json, keep=keep)
        assert len(list(tmp_path.iterdir())) == files and "1.5" in capsys.readouterr().out

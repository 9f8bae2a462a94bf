"""The endpoint against a server that we didn't write: transformers serve, with a tiny model of no use."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_avatar.endpoint import Endpoint, question
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.http_judge import HttpJudge, Verdict, read_verdict
from tests.data.media import make_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    yield f"http://127.0.0.1:{port}/v1", str(folder)
    process.kill()
    process.wait()


def test_transformers_serve_answers_and_its_nonsense_is_masked(server):
    url, model = server
    words = Endpoint(url, model, str, max_tokens=4, deadline_s=30)
    words.wait_until_ready(120, question("You are a helpful", "what moves ?"))
    answers = words.ask(question("think", f"what moves ? {k}") for k in range(8))
    assert all(isinstance(answer, str) and answer for answer in answers) and not words.failures
    schema = Verdict.model_json_schema()
    judge = Endpoint(url, model, read_verdict, schema=schema, max_tokens=8, retries=1, deadline_s=30)
    [scores] = HttpJudge(judge).score(Sample("s", "l", "train", "f", "what ?", "A", "other"), ["red"], [])
    assert all(score != score for score in scores.values())
    assert any("no verdict" in reason or "HTTP 4" in reason for reason in judge.failures), judge.failures
    words.close()
    judge.close()

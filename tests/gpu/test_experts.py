"""A mixture on a GPU: products of all experts against a loop over them, and decoding by graphs against plain steps.

The same bodies run without a GPU, where torch goes through the experts itself and a graph is the step once more.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from bench.ops import Replayed
from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.policy import generate as generation
from megatron_avatar.policy import kept, selftest
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.decode import Decoder
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.mixture import stays_on_device, through_experts
from megatron_avatar.policy.weights import load_hf
from tests.policy.tiny import KINDS, tiny_omni3, tiny_omni3_config, tiny_omni3_prompts

QWEN = selftest.Sizes(tokens=512, top=8, experts=128, first=32, own=16, hidden=2048, inner=768)  # a rank's of eight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("device", "sizes"), [
    ("cpu", selftest.Sizes()), ("cpu", selftest.Sizes(first=0, own=6)),
    pytest.param("cuda", selftest.Sizes(), marks=pytest.mark.gpu),
    pytest.param("cuda", selftest.Sizes(first=0, own=6), marks=pytest.mark.gpu),
    pytest.param("cuda", QWEN, marks=pytest.mark.gpu),
])  # fmt: skip
def test_experts_in_one_product_are_a_loop_over_them(device, sizes, dtype):
    """Outputs and gradients, those of an expert without a token among them."""
    assert selftest.experts(through_experts, torch.device(device), dtype, sizes) == ""


@contextmanager
def steps_as_graphs():
    """Without a GPU: a "graph" repeats the step on the tensors that it was captured with."""

    def capture(self, shape, inputs, received):
        inputs, output = inputs.clone(), self.step(shape, inputs, received)
        return Replayed(self, output, shape, inputs, received), inputs, received, output

    def begin(self, *arguments, plain=Decoder.__init__):
        plain(self, *arguments)
        self._uses_graphs = True

    with ExitStack() as patches:
        for target, name, value in (
            (generation, "KeyValueCache", lambda *rest, **_: KeyValueCache(*rest, static=True)),
            (kept, "memory_of", lambda _: 1 << 40), (Decoder, "_capture", capture), (Decoder, "__init__", begin),
            (torch.cuda, "graph_pool_handle", lambda: 0),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(target, name, value))
        yield


@pytest.mark.parametrize(("device", "dtype"), [
    ("cpu", "float32"), pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    pytest.param("cuda", "float32", marks=pytest.mark.gpu),
])  # fmt: skip
def test_graphs_draw_what_plain_steps_draw(tmp_path, backend, device, dtype):
    """Tokens, their log-probabilities and the experts that they went to, of prompts of all kinds; in dtypes whose
    products ask the host there are no graphs."""
    if backend.device.type != device:
        pytest.skip(f"the backend of this machine is on {backend.device.type}")
    config = tiny_omni3_config()
    config.text_config.eos_token_id = config.eos_token_id = 7
    tiny_omni3(config).save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(dtype=dtype), ParallelConfig())
    load_hf(policy, tmp_path)
    prompts = list(tiny_omni3_prompts(policy.hf_config).values())
    media = policy.embed_media(prompts)

    def drawn():
        routes: list = []
        rows = generate(policy, prompts, 4, SamplingConfig(max_new_tokens=24), list(KINDS), media=media, routes=routes)
        return list(itertools.chain(*rows)), list(itertools.chain(*routes))

    with mock.patch.object(Decoder, "_replay", Decoder.step):
        plain, chosen = drawn()
    policy.kept_generation = None
    with steps_as_graphs() if device == "cpu" else ExitStack():
        for _ in range(2):  # the second call finds the first one's graphs
            rows, routes = drawn()
            graphs = [graph for decoder in policy.kept_generation.decoders for graph in decoder._graphs]
            assert bool(graphs) == (device == "cpu" or stays_on_device(getattr(torch, dtype)))
            for row, other in zip(rows, plain, strict=True):
                assert np.array_equal(row.token_ids, other.token_ids)
                np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-5 if dtype == "float32" else 1e-2)
            assert all(np.array_equal(a, b) for a, b in zip(routes, chosen, strict=True))
    assert len({len(row) for row in plain}) > 1
    policy.kept_generation = None

"""How many operations the GPU path launches, counted on the meta device at full width: no GPU, no numbers, a minute.

    python -m bench.ops [--json]

An operation is what the dispatcher sees and no view; the package's kernels count as the kernels that they launch.
`decode_layer_ops` and `decode_outer_ops` are of one decode step (64 rows of 8 prompts), `leaving_row_ops` of a row that
ends before the others, `update_layer_ops` of a layer's passes over a micro-batch of 4,096 tokens, packed groups of one
prompt and of two (more prompts, more operations: each prompt's completions see its own prefix), `update_layer_bytes`
what of these is no matrix product or attention reads and writes, `head_ops` and `head_bytes` the same of the
log-probabilities of 4,096 completion tokens, `captures` and `plain_steps` the CUDA graphs that each of four calls of
`generate` would capture, and the steps that it would launch operation by operation, `recaptures` those graphs of the
last call that were there before, `host_reads_a_token` and `host_waits_a_token` how often the host asks for drawn
tokens, and how often the device idles meanwhile.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.timing import JSON_HELP, report
from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.planning.meta import META, shard_on_meta
from megatron_avatar.policy import decode, kept
from megatron_avatar.policy import generate as generation
from megatron_avatar.policy.backend import start, stop
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.cache import KeyValueCache, Room
from megatron_avatar.policy.decode import INPUTS, Decoder
from megatron_avatar.policy.logprobs import completion_logprobs
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.routes import Routes
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt

TINY = str(Path(__file__).resolve().parents[1] / "assets" / "tiny_base")
SHAPES = {"3b": "qwen2_5_omni_3b", "7b": "qwen2_5_omni_7b", "vl3_4b": "qwen3_vl_4b", "omni3": "qwen3_omni_30b"}
# Kernels of one operation, sums of a backward pass's parts among them; else 1.
LAUNCHES = {"avatar::attend": 2, "avatar::draw": 2, "avatar::norm_backward": 2, "avatar::split_norm_rope_backward": 3}
PROMPTS, ROWS, PROMPT, STEPS = 8, 8, 3492, 512
TOKENS, COMPLETIONS = 4096, 8  # of a micro-batch; of each of its prompts, which take half of its tokens
PACKED = {"one prompt": 1, "two prompts": 2}
PRODUCTS = ("mm", "addmm", "bmm", "linear", "attention", "attend", "grouped")


class Counted(TorchDispatchMode):
    """Counts operations by name, views apart, and the bytes that all but products and attention touch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        return sum(LAUNCHES.get(name, 1) * count for name, count in self.names.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().rsplit(".", 1)[0]
        allocates = name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
        if not (func.is_view or allocates or name in ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")):
            self.names[name] += 1
            if not any(part in name for part in PRODUCTS):
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
                self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@contextmanager
def shard(shape: str) -> Iterator[OmniPolicy]:
    """One rank's whole model in bfloat16, without numbers."""
    from megatron_avatar import config

    folder = f"{config.__path__[0]}/shapes/{SHAPES[shape]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with shard_on_meta(folder, ModelConfig(dtype="bfloat16"), ParallelConfig(), 0, 0) as policy:
            yield policy


def decode_step(policy: OmniPolicy) -> dict[str, Any]:
    """Operations of a layer, and of a step outside of its layers."""
    layers = policy.language_model.decoder.layers
    attention = layers[0].self_attention
    room = Room(pages=PROMPTS * -(-PROMPT // 512), page=512, rows=PROMPTS * ROWS, steps=STEPS, rows_per_prompt=ROWS,
                pages_per_prompt=-(-PROMPT // 512))  # fmt: skip
    cache = KeyValueCache(
        room, [layer.layer_number for layer in layers], attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head, torch.bfloat16, META, static=True,
    )  # fmt: skip
    for prompt in range(PROMPTS):
        cache.admit(prompt, PROMPT)
        cache.add_rows([prompt] * ROWS)
    decoder = Decoder(policy, cache, SamplingConfig(), torch.zeros(policy.vocab_size, dtype=torch.bool, device=META),
                      False)  # fmt: skip
    shape = cache.prepare(np.zeros(PROMPTS * ROWS, np.int64))
    inside: list[int] = []
    with Counted() as counted, torch.no_grad():
        for layer in layers:
            def tracked(*args: Any, plain: Any = layer.decode, **kwargs: Any) -> Any:
                before = counted.total
                out = plain(*args, **kwargs)
                inside.append(counted.total - before)
                return out

            layer.decode = tracked
        decoder.step(shape, torch.zeros(INPUTS, shape.rows, dtype=torch.float64, device=META), None)
        for layer in layers:
            del layer.decode
    assert len(set(inside[1:])) == 1, inside
    with Counted() as leaving:
        cache.keep_rows(np.arange(PROMPTS * ROWS) > 0)
    return {"decode_layer_ops": inside[1], "decode_outer_ops": counted.total - sum(inside),
            "leaving_row_ops": leaving.total}  # fmt: skip


def segments_of(prompts: int) -> Tensor:
    """Segments of TOKENS packed tokens of `prompts` equal groups."""
    group, rows = TOKENS // prompts, []
    prefix, length = group // 2, group // 2 // COMPLETIONS
    for first in range(0, TOKENS, group):
        rows.append([first, prefix, 0, 0])
        rows += [[first + prefix + length * k, length, first, prefix] for k in range(COMPLETIONS)]
    return torch.tensor(rows, dtype=torch.int32)


def update_layer(policy: OmniPolicy) -> dict[str, Any]:
    """Operations of a layer's passes over micro-batches of one prompt and two, and the bytes beside its products."""
    found: dict[str, Any] = {"update_layer_ops": {}, "update_layer_bytes": {}}
    for name, prompts in PACKED.items():
        passes = update_passes(policy, segments_of(prompts))
        found["update_layer_ops"][name] = {which: counted.total for which, counted in passes.items()}
        found["update_layer_bytes"][name] = {which: counted.bytes for which, counted in passes.items()}
    return found


def update_passes(policy: OmniPolicy, segments: Tensor) -> dict[str, Counted]:
    """What a layer's forward and its backward pass over packed tokens do."""
    layer, hidden = policy.language_model.decoder.layers[1], policy.config.hidden_size
    layer.zero_grad(set_to_none=True)  # Megatron-Core's buffers take gradients as they come
    positions = torch.zeros(3, 1, TOKENS, dtype=torch.int64, device=META)
    angles = policy.language_model.rotary_pos_emb(positions, policy.config.mrope_section)
    stream = torch.zeros(TOKENS, 1, hidden, device=META, requires_grad=True)
    routes = None
    if top := policy.config.experts_per_token:  # compared with generation's, of all that are no prompt's
        outputs = int(segments[segments[:, 3] > 0, 1].sum())
        recorded = torch.zeros(outputs, 1, top, dtype=torch.uint8, device=META)
        places = torch.zeros(outputs, dtype=torch.int64, device=META)
        routes = Routes(recorded, places, layer.layer_number, replay=False)
    with Counted() as forward:
        out, _ = layer(stream, segments, rotary_pos_emb=angles, attention_bias=routes)
    with Counted() as backward:
        out.sum().backward()
    return {"forward": forward, "backward": backward}


def head_of(policy: OmniPolicy) -> dict[str, Any]:
    """Operations of the log-probabilities of TOKENS completion tokens, and the bytes beside their products."""
    weight = policy.output_weight.detach().requires_grad_()
    hidden = torch.zeros(TOKENS, policy.config.hidden_size, dtype=weight.dtype, device=META, requires_grad=True)
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=META)
    with Counted() as forward:
        scores, _ = completion_logprobs(hidden, weight, ids, temperature=1.0, vocab_size=policy.vocab_size)
    with Counted() as backward:
        scores.sum().backward()
    return {"head_ops": {"forward": forward.total, "backward": backward.total},
            "head_bytes": {"forward": forward.bytes, "backward": backward.bytes}}  # fmt: skip


class Replayed:
    """In a CUDA graph's place: the step again, on the tensors that it was captured with."""

    def __init__(self, decoder: Decoder, output: Tensor, *arguments: Any) -> None:
        self.decoder, self.output, self.arguments = decoder, output, arguments

    def replay(self) -> None:
        self.output.copy_(self.decoder.step(*self.arguments))


def second_call() -> dict[str, Any]:
    """What later calls of `generate` on the tiny model do anew, with shapes as a GPU has them: captures and plain steps
    of each call, shapes that the last one captures again; times that the host reads numbers from the device, a token,
    and of these those at which the device has nothing else to do."""
    captured: list[Any] = []
    waits = Counter[str]()

    def capture(self: Decoder, shape: Any, inputs: Tensor, received: Tensor | None) -> Any:
        inputs, output = inputs.clone(), self.step(shape, inputs, received)
        captured.append(shape)
        return Replayed(self, output, shape, inputs, received), inputs, received, output

    def send(*arguments: Any, plain: Any = generation.send) -> generation.Drawn:
        waits["under way"] += 1
        return plain(*arguments)

    def read(self: generation.Drawn, plain: Any = generation.Drawn.read) -> np.ndarray:
        waits["under way"] -= 1
        waits["idle"] += waits["under way"] == 0
        return plain(self)

    def static(*arguments: Any, **_: Any) -> KeyValueCache:
        return KeyValueCache(*arguments, static=True)

    def waited(self: Tensor, *arguments: Any, plain: Any = Tensor.cpu, **kwargs: Any) -> Tensor:
        waits["cpu"] += 1
        return plain(self, *arguments, **kwargs)

    def replayed(self: Decoder, *arguments: Any, plain: Any = Decoder.__init__) -> None:
        plain(self, *arguments)
        self._uses_graphs = True

    backend = start(ParallelConfig())
    try:
        policy = build_policy(TINY, backend, ModelConfig(path=TINY), ParallelConfig())
        load_hf(policy, TINY)
        rng = np.random.default_rng(0)
        places = np.tile(np.arange(20), (3, 1))
        prompts = [Prompt(str(k), "plain", rng.integers(200, 300, 20), places) for k in range(3)]
        keys, sampling = [str(k) for k in range(3)], SamplingConfig(max_new_tokens=24)
        with ExitStack() as patches:
            for target, value in (
                (f"{generation.__name__}.KeyValueCache", static), (f"{kept.__name__}.memory_of", lambda _: 1 << 40),
                (f"{generation.__name__}.may_run_behind", lambda _: True), (f"{generation.__name__}.send", send),
                (f"{decode.__name__}.Decoder._capture", capture), (f"{decode.__name__}.Decoder.__init__", replayed),
                ("torch.cuda.graph_pool_handle", lambda: 0),
            ):  # fmt: skip
                patches.enter_context(mock.patch(target, value))
            counts = [(0, 0)]

            def count() -> None:
                assert isinstance(policy.kept_generation, kept.Kept)
                plain = sum(decoder._steps.total() for decoder in policy.kept_generation.decoders)
                counts.append((len(captured), plain))

            for _ in range(3):  # a shape is captured when it is met for the third time
                generation.generate(policy, prompts, 4, sampling, keys)
                count()
            before = len(captured)
            waits.clear()  # the calls before are read to their ends
            with mock.patch("torch.Tensor.cpu", waited), mock.patch.object(generation.Drawn, "read", read):
                completions = generation.generate(policy, prompts, 4, sampling, keys)
            count()
        longest = max(len(row) for group in completions for row in group)
        again = [shape for shape in captured[before:] if shape in captured[:before]]
        captures, plain_steps = (np.diff(column).tolist() for column in zip(*counts, strict=True))
        return {"captures": captures, "plain_steps": plain_steps, "recaptures": len(again),
                "host_reads_a_token": waits["cpu"] / longest,
                "host_waits_a_token": waits["idle"] / longest}  # fmt: skip
    finally:
        stop()


def measure() -> dict[str, Any]:
    """All counts by model, and of a second call of `generate`."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        with shard(name) as policy:
            found[name] = {**decode_step(policy), **update_layer(policy), **head_of(policy)}
    return {**found, **second_call()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    as_json = parser.parse_args().json
    report("ops", measure(), as_json=as_json, keep=as_json)


if __name__ == "__main__":
    main()

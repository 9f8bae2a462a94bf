"""The error between generation and training by what is rounded, simulated on a CPU in minutes: what model.dtype and
model.residual should be.

    python -m bench.precision [--json]

A decoder of random weights scores the same tokens twice. Once as training does: products summed in one order, attention
over blocks of keys with a running maximum. Once as generation does: the prompt so too, then sums of products split in
parts, attention split over pages and merged. All sums are in float32, and values are rounded where the GPU's kernels
round them; what differs is order alone. Reported is the mean of exp|difference| of the log-probabilities of sampled
tokens, `sure` for a head of 0.5 to 1 nat, `random` for one whose logits have a deviation of 3.

The sure head: a token of each position has a lead, some leads long and some short, along what tells the hidden state
from the mean of all; the leads are scaled to the entropy. Random weights know no outlier channels: trained ones do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import JSON_HELP, is_default, report

ENTROPY = 0.75  # nats, of the sure head
DEVIATION = 3.0  # of the random head's logits
DEFAULT = "bfloat16, residual float32"  # model.dtype and model.residual of the recipes for GPUs


@dataclass(frozen=True)
class Size:
    layers: int = 36
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 1408
    vocabulary: int = 32768
    tokens: int = 256
    prompt: int = 64
    block: int = 64  # keys that attention takes at a time in training
    page: int = 48  # and in generation


TINY = Size(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128, vocabulary=512, tokens=48, prompt=16,
            block=16, page=24)


@dataclass(frozen=True)
class Choice:
    """What is rounded to `dtype`, and which of generation's sums are made in another order than training's."""

    dtype: torch.dtype
    stream: bool = True  # the residual stream is rounded at every addition
    branches: bool = True  # what attention and feed-forward add to it is
    head: bool = True  # the hidden state and the weights of the head are
    logits: bool = False  # the logits are
    products: bool = True  # sums of products differ
    attention: bool = True  # sums of attention do


HALF, SHORT = torch.bfloat16, torch.float16
CHOICES = {
    "bfloat16": Choice(HALF),
    DEFAULT: Choice(HALF, stream=False),
    "bfloat16, residual and branches float32": Choice(HALF, stream=False, branches=False),
    "bfloat16, residual and head float32": Choice(HALF, stream=False, head=False),
    "bfloat16, residual float32, logits bfloat16": Choice(HALF, stream=False, logits=True),
    "bfloat16, only attention differs": Choice(HALF, products=False),
    "bfloat16, residual float32, only attention differs": Choice(HALF, stream=False, products=False),
    "bfloat16, no sum differs": Choice(HALF, products=False, attention=False),
    "float16": Choice(SHORT),
    "float16, residual float32": Choice(SHORT, stream=False),
    "float16, residual and head float32": Choice(SHORT, stream=False, head=False),
    "float32": Choice(torch.float32),
}


class Model:
    """Random weights of unit gain, of bfloat16's numbers, and the tokens that are scored."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)
        d = size.hidden // size.heads
        rows = (size.heads + 2 * size.kv_heads) * d
        self.layers = [
            {"qkv": self.matrix(rows, size.hidden), "proj": self.matrix(size.hidden, size.hidden),
             "fc1": self.matrix(2 * size.ffn, size.hidden), "fc2": self.matrix(size.hidden, size.ffn)}
            for _ in range(size.layers)
        ]  # fmt: skip
        self.embedded = torch.randn(size.tokens, size.hidden, generator=self.generator).bfloat16().float()
        angles = torch.arange(size.tokens)[:, None] * 1e6 ** (-torch.arange(0, d, 2) / d)
        self.rotation = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def matrix(self, rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=self.generator) / math.sqrt(columns)
        return weight.bfloat16().float()

    def hidden(self, choice: Choice, *, generating: bool) -> Tensor:
        """The normed state [T - P, H] of the completion's tokens, float32 with the values that a GPU would have."""
        prompt = self.size.prompt
        rounded = _rounding(choice.dtype)
        branch = rounded if choice.branches else _same
        stream_of = rounded if choice.stream else _same

        def product(x: Tensor, weight: Tensor) -> Tensor:
            if not (generating and choice.products):
                return x @ weight.t()
            parts = [x[prompt:, k::4] @ weight[:, k::4].t() for k in range(4)]
            return torch.cat([x[:prompt] @ weight.t(), (parts[0] + parts[1]) + (parts[2] + parts[3])])

        stream = self.embedded
        for layer in self.layers:
            query, key, value = self._split(rounded(product(rounded(_norm(stream)), layer["qkv"])), rounded)
            attended = attend_blocks(query, key, value, rounded, self.size.block)
            if generating and choice.attention:
                attended[:, prompt:] = attend_pages(query, key, value, rounded, self.size.page)[:, prompt:]
            attended = rounded(attended).transpose(0, 1).flatten(1)
            stream = stream_of(stream + branch(product(attended, layer["proj"])))
            gate, up = rounded(product(rounded(_norm(stream)), layer["fc1"])).chunk(2, dim=1)
            stream = stream_of(stream + branch(product(rounded(F.silu(gate) * up), layer["fc2"])))
        normed = _norm(stream)[prompt:]
        return rounded(normed) if choice.head else normed

    def _split(self, mixed: Tensor, rounded: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Query [heads, T, d], rotated, and key and value of each query head alike."""
        size, (cos, sin) = self.size, self.rotation
        d = size.hidden // size.heads
        parts = [x.unflatten(1, (-1, d)).transpose(0, 1)
                 for x in mixed.split([size.heads * d, size.kv_heads * d, size.kv_heads * d], dim=1)]  # fmt: skip

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return rounded(x * cos + torch.cat([-second, first], dim=-1) * sin)

        share = size.heads // size.kv_heads
        return [rotate(parts[0]), *(x.repeat_interleave(share, dim=0) for x in (rotate(parts[1]), parts[2]))]


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, rounded: Callable, block: int) -> Tensor:
    """Causal attention [heads, T, d] with a running maximum over blocks of keys, probabilities rounded in each."""
    highest = query.new_full((*query.shape[:2], 1), -1e30)
    total, out = torch.zeros_like(highest), torch.zeros_like(query)
    for first in range(0, key.shape[1], block):
        scores = _scores(query, key[:, first : first + block], first)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))
        scale, exp = (highest - new).exp(), (scores - new).exp()
        total = total * scale + exp.sum(-1, keepdim=True)
        out = out * scale + rounded(exp) @ value[:, first : first + block]
        highest = new
    return out / total


def attend_pages(query: Tensor, key: Tensor, value: Tensor, rounded: Callable, page: int) -> Tensor:
    """The same, each page of keys with a maximum of its own, and all merged at the end."""
    outs, normalisers = [], []
    for first in range(0, key.shape[1], page):
        scores = _scores(query, key[:, first : first + page], first)
        highest = scores.amax(-1, keepdim=True)
        exp = (scores - highest).exp()
        total = exp.sum(-1, keepdim=True)
        outs.append(rounded(exp) @ value[:, first : first + page] / total)
        normalisers.append(highest + total.log())
    weights = torch.stack(normalisers).softmax(0)
    return (weights * torch.stack(outs)).sum(0)


def _scores(query: Tensor, key: Tensor, first: int) -> Tensor:
    """Scaled scores [heads, T, K] of the keys from `first` on; later ones count as nothing."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    own = torch.arange(query.shape[1])[:, None]
    return scores.masked_fill(torch.arange(first, first + key.shape[1]) > own, -1e30)


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _rounding(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


def _same(x: Tensor) -> Tensor:
    return x


# ----------------------------------------------------------------------------------------------------------------
# Heads


def random_head(model: Model) -> Tensor:
    """Weights [V, H] whose logits of a normed state have a deviation of DEVIATION."""
    size = model.size
    return DEVIATION * model.matrix(size.vocabulary, size.hidden)


def sure_head(model: Model, hidden: Tensor) -> tuple[Tensor, float]:
    """Weights [V, H] under which the states `hidden` [N, H] have a mean entropy of ENTROPY nats, and that entropy."""
    base = random_head(model)
    apart = hidden - hidden.mean(0)
    apart = apart / (apart * hidden).sum(1, keepdim=True)  # a lead of one logit each
    share = torch.rand(len(hidden), 1, generator=model.generator)
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        weight = base.clone()
        weight[: len(hidden)] += middle * (0.5 + share) * apart
        entropy = float(_entropy(hidden @ weight.t()).mean())
        low, high = (middle, high) if entropy > ENTROPY else (low, middle)
        if abs(entropy - ENTROPY) < 0.01:
            break
    return weight, entropy


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def scored(choice: Choice, hidden: Tensor, head: Tensor, *, generating: bool) -> Tensor:
    """Log-probabilities [N, V] of a head whose sums generation may split otherwise."""
    rounded = _rounding(choice.dtype)
    weight = rounded(head) if choice.head else head
    if generating and choice.products:
        middle = hidden.shape[1] // 2
        logits = hidden[:, :middle] @ weight[:, :middle].t() + hidden[:, middle:] @ weight[:, middle:].t()
    else:
        logits = hidden @ weight.t()
    return (rounded(logits) if choice.logits else logits).log_softmax(-1)


# ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(size: Size, seeds: int = 2, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """{choice: {sure, random}}, mean exp|difference|, and beside them the heads' entropies."""
    sums = {name: {"sure": 0.0, "random": 0.0} for name in CHOICES}
    nats = {"sure": 0.0, "random": 0.0}
    for seed in range(seeds):
        model = Model(size, seed)
        exact = model.hidden(CHOICES["float32"], generating=False)
        weight, sure = sure_head(model, exact)
        heads = {"sure": weight, "random": random_head(model)}
        for kind, entropy in (("sure", sure), ("random", float(_entropy(exact @ heads["random"].t()).mean()))):
            nats[kind] += entropy / seeds
        tokens = {kind: torch.multinomial((exact @ head.t()).softmax(-1), 16, replacement=True,
                                          generator=model.generator) for kind, head in heads.items()}  # fmt: skip
        for name, choice in CHOICES.items():
            states = [model.hidden(choice, generating=generating) for generating in (False, True)]
            for kind, head in heads.items():
                train, generate = (scored(choice, state, head, generating=bool(k)).gather(1, tokens[kind])
                                   for k, state in enumerate(states))  # fmt: skip
                sums[name][kind] += float((train - generate).abs().double().exp().mean()) / seeds
            say(f"seed {seed}, {name}: {sums[name]}")
    choices = {name: {kind: round(value, 5) for kind, value in found.items()} for name, found in sums.items()}
    return {**choices, "entropy": {kind: round(value, 3) for kind, value in nats.items()}, "default": DEFAULT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small decoder and one seed, in a second; nothing kept")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    options = parser.parse_args()
    result = measure(TINY, 1) if options.tiny else measure(Size())
    report("precision", result, as_json=options.json, keep=is_default(parser, options))


if __name__ == "__main__":
    main()

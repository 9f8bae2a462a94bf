"""Each of the package's kernels against the torch function that it equals, on small tensors of a device.

Triton may be importable and unable to build (no C compiler, no Python.h, a GPU that it doesn't know): that is found
before training, once a process, and torch's operations run instead (fusions.py). What breaks the GPU itself, as a
wrong address does, ends the process: `doctor` asks in one of its own. Heads of 128 and the 7B's rows, which
need the most of a GPU; attention with as many queries as one program takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy.kernels import attend, draw, head, merge, norm, rope, swiglu
from megatron_avatar.policy.selftest import differs

# Of the largest number: one rounding or two to a dtype; float32 attention on a GPU isn't torch's to the last digits.
# By the result's own dtype; log-probabilities are in float32 whatever the model is in, and each ratio rests on them.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}
EXACT = {"draw": 3e-5, "add_chunk": 3e-5}
WIDTH, INNER, TOKENS, EPS = 3584, 1100, 70, 1e-6
GROUPS, SHARE, SIZE, FEW, SOME = 2, 7, 128, 5, 17
PAGE, PAGE_TOKENS, READERS, ROWS, OWN = 96, (96, 54), 8, 10, 544
VOCABULARY = 5000


class Inputs:
    """The same random numbers each time, on the device and in the dtype that are asked."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float32)

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def angles(self, tokens: int) -> Tensor:
        turn = self.wide(tokens, SIZE)
        return torch.stack([turn.cos(), turn.sin()])

    def norms(self) -> rope.HeadNorms:
        return rope.HeadNorms(self.normal(SIZE), self.normal(SIZE), EPS)


def add_norm(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    x, weight = of.normal(TOKENS, WIDTH), of.normal(WIDTH)
    return (*run(x, of.wide(TOKENS, WIDTH), weight, EPS), run(x, None, weight, EPS)[1])


def norm_backward(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    grad, extra, stream = of.normal(TOKENS, WIDTH), of.wide(TOKENS, WIDTH), of.wide(TOKENS, WIDTH)
    weight = of.normal(WIDTH)
    return (*run(grad, extra, stream, weight, EPS), *run(grad, None, stream, weight, EPS))


def torch_norm_backward(
    grad: Tensor, extra: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    own, of_weight = norm.torch_norm_backward(grad, stream, weight, eps)
    return own if extra is None else own + extra, of_weight


def silu(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    return (run(of.normal(3, 2 * INNER)),)


def silu_backward(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    return (run(of.normal(3, INNER), of.normal(3, 2 * INNER)),)


def split(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    mixed, angles = of.normal(FEW, GROUPS, SHARE + 2, SIZE), of.angles(FEW)
    return (*run(mixed, angles), *run(mixed, angles, of.norms()))


def split_backward(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    query, key, value = (of.normal(FEW, heads, SIZE) for heads in (GROUPS * SHARE, GROUPS, GROUPS))
    return (run(query, key, value, of.angles(FEW)),)


def split_norm_backward(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    query, key, value = (of.normal(SOME, heads, SIZE) for heads in (GROUPS * SHARE, GROUPS, GROUPS))
    return run(query, key, value, of.angles(SOME), of.normal(SOME, GROUPS, SHARE + 2, SIZE), of.norms())


def decode(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    mixed, angles, lengths = of.normal(FEW, GROUPS, SHARE + 2, SIZE), of.angles(FEW), of.put(torch.arange(FEW) * 3 % 7)
    stores = [of.normal(6, GROUPS, 7, SIZE) for _ in "kv"]
    return (run(mixed, angles, *stores, lengths), run(mixed, angles, *stores, lengths, of.norms()), *stores)


def attention(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    """READERS rows read two pages, the second of which isn't full; the others none. Own tokens: one, some, most."""
    count, reads = len(PAGE_TOKENS), torch.arange(ROWS) < READERS
    read = torch.arange(READERS).expand(count, -1)
    parts = torch.arange(ROWS)[:, None] + READERS * torch.arange(count)
    lengths = torch.arange(ROWS) * 59 % OWN
    empty = torch.arange(PAGE) >= torch.tensor(PAGE_TOKENS)[:, None]
    later = torch.arange(OWN) > lengths[:, None]
    masks = (torch.zeros(x.shape).masked_fill_(x, float("-inf")).to(of.dtype)[:, None, None] for x in (empty, later))
    empty, later = map(of.put, masks)
    absent = ~reads[:, None].expand(-1, count).contiguous()
    tables = (read.contiguous(), torch.full((count,), READERS), torch.tensor(PAGE_TOKENS), torch.arange(count),
              count * reads, parts.where(reads[:, None], 0), absent)  # fmt: skip
    pages = [of.normal(count, GROUPS, PAGE, SIZE) for _ in "kv"]
    own = [of.normal(ROWS, GROUPS, OWN, SIZE) for _ in "kv"]
    query = of.normal(ROWS, GROUPS, SHARE, SIZE)
    where = attend.Tables._make((*map(of.put, tables), empty))
    return (run(query, *pages, *own, of.put(lengths), later, where, OWN, SIZE**-0.5),)


def merged(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    """The last rows, then some that lie anywhere."""
    output, part = of.normal(TOKENS, GROUPS * SHARE, SIZE), of.normal(9, GROUPS * SHARE, SIZE)
    lse, part_lse = (3 * of.wide(GROUPS * SHARE, n).t() for n in (TOKENS, 9))
    places = of.put(torch.arange(9) * 7)
    return run(output, lse, part, part_lse, None, TOKENS - 9), run(output, lse, part, part_lse, places, 0), output


def torch_merge(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, places: Tensor | None, start: int
) -> Tensor:  # fmt: skip
    """Writes no log-sum-exps, as the kernel."""
    queries, lse = slice(start, start + len(part)) if places is None else places, lse.clone()
    merge.torch_merge_parts(output, lse, part, part_lse, queries)
    return lse[queries]


def draws(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    logits, banned = 3 * of.wide(4, VOCABULARY), of.put(torch.arange(VOCABULARY) % 3 == 0)
    uniforms = of.put(torch.tensor([0.011, 0.3, 0.62, 0.987], dtype=torch.float64))
    found = [run(logits, uniforms, 0.9, banned, greedy) for greedy in (False, True)]
    return tuple(x for ids, logprobs in found for x in (F.one_hot(ids, VOCABULARY), logprobs))


def chunk(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    state, targets = head.new_state(5, of.device), of.put(torch.arange(5) * 1999)
    for start in (0, VOCABULARY):
        run(state, 3 * of.wide(5, VOCABULARY), targets, start, 0.9)
    return (state,)


def chunk_gradient(run: Callable, of: Inputs) -> tuple[Tensor, ...]:
    logits, targets, grad = 3 * of.wide(5, VOCABULARY), of.put(torch.arange(5) * 999), of.wide(5)
    return (run(logits, targets, logits.logsumexp(-1), grad, 0, 1.0, of.dtype),)


OURS: dict[str, Callable] = {
    "add_norm": norm.triton_add_norm, "norm_backward": norm.triton_norm_backward, "swiglu": swiglu.triton_swiglu,
    "swiglu_backward": swiglu.triton_swiglu_backward, "split_rope": rope.triton_split_rope,
    "split_rope_backward": rope.triton_split_rope_backward,
    "split_norm_rope_backward": rope.triton_split_norm_rope_backward, "decode_rope": rope.triton_decode_rope,
    "attend": attend.triton_attend, "merge_parts": merge.triton_merge_parts, "draw": draw.triton_draw,
    "add_chunk": head.triton_add_chunk, "scores_gradient": head.triton_scores_gradient,
}  # fmt: skip
# What is called with one and the other, and torch's function, for each of OURS.
CASES: dict[str, tuple[Callable[[Callable, Inputs], tuple[Tensor, ...]], Callable]] = {
    "add_norm": (add_norm, norm.torch_add_norm), "norm_backward": (norm_backward, torch_norm_backward),
    "swiglu": (silu, swiglu.torch_swiglu), "swiglu_backward": (silu_backward, swiglu.torch_swiglu_backward),
    "split_rope": (split, rope.torch_split_rope),
    "split_rope_backward": (split_backward, rope.torch_split_rope_backward),
    "split_norm_rope_backward": (split_norm_backward, rope.torch_split_norm_rope_backward),
    "decode_rope": (decode, rope.torch_decode_rope), "attend": (attention, attend.torch_attend),
    "merge_parts": (merged, torch_merge), "draw": (draws, draw.torch_draw), "add_chunk": (chunk, head.torch_add_chunk),
    "scores_gradient": (chunk_gradient, head.torch_scores_gradient),
}  # fmt: skip


@torch.no_grad()
def own_kernels(kernels: Mapping[str, Callable], device: torch.device, dtype: torch.dtype) -> str:
    """The first of `kernels` (OURS) that differs from torch's function on a device, in words; empty where none does.
    What a kernel raises is the caller's to catch."""
    for name, run in kernels.items():
        case, formula = CASES[name]
        ours, theirs = (case(way, Inputs(device, dtype)) for way in (run, formula))
        for mine, right in zip(ours, theirs, strict=True):
            error = differs(mine, right)
            if not error <= EXACT.get(name, TOLERANCE.get(right.dtype, TOLERANCE[torch.float32])):
                return f"{name} differs from torch's by {error:.1e}"
    return ""

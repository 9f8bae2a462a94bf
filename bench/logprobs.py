"""Log-probabilities and entropy of completion tokens, forward and backward: ours against the full logits.

    python -m bench.logprobs --json

The naive form is what a trainer writes without thinking of memory: logits of all tokens over Qwen's vocabulary,
log_softmax, gather; its entropy takes no part in the backward pass, as ours. Hidden states and head both train. Memory
is the process's peak beyond what it held before (the device's on a GPU), gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import JSON_HELP, in_turns, is_default, medians, report
from megatron_avatar.policy.logprobs import completion_logprobs

VOCABULARY, PADDED = 151_936, 152_064  # Qwen2.5's tokens, and the rows of its output layer
TEMPERATURE = 0.9


def naive(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.log_softmax(F.linear(hidden, weight)[:, :VOCABULARY].float() / TEMPERATURE, dim=-1)
    with torch.no_grad():
        entropy = -(scores.exp() * scores).sum(dim=-1)
    return scores.gather(1, ids[:, None])[:, 0], entropy


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return completion_logprobs(hidden, weight, ids, temperature=TEMPERATURE, vocab_size=VOCABULARY)


def peak_mib(work: Callable[[], object]) -> float:
    """Most memory held at once while `work` runs, beyond what was held before, in MiB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def compare(tokens: int, size: int, rounds: int) -> dict[str, Any]:
    """Seconds, MiB and the largest difference of log-probabilities and entropies, for N `tokens` and a hidden size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(n, size, device=device).mul_(size**-0.25).to(dtype).requires_grad_() for n in (tokens, PADDED)
    )
    ids = torch.randint(VOCABULARY, (tokens,), device=device)

    results: dict[str, Tensor] = {}

    def step(form: Callable) -> None:
        scores, entropy = form(hidden, weight, ids)
        torch.autograd.grad(scores.mean(), (hidden, weight))
        results[form.__name__] = torch.stack([scores.detach(), entropy])

    steps = {form.__name__: partial(step, form) for form in (ours, naive)}
    memory = {name: peak_mib(work) for name, work in steps.items()}
    seconds = medians(in_turns(steps, rounds, warmup=0))
    return {
        "tokens": tokens, "hidden": size, "vocabulary": PADDED, "dtype": str(dtype),
        "ours_s": seconds["ours"], "naive_s": seconds["naive"], "speedup": seconds["naive"] / seconds["ours"],
        "ours_mib": memory["ours"], "naive_mib": memory["naive"], "memory_ratio": memory["naive"] / memory["ours"],
        "largest_difference": float((results["ours"] - results["naive"]).abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    result = compare(arguments.tokens, arguments.hidden, arguments.rounds)
    report("logprobs", result, as_json=arguments.json, keep=is_default(parser, arguments))


if __name__ == "__main__":
    main()

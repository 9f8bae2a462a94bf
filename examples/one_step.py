"""AVATAR in one file: plain tensors, a tiny language model, and every part of a step: python examples/one_step.py

Nothing here imports the package. The trainer does the same with media, on Megatron-Core and over many ranks; a test
holds this file's loss equal to the trainer's. The names are those of arXiv 2508.03100.

The task: a prompt names two digits, and the answer is the larger one. A completion has L tokens.
"""

from __future__ import annotations

import argparse
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

END, ASK, HINT = 10, 11, 12  # behind the digits 0 to 9
N_ON, N_OFF = 4, 4  # fresh and replayed completions of a prompt
LAMBDA, ALPHA, BETA, CLIP, DUAL_CLIP = 0.3, 1.0, 0.02, 0.2, 3.0
PATIENCE, WINDOW = 3, 20
LogProbs = Callable[[list[int], Tensor], Tensor]  # prompt, completion [L] -> log-probabilities [L]


@dataclass
class Row:
    """A completion and what is known of it; `old` are log-probabilities [L] at the time when it was sampled."""

    prompt: list[int]
    key: tuple[str, str]  # sample and variant: R-bar and the buffer go by identity, never by text
    tokens: Tensor
    old: Tensor
    reward: float
    on_policy: bool = True
    advantage: float = 0.0


@dataclass
class Memory:
    """What outlives a step: rewards for R-bar (VCRS), streaks of visits without a solution, the replay buffer."""

    rewards: dict = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=WINDOW)))
    streak: dict = field(default_factory=lambda: defaultdict(int))
    buffer: dict = field(default_factory=lambda: defaultdict(list))

    def baseline(self, key: tuple[str, str]) -> float:
        return sum(self.rewards[key]) / len(self.rewards[key])


# ---- the formulas ----------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor) -> Tensor:
    """On-policy [n]: (R - mean) / (std + 1e-4), and zero where all rewards are equal (GRPO; Eq. 2)."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def replayed_advantages(rewards: Tensor, baselines: Tensor, sigma: float) -> Tensor:
    """Off-policy [m]: (R - R-bar(q)) / max(sigma, 0.1), clipped to +-5 (VCRS)."""
    return ((rewards - baselines) / max(sigma, 0.1)).clamp(-5, 5)


def temporal_weights(length: int) -> Tensor:
    """[L]: 1 + lambda (2t' - 1)^2 with t' = t / (L - 1): planning and conclusion count more (TAS)."""
    t = torch.arange(length) / max(length - 1, 1)
    return 1 + LAMBDA * (2 * t - 1) ** 2


def loss(rows: list[Row], policy: LogProbs, reference: LogProbs) -> Tensor:
    """-(J_on + alpha J_off - beta KL): means over a completion's tokens, then over the completions of each part."""
    counts, total = {side: sum(row.on_policy is side for row in rows) for side in (True, False)}, torch.zeros(())
    for row in rows:
        new = policy(row.prompt, row.tokens)
        ratio = (new - row.old).clamp(-20, 20).exp()
        advantage = row.advantage * temporal_weights(len(row.tokens))
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        if row.advantage < 0:  # a stale ratio must not blow a failure up
            surrogate = torch.maximum(surrogate, DUAL_CLIP * advantage)
        share = (1.0 if row.on_policy else ALPHA) / counts[row.on_policy]
        total = total - share * surrogate.mean()
        if row.on_policy:  # on another policy's samples the estimate would be biased
            gap = reference(row.prompt, row.tokens) - new
            total = total + BETA * share * (gap.exp() - gap - 1).mean()
    return total


# ---- the policy ------------------------------------------------------------------------------------------------


def tiny_model() -> Qwen2ForCausalLM:
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=13, num_key_value_heads=2, tie_word_embeddings=True, **shape))


def log_probs(model: Qwen2ForCausalLM) -> LogProbs:
    """Log-probabilities [L] of a completion's tokens under the full softmax."""

    def score(prompt: list[int], completion: Tensor) -> Tensor:
        ids = torch.cat([torch.tensor(prompt), completion])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1).gather(-1, completion[:, None])[:, 0]

    return score


@torch.no_grad()
def sample(model: Qwen2ForCausalLM, prompt: list[int], most: int = 3) -> Tensor:
    """One completion [L] at temperature 1, ended by END or by length."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and (len(ids) == len(prompt) or ids[-1] != END):
        ids.append(int(torch.multinomial(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1), 1)))
    return torch.tensor(ids[len(prompt) :])


def reward(tokens: Tensor, answer: int) -> float:
    """Format 0.5: one digit and END. Accuracy 0.5: the right one first."""
    well_formed = len(tokens) == 2 and int(tokens[0]) < 10 and int(tokens[1]) == END
    return 0.5 * well_formed + 0.5 * (int(tokens[0]) == answer)


# ---- a step ----------------------------------------------------------------------------------------------------


def fresh_group(model: Qwen2ForCausalLM, sample_id: str, memory: Memory) -> list[Row]:
    """n_on completions of a prompt, with its hint where `PATIENCE` plain visits in a row solved nothing."""
    first, second = map(int, sample_id)
    variant = "hinted" if memory.streak[sample_id] >= PATIENCE else "plain"
    hint = [HINT, max(first, second)] if variant == "hinted" else []
    prompt, score = [ASK, first, second, *hint], log_probs(model)
    rows = []
    for _ in range(N_ON):
        tokens = sample(model, prompt)
        with torch.no_grad():
            old = score(prompt, tokens)
        rows.append(Row(prompt, (sample_id, variant), tokens, old, reward(tokens, max(first, second))))
    for row, value in zip(rows, group_advantages(torch.tensor([r.reward for r in rows])), strict=True):
        row.advantage = float(value)
    return rows


def replayed_group(memory: Memory) -> list[Row]:
    """Up to n_off kept completions of one prompt, each with an advantage under today's R-bar."""
    live = {k: [r for r in rows if abs(r.reward - memory.baseline(k)) > 1e-6] for k, rows in memory.buffer.items()}
    live = {key: rows for key, rows in live.items() if rows}
    if not live:
        return []
    key = list(live)[int(torch.randint(len(live), ()))]
    rows = live[key][-N_OFF:]
    kept = torch.tensor([r.reward for every in memory.buffer.values() for r in every])
    rewards, baselines = torch.tensor([r.reward for r in rows]), torch.full((len(rows),), memory.baseline(key))
    for row, value in zip(rows, replayed_advantages(rewards, baselines, float(kept.std(correction=0))), strict=True):
        row.advantage, row.on_policy = float(value), False
    return rows


def step(
    model: Qwen2ForCausalLM, reference: LogProbs, optimizer: torch.optim.Optimizer, sample_id: str, memory: Memory
) -> float:
    """One prompt's step; returns the mean reward of its fresh completions."""
    fresh = fresh_group(model, sample_id, memory)
    value = loss([*fresh, *replayed_group(memory)], log_probs(model), reference)
    optimizer.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    key = fresh[0].key
    memory.rewards[key].extend(row.reward for row in fresh)  # after the step has used R-bar
    memory.buffer[key] += fresh
    if key[1] == "plain":
        memory.streak[sample_id] = 0 if any(row.reward == 1 for row in fresh) else memory.streak[sample_id] + 1
    return sum(row.reward for row in fresh) / len(fresh)


def train(steps: int, seed: int = 0) -> Iterator[float]:
    """Mean reward of each step on a dozen prompts in turn, as it ends."""
    torch.set_num_threads(1)  # the matrices are tiny
    torch.manual_seed(seed)
    model, memory = tiny_model(), Memory()
    frozen = tiny_model()
    frozen.load_state_dict(model.state_dict())
    start = torch.no_grad()(log_probs(frozen))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prompts = [f"{a}{b}" for a in range(4) for b in range(3)]
    for k in range(steps):
        yield step(model, start, optimizer, prompts[k % len(prompts)], memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    steps, part = parser.parse_args().steps, []
    for done, mean in enumerate(train(steps), 1):
        part.append(mean)
        if done % 24 == 0 or done == steps:
            print(f"steps {done - len(part) + 1:3} to {done:3}: mean reward {sum(part) / len(part):.2f}", flush=True)
            part = []

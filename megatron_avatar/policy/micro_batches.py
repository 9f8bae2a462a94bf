"""Which groups an update takes together, and how many lanes a prompt's rows. Plain numbers: plans count with it where
torch isn't there."""

from __future__ import annotations

from collections.abc import Sequence


def lanes_of(prompts: int, rows: int, lanes: int) -> list[int]:
    """How many lanes of generation the `rows` rows of each prompt are shared out over. With fewer prompts than lanes,
    several read a prompt, so that no lane is empty where the rows allow it."""
    return [min(rows, max(1, lanes // prompts + (number < lanes % prompts))) for number in range(prompts)]


def plan_micro_batches(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], budget: int
) -> list[list[tuple[int, list[int]]]]:
    """Share groups out over micro-batches of at most `budget` packed tokens.

    A group larger than the budget is split by completions, each part repeating the prompt; a single completion
    that is too large with its prompt gets a micro-batch of its own. Parts are placed first-fit, largest first.
    Returns micro-batches as lists of (group, completion indices); the same input gives the same plan.
    """
    parts: list[tuple[int, int, list[int]]] = []  # tokens, group, completions
    for group, (prompt_length, lengths) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        prefix = prompt_length - 1
        bins: list[tuple[int, list[int]]] = []
        for number, length in enumerate(lengths):
            if not bins or bins[-1][0] + length > budget:
                bins.append((prefix, []))
            bins[-1] = (bins[-1][0] + length, [*bins[-1][1], number])
        parts += [(tokens, group, numbers) for tokens, numbers in bins]

    loads: list[int] = []
    plan: list[list[tuple[int, list[int]]]] = []
    for tokens, group, numbers in sorted(parts, key=lambda part: (-part[0], part[1], part[2])):
        fitting = (i for i, load in enumerate(loads) if load + tokens <= budget)
        place = next(fitting, len(plan))
        if place == len(plan):
            loads.append(0)
            plan.append([])
        loads[place] += tokens
        plan[place].append((group, numbers))
    return [sorted(batch) for batch in plan]

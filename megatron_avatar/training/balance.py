"""Work shared out by its tokens, so that no data-parallel rank and no pipeline waits longer than needed."""

from __future__ import annotations

from collections.abc import Sequence

Part = tuple[int, list[int]]  # (index of a group, indices of the completions taken from it)


def deal(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Give every item to one of len(loads) owners that already carry `loads`: the costliest item first, each to who
    carries least by then.

    Returns the owner of each item; equal arguments give equal owners. Nobody ends above
    max(max(loads), mean + (1 - 1 / owners) * largest cost), the mean being that of everything together.
    """
    carried, owners = list(loads), [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owner = min(range(len(carried)), key=carried.__getitem__)
        owners[item] = owner
        carried[owner] += costs[item]
    return owners


def loads_of(costs: Sequence[float], owners: Sequence[int], count: int) -> list[float]:
    """What each of `count` owners carries."""
    loads = [0.0] * count
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


def imbalance(loads: Sequence[float]) -> float:
    """The largest load in units of the mean: 1 where all are equal."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def packed_tokens(prompt_tokens: int, completion_tokens: Sequence[int]) -> int:
    """Tokens of a group in a packed row: a completion opens with the prompt's last token, and lacks its own last."""
    return prompt_tokens - 1 + sum(completion_tokens)


def even_out(plan: Sequence[Sequence[Part]], tokens: Sequence[Sequence[int]], count: int, budget: int
             ) -> list[list[Part]]:
    """The parts of a plan over at most `count` micro-batches of about equal size: a pipeline waits for the largest.

    `tokens` holds the packed tokens of each part, in the shape of the plan. The plan itself comes back where equal
    sizes would break the budget: first-fit packs tighter.
    """
    parts = [part for batch in plan for part in batch]
    costs = [cost for batch in tokens for cost in batch]
    owners = deal(costs, [0] * count)
    if max(loads_of(costs, owners, count), default=0) > max([budget, *costs]):
        return [list(batch) for batch in plan]
    batches = [sorted(part for part, owner in zip(parts, owners, strict=True) if owner == k) for k in range(count)]
    return [batch for batch in batches if batch]

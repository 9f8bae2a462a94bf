"""What reinforcement learning on the ladder will do with its prompts, before it is run.

    python -m bench.schedule [--prompts 126] [--steps 76] [--json]

The run's own choice of prompts, tracker, hints and replay go through one stage of 16 prompts an update, in place of
the model stand prompts that succeed as often as the ladder is made for: an answer is right where all looks are taken
(data_tools/ladder.py: FULL, HINTED_FULL) and told without a mistake (GIVEN_LOOK, what the gate asks for), or by a
guess of what wasn't looked at. Nothing is learned, so it says how a training begins. `aims` are what a schedule needs,
so that parts can show.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.dynamics import settings
from bench.timing import JSON_HELP, is_default, report
from bench.world import COPIED, EVIDENCE
from data_tools.ladder import FULL, HINTED_FULL, LADDER, ask
from megatron_avatar.config import StageConfig
from megatron_avatar.planning.dynamics import FixedPolicy, Outlook, Tally, go_through

GIVEN_LOOK = EVIDENCE * COPIED
BATCH, TIMES = 16, 4
SYSTEMS = {"GRPO": ["ablation=grpo"], "AVATAR": [], "AVATAR as published": ["ablation=published"]}
AIMS = {
    "visits_per_prompt": "about 10", "hinted": "0.20 to 0.33", "dead": "below 0.20",
    "vanished": "0.40 to 0.60 for GRPO",
}  # fmt: skip


def right(name: str, full: float) -> float:
    """How often a trace of this family is right that takes all looks with probability `full`, and else some of the
    first, as data_tools/ladder.py writes them: parts that are not looked at are guessed."""
    looks = ask(name, np.random.default_rng(0)).looks
    guessed = [1 / len(look.guesses) if look.part else 1.0 for look in looks]
    if len(looks) == 1:
        guessed = [LADDER[name].chance]  # of tones only some patterns stand there to guess from
    stopped = [float(np.prod(guessed[taken:])) for taken in range(len(looks))]
    return full * GIVEN_LOOK + (1 - full) * float(np.mean(stopped))


class LadderPolicy(FixedPolicy):
    """Prompts that are right with their family's probabilities, plain and hinted, each a little easier or harder."""

    def __init__(self, pool: list[str], seed: int) -> None:
        super().__init__(pool, seed)
        rng, names = np.random.default_rng(seed), list(LADDER)
        self._plain, self._hinted = {}, {}
        for k, prompt in enumerate(pool):
            name = names[k % len(names)]
            own = float(np.exp(rng.normal(0, 0.3)))
            for found, full in ((self._plain, FULL[LADDER[name].rung]), (self._hinted, HINTED_FULL)):
                share = right(name, full)
                odds = own * share / (1 - share)
                found[prompt] = odds / (1 + odds)

    def chance(self, sample_id: str, variant: str) -> float:
        return (self._hinted if variant == "hinted" else self._plain)[sample_id]


def predict(overrides: list[str], prompts: int, steps: int) -> Outlook:
    """The outlook of one system, over several draws of the prompts."""
    config, tally = settings(overrides, "tiny_avatar"), Tally()
    stage = StageConfig(steps=steps, prompts_per_step=BATCH, rewards={"format": 0.5, "accuracy": 0.5})
    config.stages = {"ladder": stage}
    for turn in range(TIMES):
        ids = [f"{turn}/{k}" for k in range(prompts)]
        config.seed = turn
        go_through(config, "ladder", ids, set(ids), LadderPolicy(ids, turn), tally, steps=steps)
    return tally.outlook(TIMES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=126)
    parser.add_argument("--steps", type=int, default=76)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    args = parser.parse_args(arguments)
    if args.prompts < BATCH or args.steps < 2:
        parser.error(f"write {BATCH} prompts or more and 2 steps or more")
    found: dict[str, Any] = {name: asdict(predict(extra, args.prompts, args.steps)) for name, extra in SYSTEMS.items()}
    report("schedule", {"aims": AIMS, "systems": found}, as_json=args.json, keep=is_default(parser, args))


if __name__ == "__main__":
    main()

"""When a prompt is shown with its hint (paper, "Hints"): in the hard tier, once exploration has stopped."""

from __future__ import annotations

from typing import Any

from megatron_avatar.config.schema import HintConfig
from megatron_avatar.records import Variant
from megatron_avatar.rl.tracker import HARD_QUANTILE, RewardTracker


class HintPolicy:
    """Decides the variant of every coming visit from the tracker's history; alike on every rank.

    Injected when the prompt is hard and its last `patience` plain visits brought no solved completion, or,
    with `kl_threshold` set, when the last plain visit's mean KL lies below it (the paper's own test).
    Withdrawn when plain R-bar ranks `hysteresis` above the hard tier. Every `plain_every`-th visit of a
    hinted prompt stays plain, so that plain R-bar goes on being measured.
    """

    def __init__(self, config: HintConfig, tracker: RewardTracker) -> None:
        assert config.patience >= 1 and config.plain_every >= 1, config
        self._config = config
        self._tracker = tracker
        self._visits: dict[str, int] = {}  # visits since injection of every prompt whose hint is in use

    @property
    def in_use(self) -> int:
        """Prompts whose hint is in use."""
        return len(self._visits)

    def variant(self, sample_id: str, has_hint: bool, ahead: int = 0) -> Variant:
        """The variant of the visit that comes after `ahead` others, which are not noted yet; changes nothing."""
        every = self.stands_for(sample_id, has_hint)
        return "plain" if every == 1 or (self._visits[sample_id] + ahead + 1) % every == 0 else "hinted"

    def stands_for(self, sample_id: str, has_hint: bool) -> int:
        """Of how many of a prompt's visits, now, one is plain."""
        in_use = self._config.enabled and has_hint and sample_id in self._visits and not self._recovered(sample_id)
        return self._config.plain_every if in_use else 1

    def update(self, sample_id: str, variant: Variant, *, kl: float | None = None) -> None:
        """Note a visit, once the tracker holds the whole step's rewards.

        `kl` is the mean KL of the visit's completions to the reference, read under `kl_threshold` only.
        """
        if sample_id in self._visits:
            self._visits[sample_id] += 1
            if self._recovered(sample_id):
                del self._visits[sample_id]
        elif variant == "plain" and self._tracker.tier(sample_id) == "hard" and self._stalled(sample_id, kl):
            self._visits[sample_id] = 0

    def _recovered(self, sample_id: str) -> bool:
        rank = self._tracker.rank(sample_id)
        return rank is not None and rank >= HARD_QUANTILE + self._config.hysteresis

    def _stalled(self, sample_id: str, kl: float | None) -> bool:
        if self._config.kl_threshold is not None:
            assert kl is not None, "rl.hints.kl_threshold needs every visit's KL"
            return kl < self._config.kl_threshold
        return self._tracker.streak(sample_id) >= self._config.patience

    def state_dict(self) -> dict[str, Any]:
        return {"visits": dict(self._visits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._visits = dict(state["visits"])

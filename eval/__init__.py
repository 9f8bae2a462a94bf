"""Evaluation and the report: what a user runs after training.

`run` (answers of a model) with `prepare` (a benchmark's media) and `predict` (lines, continued), `score`, `tables`,
`figures`, `reproduction` and `report` (what comes out), `demo` with `jobs` and `ahead`, `lmms` (lmms-eval on the
engine), `try_it`, `fixture` (each benchmark tried on records whose scores were computed by hand). Rooms: `asking`,
`scoring`, `paper`.
"""

from megatron_avatar import first_words  # says its line where a slow module of this package is run

__all__ = ["first_words"]

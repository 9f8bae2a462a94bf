"""What a user runs to make, inspect and prepare data.

`prepare/` (a dataset into a manifest), `synthesize` with `world`, `families` and `ladder` (clips with known answers),
`teacher` with `hints`, `captions`, `traces` and `leaks` (what a language model writes), `show`, `pretrain` with
`lessons` and `tokenizer` (the demo's base).
"""

from megatron_avatar import first_words  # says its line where a slow module of this package is run

__all__ = ["first_words"]

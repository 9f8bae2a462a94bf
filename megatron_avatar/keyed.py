"""Keyed randomness: what is drawn depends on a key alone, never on call order, batch or the layout of the ranks."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_rng(*key: object) -> np.random.Generator:
    """The generator of `key`, whose parts count by their text: keyed_rng("a", 1) and keyed_rng("a/1") are equal."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(_Key(np.frombuffer(digest, "<u8"))))  # type: ignore[arg-type]


class _Key(np.random.bit_generator.ISeedSequence):
    """Gives Philox its key [2] as it is: Philox(key=...) does the same, and asks the system for entropy beforehand."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        assert n_words == len(self._words), n_words
        return self._words

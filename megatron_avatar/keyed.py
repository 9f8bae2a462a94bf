"""Keyed randomness: what is drawn depends on a key alone, never on call order, batch or the layout of the ranks."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_rng(*key: object) -> np.random.Generator:
    """The generator of `key`, whose parts count by their text: keyed_rng("a", 1) and keyed_rng("a/1") are equal."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))

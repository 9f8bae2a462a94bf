"""One process of the real backend for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_avatar.config.schema import ParallelConfig
from megatron_avatar.policy import backend as backends


@pytest.fixture(scope="module")
def backend() -> Iterator[backends.Backend]:
    yield backends.start(ParallelConfig())
    backends.stop()

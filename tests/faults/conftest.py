"""Checkpoints for tests that need time to break things."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 8192: a stream of it lasts for seconds."""
    from support.checkpoints import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("checkpoints") / "long-llama", context=8192)

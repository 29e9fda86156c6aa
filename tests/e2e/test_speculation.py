"""Drafts through gRPC: the same answers with and without, and the metrics that show them at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.test_exactness import alone, requests, together
from support import calls
from support.serving import Server, total


def counted(server: Server) -> tuple[float, float]:
    found = server.metrics()
    return total(found, "salver_draft_tokens_total"), total(found, "salver_accepted_draft_tokens_total")


# A model that says one thing again and again, and one that says any of three.
LOOPS = [
    calls.generate_request("Again.", max_tokens=120, ignore_eos=True, logit_bias={42: 100.0}),
    calls.generate_request(
        "Again.", max_tokens=120, ignore_eos=True, temperature=1.0, seed=7,
        logit_bias={40: 30.0, 41: 30.0, 42: 30.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_same_tokens_with_and_without(
    tiny_llama: Path, start_server: Callable[..., Server], kernels: str
) -> None:
    ways = [*requests(48), *LOOPS]
    without = start_server(tiny_llama, "--kernels", kernels, "--speculation", "off")
    truth = alone(without, ways)
    assert counted(without) == (0, 0)
    for flags in (["--speculation", "ngram"], ["--speculative-model", str(tiny_llama)]):
        flags = [*flags, "--kernels", kernels, "--check-integrity", "--no-deadline-admission"]
        server = start_server(tiny_llama, *flags)
        assert alone(server, ways) == truth
        assert together(server, ways, others=12) == truth
        server.wait_idle()
        drafts, accepted = counted(server)
        if "ngram" in flags:  # as dear as the model itself, a draft model seldom pays
            assert drafts >= accepted > 0


def test_a_draft_model_with_other_tokens_is_refused(
    tiny_llama: Path, smollm2_checkpoint: Path, cache_dir: Path
) -> None:
    server = Server(
        str(tiny_llama), "--speculative-model", str(smollm2_checkpoint), "--cache-dir", str(cache_dir)
    )
    try:
        assert server.process.wait(timeout=60) != 0
        assert "--speculative-model" in server.log
        assert "tokens are not the model's" in server.log
    finally:
        server.kill()

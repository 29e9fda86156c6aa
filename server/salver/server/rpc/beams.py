"""Beam search on the front's side: what a request asks for, and what does not go together with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from salver.model.generation_config import MAX_LENGTH_PENALTY
from salver.server.engine.beam import beam_capacity
from salver.server.engine.request import BeamParams
from salver.server.rpc.configuration import CHECKPOINT, EARLY_STOPPING, REQUEST, Configuration, without_beams
from salver.server.rpc.served import RequestLimits, ServedModel
from salver.server.rpc.tools import must_call

if TYPE_CHECKING:
    from salver.server.rpc.validation import Violations

_EARLY_STOPPING = {value: key for key, value in EARLY_STOPPING.items()}


def settle_beams(request: Any, made: Configuration, defaults: Configuration) -> None:
    """Puts the request's beams over the defaults into `made`, which has some then if it is a search.

    A search is greedy unless the request says a temperature. One that the checkpoint alone asks for gives
    way to whatever the request says that does not go together with it.
    """
    asked = request.HasField("beams")
    made.beams.CopyFrom(defaults.beams)
    for name in defaults.origins:
        if name.startswith("beams."):
            made.origins[name] = defaults.origins[name]
    for field, _ in request.beams.ListFields():
        made.origins[f"beams.{field.name}"] = REQUEST
    made.beams.MergeFrom(request.beams)
    if not asked and made.beams.num_beams > 1 and _contradictions(request, made):
        made.beams.num_beams = 1
    if made.beams.num_beams > 1:
        if made.origins["sampling.temperature"] != REQUEST:
            made.sampling.temperature = 0
            made.origins["sampling.temperature"] = made.origins["beams.num_beams"]
        return
    without_beams(made)


def check_beams(
    request: Any, made: Configuration, limits: RequestLimits, violations: Violations
) -> BeamParams | None:
    """The beams in force, after `settle_beams`; None: no beam search."""
    asked = request.beams
    if asked.early_stopping not in _EARLY_STOPPING and asked.early_stopping:
        violations.add("beams.early_stopping", f"{asked.early_stopping} is not a way to stop")
    if asked.HasField("num_beams") and asked.num_beams == 0:
        violations.add("beams.num_beams", "must be at least 1")
    if not made.HasField("beams"):
        alone = asked.HasField("num_beams") and asked.num_beams <= 1
        for field, _ in asked.ListFields():
            if field.name != "num_beams":
                why = "does nothing with one beam" if alone else "needs beams.num_beams"
                violations.add(f"beams.{field.name}", why)
        return None
    beams = made.beams
    most = min(limits.max_beams, limits.max_num_seqs)
    if beams.num_beams > most:
        whose = " (the checkpoint's)" if made.origins["beams.num_beams"] == CHECKPOINT else ""
        violations.add(
            "beams.num_beams",
            f"{beams.num_beams}{whose} must be at most {most}: every beam is a sequence of the batch",
        )
    if not abs(beams.length_penalty) <= MAX_LENGTH_PENALTY:  # NaN too
        low, high = f"{-MAX_LENGTH_PENALTY:g}", f"{MAX_LENGTH_PENALTY:g}"
        violations.add("beams.length_penalty", f"{beams.length_penalty:g} must be between {low} and {high}")
    for field, problem in _contradictions(request, made):
        violations.add(field, problem)
    # Numbers as they were written, not as 32 bits hold them.
    penalty = float(f"{beams.length_penalty:.7g}") if math.isfinite(beams.length_penalty) else 0.0
    return BeamParams(beams.num_beams, penalty, _EARLY_STOPPING.get(beams.early_stopping, False))


def limits_of_beams(beams: BeamParams, num_prompt_tokens: int, model: ServedModel) -> RequestLimits:
    """The limits of a request of so many prompt tokens: its beams share the cache."""
    ready = model.ready
    held = beam_capacity(num_prompt_tokens, beams.num_beams, ready.num_blocks - 1, ready.block_size)
    return replace(
        model.limits, cache_tokens=held, cache_name=f"key-value cache, shared by {beams.num_beams} beams,"
    )


def _contradictions(request: Any, made: Configuration) -> list[tuple[str, str]]:
    """What of the request does not go together with the beams in force, and why."""
    found = []
    if request.DESCRIPTOR.name.startswith("Stream"):
        found.append(("beams", "cannot be streamed: the answers are known when the search has ended"))
    sampling = made.sampling
    if made.origins["sampling.temperature"] == REQUEST and sampling.temperature > 0:
        found.append(("sampling.temperature", "must be 0 or unset: a beam search draws nothing"))
    if sampling.n > made.beams.num_beams:
        found.append(("sampling.n", f"{sampling.n} must be at most beams.num_beams ({made.beams.num_beams})"))
    if made.stopping.stop:
        found.append(("stopping.stop", "cannot be set together with beams; stop_token_ids can"))
    if request.HasField("resume"):
        found.append(("resume", "cannot be set together with beams: a search begins anew"))
    if request.HasField("structured_output"):
        found.append(("structured_output", "cannot be set together with beams"))
    if must_call(request):
        found.append(("tool_choice", "cannot ask for a call together with beams"))
    return found

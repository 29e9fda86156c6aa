"""The bounds of the queue, and that permits give back exactly what they took."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salver.server.admission import Admission, Permit
from salver.server.rpc.errors import ApiError


def make(max_requests: int = 2, max_tokens: int = 100, places: int = 0) -> tuple[Admission, list[str]]:
    refusals: list[str] = []
    admission = Admission(max_requests, max_tokens, refusals.append)
    admission.places = places
    return admission, refusals


def state(admission: Admission) -> tuple[int, int, int]:
    return admission.waiting_requests, admission.waiting_tokens, admission.running_sequences


def test_requests_beyond_the_bound_are_refused_at_once() -> None:
    admission, refusals = make(max_requests=2)
    first, _ = admission.admit(), admission.admit()
    with pytest.raises(ApiError) as refusal:
        admission.admit()
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.value.retry_after and refusals == ["queue_requests"]
    first.started(0)
    admission.admit()


def test_tokens_beyond_the_bound_are_refused() -> None:
    admission, refusals = make(max_tokens=100)
    admission.admit().add_tokens(60)
    second = admission.admit()
    with pytest.raises(ApiError):
        second.add_tokens(41)
    assert refusals == ["queue_tokens"]
    second.add_tokens(40)
    assert admission.waiting_tokens == 100


def test_an_empty_queue_takes_what_is_larger_than_the_bound() -> None:
    admission, _ = make(max_requests=2, max_tokens=10)
    permit = admission.admit(5)
    permit.add_tokens(1000)
    with pytest.raises(ApiError):
        admission.admit()


def test_free_places_of_the_batch_are_not_the_queue() -> None:
    admission, _ = make(max_requests=1, places=2)
    permits = [admission.admit() for _ in range(3)]
    with pytest.raises(ApiError):
        admission.admit()
    permits[0].started(0, sequences=2)  # the batch is full: one of two waits above the bound
    with pytest.raises(ApiError):
        admission.admit()
    permits[0].release()
    admission.admit()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 50)), max_size=60))
def test_everything_comes_back(steps: list[tuple[int, int, int]]) -> None:
    admission, _ = make(max_requests=6, max_tokens=200, places=2)
    permits: list[Permit] = []
    for action, requests, tokens in steps:
        try:
            if action == 0 or not permits:
                permits.append(admission.admit(requests))
            elif action == 1:
                permits[tokens % len(permits)].add_tokens(tokens)
            elif action == 2:
                permits[tokens % len(permits)].started(tokens, requests)
            elif action == 3:
                permits[tokens % len(permits)].release()
            else:
                permits.pop(tokens % len(permits)).release()
        except ApiError:
            pass
        assert min(state(admission)) >= 0
    for permit in permits:
        permit.release()
        permit.release()
    assert state(admission) == (0, 0, 0)

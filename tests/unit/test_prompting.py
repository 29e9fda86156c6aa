"""Examples before a question, and the answer that most samples agree on."""

from __future__ import annotations

import pytest

from salver.client import Completion, GenerateResult, Message
from salver.client.prompting import few_shot, self_consistent


def result(*texts: str) -> GenerateResult:
    return GenerateResult("", "", tuple(Completion(i, text, ()) for i, text in enumerate(texts)))


def test_few_shot() -> None:
    assert few_shot([("a", "b")], "c", system="s") == [
        Message.system("s"), Message.user("a"), Message.assistant("b"), Message.user("c"),
    ]  # fmt: skip
    assert few_shot([], "c") == [Message.user("c")]


def test_self_consistency() -> None:
    vote = self_consistent(result("41", "42", "forty", "42", "41", "42"), int)
    assert (vote.answer, vote.votes, vote.unread, vote.share) == (42, {42: 3, 41: 2}, 1, 0.5)
    assert self_consistent(result("b", "a"), lambda text: text).answer == "b", "the first of equals"
    with pytest.raises(ValueError, match="none of 2"):
        self_consistent(result("x", "y"), lambda text: None)

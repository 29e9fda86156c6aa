"""FakeServer understands texts: its answers are functions of the request and behave as a model's do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest

from salver.client import Client, ConnectionOptions, InvalidArgument, Unavailable
from salver.client.cli import main
from salver.client.testing import FakeServer

NEWS = "Frozen water lies on the Moon. The striker scored twice in Rome."


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(fake: FakeServer) -> Iterator[Client]:
    with Client(fake.address) as made:
        yield made


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_it_says_what_it_can_do(client: Client) -> None:
    model = client.get_model()
    assert {"generate", "embed", "rerank", "extract_answer"} <= set(model.tasks)
    assert model.embedding_dimensions == len(client.embed("x")[0].values)


def test_vectors_are_near_where_words_are_common(client: Client) -> None:
    texts = ["the calm sea", "the calm old sea", "nine red engines", "the calm sea"]
    one, near, far, same = (embedding.values for embedding in client.embed(texts))
    assert one == same and math.hypot(*one) == pytest.approx(1, abs=1e-5)
    assert dot(one, near) > 0.5 > dot(one, far)
    (short,) = client.embed("the calm sea", dimensions=4)
    assert len(short.values) == 4 and math.hypot(*short.values) == pytest.approx(1, abs=1e-5)
    (each,) = client.embed("a b", per_token=True)
    assert [(token.start, token.end) for token in each.tokens] == [(0, 1), (2, 3)]
    with pytest.raises(InvalidArgument, match="inputs: must not be empty"):
        client.embed([])


def test_texts_are_ranked_labelled_and_filled(client: Client) -> None:
    documents = ["about money", "water on the moon", "the moon"]
    ranking = client.rerank("is there water on the moon", documents, top_n=2, return_documents=True)
    assert [(found.index, found.document) for found in ranking] == [(1, documents[1]), (2, documents[2])]
    assert 1 > ranking[0].score > ranking[1].score > 0
    (labels,) = client.classify("so good")
    assert labels == client.classify("so good")[0]
    assert sum(label.score for label in labels.labels) == pytest.approx(1, abs=1e-5)
    spans = client.classify_tokens(NEWS)[0].spans
    assert [(s.text, NEWS[s.start : s.end]) for s in spans if s.text == "Rome"] == [("Rome", "Rome")]
    ((mask,),) = client.fill_mask("the [MASK] sea", top_k=3)
    assert [c.probability for c in mask.candidates] == [0.5, 0.25, 0.125]
    with pytest.raises(InvalidArgument, match=r"inputs\[1\]: holds no mask token"):
        client.fill_mask(["[MASK]", "none"])


def test_questions_are_answered_from_the_context(client: Client) -> None:
    (answer,) = client.extract_answer("Where is water?", NEWS)
    assert answer.text == "Frozen water lies on the Moon." == NEWS[answer.start : answer.end]
    (nothing,) = client.extract_answer("Who?", NEWS, allow_no_answer=True)
    assert nothing.no_answer


def test_attention_and_distribution_add_up(client: Client) -> None:
    found = client.get_attention("the calm old sea")
    assert len(found.matrices) == 4 and len({matrix.weights for matrix in found.matrices}) == 4
    for matrix in found.matrices:
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in matrix.weights)
    crossed = client.get_attention("the calm old sea", kind="cross", target="la mer")
    assert [unit.token for unit in crossed.queries] == [b"la", b"mer"]
    assert [len(row) for row in crossed.matrices[0].weights] == [4, 4]
    (links,) = client.get_attention("a b", layers=[1], view="head_mean", top_k=1).matrices
    assert [(link.query, link.key) for link in links.links] == [(0, 0), (1, 1)]
    with pytest.raises(InvalidArgument, match=r"layers\[0\]: 2 must be below 2"):
        client.get_attention("a", layers=[2])
    model, _, kept = client.get_distribution("the", temperature=0.5, top_k=2)
    assert sum(c.probability for c in model.candidates) == pytest.approx(1)
    assert kept.num_tokens == 2 and 0 < kept.removed_mass < 1
    assert client.get_distribution("the", temperature=0)[-1].candidates[0].probability == 1
    with pytest.raises(InvalidArgument, match=r"sampling\.top_p: a FakeServer does not do it"):
        client.get_distribution("the", top_p=0.5)
    assert client.model_card().model.name == "fake"


def test_calls_fail_as_planned_and_are_kept(fake: FakeServer) -> None:
    with Client(fake.address, ConnectionOptions(max_attempts=1, resume_attempts=0)) as client:
        fake.fail(message="not now")
        with pytest.raises(Unavailable, match="not now"):
            client.embed("x")
        client.embed("kept")
    assert fake.requests[-1].inputs[0].text == "kept"


def test_the_command_line_asks_it(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--address", fake.address]
    assert main(["distribution", "the", "--chat", "--show", "2", *address]) == 0
    assert fake.requests[-1].messages[0].content == "the" and "model" in capsys.readouterr().out
    assert main(["distribution", "the", "--regex", "a+", *address]) != 0
    assert fake.requests[-1].structured_output.regex == "a+"
    assert "a FakeServer does not do it" in capsys.readouterr().err
    assert main(["attention", "a b", "--pair", "c d", "--word", "d", *address]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["a", "b", "c", "d"] and "←" in lines[3]

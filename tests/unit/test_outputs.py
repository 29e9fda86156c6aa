"""Token ids to deltas: whole characters, stop strings, resuming at any cut, one slot."""

from __future__ import annotations

import asyncio
import codecs
from dataclasses import dataclass, field, replace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from salver.model.tokenizer import Tokenizer
from salver.server.engine.errors import EngineUnavailable, RequestDeadlineExceeded, RequestFailed
from salver.server.engine.outputs import CompletionDelta, GenerationStream, GenerationUpdate, StopMatch
from salver.server.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SamplingParams,
    SequenceOutput,
    SequenceTimings,
    StoppingParams,
)

CHUNKS = [bytes([b]) for b in range(256)] + [b"ab", b"ba", b"aab", "é".encode()[1:] + b"a", b"b\xf0\x9f"]
END, EXTRA = len(CHUNKS), len(CHUNKS) + 1  # two special tokens


def make_tokenizer() -> Tokenizer:
    """Tokens are byte strings, some of which end within a character."""
    from salver.model.tokenizer.decoding import byte_level_alphabet

    character = {byte: char for char, byte in byte_level_alphabet().items()}
    vocab = {"".join(character[b] for b in chunk): i for i, chunk in enumerate(CHUNKS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", "<|extra|>"])
    return Tokenizer(backend, eos_token_ids=(END,))


TOKENIZER = make_tokenizer()


@dataclass
class FakeEngine:
    submitted: list[EngineRequest] = field(default_factory=list)
    aborted: list[tuple[int, int | None]] = field(default_factory=list)

    def submit(self, request, sink):
        self.submitted.append(request)

    def abort(self, request_id, sample_index=None):
        self.aborted.append((request_id, sample_index))


def request(max_tokens=100, min_tokens=0, stop_ids=(END,), outputs=((),), **rest) -> EngineRequest:
    stopping = StoppingParams(max_tokens, min_tokens, frozenset(stop_ids))
    indices = tuple(range(len(outputs)))
    return EngineRequest(7, (1, 2, 3), SamplingParams(), stopping, indices, tuple(outputs), **rest)


def stream(engine, req, **options) -> GenerationStream:
    return GenerationStream(engine, req, TOKENIZER, eos_token_ids=frozenset([END]), **options)


def ids(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def engine_reason(req: EngineRequest, output: list[int]) -> FinishReason | None:
    """As the engine decides after the last of these tokens."""
    if output[-1] in req.stopping.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(output) >= req.stopping.max_tokens else None


def feed(
    target: GenerationStream, engine: FakeEngine, req: EngineRequest, tokens: list[int], sizes=(1,)
) -> None:
    """Plays the engine for sample 0: tokens in groups until it ends or is aborted."""
    (index,) = req.sample_indices
    output, position, group = list(req.outputs[0]), 0, 0
    while position < len(tokens) and not engine.aborted:
        step: list[int] = []
        reason = None
        while position < len(tokens) and len(step) < sizes[group % len(sizes)] and reason is None:
            step.append(tokens[position])
            position += 1
            output.append(step[-1])
            reason = engine_reason(req, output)
        group += 1
        logprobs = [Logprobs(t, -1.0, 1) for t in step]
        target.put(SequenceOutput(7, index, step, logprobs, finish_reason=reason))
        if reason is not None:
            return


async def pending(target: GenerationStream) -> list[GenerationUpdate]:
    """What the reader would get now, without waiting for more."""
    updates = []
    try:
        while True:
            updates.append(await asyncio.wait_for(anext(target), 0.001))
    except (TimeoutError, StopAsyncIteration):
        return updates


def merged(updates: list[GenerationUpdate]) -> CompletionDelta:
    """One delta of all those of sample 0; asserts that their offsets join."""
    deltas = [delta for update in updates for delta in update.deltas]
    first = deltas[0]
    whole = replace(first, text="", token_ids=[], logprobs=[], finish_reason=None, stop_match=None)
    for delta in deltas:
        assert whole.finish_reason is None, "a delta after the last one"
        assert delta.text_offset == first.text_offset + len(whole.text)
        assert delta.token_offset == first.token_offset + len(whole.token_ids)
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        whole.logprobs += delta.logprobs
        whole.finish_reason, whole.stop_match = delta.finish_reason, delta.stop_match
    return whole


def run(req: EngineRequest, tokens: list[int], sizes=(1,), **options) -> CompletionDelta:
    """The whole answer that a reader gets who reads at the end; an empty delta if none came."""

    async def main() -> CompletionDelta:
        engine = FakeEngine()
        target = stream(engine, req, **options)
        target.start()
        if engine.submitted:
            feed(target, engine, engine.submitted[0], tokens, sizes)
        updates = await pending(target)
        if not updates:
            return CompletionDelta(0, "", [], [], None, None, 0, 0)
        return merged(updates)

    return asyncio.run(main())


# --- an oracle that knows nothing of streams ---------------------------------------------


def certain(tokens: list[int], final: bool) -> str:
    raw = b"".join(CHUNKS[t] for t in tokens if t < END)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final)


def expected(req: EngineRequest, tokens: list[int], stop: tuple[str, ...], include_stop: bool):
    """(text, number of tokens, finish reason, stop match) by looking at every prefix anew."""
    for count in range(1, len(tokens) + 1):
        output = tokens[:count]
        reason = engine_reason(req, output)
        if reason is FinishReason.STOP:
            text = certain(output[:-1], True)
            if include_stop and output[-1] == END:
                text += "<|im_end|>"
            elif include_stop:
                text = certain(output, True)
            last = output[-1]
            return text, count, reason, StopMatch(eos=True) if last == END else StopMatch(token_id=last)
        text, old = certain(output, False), len(certain(output[:-1], False))
        if count >= req.stopping.min_tokens:
            matches = [
                (start + len(s), start)
                for s in stop
                for start in range(len(text))
                if text.startswith(s, start) and start + len(s) > old
            ]
            if matches:
                end, start = min(matches)
                match = StopMatch(text=text[start:end])
                return text[: end if include_stop else start], count, FinishReason.STOP, match
        if reason is not None:
            return certain(output, True), count, reason, None
    return None


token = st.one_of(
    st.sampled_from([*ids("aabb \n"), *range(256, len(CHUNKS)), EXTRA]),
    st.integers(0, 255),
)
piece = st.one_of(
    st.lists(token, min_size=1, max_size=4),
    st.text(alphabet="ab é€🙂", min_size=1, max_size=5).map(ids),
    st.just([ord("\n")]),
)
token_lists = st.lists(piece, min_size=1, max_size=8).map(lambda pieces: [t for p in pieces for t in p])
stops = st.lists(st.text(alphabet="ab é€🙂�", min_size=1, max_size=4), max_size=3).map(tuple)


@st.composite
def cases(draw):
    tokens = draw(token_lists)
    ends_with_eos = draw(st.booleans())
    if ends_with_eos:
        tokens.append(END)
    stop_ids = draw(st.sampled_from([(END,), (END, ord("\n"))]))
    min_tokens = draw(st.integers(0, 6))
    kept: list[int] = []
    for token_id in tokens:  # the engine masks stop ids before min_tokens
        if token_id not in stop_ids or len(kept) >= min_tokens:
            kept.append(token_id)
    tokens = kept or ids("a")
    max_tokens = max(len(tokens), min_tokens)
    tokens += ids("b") * (max_tokens - len(tokens))
    req = request(max_tokens, min_tokens, stop_ids)
    return req, tokens, draw(stops), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(case=cases(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_text_tokens_and_reason_equal_the_oracle_however_outputs_are_grouped(case, sizes):
    req, tokens, stop, include_stop = case
    text, count, reason, match = expected(req, tokens, stop, include_stop)
    got = run(req, tokens, sizes, stop=stop, include_stop=include_stop)
    assert (got.text, got.token_ids, got.finish_reason) == (text, tokens[:count], reason)
    assert got.stop_match == match
    assert [entry.token_id for entry in got.logprobs] == got.token_ids


@settings(max_examples=250, deadline=None)
@given(case=cases(), data=st.data())
def test_a_resumed_stream_goes_on_where_the_first_one_was_cut(case, data):
    req, tokens, stop, include_stop = case
    options = {"stop": stop, "include_stop": include_stop}
    whole = run(req, tokens, **options)
    cut = data.draw(st.integers(0, len(whole.token_ids)), label="cut")
    first = run(req, whole.token_ids[:cut], **options)
    second = run(replace(req, outputs=(tuple(whole.token_ids[:cut]),)), tokens[cut:], **options)
    assert first.text + second.text == whole.text
    assert first.token_ids + second.token_ids == whole.token_ids
    assert second.text_offset == len(first.text)
    assert second.token_offset == cut
    assert second.finish_reason == whole.finish_reason
    assert second.stop_match == whole.stop_match


# --- single cases ------------------------------------------------------------------------


def test_text_that_may_become_a_stop_string_is_held_back():
    async def main():
        engine = FakeEngine()
        req = request()
        target = stream(engine, req, stop=("STOP",))
        target.start()
        seen = []
        for token_id in ids("a STOaSTOP"):
            target.put(SequenceOutput(7, 0, [token_id]))
            seen += [delta.text for update in await pending(target) for delta in update.deltas]
        assert seen == ["a", " ", "", "", "", "STOa", "", "", "", ""]
        assert engine.aborted == [(7, 0)]
        assert target.finished

    asyncio.run(main())


def test_a_late_stop_match_drops_the_tokens_after_it_and_counts_none_of_them():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(), stop=("!",))
        target.start()
        target.put(SequenceOutput(7, 0, ids("ab!cd")))
        target.put(SequenceOutput(7, 0, ids("ef")))  # was on its way when the abort was sent
        (update,) = await pending(target)
        (delta,) = update.deltas
        assert update.finished
        assert (delta.text, delta.token_ids) == ("ab", ids("ab!"))
        assert target.completion_tokens == 3

    asyncio.run(main())


def test_unread_outputs_are_merged_into_one_update():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(outputs=((), ())))
        target.start()
        for token_id in ids("hello"):
            for index in (0, 1):
                target.put(SequenceOutput(7, index, [token_id]))
        update = await anext(target)
        assert [(d.index, d.text, d.token_offset) for d in update.deltas] == [
            (0, "hello", 0),
            (1, "hello", 0),
        ]
        assert not update.finished
        target.put(SequenceOutput(7, 1, [ord("!")], finish_reason=FinishReason.LENGTH))
        update = await anext(target)
        assert [(d.index, d.text, d.text_offset, d.token_offset) for d in update.deltas] == [(1, "!", 5, 5)]
        target.put(SequenceOutput(7, 0, [END], finish_reason=FinishReason.STOP))
        update = await anext(target)
        assert update.finished
        assert update.deltas[0].stop_match == StopMatch(eos=True)
        with pytest.raises(StopAsyncIteration):
            await anext(target)
        assert target.completion_tokens == 12
        target.close()
        assert engine.aborted == []

    asyncio.run(main())


def test_collect_gives_the_whole_answer_at_once():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(max_tokens=3))
        target.start()
        reader = asyncio.create_task(target.collect())
        await asyncio.sleep(0)
        feed(target, engine, engine.submitted[0], ids("abc"))
        update = await asyncio.wait_for(reader, 5)
        assert (update.deltas[0].text, update.finished) == ("abc", True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("reason", "error"),
    [(FinishReason.DEADLINE, RequestDeadlineExceeded), (FinishReason.ERROR, RequestFailed)],
)
def test_a_deadline_or_failure_is_raised_after_what_came_before(reason, error):
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(outputs=((), ())))
        target.start()
        target.put(SequenceOutput(7, 0, ids("a")))
        target.put(SequenceOutput(7, 1, [], finish_reason=reason, error="NaN in the logits"))
        assert (await anext(target)).deltas[0].text == "a"
        for _ in range(2):
            with pytest.raises(error) as raised:
                await anext(target)
        if error is RequestFailed:
            assert "NaN" in str(raised.value)
        assert engine.aborted == [(7, None)]

    asyncio.run(main())


def test_close_aborts_what_runs_once_and_ends_the_reader():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request())
        target.start()
        reader = asyncio.create_task(anext(target))
        await asyncio.sleep(0)
        target.close()
        target.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(reader, 5)
        assert engine.aborted == [(7, None)]

    asyncio.run(main())


def test_only_unfinished_resumed_samples_are_submitted():
    async def main():
        engine = FakeEngine()
        outputs = (tuple(ids("ab!")), tuple(ids("ab")), (*ids("a"), END), tuple(ids("abcd")))
        target = stream(engine, request(max_tokens=4, outputs=outputs), stop=("!",))
        target.start()
        (submitted,) = engine.submitted
        assert submitted.sample_indices == (1,)
        assert submitted.outputs == (tuple(ids("ab")),)
        update = await anext(target)
        assert [(d.index, d.text, d.token_ids, d.finish_reason, d.stop_match) for d in update.deltas] == [
            (0, "", [], FinishReason.STOP, StopMatch(text="!")),
            (2, "", [], FinishReason.STOP, StopMatch(eos=True)),
            (3, "", [], FinishReason.LENGTH, None),
        ]
        assert not update.finished
        target.put(SequenceOutput(7, 1, [ord("x")]))
        target.put(SequenceOutput(7, 1, [END], finish_reason=FinishReason.STOP))
        update = await anext(target)
        assert update.finished
        assert (update.deltas[0].text_offset, update.deltas[0].token_offset) == (2, 2)
        assert (target.completion_tokens, target.resumed_tokens) == (13, 11)

    asyncio.run(main())


def test_all_samples_resumed_to_their_end_need_no_engine():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(max_tokens=2, outputs=(tuple(ids("ab")),)))
        target.start()
        assert (await asyncio.wait_for(anext(target), 5)).finished
        assert engine.submitted == []

    asyncio.run(main())


def test_a_finished_resume_still_computes_the_prompt_log_probabilities():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(max_tokens=2, outputs=(tuple(ids("ab")),), prompt_top_k=0))
        target.start()
        (submitted,) = engine.submitted
        assert submitted.stopping.max_tokens == 0
        assert submitted.outputs == ((),)
        found = [Logprobs(2, -1.0, 1), Logprobs(3, -2.0, 2)]
        target.put(SequenceOutput(7, 0, [], prompt_logprobs=found, finish_reason=FinishReason.LENGTH))
        update = await target.collect()
        assert update.prompt_logprobs == found
        assert (update.finished, len(update.deltas), target.completion_tokens) == (True, 1, 2)

    asyncio.run(main())


def test_prompt_log_probabilities_are_told_once_though_a_preempted_sample_repeats_them():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(max_tokens=0, prompt_top_k=0))
        target.start()
        assert engine.submitted == [target._request]
        found = [Logprobs(2, -1.0, 1), Logprobs(3, -2.0, 2)]
        target.put(SequenceOutput(7, 0, [], prompt_logprobs=found[:1]))
        target.put(SequenceOutput(7, 0, [], prompt_logprobs=found[1:]))
        target.put(SequenceOutput(7, 0, [], prompt_logprobs=found, finish_reason=FinishReason.LENGTH))
        update = await target.collect()
        assert update.prompt_logprobs == found

    asyncio.run(main())


def test_usage_and_timings_over_samples():
    async def main():
        engine = FakeEngine()
        target = stream(engine, request(outputs=((), ())))
        target.start()
        target.started(0.5)
        for index, timings in enumerate(
            (SequenceTimings(0.5, 1.0, 2.0, 9, 1), SequenceTimings(0.75, 0.5, 4.0, 7, 2))
        ):
            output = SequenceOutput(7, index, [END], finish_reason=FinishReason.STOP)
            output.timings, output.num_cached_tokens = timings, index * 16
            target.put(output)
        assert target.cached_tokens == 16
        assert target.timings == SequenceTimings(0.5, 0.75, 4.0, 9, 3)

    asyncio.run(main())


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        stream(FakeEngine(), request(), stop=("",))


def test_an_unavailable_engine_is_told_by_start():
    class Unavailable(FakeEngine):
        def submit(self, request, sink):
            raise EngineUnavailable("starting", 2.0)

    async def main():
        engine = Unavailable()
        target = stream(engine, request())
        with pytest.raises(EngineUnavailable):
            target.start()
        target.close()
        assert engine.aborted == []

    asyncio.run(main())

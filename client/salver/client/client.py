"""The synchronous client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from salver.client import encoding, inspection, rpcs
from salver.client.addresses import Address, to_target
from salver.client.convert import Conversation, PromptLike
from salver.client.encoding import (
    Answer,
    Classification,
    ClassifyOptions,
    ClassifyTokensOptions,
    Embedding,
    EmbedOptions,
    ExtractAnswerOptions,
    FilledMask,
    FillMaskOptions,
    RankedDocument,
    RerankOptions,
    TextOrPair,
    Texts,
    TokenClassification,
)
from salver.client.errors import Cancelled, SalverError, from_rpc_error
from salver.client.inspection import Attention, AttentionOptions, DistributionOptions, StepDistribution
from salver.client.model_card import ModelCard
from salver.client.options import DEFAULT_TIMEOUT, ConnectionOptions
from salver.client.resumption import Attempts, Resumption
from salver.client.rpcs import Rpc
from salver.client.types import (
    ChatOptions,
    GenerateResult,
    GenerationOptions,
    Message,
    Model,
    Resume,
    ScoreOptions,
    ScoreResult,
    ServerInfo,
    Token,
)


class _Slots:
    """At most `limit` calls at once; None is no bound."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._free = threading.Semaphore(limit) if limit else None

    def take(self, attempts: Attempts) -> Callable[[], None]:
        """Waits for a slot; what gives it back, however often it is called. Raises DeadlineExceeded."""
        free = self._free
        if free is None or self.limit is None:
            return lambda: None
        if not free.acquire(timeout=attempts.left()):
            raise attempts.no_slot(self.limit)
        held = [free]

        def give_back() -> None:
            try:
                held.pop().release()
            except IndexError:
                pass

        return give_back


class Stream(Iterator[GenerateResult]):
    """The messages of an answer, as they come. Leaving it early (`close`, `with`) cancels the call.

    When its server is lost, it goes on at another one from the tokens so far.
    """

    def __init__(self, start: Callable[[Any, float], Any], attempts: Resumption, slots: _Slots) -> None:
        self._start = start
        self._attempts = attempts
        self._slots = slots
        self._closed = threading.Event()
        self._give_back: Callable[[], None] | None = None
        self._call: Any = None
        if slots.limit is None:
            self._begin()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerateResult:
        try:
            while True:
                delta = self._next()
                if delta is not None:
                    return delta
        except BaseException:
            self._end()
            raise

    def _next(self) -> GenerateResult | None:
        """The next message; None when there is none to show. Raises SalverError."""
        try:
            if self._call is None:
                self._begin()
            return self._attempts.take(next(self._call))
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise from_rpc_error(error) from None
            pause = self._attempts.pause(error)
        self._call = None
        self._closed.wait(pause)
        return None

    def _begin(self) -> None:
        """Calls, or calls again."""
        if self._give_back is None:
            self._give_back = self._slots.take(self._attempts)
        if self._closed.is_set():
            raise Cancelled(grpc.StatusCode.CANCELLED, "the stream was closed")
        self._call = self._start(self._attempts.request(), self._attempts.left())
        if self._closed.is_set():  # meanwhile, by another thread
            self._call.cancel()

    def _end(self) -> None:
        call, give_back = self._call, self._give_back
        if call is not None:
            call.cancel()
        if give_back is not None:
            give_back()

    @property
    def result(self) -> GenerateResult:
        """The answer so far, the deltas joined; whole once the stream has ended."""
        return self._attempts.result

    @property
    def resumptions(self) -> int:
        """How often the answer was begun again or gone on with, because its server was lost."""
        return self._attempts.resumptions

    def resume(self) -> Resume:
        """What to give as `resume=` to another call that shall go on from here."""
        return self._attempts.resume()

    def close(self) -> None:
        """Cancels the call unless it has ended; the server frees everything at once."""
        self._closed.set()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # it was made to its end
            self.close()


class Client:
    """Calls the server at `address`, or the servers at several.

    `address` is host:port, a sequence of them (or one string with commas), or any gRPC target, as
    `dns:///name:port` for all that a name stands for. Calls go to each in turn.

    Every method raises a `SalverError` when the call fails. `timeout` is in seconds, over all
    attempts: 300 by default for what generates or scores, 60 for the rest.
    """

    def __init__(
        self, address: Address = "127.0.0.1:50051", options: ConnectionOptions | None = None
    ) -> None:
        """Raises AddressError (a ValueError) for what is no address or cannot be looked up, and OSError
        for certificate files that cannot be read."""
        self._options = options or ConnectionOptions()
        self._target = to_target(address)
        uri, arguments = self._target.uri, self._options.arguments(self._target.several)
        credentials = self._options.channel_credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(uri, arguments, self._options.compression)
        else:
            self._channel = grpc.secure_channel(uri, credentials, arguments, self._options.compression)
        self._stubs = rpcs.Stubs(self._channel)
        self._slots = _Slots(self._options.max_concurrent_calls)
        self._unbounded = _Slots(None)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompt: PromptLike, **options: Unpack[GenerationOptions]) -> GenerateResult:
        """Completes a prompt (text, or token ids)."""
        result: GenerateResult = self._call(rpcs.generate(prompt, options))
        return result

    def stream_generate(self, prompt: PromptLike, **options: Unpack[GenerationOptions]) -> Stream:
        """Completes a prompt; messages come as tokens do."""
        return self._stream(rpcs.generate(prompt, options, stream=True))

    def chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> GenerateResult:
        """Answers a conversation; a mere string is what the user says."""
        result: GenerateResult = self._call(rpcs.chat(messages, options))
        return result

    def stream_chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> Stream:
        """Answers a conversation; messages come as tokens do."""
        return self._stream(rpcs.chat(messages, options, stream=True))

    def score(
        self, inputs: Iterable[tuple[PromptLike, PromptLike]], **options: Unpack[ScoreOptions]
    ) -> list[ScoreResult]:
        """The log-likelihood of each (context, continuation), in order."""
        results: list[ScoreResult] = self._call(rpcs.score(inputs, options))
        return results

    def embed(
        self, inputs: PromptLike | Iterable[PromptLike], **options: Unpack[EmbedOptions]
    ) -> list[Embedding]:
        """The vectors of texts (or of prompts of token ids), in order."""
        request = encoding.embed_request(inputs, options)
        found: list[Embedding] = self._call(rpcs.encode("Embed", request, encoding.embeddings, options))
        return found

    def rerank(self, query: str, documents: Texts, **options: Unpack[RerankOptions]) -> list[RankedDocument]:
        """Documents by their relevance to the query, best first."""
        request = encoding.rerank_request(query, documents, options)
        found: list[RankedDocument] = self._call(rpcs.encode("Rerank", request, encoding.ranking, options))
        return found

    def classify(
        self, inputs: TextOrPair | Sequence[TextOrPair], **options: Unpack[ClassifyOptions]
    ) -> list[Classification]:
        """The labels of texts, or of pairs (tuples of two)."""
        request = encoding.classify_request(inputs, options)
        found: list[Classification] = self._call(
            rpcs.encode("Classify", request, encoding.classifications, options)
        )
        return found

    def classify_tokens(
        self, inputs: Texts, **options: Unpack[ClassifyTokensOptions]
    ) -> list[TokenClassification]:
        """The labels of tokens, or of the spans that they make up (`aggregation`)."""
        request = encoding.classify_tokens_request(inputs, options)
        found: list[TokenClassification] = self._call(
            rpcs.encode("ClassifyTokens", request, encoding.token_classifications, options)
        )
        return found

    def fill_mask(self, inputs: Texts, **options: Unpack[FillMaskOptions]) -> list[tuple[FilledMask, ...]]:
        """What may stand in the place of each text's mask tokens."""
        request = encoding.fill_mask_request(inputs, options)
        found: list[tuple[FilledMask, ...]] = self._call(
            rpcs.encode("FillMask", request, encoding.fillings, options)
        )
        return found

    def extract_answer(
        self, question: str, context: str, **options: Unpack[ExtractAnswerOptions]
    ) -> list[Answer]:
        """The spans of the context that answer the question, best first."""
        request = encoding.extract_answer_request(question, context, options)
        found: list[Answer] = self._call(rpcs.encode("ExtractAnswer", request, encoding.answers, options))
        return found

    def get_distribution(
        self, prompt: PromptLike | Sequence[Message], **options: Unpack[DistributionOptions]
    ) -> list[StepDistribution]:
        """The next token's distribution before and after each step of sampling; the last is drawn from.

        Of a prompt, or of the answer to a conversation.
        """
        request = inspection.distribution_request(prompt, options)
        found: list[StepDistribution] = self._call(
            rpcs.inspect("GetDistribution", request, inspection.distribution, options)
        )
        return found

    def get_attention(self, prompt: PromptLike, **options: Unpack[AttentionOptions]) -> Attention:
        """How much each token (or word) of a text attends to each other, by layer and head."""
        request = inspection.attention_request(prompt, options)
        found: Attention = self._call(rpcs.inspect("GetAttention", request, inspection.attention, options))
        return found

    def tokenize(
        self, text: str, *, add_special_tokens: bool | None = None, timeout: float | None = None
    ) -> list[Token]:
        """The tokens of a text with their places."""
        tokens: list[Token] = self._call(rpcs.tokenize(text, add_special_tokens, timeout))
        return tokens

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        text: str = self._call(rpcs.detokenize(token_ids, skip_special_tokens, timeout))
        return text

    def list_models(self, *, timeout: float | None = None) -> list[Model]:
        """All models, whatever the number of pages."""
        models: list[Model] = []
        token = ""
        while True:
            page, token = self._call(rpcs.list_models(token, timeout))
            models += page
            if not token:
                return models

    def get_model(self, model: str = "", *, timeout: float | None = None) -> Model:
        """One model; the served one when not named."""
        found: Model = self._call(rpcs.get_model(model, timeout))
        return found

    def model_card(
        self, model: str = "", *, context: int | None = None, timeout: float | None = None
    ) -> ModelCard:
        """What the checkpoint is made of, the memory it takes and how fast the device can compute it, for
        sequences of `context` tokens."""
        found: ModelCard = self._call(rpcs.model_card(model, context, timeout))
        return found

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, limits, device, start-up phases."""
        info: ServerInfo = self._call(rpcs.server_info(timeout))
        return info

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """SERVING or NOT_SERVING, of the server or one service. An unknown service is NotFound."""
        status: str = self._call(rpcs.check_health(service, timeout), self._unbounded)
        return status

    def wait_until_serving(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Returns once the server is SERVING. Raises the last SalverError, or TimeoutError, else."""
        end = time.monotonic() + timeout
        failure: Exception = TimeoutError(f"not SERVING after {timeout:g} s")
        while (left := end - time.monotonic()) > 0:
            try:
                if self.health(timeout=min(left, 5.0)) == "SERVING":
                    return
            except SalverError as error:
                failure = error
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))
        raise failure

    def call(self, rpc: Rpc) -> Any:
        """Makes a call that another part of the SDK describes. Raises SalverError."""
        return self._call(rpc)

    def _call(self, rpc: Rpc, slots: _Slots | None = None) -> Any:
        attempts = Attempts(rpc, self._options, self._target.several)
        method = rpc.method(self._stubs)
        give_back = (slots or self._slots).take(attempts)
        try:
            while True:
                try:
                    reply = method(
                        attempts.request(), timeout=attempts.left(), metadata=self._options.call_metadata()
                    )
                except grpc.RpcError as error:
                    pause = attempts.pause(error)
                else:
                    return rpc.decode(reply)
                time.sleep(pause)
        finally:
            give_back()

    def _stream(self, rpc: Rpc) -> Stream:
        method = rpc.method(self._stubs)

        def start(request: Any, timeout: float) -> Any:
            return method(request, timeout=timeout, metadata=self._options.call_metadata())

        return Stream(start, Resumption(rpc, self._options, self._target.several), self._slots)

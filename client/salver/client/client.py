"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from salver.client import convert, health
from salver.client.accumulate import Accumulator
from salver.client.convert import Conversation, PromptLike
from salver.client.errors import SalverError, from_rpc_error
from salver.client.options import DEFAULT_TIMEOUT, GENERATION_TIMEOUT, ConnectionOptions
from salver.client.types import (
    ChatOptions,
    GenerateResult,
    GenerationOptions,
    Model,
    Resume,
    ScoreOptions,
    ScoreResult,
    ServerInfo,
    Token,
)
from salver.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)


class Stream(Iterator[GenerateResult]):
    """The messages of an answer, as they come. Leaving it early (`close`, `with`) cancels the call."""

    def __init__(self, call: Any, resumed: Resume | None) -> None:
        self._call = call
        self._accumulator = Accumulator(resumed)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerateResult:
        try:
            delta = convert.from_generation(next(self._call))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        self._accumulator.add(delta)
        return delta

    @property
    def result(self) -> GenerateResult:
        """The answer so far, the deltas joined; whole once the stream has ended."""
        return self._accumulator.result

    def resume(self) -> Resume:
        """What to give as `resume=` to another call that shall go on from here."""
        return self._accumulator.resume()

    def close(self) -> None:
        """Cancels the call unless it has ended; the server frees everything at once."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """Calls a server at `address` (host:port, or any gRPC target, `dns:///name:port` for several).

    Every method raises a `SalverError` when the call fails. `timeout` is in seconds:
    300 by default for what generates or scores, 60 for the rest.
    """

    def __init__(self, address: str = "127.0.0.1:50051", options: ConnectionOptions | None = None) -> None:
        self._options = options or ConnectionOptions()
        arguments = self._options.arguments()
        if self._options.credentials is None:
            self._channel = grpc.insecure_channel(address, arguments, self._options.compression)
        else:
            self._channel = grpc.secure_channel(
                address, self._options.credentials, arguments, self._options.compression
            )
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._tokenization = tokenization_pb2_grpc.TokenizationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)

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
        request = convert.to_generation(
            generation_pb2.GenerateRequest, options, prompt=convert.to_prompt(prompt)
        )
        reply = self._call(self._generation.Generate, request, options.get("timeout"), GENERATION_TIMEOUT)
        return convert.from_generation(reply)

    def stream_generate(self, prompt: PromptLike, **options: Unpack[GenerationOptions]) -> Stream:
        """Completes a prompt; messages come as tokens do."""
        request = convert.to_generation(
            generation_pb2.StreamGenerateRequest, options, prompt=convert.to_prompt(prompt)
        )
        return self._stream(self._generation.StreamGenerate, request, options)

    def chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> GenerateResult:
        """Answers a conversation; a mere string is what the user says."""
        request = convert.to_generation(
            generation_pb2.ChatRequest, options, messages=convert.to_messages(messages)
        )
        reply = self._call(self._generation.Chat, request, options.get("timeout"), GENERATION_TIMEOUT)
        return convert.from_generation(reply)

    def stream_chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> Stream:
        """Answers a conversation; messages come as tokens do."""
        request = convert.to_generation(
            generation_pb2.StreamChatRequest, options, messages=convert.to_messages(messages)
        )
        return self._stream(self._generation.StreamChat, request, options)

    def score(
        self, inputs: Iterable[tuple[PromptLike, PromptLike]], **options: Unpack[ScoreOptions]
    ) -> list[ScoreResult]:
        """The log-likelihood of each (context, continuation), in order."""
        request = convert.to_score(inputs, options)
        reply = self._call(self._generation.Score, request, options.get("timeout"), GENERATION_TIMEOUT)
        return convert.from_score(reply)

    def tokenize(
        self, text: str, *, add_special_tokens: bool | None = None, timeout: float | None = None
    ) -> list[Token]:
        """The tokens of a text with their places."""
        request = tokenization_pb2.TokenizeRequest(text=text)
        if add_special_tokens is not None:
            request.add_special_tokens = add_special_tokens
        return convert.from_tokens(self._call(self._tokenization.Tokenize, request, timeout))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = tokenization_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=token_ids))
        if skip_special_tokens is not None:
            request.skip_special_tokens = skip_special_tokens
        text: str = self._call(self._tokenization.Detokenize, request, timeout).text
        return text

    def list_models(self, *, timeout: float | None = None) -> list[Model]:
        """All models, whatever the number of pages."""
        models: list[Model] = []
        token = ""
        while True:
            request = model_pb2.ListModelsRequest(page_token=token)
            reply = self._call(self._models.ListModels, request, timeout)
            models += map(convert.from_model, reply.models)
            token = reply.next_page_token
            if not token:
                return models

    def get_model(self, model: str = "", *, timeout: float | None = None) -> Model:
        """One model; the served one when not named."""
        request = model_pb2.GetModelRequest(model=model)
        return convert.from_model(self._call(self._models.GetModel, request, timeout).model)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, limits, device, start-up phases."""
        request = model_pb2.GetServerInfoRequest()
        return convert.from_server_info(self._call(self._models.GetServerInfo, request, timeout))

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """SERVING or NOT_SERVING, of the server or one service. An unknown service is NotFound."""
        return health.status(self._call(health.check(self._channel), health.request(service), timeout))

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

    def _call(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout: float | None,
        default: float = DEFAULT_TIMEOUT,
    ) -> Any:
        try:
            return method(request, timeout=timeout or default, metadata=self._options.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _stream(self, method: Callable[..., Any], request: Any, options: GenerationOptions) -> Stream:
        timeout = options.get("timeout") or GENERATION_TIMEOUT
        call = method(request, timeout=timeout, metadata=self._options.metadata)
        return Stream(call, options.get("resume"))

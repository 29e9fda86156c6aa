"""What is served, once it is there, and whether calls may come in."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Protocol

from salver.model.chat_template import ChatTemplate
from salver.model.embedding_spec import EmbeddingSpec
from salver.model.encoder_spec import EncoderSpec
from salver.model.generation_config import GenerationConfig
from salver.model.hyperparameters import Hyperparameter
from salver.model.spec import ModelSpec
from salver.model.tokenizer import Tokenizer
from salver.server.engine.changes import AdapterFacts
from salver.server.engine.errors import EngineError, EngineUnavailable
from salver.server.engine.process import OutputSink
from salver.server.engine.request import EngineRequest, Ready
from salver.server.rpc.calls import Call, current_call
from salver.server.rpc.configuration import Configuration, checkpoint_defaults
from salver.server.rpc.errors import RETRY_DRAINING, draining, loading, task_not_supported


class Engine(Protocol):
    """What the services ask of the engine (EngineProcess, or a fake of it in tests)."""

    @property
    def restarts(self) -> int: ...
    def submit(self, request: EngineRequest, sink: OutputSink) -> None: ...
    def abort(self, request_id: int, sample_index: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds that requests must keep; the same for the life of the server. Sizes in tokens and bytes."""

    max_model_len: int
    cache_tokens: int
    vocab_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_samples: int
    max_queued_requests: int
    max_queued_tokens: int
    max_message_bytes: int
    max_top_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    max_stop_token_ids: int = 1024
    max_logit_bias: int = 4096
    max_words: int = 256
    max_word_length: int = 256
    max_allowed_token_ids: int = 4096
    max_logprob_token_ids: int = 128
    max_beams: int = 32
    cache_name: str = "key-value cache"  # that cache_tokens are of

    @property
    def capacity(self) -> int:
        """Longest prompt and output together: bounded by the context, and by what the cache can hold.

        A model without a cache (`cache_tokens` 0) reads whole inputs up to its context.
        """
        return min(self.max_model_len, self.cache_tokens) if self.cache_tokens else self.max_model_len


class Task(enum.Enum):
    """What can be asked of a checkpoint; the names of `salver.v1.Task`."""

    GENERATE = "TASK_GENERATE"
    CHAT = "TASK_CHAT"
    SCORE = "TASK_SCORE"
    EMBED = "TASK_EMBED"
    RERANK = "TASK_RERANK"
    CLASSIFY = "TASK_CLASSIFY"
    CLASSIFY_TOKENS = "TASK_CLASSIFY_TOKENS"
    FILL_MASK = "TASK_FILL_MASK"
    EXTRACT_ANSWER = "TASK_EXTRACT_ANSWER"


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One version of a LoRA adapter; requests to the engine ask it by the key of its facts."""

    name: str
    version: int
    directory: str
    facts: AdapterFacts


_TASKS_OF_HEADS = {
    "input": (Task.CLASSIFY,),
    "tokens": (Task.CLASSIFY_TOKENS,),
    "spans": (Task.EXTRACT_ANSWER,),
    "vocabulary": (Task.FILL_MASK,),
}


@dataclass(slots=True)
class WeightsInForce:
    """Which version of the base's weights the worker computes with; 1 is the first."""

    version: int = 1


@dataclass(frozen=True)
class ServedModel:
    """The one checkpoint of this server, as the front knows it."""

    name: str
    architecture: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    ready: Ready
    weights_digest: str
    limits: RequestLimits
    weights_version: int = 1
    in_force: WeightsInForce = field(default_factory=WeightsInForce, compare=False)
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    checkpoint: str = ""  # its directory
    adapters: tuple[LoadedAdapter, ...] = ()  # one of each name
    adapter: str = ""  # the key of the LoRA adapter that requests of this name ask; empty: the model itself
    embedding: EmbeddingSpec = field(default_factory=EmbeddingSpec)
    embedding_dimensions: int = 0
    spec: ModelSpec | EncoderSpec | None = None
    hyperparameters: tuple[Hyperparameter, ...] = ()

    @property
    def numerics_id(self) -> str:
        """Of an answer that ends now. Of one that began with other weights it promises nothing."""
        mine, now = self.weights_version, self.in_force.version
        if mine == now:
            return self.ready.numerics_id
        digest = sha256(f"{self.ready.numerics_id}, then version {now}".encode()).hexdigest()
        return f"none-{digest[:16]}"

    @property
    def encoder(self) -> EncoderSpec | None:
        """None of a decoder."""
        return self.spec if isinstance(self.spec, EncoderSpec) else None

    @property
    def source(self) -> EncoderSpec | None:
        """The encoder of an encoder-decoder, which reads the source; None of all others."""
        return self.spec.encoder if isinstance(self.spec, ModelSpec) else None

    @property
    def input_vocab_size(self) -> int:
        """Of prompts, which an encoder-decoder's encoder reads; limits.vocab_size is of what is written."""
        return self.limits.vocab_size if self.source is None else self.source.vocab_size

    @property
    def forced_eos_token_id(self) -> int | None:
        """What the checkpoint ends an output with that reaches its limit."""
        return self.spec.forced_eos_token_id if isinstance(self.spec, ModelSpec) else None

    @property
    def num_layers(self) -> int:
        """Of attention; a layer that is computed several times counts as often."""
        if self.spec is None:
            return 0
        return len(self.spec.order) if isinstance(self.spec, EncoderSpec) else self.spec.num_layers

    @property
    def num_heads(self) -> int:
        """Of queries, in each layer."""
        return 0 if self.spec is None else self.spec.num_heads

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What this checkpoint can be asked; a ranker is a classifier of one label."""
        decoder = self.spec if isinstance(self.spec, ModelSpec) else None
        if self.encoder is None and (decoder is None or not decoder.body):
            chat = () if self.chat_template is None else (Task.CHAT,)
            embed = (Task.EMBED,) if self.source is None else ()
            return (Task.GENERATE, *chat, Task.SCORE, *embed)
        reads, size = "", 0
        if self.encoder is not None and self.encoder.head is not None:
            reads, size = self.encoder.head.reads, self.encoder.head.size
        elif decoder is not None and decoder.classifier is not None:
            reads, size = decoder.classifier.reads, len(decoder.classifier.labels)
        rank = (Task.RERANK,) if reads == "input" and size == 1 else ()
        return (Task.EMBED, *rank, *_TASKS_OF_HEADS.get(reads, ()))

    def require(self, task: Task) -> None:
        """Raises ApiError (FAILED_PRECONDITION) for a task that the checkpoint does not have."""
        if task in self.tasks:
            return
        names = [known.value.removeprefix("TASK_") for known in self.tasks]
        raise task_not_supported(
            f"{self.name!r} ({self.architecture}) does not have the task {task.value.removeprefix('TASK_')}; "
            f"it has {', '.join(names)}",
            task=task.value,
            supported=",".join(known.value for known in self.tasks),
        )

    @property
    def labels(self) -> tuple[str, ...]:
        if isinstance(self.spec, ModelSpec):
            return () if self.spec.classifier is None else self.spec.classifier.labels
        return self.encoder.labels if self.encoder is not None and self.encoder.head is not None else ()

    @property
    def problem_type(self) -> str:
        if isinstance(self.spec, ModelSpec):
            return "" if self.spec.classifier is None else self.spec.classifier.problem_type
        return self.encoder.problem_type if self.encoder is not None else ""

    @property
    def rank_activation(self) -> str:
        if isinstance(self.spec, ModelSpec):
            return "" if self.spec.classifier is None else self.spec.classifier.rank_activation
        return self.encoder.rank_activation if self.encoder is not None else ""

    @cached_property
    def defaults(self) -> Configuration:
        """What is in force where a request says nothing."""
        return checkpoint_defaults(self.generation_config)

    @cached_property
    def with_adapter(self) -> dict[str, ServedModel]:
        """The model under each of its adapters, by their names."""
        return {
            adapter.name: replace(
                self,
                name=adapter.name,
                adapters=(),
                adapter=adapter.facts.key,
                weights_digest=adapter.facts.digest,
                ready=replace(
                    self.ready, numerics_id=f"{self.ready.numerics_id}+{adapter.facts.digest[:16]}"
                ),
            )
            for adapter in self.adapters
        }


class FrontState(enum.Enum):
    """Where the front is between its start and its end."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Front:
    """State shared by all services: the model once it is loaded, and whether calls may come in."""

    def __init__(self, rejected: Callable[[str], None] = lambda reason: None) -> None:
        self.state = FrontState.LOADING
        self._model: ServedModel | None = None
        self._engine: Engine | None = None
        self._rejected = rejected
        self._running: dict[OutputSink, Call | None] = {}
        self._calls: set[Call] = set()  # of our services, that have not ended
        self._left = asyncio.Event()  # when one ends
        self._held: asyncio.Event | None = None  # calls that would compute wait for it

    @contextmanager
    def running(self, sink: OutputSink) -> Iterator[None]:
        """While inside, `sink` is failed when the drain period is over, or its call is doomed."""
        call = self._running[sink] = current_call()
        if call is not None and call.doom is not None:
            sink.fail(call.doom)
        try:
            yield
        finally:
            del self._running[sink]

    def doom(self, calls: Collection[Call], error: EngineError) -> None:
        """Ends these calls with `error`: what they have in the engine, and what they are about to give it."""
        for call in calls:
            call.doom = error
            for request_id in call.engine_requests:
                self.engine.abort(request_id)
        for sink, asked in list(self._running.items()):
            if asked in calls:
                sink.fail(error)

    def left(self, call: Call) -> None:
        """It has ended."""
        self._calls.discard(call)
        left, self._left = self._left, asyncio.Event()
        left.set()

    def calls(self, adapter: str) -> list[Call]:
        """Those that have not ended and ask the adapter of this key."""
        return [call for call in self._calls if call.adapter == adapter]

    async def wait_for_end(self, calls: Collection[Call]) -> None:
        """Returns when all of these have ended."""
        while not self._calls.isdisjoint(calls):
            await self._left.wait()

    def end_running(self) -> None:
        """The drain period is over: what still runs ends with UNAVAILABLE."""
        for sink in list(self._running):
            sink.fail(EngineUnavailable("the server is shutting down", RETRY_DRAINING))

    def serve(self, model: ServedModel, engine: Engine) -> None:
        """Calls may come in from now on."""
        self._model, self._engine = model, engine
        if self.state is FrontState.LOADING:
            self.state = FrontState.SERVING

    def drain(self) -> None:
        """No new calls from now on."""
        self.state = FrontState.DRAINING
        if self._held is not None:
            self._held.set()  # who waits there is told

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, calls that come and would compute wait."""
        self._held = asyncio.Event()
        try:
            yield
        finally:
            held, self._held = self._held, None
            held.set()

    def computing(self) -> list[Call]:
        """Calls that have not ended and may compute."""
        return [call for call in self._calls if _computes(call)]

    async def gate(self) -> None:
        """Lets the call that is being answered in, perhaps after a while. Raises ApiError (UNAVAILABLE)
        unless calls may come in."""
        await self.require_serving()
        call = current_call()
        if call is None:
            return
        while self._held is not None and _computes(call):
            await self._held.wait()
            await self.require_serving()
        self._calls.add(call)

    async def require_serving(self) -> None:
        """Raises ApiError (UNAVAILABLE) unless calls may come in."""
        if self.state is FrontState.SERVING:
            return
        self._rejected(self.state.value)
        raise loading() if self.state is FrontState.LOADING else draining()

    @property
    def model(self) -> ServedModel:
        if self._model is None:
            raise loading()
        return self._model

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise loading()
        return self._engine


def _computes(call: Call) -> bool:
    return not call.method.startswith(("/salver.v1.ModelService/", "/salver.v1.TokenizationService/"))

"""TokenizationService: the checkpoint's tokenizer and chat template."""

from __future__ import annotations

from typing import Any

import grpc

from salver.server.rpc.prompts import PromptReader, render, template_of
from salver.server.rpc.served import Front
from salver.server.rpc.validation import Violations, check_messages, check_token_ids, model_named
from salver.v1 import tokenization_pb2, tokenization_pb2_grpc


class TokenizationService(tokenization_pb2_grpc.TokenizationServiceServicer):
    """Answers without the engine."""

    def __init__(self, front: Front, prompts: PromptReader) -> None:
        self._front = front
        self._prompts = prompts

    async def Tokenize(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model = self._front.model
        model_named(request.model, model)
        violations = Violations()
        kind = request.WhichOneof("input")
        if kind is None:
            violations.add("input", "must be text or conversation")
        elif kind == "conversation":
            template_of(model)
            check_messages(request.conversation.messages, "conversation.messages", violations)
        violations.raise_any()
        # Templates write the special tokens themselves.
        special = request.add_special_tokens if request.HasField("add_special_tokens") else kind == "text"

        def work() -> Any:
            text = request.text
            if kind == "conversation":
                conversation = request.conversation
                asks = (
                    not conversation.HasField("add_generation_prompt") or conversation.add_generation_prompt
                )
                text = render(conversation.messages, model, add_generation_prompt=asks)
            tokenizer = model.tokenizer
            tokens = [
                tokenization_pb2.Token(
                    id=token_id, token=tokenizer.token_bytes(token_id), start=start, end=end
                )
                for token_id, start, end in tokenizer.encode_with_offsets(text, add_special_tokens=special)
            ]
            return tokenization_pb2.TokenizeResponse(model=model.name, tokens=tokens, text=text)

        size = len(request.text) + sum(len(message.content) for message in request.conversation.messages)
        return await self._prompts.run(size, work)

    async def Detokenize(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model = self._front.model
        model_named(request.model, model)
        violations = Violations()
        ids = list(request.token_ids.ids)
        if not request.HasField("token_ids"):
            violations.add("token_ids", "must be set")
        check_token_ids(ids, "token_ids.ids", model.limits.vocab_size, violations)
        violations.raise_any()
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await self._prompts.run(
            4 * len(ids), lambda: model.tokenizer.decode(ids, skip_special_tokens=skip)
        )
        return tokenization_pb2.DetokenizeResponse(model=model.name, text=text)

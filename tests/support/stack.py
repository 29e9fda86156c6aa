"""Drives the model without the engine: sequences in a paged cache, steps of any mixture."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from salver.model.attention import AttentionBatch, into_slots, over_sources
from salver.model.cache import KVCache
from salver.model.encoder import build_encoder_batch
from salver.model.loader import load_model
from salver.model.transformer import Decoder, SourceDecoder

CPU = torch.device("cpu")
BLOCK_SIZE = 4


class Stack:
    """A loaded checkpoint with a small cache; sequences are known by their number."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        dtype: torch.dtype = torch.float32,
        numerics: str = "exact",
        num_blocks: int = 400,
    ) -> None:
        model = load_model(checkpoint, device=CPU, dtype=dtype, numerics=numerics)
        self._hold(model, KVCache(model.spec, num_blocks, BLOCK_SIZE, dtype=dtype, device=CPU))

    @classmethod
    def of(cls, model: Decoder, cache: KVCache) -> Stack:
        """Drives a model that is there already."""
        stack = cls.__new__(cls)
        stack._hold(model, cache)
        return stack

    def _hold(self, model: Decoder, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.head: Callable[[Tensor], Tensor] | None = None  # in the place of the one that gives logits
        self.block_size = cache.block_size
        self.free = list(range(1, cache.num_blocks))
        random.Random(0).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.prompts: dict[int, int] = {}  # lengths of prompts
        self.sources: dict[int, tuple[list[int], int]] = {}  # of encoder-decoders: blocks, length

    @torch.inference_mode()
    def read(self, sources: dict[int, Sequence[int]]) -> None:
        """Encodes the sources of sequences, all in one step."""
        spec = self.model.spec.encoder
        assert spec is not None
        model = cast(SourceDecoder, self.model)
        order = sorted(sources, key=lambda sequence: len(sources[sequence]))
        inputs = [list(sources[sequence]) for sequence in order]
        batch = build_encoder_batch(spec, inputs, [[]] * len(inputs), row_multiple=4, device=CPU)
        tables = [[self.free.pop() for _ in range(-(-len(ids) // self.block_size))] for ids in inputs]
        lengths = list(map(len, inputs))
        slots = into_slots(tables, lengths, batch.token_ids.numel(), self.block_size, CPU)
        model.encode(batch, self.cache, slots)
        self.sources |= dict(zip(order, zip(tables, lengths, strict=True), strict=True))

    @torch.inference_mode()
    def step(self, parts: Sequence[tuple[int, Sequence[int]]], padding: int = 0) -> list[Tensor]:
        """Appends tokens to sequences, all in one step; gives the logits [n, vocab] of each part."""
        size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        for sequence, tokens in parts:
            table = self.tables.setdefault(sequence, [])
            begin = self.lengths.get(sequence, 0)
            end = self.lengths[sequence] = begin + len(tokens)
            while len(table) * size < end:
                table.append(self.free.pop())
            token_ids += tokens
            positions += range(begin, end)
            slots += [table[p // size] * size + p % size for p in range(begin, end)]
            bounds.append(len(token_ids))
        tables = [self.tables[sequence] for sequence, _ in parts]
        widest = max(map(len, tables))
        batch = AttentionBatch(
            cu_seqlens_q=bounds,
            seq_lens=[self.lengths[sequence] for sequence, _ in parts],
            block_tables=torch.tensor([table + [0] * (widest - len(table)) for table in tables]),
            slot_mapping=torch.tensor(slots + [i % size for i in range(padding)]),
            prompt_lens=[self.prompts.get(sequence, 0) for sequence, _ in parts],
        )
        if self.sources:
            tables, lengths = zip(*(self.sources[sequence] for sequence, _ in parts), strict=True)
            batch.source = over_sources(batch, tables, lengths)
        hidden = self.model(
            torch.tensor(token_ids + [0] * padding),
            torch.tensor(positions + [0] * padding),
            self.cache,
            batch,
        )
        assert bool(torch.isfinite(hidden[bounds[-1] :]).all())
        head = self.head or self.model.logits
        return [head(hidden[a:b]) for a, b in itertools.pairwise(bounds)]

    def end(self, sequence: int) -> None:
        """Frees the sequence's blocks; what is in them stays."""
        self.free += self.tables.pop(sequence)
        del self.lengths[sequence]

    def logits(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """[n, vocab] of a sequence alone, `chunk` tokens a step."""
        chunk = chunk or len(tokens)
        self.prompts[-1] = len(tokens)
        found = [self.step([(-1, tokens[i : i + chunk])])[0] for i in range(0, len(tokens), chunk)]
        self.end(-1)
        return torch.cat(found)

    def greedy(self, prompt: Sequence[int], count: int, chunk: int | None = None) -> list[int]:
        """The tokens that follow, one step each."""
        chunk = chunk or len(prompt)
        self.prompts[-1] = len(prompt)
        for begin in range(0, len(prompt), chunk):
            row = self.step([(-1, prompt[begin : begin + chunk])])[0][-1]
        tokens = [int(row.argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step([(-1, tokens[-1:])])[0][-1].argmax()))
        self.end(-1)
        return tokens

    def greedy_together(self, prompts: Sequence[Sequence[int]], count: int, chunk: int) -> list[list[int]]:
        """All at once, prompts beginning in turn: steps mix chunks of prompts with single tokens."""
        waiting = [list(prompt) for prompt in prompts]
        self.prompts.update(enumerate(map(len, prompts)))
        found: list[list[int]] = [[] for _ in prompts]
        step = 0
        while any(len(tokens) < count for tokens in found):
            parts = []
            for sequence, prompt in enumerate(waiting[: step + 1]):
                if prompt:
                    parts.append((sequence, prompt[:chunk]))
                    del prompt[:chunk]
                elif len(found[sequence]) < count:
                    parts.append((sequence, found[sequence][-1:]))
            for (sequence, _), logits in zip(parts, self.step(parts, padding=step % 3), strict=True):
                if not waiting[sequence]:
                    found[sequence].append(int(logits[-1].argmax()))
            step += 1
        for sequence in range(len(prompts)):
            self.end(sequence)
        return found


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids, the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]

"""The paged cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .attention.batch import AttentionBatch
from .spec import ModelSpec
from .transfer import tensor_on


class KVCache:
    """Keys and values of every layer in blocks of `block_size` tokens.

    Layout of `data`: [layers, num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim]. A
    head's part of a block is one contiguous row, so that gathering a sequence by rows gives
    matrices [tokens, head_dim] per head, ready to be multiplied, in one pass over memory.

    Block 0 is the null block: scratch for what belongs to no sequence.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        shape = (spec.num_layers, num_blocks, 2, spec.num_kv_heads, block_size, spec.head_dim)
        self.data = _zeros(shape, dtype, device)
        rows = num_blocks * 2 * spec.num_kv_heads
        self._by_block_row = list(self.data.view(spec.num_layers, rows, block_size * spec.head_dim).unbind(0))
        self._by_token_row = list(self.data.view(spec.num_layers, rows * block_size, spec.head_dim).unbind(0))

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block, all layers."""
        return block_size * spec.kv_bytes_per_token(dtype.itemsize)

    def keys(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view."""
        return self.data[layer, :, 0].transpose(1, 2)

    def values(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view."""
        return self.data[layer, :, 1].transpose(1, 2)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) in all layers; no destination is also a source."""
        if pairs:
            sources, destinations = tensor_on(self.data.device, pairs, torch.int64).unbind(1)
            self.data[:, destinations] = self.data[:, sources]

    # ---- by rows, for attention ----

    def block_row_index(self, blocks: Tensor) -> Tensor:
        """Rows of `block_rows` of blocks [S, B]: int64 [2, S, num_kv_heads, B], keys then values."""
        heads = self.num_kv_heads
        part = torch.arange(2 * heads, device=blocks.device).view(2, 1, heads, 1)
        return blocks[None, :, None, :] * (2 * heads) + part

    def block_rows(self, layer: int) -> Tensor:
        """[rows, block_size * head_dim]: one row per block, key or value, and head."""
        return self._by_block_row[layer]

    def begin_step(self, batch: AttentionBatch) -> None:
        """Clears the blocks that this step begins to fill.

        What a block's last owner left there is masked, but a NaN among it would come through.
        """
        slots = batch.slot_mapping[: batch.num_tokens]
        begun = slots[slots % self.block_size == 0] // self.block_size
        if begun.numel():
            self.data.index_fill_(1, begun, 0)

    def write(self, layer: int, keys: Tensor, values: Tensor, batch: AttentionBatch) -> None:
        """Stores keys and values [N, num_kv_heads, head_dim] at the slots of the batch, but for padding."""
        key_rows, value_rows = batch.derive(self._slot_rows)
        count, rows = batch.num_tokens, self._by_token_row[layer]
        rows.index_copy_(0, key_rows, keys[:count].reshape(-1, self.head_dim))
        rows.index_copy_(0, value_rows, values[:count].reshape(-1, self.head_dim))

    def _slot_rows(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        slots = batch.slot_mapping[: batch.num_tokens]
        block, offset = (slots // self.block_size)[:, None], (slots % self.block_size)[:, None]
        heads = torch.arange(self.num_kv_heads, device=slots.device)
        key_rows = (block * (2 * self.num_kv_heads) + heads) * self.block_size + offset
        value_rows = key_rows + self.num_kv_heads * self.block_size
        return key_rows.flatten(), value_rows.flatten()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty memory: attention multiplies what it masks by zero, which NaN would survive.

    On the CPU by the system's zero pages, through numpy: torch.zeros writes them, and blocks that
    nobody has used yet would be resident.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)

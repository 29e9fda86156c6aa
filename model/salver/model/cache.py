"""The paged cache: keys and values of every token, in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salver.model.spec import ModelSpec


class KVCache:
    """Keys and values of all layers, [num_kv_heads, num_blocks, block_size, head_dim] a layer.

    Head-major, so that blocks gathered for a batch of sequences are already laid out as the
    batched product wants them. Block 0 is the null block: padding rows write there.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_kv_heads, num_blocks, block_size, spec.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeros, not garbage: a NaN under a mask would still poison a sum. The pages of zeros are
        # not resident until they are written.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all layers."""
        return block_size * spec.kv_bytes_per_token(dtype.itemsize)

    def write(self, layer: int, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [N, num_kv_heads, head_dim] at slots (block * block_size + offset) [N]."""
        for cache, new in ((self.keys[layer], keys), (self.values[layer], values)):
            flat = cache.view(cache.shape[0], -1, cache.shape[3])
            flat.index_copy_(1, slot_mapping, new.transpose(0, 1))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination); all sources are read before anything is written."""
        device = self.keys[0].device
        sources = torch.tensor([source for source, _ in pairs], device=device)
        destinations = torch.tensor([destination for _, destination in pairs], device=device)
        for cache in (*self.keys, *self.values):
            cache.index_copy_(1, destinations, cache.index_select(1, sources))

"""Multi-head latent attention (DeepSeek-V2, 2024): the cache holds one low-rank vector a token.

Keys and values of a head are products with that vector. The key's matrix is applied to the query
instead, and the value's to what attention gives: then the vector itself is the one key, and the value,
that all heads read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layers import Linear, Norm
from .rope import Rotation
from .spec import LatentAttention, ModelSpec


class Latent(nn.Module):
    """From hidden states to what attention reads, and from what it gives to values of every head."""

    def __init__(self, spec: ModelSpec, latent: LatentAttention) -> None:
        super().__init__()
        self.spec = latent
        self.num_heads = spec.num_heads
        rank = latent.query_rank
        self.query_down = Linear(rank, spec.hidden_size, bias=spec.qkv_bias) if rank else None
        self.query_norm = Norm(latent.norm, rank) if rank else None
        width = spec.num_heads * (latent.key_dim + latent.rotary_dim)
        self.query_up = Linear(width, rank or spec.hidden_size)
        self.down = Linear(latent.latent_dim + latent.rotary_dim, spec.hidden_size, bias=spec.qkv_bias)
        self.norm = Norm(latent.norm, latent.latent_dim)
        self.up = Linear(spec.num_heads * (latent.key_dim + latent.value_dim), latent.latent_dim)
        self.to_latent = HeadProduct(self.up, spec.num_heads, latent, keys=True)
        self.from_latent = HeadProduct(self.up, spec.num_heads, latent, keys=False)

    def query(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[N, num_heads, latent_dim + rotary_dim] of hidden [N, hidden]."""
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        query = self.query_up(x).view(x.shape[0], self.num_heads, -1)
        still, turning = torch.split(query, [self.spec.key_dim, self.spec.rotary_dim], dim=2)
        return torch.cat((self.to_latent(still), rotation(turning)), dim=2)

    def vectors(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[N, 1, latent_dim + rotary_dim] of hidden [N, hidden], for the cache."""
        vector, key = torch.split(self.down(x), [self.spec.latent_dim, self.spec.rotary_dim], dim=1)
        return torch.cat((self.norm(vector)[:, None], rotation(key[:, None])), dim=2)

    def values(self, attended: Tensor) -> Tensor:
        """[N, num_heads * value_dim] of what attention gives, [N, num_heads * (latent_dim + rotary_dim)]."""
        vectors = torch.unflatten(attended, 1, (self.num_heads, -1))[..., : self.spec.latent_dim]
        return self.from_latent(vectors).flatten(1)


class HeadProduct(nn.Module):
    """Products of the heads with their parts of `up`: queries with the keys', vectors with the values'."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, up: Linear, num_heads: int, latent: LatentAttention, *, keys: bool) -> None:
        super().__init__()
        self.up = up
        self.num_heads = num_heads
        self.sizes = [latent.key_dim, latent.value_dim]
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        """[N, heads, latent_dim] of queries [N, heads, key_dim]; [N, heads, value_dim] of the vectors."""
        return self.product(x, self.up.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with another matrix in the place of `up`'s."""
        matrices = torch.unflatten(weight, 0, (self.num_heads, -1))
        keys, values = torch.split(matrices, self.sizes, dim=1)
        return _by_head(x, keys if self.keys else values.transpose(1, 2))


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """[N, heads, out] of x [N, heads, in] and a matrix [heads, in, out] each.

    float32 in float64: the rounding of such products depends on the number of rows.
    """
    dtype = torch.float64 if x.dtype == torch.float32 else x.dtype
    return torch.bmm(x.transpose(0, 1).to(dtype), matrices.to(dtype)).transpose(0, 1).to(x.dtype)

"""A mixture of experts: each token is computed by the few experts that its router chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, Weights, product
from .spec import ExpertsSpec, ModelSpec

# An expert's tokens are padded to a multiple of so many, like the batch (see `numerics.row_multiple`), so
# that a token's numbers don't depend on who else chose the expert; until it is known how many it takes.
ROWS = 16

Inner = Callable[[Tensor], Tensor]  # [n, columns of `up`] to [n, intermediate_size]


class ExpertProducts(Weights):
    """A matrix for each expert, weight [experts, out, in]."""

    rows = 0  # see `layers.product`

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """[n, out] of [n, in], by one of the experts; `tokens`: which rows of the step the first ones are."""
        bias = None if self.bias is None else self.bias[expert]
        return product(x, self.weight[expert], bias, self.rows)


class Experts(nn.Module):
    """Costs as much as the experts that some token of the step chose."""

    reduce: Callable[[Tensor], Tensor] | None = None  # see `layers.Linear`

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, spec: ModelSpec, experts: ExpertsSpec, inner: Inner) -> None:
        super().__init__()
        hidden, size = spec.hidden_size, experts.intermediate_size
        width = 2 * size if spec.gated else size
        self.spec = experts
        self.row_multiple = ROWS
        self.inner = inner
        self.router = Linear(experts.count, hidden, bias=experts.bias)
        self.correction = Weights(experts.count) if experts.correction else None
        self.up = ExpertProducts(experts.count, width, hidden, bias=experts.bias)
        self.down = ExpertProducts(experts.count, hidden, size, bias=experts.bias)
        shared = experts.shared_intermediate_size
        self.shared_up = Linear(2 * shared if spec.gated else shared, hidden) if shared else None
        self.shared_down = Linear(hidden, shared) if shared else None
        self.shared_gate = Linear(1, hidden) if experts.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        chosen, weights = self._route(x)
        out = torch.zeros_like(x)
        # Pairs of token and expert, the pairs of an expert side by side. In order of experts a token's
        # sum has one order, whoever else is there.
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.spec.per_token
        weights = weights.flatten()[order, None].to(x.dtype)
        begin = 0
        for expert, count in enumerate(chosen.flatten().bincount(minlength=self.spec.count).tolist()):
            if count:
                end = begin + count
                found = self._expert(expert, x, tokens[begin:end])
                out.index_add_(0, tokens[begin:end], found * weights[begin:end])
                begin = end
        if self.shared_up is not None and self.shared_down is not None:
            shared = self.shared_down(self.inner(self.shared_up(x)))
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(x).sigmoid()
            out += shared
        return out if self.reduce is None else self.reduce(out)

    def _expert(self, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        """[n, hidden] of these rows of x."""
        count = len(tokens)
        rows = F.pad(x[tokens], (0, 0, 0, -count % self.row_multiple))
        return self.down(self.inner(self.up(rows, expert, tokens)), expert, tokens)[:count]

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(experts int64, weights float32), both [N, per_token]."""
        spec = self.spec
        logits = self.router(x).float()
        scores = logits.sigmoid() if spec.scores == "sigmoid" else logits.softmax(-1)
        judged = scores if self.correction is None else scores + self.correction.weight.float()
        if spec.groups > 1:
            judged = self._best_groups(judged)
        chosen = judged.topk(spec.per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if spec.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if spec.scores == "sigmoid" else 0.0))
        return chosen, weights * spec.scale

    def _best_groups(self, judged: Tensor) -> Tensor:
        """The scores [N, count], -inf in groups that are not among the best."""
        grouped = torch.unflatten(judged, 1, (self.spec.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.spec.groups_per_token, dim=-1).indices
        outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=judged.device).scatter_(
            1, best, False
        )
        return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)

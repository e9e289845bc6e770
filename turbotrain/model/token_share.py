"""The tokens of a sample dealt to the processes of a group: Ulysses context parallelism (arXiv 2309.14509).

All of the network but self-attention works token by token: a process computes it for its own tokens. Self-attention works
head by head: an all-to-all turns (own tokens, all heads) into (all tokens, own heads), and another one back. Tangents travel with
their values in the same collective.

Every process computes the same loss from the whole output, and the engines average gradients over all processes. So the output
hands back `size` times its gradient, and the average over a group is the sum over its tokens: the gradient of one process.

Shape suffixes: B batch, L all tokens, R own tokens, N all heads, O own heads, H head dim, D features; P processes of the group,
X tensors that travel together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from turbotrain.model.tangent import Dual

# A linear map of several tensors of one shape.
_Map = Callable[[Sequence[Tensor]], list[Tensor]]


class TokenShare:
    """What one process has of `length` tokens: as many as every other one, consecutive, the last ones zero padding.

    Attention never sees the padding, and its gradients are zero. All processes of `group` call the same methods in the same
    order.
    """

    def __init__(self, length: int, group: ProcessGroup) -> None:
        self.length, self.group = length, group
        self.size, self.rank = group.size(), group.rank()
        self.rows = -(-length // self.size)

    def own(self, x: Tensor) -> Tensor:
        """The process's part of a constant, whose dimension 1 are all tokens: (B, L, ...) -> (B, R, ...)."""
        first = min(self.rank * self.rows, self.length)
        return _padded(x[:, first : first + self.rows], self.rows)

    def split(self, x: Dual) -> Dual:
        """(B, L, D) -> (B, R, D)."""
        (part,) = _mapped(self._split, lambda grads: [grad / self.size for grad in self._join(grads)], [x])
        return part

    def join(self, x: Dual) -> Dual:
        """(B, R, D) -> (B, L, D), the same on all processes."""
        (whole,) = _mapped(self._join, lambda grads: [self.own(grad) * self.size for grad in grads], [x])
        return whole

    def to_heads(self, *duals: Dual) -> list[Dual]:
        """Each (B, R, N, H) -> (B, L, O, H), in one collective."""
        return _mapped(self._to_heads, self._to_tokens, duals)

    def to_tokens(self, x: Dual) -> Dual:
        """(B, L, O, H) -> (B, R, N, H)."""
        (own,) = _mapped(self._to_tokens, self._to_heads, [x])
        return own

    def _split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.own(x) for x in tensors]

    def _join(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        sent_XBRD = torch.stack(tuple(tensors))
        got = [torch.empty_like(sent_XBRD) for _ in range(self.size)]
        dist.all_gather(got, sent_XBRD, group=self.group)
        return list(torch.cat(got, 2)[:, :, : self.length].unbind())

    def _to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        got_PXBROH = self._exchange([x.unflatten(2, (self.size, -1)).movedim(2, 0) for x in tensors])
        return [got_PBROH.transpose(0, 1).flatten(1, 2)[:, : self.length] for got_PBROH in got_PXBROH.unbind(1)]

    def _to_tokens(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        padded = [_padded(x, self.rows * self.size) for x in tensors]
        got_PXBROH = self._exchange([x.unflatten(1, (self.size, -1)).movedim(1, 0) for x in padded])
        return [got_PBROH.movedim(0, 2).flatten(2, 3) for got_PBROH in got_PXBROH.unbind(1)]

    def _exchange(self, parts: Sequence[Tensor]) -> Tensor:
        """parts (P, B, R, O, H), the p-th slice for process p -> (P, X, B, R, O, H), the p-th from process p."""
        sent = torch.stack(tuple(parts), dim=1)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        return got


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros after dimension 1 up to `length`."""
    missing = length - x.shape[1]
    return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing)) if missing else x


def _mapped(forth: _Map, back: _Map, duals: Sequence[Dual]) -> list[Dual]:
    """`forth` of all values and tangents at once; `back` of the gradients, which have values alone."""
    slopes = [dual.t for dual in duals if dual.t is not None]
    mapped = _LinearMap.apply(forth, back, len(duals), *(dual.x for dual in duals), *slopes)
    rest = iter(mapped[len(duals) :])
    return [Dual(value, None if dual.t is None else next(rest)) for dual, value in zip(duals, mapped)]


class _LinearMap(torch.autograd.Function):
    """forth(tensors), of which the first `count` have a gradient: back(gradients)."""

    @staticmethod
    def forward(ctx: Any, forth: _Map, back: _Map, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back, ctx.count, ctx.constants = back, count, len(tensors) - count
        ctx.set_materialize_grads(False)
        out = forth(tensors)
        ctx.mark_non_differentiable(*out[count:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = next(grad for grad in grads if grad is not None)
        filled = [torch.zeros_like(given) if grad is None else grad for grad in grads[: ctx.count]]
        return None, None, None, *ctx.back(filled), *[None] * ctx.constants

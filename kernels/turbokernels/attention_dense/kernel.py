"""Dense attention with its tangent by Triton: the kernels of block-sparse attention, without lists.

Shape suffixes: B batch, L tokens, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbokernels.attention_sparse.kernel_backward import backward
from turbokernels.attention_sparse.kernel_jvp import jvp
from turbokernels.attention_tiles import check_kernel_operands
from turbokernels.recompute import refuse_tangents

BLOCKS = (128, 64)  # query and key tokens: no tile is larger


class _AttentionJvp(torch.autograd.Function):
    """(o, to): o is differentiable with respect to q, k, v; the tangent to is not."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        o, to, lse = jvp(q, k, v, tq, tk, tv, None, *BLOCKS)
        ctx.mark_non_differentiable(to)
        ctx.save_for_backward(q, k, v, o, lse)
        return o, to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do is None:
            return (None,) * 6
        q, k, v, o, lse = ctx.saved_tensors
        return (*backward(q, k, v, o, lse, do, None, *BLOCKS), None, None, None)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.attention_jvp."""
    check_kernel_operands("attention_jvp", q)
    refuse_tangents("attention_jvp", *(x for x in (q, k, v, tq, tk, tv) if x is not None))
    return _AttentionJvp.apply(q, k, v, tq, tk, tv)  # pyright: ignore[reportReturnType]

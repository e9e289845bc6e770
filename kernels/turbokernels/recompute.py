"""Gradients of fused element-wise ops: a kernel makes the result, the reference formula its gradient.

Kernels for these ops' backward passes would save little: training is bound by attention and linears. So the backward
pass runs the reference once more, with gradient, on the saved operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

Function = Callable[..., Any]


class _Recomputed(torch.autograd.Function):
    """fused(*operands), with the gradient of reference(*operands); all operands are tensors."""

    @staticmethod
    def forward(ctx: Any, fused: Function, reference: Function, *operands: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.reference = reference
        ctx.save_for_backward(*operands)
        return fused(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[2:]
        operands = [o.detach().requires_grad_(need) for o, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            results = ctx.reference(*operands)
        wanted = [o for o in operands if o.requires_grad]
        found = iter(torch.autograd.grad(results, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))


def refuse_tangents(op: str, *operands: Tensor) -> None:
    """Errors: ValueError under torch.func's transforms and for dual tensors, where a kernel's tangent would be zero."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    if transformed or any(forward_ad.unpack_dual(operand).tangent is not None for operand in operands):
        raise ValueError(f"{op}: the kernel has no tangent and no batching rule; use impl='reference' under torch.func")


def differentiable(op: str, fused: Function, reference: Function, *operands: Tensor) -> Any:
    """fused(*operands), which autograd differentiates as reference(*operands). See `refuse_tangents` for errors."""
    refuse_tangents(op, *operands)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return _Recomputed.apply(fused, reference, *operands)
    return fused(*operands)

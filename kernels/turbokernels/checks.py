"""Validation of operands, shared by the public functions: what is wrong, its value, and the remedy.

Shape suffixes: B batch, L tokens, N heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, float64, is_grad_enabled

FLOAT_DTYPES = (float16, bfloat16, float32, float64)


def check_floating(op: str, **tensors: Tensor) -> None:
    """Require one floating dtype and one device for all `tensors`, and a contiguous last dimension in each."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64: cast it first"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; cast them to one dtype"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; move them to one device"
            )
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension, not 1: pass {name}.contiguous()"
            )


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor | None = None, **tangents: Tensor | None) -> None:
    """Check q (B, Lq, N, D), k and v (B, Lk, N, D), and tangents `tq`, `tk`, `tv` that are like their primals."""
    primals = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in primals.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions (batch, tokens, heads, head dim)"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; every dimension must be at least 1")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, heads and head dim (0, 2 and 3)"
        )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; expected k's shape {tuple(k.shape)}")
    given = {name: tensor for name, tensor in tangents.items() if tensor is not None}
    for name, tangent in given.items():
        primal = primals[name[1:]]
        if tangent.shape != primal.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tangent.shape)}; expected {name[1:]}'s shape {tuple(primal.shape)}"
            )
    check_floating(op, **primals, **given)


def check_modulation(op: str, x: Tensor, **others: Tensor) -> None:
    """Check x (B, L, C) and tensors that multiply or add to it: (B, 1, C) or (B, L, C), of any floating dtype."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (batch, tokens, channels), each at least 1")
    check_floating(op, x=x)
    batch, length, channels = x.shape
    for name, tensor in others.items():
        check_floating(op, **{name: tensor})
        if tuple(tensor.shape) not in ((batch, 1, channels), (batch, length, channels)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; expected ({batch}, 1, {channels}) or {tuple(x.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}; move them to one device")


def check_inference(op: str, **tensors: Tensor) -> None:
    """Refuse operands that require grad, for ops that round to 8 bits."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, but rounding to 8 bits has no useful gradient; use no_grad()"
            )

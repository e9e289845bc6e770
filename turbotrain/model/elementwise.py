"""What happens between the linears of a block: norms, modulation, gates, rotary embedding, GELU, quantisation.

With gradients or tangents these are the small functions of functional.py. Without, they are turbokernels' fused operators:
a branch's end and the next norm pass over memory once together, and 8-bit linears that read the same values are handed
them quantised, once, without a rounding in between.

Shape suffixes: B batch, L tokens, M 1 or L, D features, N heads, H head dim, P = H / 2 rotary pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import turbokernels as tk
from torch import Tensor, nn

from turbotrain.model import functional as fn
from turbotrain.model.quant_linear import QuantLinear, common_scheme, multiply_together, quantize_for
from turbotrain.model.tangent import Dual, Quantized, add, lift, linear

PER_TOKEN = {"int8_channel": torch.int8, "fp8_channel": torch.float8_e4m3fn}


class Norm(NamedTuple):
    """A LayerNorm over the features, and what follows it.

    Modulation: times 1 + scale, plus shift, each (B, M, D), all divided by `smooth` (D,) where there is one.
    affine: times scale, plus shift, each (D,): a weight and a bias.
    """

    shift: Dual
    scale: Dual
    eps: float
    smooth: Tensor | None = None
    affine: bool = False


def norm(x: Dual, norm: Norm, readers: Iterable[nn.Module]) -> Dual | Quantized:
    """The norm of x (B, L, D) as the linears that read it take it."""
    if not _fuses(x, norm.shift, norm.scale):
        return _plain_norm(x, norm)
    scheme = common_scheme(readers)
    scale, shift, affine = _operands(norm, x.x.shape[0])
    if scheme in PER_TOKEN:
        quantised = tk.layer_norm_modulate_quantize(x.x, scale, shift, norm.eps, PER_TOKEN[scheme], affine=affine)
        return Quantized(*quantised, x.x.dtype)
    return quantize_for(scheme, tk.layer_norm_modulate(x.x, scale, shift, norm.eps, affine=affine))


def residual_norm(
    x: Dual, branch: Dual, gate: Dual | None, norm: Norm, readers: Iterable[nn.Module]
) -> tuple[Dual, Dual | Quantized]:
    """The stream x + branch * gate (B, L, D), gate (B, M, D) or None for 1; and `norm` of it for its readers."""
    if not _fuses(x, branch, gate, norm.shift, norm.scale):
        x = add(x, branch) if gate is None else lift(fn.gated_residual, x, branch, gate)
        return x, _plain_norm(x, norm)
    scheme = common_scheme(readers)
    scale, shift, affine = _operands(norm, x.x.shape[0])
    gate_BMD = None if gate is None else gate.x
    if scheme in PER_TOKEN:
        out, values, token_scale = tk.gate_residual_norm_quantize(
            x.x, branch.x, gate_BMD, scale, shift, norm.eps, PER_TOKEN[scheme], affine=affine
        )
        return Dual(out), Quantized(values, token_scale, branch.x.dtype)
    out, h = tk.gate_residual_norm(x.x, branch.x, gate_BMD, scale, shift, norm.eps, affine=affine)
    return Dual(out), quantize_for(scheme, h)


def residual(x: Dual, branch: Dual, gate: Dual) -> Dual:
    """x + branch * gate."""
    if not _fuses(x, branch, gate):
        return lift(fn.gated_residual, x, branch, gate)
    return Dual(tk.gate_residual(x.x, branch.x, gate.x))


def norm_heads(x: Dual, weight_D: Tensor, rope_2LP: Tensor | None, num_heads: int, eps: float) -> Dual:
    """RMSNorm of (B, L, D) over all heads, turned by the angles' cosines and sines if any: (B, L, N, H).

    In inference x, a linear's result that nobody else reads, is overwritten.
    """
    if not _fuses(x):
        if rope_2LP is None:
            return split_heads(lift(fn.rms_norm, x, weight_D, eps), num_heads)
        return lift(fn.norm_rope, x, weight_D, rope_2LP, eps)
    cos_LP, sin_LP = (None, None) if rope_2LP is None else rope_2LP.unbind()
    return Dual(tk.rms_norm_rope(split_heads(x, num_heads).x, weight_D, cos_LP, sin_LP, eps, in_place=True))


def linears(layers: Sequence[nn.Module], x: Dual | Quantized) -> list[Dual]:
    """linear(layer, x) of layers that read the same values; one product where their 8-bit weights lie together."""
    together = multiply_together(layers, x) if isinstance(x, Quantized) else None
    return [linear(layer, x) for layer in layers] if together is None else [Dual(y) for y in together]


def gelu_linear(module: nn.Module, x: Dual) -> Dual:
    """module(GELU(x)) for a linear layer; an 8-bit one applies GELU where it quantises."""
    if isinstance(module, QuantLinear) and x.t is None:
        return Dual(module(x.x, activation="gelu_tanh"))
    return linear(module, lift(fn.gelu_tanh, x))


def feed_forward(first: nn.Module, second: nn.Module, x: Dual | Quantized, rows: int | None) -> Dual:
    """second(GELU(first(x))); with `rows`, that many tokens after the other, because the hidden ones are the widest there are."""
    values = x.values if isinstance(x, Quantized) else x.x
    length = values.shape[1]
    if rows is None or rows >= length or not (isinstance(x, Quantized) or _fuses(x)):
        return gelu_linear(second, linear(first, x))
    out = None
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        piece = x.rows(start, stop) if isinstance(x, Quantized) else Dual(x.x[:, start:stop])
        piece_BRD = gelu_linear(second, linear(first, piece)).x
        if out is None:
            out = piece_BRD.new_empty(piece_BRD.shape[0], length, piece_BRD.shape[2])
        out[:, start:stop] = piece_BRD
    assert out is not None
    return Dual(out)


def for_readers(x_BLD: Tensor, readers: Iterable[nn.Module]) -> Dual | Quantized:
    """x as the linears that read it take it."""
    return quantize_for(common_scheme(readers), x_BLD) if _fuses(Dual(x_BLD)) else Dual(x_BLD)


def split_heads(x: Dual, num_heads: int) -> Dual:
    """(B, L, N * H) -> (B, L, N, H), a view."""
    return Dual(x.x.unflatten(-1, (num_heads, -1)), None if x.t is None else x.t.unflatten(-1, (num_heads, -1)))


def merge_heads(x: Dual) -> Dual:
    """(B, L, N, H) -> (B, L, N * H)."""
    return Dual(x.x.flatten(2), None if x.t is None else x.t.flatten(2))


def _fuses(*operands: Dual | None) -> bool:
    """Whether the fused operators serve: nothing asks for a gradient or a tangent. They know no float64 on GPUs."""
    if torch.is_grad_enabled():
        return False
    return all(dual is None or (dual.t is None and dual.x.dtype != torch.float64) for dual in operands)


def _plain_norm(x: Dual, norm: Norm) -> Dual:
    if norm.affine:
        return lift(fn.affine_norm, x, norm.scale, norm.shift, norm.eps)
    return lift(fn.norm_modulate, x, norm.shift, norm.scale, norm.smooth, norm.eps)


def _operands(norm: Norm, batch: int) -> tuple[Tensor, Tensor, bool]:
    """scale and shift (B, M, D), and whether scale is the whole factor, without the 1."""
    scale, shift = norm.scale.x, norm.shift.x
    if norm.affine:
        return scale.expand(batch, 1, -1), shift.expand(batch, 1, -1), True
    if norm.smooth is not None:
        return (1 + scale) / norm.smooth, shift / norm.smooth, True
    return scale, shift, False

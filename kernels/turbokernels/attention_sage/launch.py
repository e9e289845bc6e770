"""Launches of the quantised attention kernels.

Shape suffixes: B batch, L tokens, N heads, D head dim, G batch * heads, I query blocks, J key blocks, M kept blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from turbokernels.attention_sage import kernel, reference
from turbokernels.attention_tiles import check_kernel_operands, strides_of
from turbokernels.blocks import BlockMask
from turbokernels.tuning import Launch, best, capability, interpreted, shared_memory

NARROWEST = 32  # int8 values of a row, and keys of a step: what an 8-bit product needs
SPLITS = kernel.SPLITS.value
LOG2E = math.log2(math.e)


def _check(op: str, q: Tensor, pv: str) -> None:
    """Require what the kernels can do. Errors: ValueError with the remedy."""
    check_kernel_operands(op, q)
    if pv == "fp8" and capability(q.device) < (8, 9):
        raise ValueError(
            f"{op}: pv='fp8' needs compute capability 8.9, this GPU has {capability(q.device)}; use pv='fp16' or 'auto'"
        )


def _candidates(q: Tensor, block_q: int, block_k: int, pv: str) -> list[Launch]:
    """ROWS queries per program, KEYS per step, CHANNELS of v per product. Each warp holds 16 rows of the output.

    fp8's products need registers of their own besides the output's. On Hopper, in two pieces and with 128 registers per
    thread, two programs of 8 warps share a processor: the softmax of one hides behind the products of the other.
    """
    keys, dim = max(NARROWEST, min(64, block_k)), q.shape[3]
    if interpreted() or block_q < 64:
        return [Launch(4, 2, ROWS=block_q, KEYS=keys, CHANNELS=dim // 2 if dim > 16 else dim)]
    small = Launch(4, 3, ROWS=64, KEYS=keys, CHANNELS=dim)
    if block_q == 64:
        return [small, Launch(4, 4, ROWS=64, KEYS=keys, CHANNELS=dim), Launch(4, 2, ROWS=64, KEYS=keys, CHANNELS=dim)]
    candidates = [Launch(8, stages, ROWS=128, KEYS=keys, CHANNELS=dim) for stages in (3, 2)]
    if pv == "fp8" and dim == 128 and capability(q.device)[0] == 9:
        halves = [Launch(8, stages, ROWS=128, KEYS=keys, CHANNELS=64, maxnreg=128) for stages in (3, 2, 4)]
        candidates = halves + candidates
    if block_k == 128 and shared_memory(q.device) > 160 * 1024:
        candidates.append(Launch(8, 2, ROWS=128, KEYS=128, CHANNELS=dim))
    return [*candidates, small]


def _rows(
    x: Tensor, partial: Tensor, block: int, n_blocks: int, factor: float, smooth: bool, width: int
) -> tuple[Tensor, Tensor]:
    """int8 (G, n_blocks * block, width) and float32 scales (G, n_blocks) of x (B, L, N, D)."""
    batch, length, heads, dim = x.shape
    groups = batch * heads
    values = torch.empty(groups, n_blocks * block, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(groups, n_blocks, dtype=torch.float32, device=x.device)
    launch = Launch(8 if block >= 64 else 4, 1, BLOCK=block)
    kernel.rows_kernel[n_blocks, groups](
        *(x, partial, values, scale, *strides_of(x), heads, length, factor),
        **launch.kwargs(SMOOTH=smooth, D=dim, W=width),
    )
    return values, scale


def _statistics(k: Tensor, v: Tensor) -> Tensor:
    """Partial sums of k and largest |v| per channel, float32 (G, 2, SPLITS, D)."""
    batch, length, heads, dim = k.shape
    partial = torch.empty(batch * heads, 2, SPLITS, dim, dtype=torch.float32, device=k.device)
    launch = Launch(8, 3, BLOCK=64)
    tiles_per_program = -(-length // (launch["BLOCK"] * SPLITS))
    kernel.statistics_kernel[SPLITS, batch * heads](
        *(k, v, partial, *strides_of(k), *strides_of(v), heads, length, tiles_per_program),
        **launch.kwargs(D=dim),
    )
    return partial


def _values(v: Tensor, partial: Tensor, block: int, n_blocks: int, fp8: bool) -> Tensor:
    """v in the format of P V, padded to whole blocks: e4m3 (G, D, J * block) or float16 (G, J * block, D)."""
    batch, length, heads, dim = v.shape
    padded = n_blocks * block
    shape = (batch * heads, dim, padded) if fp8 else (batch * heads, padded, dim)
    values = torch.empty(shape, dtype=torch.float8_e4m3fn if fp8 else torch.float16, device=v.device)
    launch = Launch(8 if block >= 64 else 4, 1, BLOCK=block)
    kernel.values_kernel[n_blocks, batch * heads](
        *(v, partial, values, *strides_of(v), heads, length),
        **launch.kwargs(FP8=fp8, D=dim),
    )
    return values


@torch.library.custom_op(
    "turbokernels::sage_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? kept, int block_q, int block_k, str pv) -> Tensor",
)
def sage_op(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, block_q: int, block_k: int, pv: str) -> Tensor:
    """o (B, Lq, N, D) over the kept blocks (B, N, I, M), or over all of them."""
    batch, length_q, heads, dim = q.shape
    groups, length_k = batch * heads, k.shape[1]
    n_q_blocks, n_k_blocks = -(-length_q // block_q), -(-length_k // block_k)
    n_kept = n_k_blocks if kept is None else kept.shape[3]
    width, fp8 = max(NARROWEST, dim), pv == "fp8"

    partial = _statistics(k, v)
    q_values, q_scale = _rows(q, partial, block_q, n_q_blocks, LOG2E * dim**-0.5, False, width)
    k_values, k_scale = _rows(k, partial, block_k, n_k_blocks, 1.0, True, width)
    values = _values(v, partial, block_k, n_k_blocks, fp8)
    lists = q_scale if kept is None else kept.contiguous()  # without lists: any pointer, never read

    def run(launch: Launch) -> Tensor:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernel.attend_kernel[n_q_blocks * (block_q // launch["ROWS"]), groups](
            *(q_values, k_values, values, q_scale, k_scale, partial, lists, o, *strides_of(o)),
            *(heads, length_q, length_k, n_q_blocks, n_k_blocks, n_kept),
            **launch.kwargs(SPARSE=kept is not None, FP8=fp8, D=dim, W=width, BLOCK_Q=block_q, BLOCK_K=block_k),
        )
        return o

    key = (dim, pv, block_q, block_k, "dense" if kept is None else "sparse")
    return run(best("sage_attention", key, _candidates(q, block_q, block_k, pv), run, q.device))


@sage_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, block_q: int, block_k: int, pv: str) -> Tensor:
    return q.new_empty(q.shape)


class _Inference(torch.autograd.Function):
    """Without a derivative: `torch.func.jvp` refuses it, where a bare custom op would silently give a zero tangent."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sage_op(*operands)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("quantised attention has no gradient; train with sparse_attention")


def sage_sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, pv: str) -> Tensor:
    """As `reference.sage_sparse_attention`."""
    _check("sage_sparse_attention", q, pv)
    return _Inference.apply(q, k, v, mask.kept, mask.block_q, mask.block_k, pv)  # pyright: ignore[reportReturnType]


def sage_attention(q: Tensor, k: Tensor, v: Tensor, pv: str) -> Tensor:
    """As `reference.sage_attention`."""
    _check("sage_attention", q, pv)
    blocks = reference.DENSE_BLOCK_Q, reference.DENSE_BLOCK_K
    return _Inference.apply(q, k, v, None, *blocks, pv)  # pyright: ignore[reportReturnType]

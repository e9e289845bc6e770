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
from turbokernels.tuning import Launch, best, capability, has_gluon, interpreted, shared_memory

NARROWEST = 32  # int8 values of a row, and keys of a step: what an 8-bit product needs
SPLITS = kernel.SPLITS.value
LOG2E = math.log2(math.e)


def check(op: str, q: Tensor, pv: str) -> None:
    """Require what the kernels can do. Errors: ValueError with the remedy."""
    check_kernel_operands(op, q)
    if pv == "fp8" and capability(q.device) < (8, 9):
        raise ValueError(
            f"{op}: pv='fp8' needs compute capability 8.9, this GPU has {capability(q.device)}; use pv='fp16' or 'auto'"
        )


def candidates(q: Tensor, block_q: int, block_k: int, pv: str) -> list[Launch]:
    """Launches of `kernel_hopper.py`, where it runs, and then of `kernel.py`."""
    launches = portable_candidates(q, block_q, block_k, pv)
    if pv == "fp8" and capability(q.device)[0] == 9 and has_gluon():
        launches = [*hopper_candidates(q.shape[3], block_q, block_k), *launches]
    return launches


def hopper_candidates(dim: int, block_q: int, block_k: int) -> list[Launch]:
    """Launches of `kernel_hopper.py`, none where it does not apply. SLOTS: pairs of tiles in the ring. Two programs share
    a processor; of their registers Gluon gives most to the warps that compute."""
    return [Launch(4, 1, SLOTS=3, maxnreg=128)] if min(dim, block_q, block_k) >= 64 else []


def portable_candidates(q: Tensor, block_q: int, block_k: int, pv: str) -> list[Launch]:
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
    launches = [Launch(8, stages, ROWS=128, KEYS=keys, CHANNELS=dim) for stages in (3, 2)]
    if pv == "fp8" and dim == 128 and capability(q.device)[0] == 9:
        halves = [Launch(8, stages, ROWS=128, KEYS=keys, CHANNELS=64, maxnreg=128) for stages in (3, 2, 4)]
        launches = halves + launches
    if block_k == 128 and shared_memory(q.device) > 160 * 1024:
        launches.append(Launch(8, 2, ROWS=128, KEYS=128, CHANNELS=dim))
    return [*launches, small]


def _width(dim: int) -> int:
    """Of an int8 row."""
    return max(NARROWEST, dim)


def _rows(
    x: Tensor, mean: Tensor | None, block: int, factor: float, block_means: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int8 (G, blocks * block, width) and float32 scales (G, blocks) of x (B, L, N, D), less its mean (G, D) if given.
    block_means: float32 (B, N, blocks, D), to be written."""
    batch, length, heads, dim = x.shape
    groups, n_blocks = batch * heads, -(-length // block)
    values = torch.empty(groups, n_blocks * block, _width(dim), dtype=torch.int8, device=x.device)
    scale = torch.empty(groups, n_blocks, dtype=torch.float32, device=x.device)
    # A sum over tokens is the quicker the fewer warps share it.
    launch = Launch(8 if block >= 64 and block_means is None else 4, 1, BLOCK=block)
    kernel.rows_kernel[n_blocks, groups](
        *(x, mean, values, scale, block_means, *strides_of(x), heads, length, factor),
        **launch.kwargs(SMOOTH=mean is not None, MEANS=block_means is not None, D=dim, W=_width(dim)),
    )
    return values, scale


def quantize_queries(q: Tensor, block: int, block_means: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q for `attend`: int8 (G, I * block, width), and its scales (G, I) with the softmax's factor. block_means: float32
    (B, N, I, D), to be written."""
    return _rows(q, None, block, LOG2E * q.shape[3] ** -0.5, block_means)


def quantize_keys(k: Tensor, mean: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """k minus its mean (G, D) for `attend`: int8 (G, J * block, width), and scales (G, J)."""
    return _rows(k, mean, block, 1.0)


def value_scale(largest: Tensor) -> Tensor:
    """The scale of v in e4m3 of each channel, float32 (G, D), from the largest magnitudes that programs found (G,
    programs, D)."""
    return _combine(None, largest, 1)[1]


def _combine(sums: Tensor | None, largest: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The mean of k (not written without sums) and the scale of v, float32 (G, D)."""
    groups, programs, dim = largest.shape
    mean, scale = torch.empty(2, groups, dim, dtype=torch.float32, device=largest.device).unbind(0)
    kernel.combine_kernel[groups,](  # pyright: ignore[reportArgumentType]
        *(sums, largest, mean, scale, length, programs),
        **{"MEAN": sums is not None, "D": dim, "PROGRAMS": 1 << (programs - 1).bit_length()},
    )
    return mean, scale


def _statistics(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of k and the scale of v in e4m3 of each channel, float32 (G, D)."""
    batch, length, heads, dim = k.shape
    groups = batch * heads
    sums, largest = torch.empty(2, groups, SPLITS, dim, dtype=torch.float32, device=k.device).unbind(0)
    launch = Launch(8, 1, BLOCK=64, ROWS=16)
    tiles_per_program = -(-length // (launch["BLOCK"] * SPLITS))
    kernel.statistics_kernel[SPLITS, groups](
        *(k, v, sums, largest, *strides_of(k), *strides_of(v), heads, length, tiles_per_program),
        **launch.kwargs(D=dim),
    )
    return _combine(sums, largest, length)


def quantize_values(v: Tensor, scale: Tensor, block: int, pv: str) -> Tensor:
    """v in the format of P V, padded to whole blocks: e4m3 (G, J * block / tokens, D, tokens) with the tokens of
    `kernel.tokens_of`, or float16 (G, J * block, D)."""
    batch, length, heads, dim = v.shape
    n_blocks, fp8 = -(-length // block), pv == "fp8"
    tokens: int = kernel.tokens_of(block)  # pyright: ignore[reportAssignmentType]
    tiles = (n_blocks * block // tokens, dim, tokens) if fp8 else (n_blocks * block, dim)
    values = torch.empty(batch * heads, *tiles, dtype=torch.float8_e4m3fn if fp8 else torch.float16, device=v.device)
    launch = Launch(8 if block >= 64 else 4, 1, BLOCK=block)
    kernel.values_kernel[n_blocks, batch * heads](
        *(v, scale, values, *strides_of(v), heads, length),
        **launch.kwargs(FP8=fp8, D=dim),
    )
    return values


def _attend_hopper(
    q_values: Tensor,
    k_values: Tensor,
    values: Tensor,
    scales: tuple[Tensor, ...],
    lists: Tensor,
    o: Tensor,
    sizes: tuple[int, ...],
    sparse: bool,
    blocks: tuple[int, int],
    launch: Launch,
) -> None:
    """As `attend_kernel` of `kernel.py`, into o."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # here: not every Triton has it

    from turbokernels.attention_sage import kernel_hopper

    rows, keys = kernel_hopper.ROWS.value, kernel_hopper.TILE.value

    def described(x: Tensor, tile: list[int]) -> TensorDescriptor:
        flat = x.flatten(0, -2)
        return TensorDescriptor(
            flat, list(flat.shape), list(flat.stride()), tile, kernel_hopper.tile_layout(x.dtype, *tile)
        )

    (block_q, block_k), (_, _, n_q_blocks, _, _) = blocks, sizes
    programs = n_q_blocks * (block_q // rows)
    kernel_hopper.attend_kernel[programs, q_values.shape[0]](
        *(described(q_values, [rows, q_values.shape[2]]), described(k_values, [keys, k_values.shape[2]])),
        *(described(values, [values.shape[2], keys]), *scales, lists, o, *strides_of(o), o.shape[2], *sizes),
        **launch.kwargs(SPARSE=sparse, BLOCK_Q=block_q, BLOCK_K=block_k),
    )


def attend(
    q: Tensor,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    values: Tensor,
    v_scale: Tensor,
    kept: Tensor | None,
    blocks: tuple[int, int],
    length_k: int,
    pv: str,
) -> Tensor:
    """o (B, Lq, N, D), like q, of quantised operands (`quantize_queries`, `quantize_keys`, `quantize_values`), over the
    kept blocks (B, N, I, M) or over all of them."""
    (_, length_q, heads, dim), (q_values, q_scale), (k_values, k_scale) = q.shape, queries, keys
    (block_q, block_k), n_q_blocks, n_k_blocks, fp8 = blocks, q_scale.shape[1], k_scale.shape[1], pv == "fp8"
    n_kept = n_k_blocks if kept is None else kept.shape[3]
    scales = q_scale, k_scale, v_scale
    sizes = (length_q, length_k, n_q_blocks, n_k_blocks, n_kept)
    lists = q_scale.view(torch.int32) if kept is None else kept.contiguous()  # without lists: never read

    def run(launch: Launch) -> Tensor:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if "SLOTS" in launch:
            _attend_hopper(q_values, k_values, values, scales, lists, o, sizes, kept is not None, blocks, launch)
            return o
        kernel.attend_kernel[n_q_blocks * (block_q // launch["ROWS"]), q_values.shape[0]](
            *(q_values, k_values, values, *scales, lists, o, *strides_of(o), heads, *sizes),
            **launch.kwargs(
                SPARSE=kept is not None, FP8=fp8, D=dim, W=q_values.shape[2], BLOCK_Q=block_q, BLOCK_K=block_k
            ),
        )
        return o

    key = (dim, pv, block_q, block_k, "dense" if kept is None else "sparse")
    return run(best("sage_attention", key, candidates(q, block_q, block_k, pv), run, q.device))


@torch.library.custom_op(
    "turbokernels::sage_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? kept, int block_q, int block_k, str pv) -> Tensor",
)
def sage_op(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, block_q: int, block_k: int, pv: str) -> Tensor:
    """o (B, Lq, N, D) over the kept blocks (B, N, I, M), or over all of them."""
    mean, v_scale = _statistics(k, v)
    operands = quantize_queries(q, block_q), quantize_keys(k, mean, block_k), quantize_values(v, v_scale, block_k, pv)
    return attend(q, *operands, v_scale, kept, (block_q, block_k), k.shape[1], pv)


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
    check("sage_sparse_attention", q, pv)
    return _Inference.apply(q, k, v, mask.kept, mask.block_q, mask.block_k, pv)  # pyright: ignore[reportReturnType]


def sage_attention(q: Tensor, k: Tensor, v: Tensor, pv: str) -> Tensor:
    """As `reference.sage_attention`."""
    check("sage_attention", q, pv)
    blocks = reference.DENSE_BLOCK_Q, reference.DENSE_BLOCK_K
    return _Inference.apply(q, k, v, None, *blocks, pv)  # pyright: ignore[reportReturnType]

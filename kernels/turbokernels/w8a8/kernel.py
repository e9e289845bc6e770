# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Triton kernels of W8A8 linear layers: int8 tensor cores, scales, bias and activation in the epilogue.

Shape suffixes: M tokens (all leading dimensions), K input features, N output features; B samples, L tokens of one
sample, T tiles along L, U tiles along K, V tiles along N.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turbokernels.quantize import kernel as quantize
from turbokernels.rows import DTYPES, as_samples, gelu_tanh
from turbokernels.tuning import Launch, best, capability, has_gluon
from turbokernels.w8a8 import reference
from turbokernels.w8a8.reference import BLOCK

logger = logging.getLogger(__name__)

# No fused multiply-adds: the epilogue is the reference's, rounding by rounding.
OPTIONS = {"enable_fp_fusion": False}
ALIGNMENT = 16  # bytes: of a descriptor's base and strides


@triton.jit
def _place(i_tile, n_m, n_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows of tiles are walked column by column: what runs at the same time shares few
    rows of x and few of w, which stay in L2."""
    i_group = i_tile // (GROUP * n_n)
    rows = tl.minimum(n_m - i_group * GROUP, GROUP)
    i_in_group = i_tile - i_group * GROUP * n_n
    return i_group * GROUP + i_in_group % rows, i_in_group // rows


@triton.jit
def _rows_tile(
    x,
    w,
    p_x_scale,
    p_w_scale,
    p_bias,
    y,
    i_tile,
    n_rows,
    n_out,
    n_in,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED_K: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
):
    i_tile_m, i_tile_n = _place(i_tile, tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N), GROUP)
    i_m = i_tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = i_tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat the last one: loads need no mask, and nothing is stored from them.
    i_m_in, i_n_in = tl.minimum(i_m, n_rows - 1), tl.minimum(i_n, n_out - 1)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if TMA:
        for start in tl.range(0, n_in, BLOCK_K):
            b_x = x.load([i_tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K], zero beyond K
            b_w = w.load([i_tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
            b_sum = tl.dot(b_x, tl.trans(b_w), b_sum, out_dtype=tl.int32)
    else:
        i_k = tl.arange(0, BLOCK_K)
        p_x = x + i_m_in[:, None].to(tl.int64) * stride_x + i_k[None, :]
        p_w = w + i_n_in[:, None].to(tl.int64) * stride_w + i_k[None, :]
        for _ in tl.range(0, n_in // BLOCK_K):
            b_x = tl.load(p_x)
            b_w = tl.load(p_w)
            b_sum = tl.dot(b_x, tl.trans(b_w), b_sum, out_dtype=tl.int32)
            p_x += BLOCK_K
            p_w += BLOCK_K
        if RAGGED_K:
            m_k = (i_k < n_in % BLOCK_K)[None, :]
            b_x, b_w = tl.load(p_x, mask=m_k, other=0), tl.load(p_w, mask=m_k, other=0)
            b_sum = tl.dot(b_x, tl.trans(b_w), b_sum, out_dtype=tl.int32)
    b_y = b_sum.to(tl.float32) * tl.load(p_x_scale + i_m_in)[:, None] * tl.load(p_w_scale + i_n_in)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + i_n_in).to(tl.float32)[None, :]
    if GELU:
        b_y = gelu_tanh(b_y)
    if TMA:
        y.store([i_tile_m * BLOCK_M, i_tile_n * BLOCK_N], b_y.to(y.dtype))
    else:
        p_y = y + i_m[:, None].to(tl.int64) * n_out + i_n[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(i_m < n_rows)[:, None] & (i_n < n_out)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _rows_kernel(
    x,
    w,
    p_x_scale,
    p_w_scale,
    p_bias,
    y,
    n_rows,
    n_out,
    n_in,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED_K: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """y = x w^T * x_scale * w_scale + bias. x (M, K), w (N, K) int8, y (M, N): pointers, or tensor descriptors (TMA).

    PERSISTENT: that many programs per processor walk the tiles, so that a tile's epilogue overlaps with the next one's
    first loads; 0: one program per tile.
    """
    if PERSISTENT:
        n_tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_out, BLOCK_N)
        for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
            _rows_tile(
                x, w, p_x_scale, p_w_scale, p_bias, y, i_tile, n_rows, n_out, n_in, stride_x, stride_w,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, RAGGED_K, GELU, TMA,
            )  # fmt: skip
    else:
        _rows_tile(
            x, w, p_x_scale, p_w_scale, p_bias, y, tl.program_id(0), n_rows, n_out, n_in, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, RAGGED_K, GELU, TMA,
        )  # fmt: skip


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, **flags: int) -> Launch:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": 8, "TMA": 0, "PERSISTENT": 0}
    return Launch(num_warps, num_stages, **(blocks | flags))


def _asynchronous(block_m: int, block_n: int, slots: int, num_warps: int, consumers: int, group: int) -> Launch:
    """A launch of `kernel_hopper.py`: consumers of num_warps each, a ring of so many slots."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128, "GROUP": group}
    return Launch(num_warps, 1, **blocks, CONSUMERS=consumers, SLOTS=slots)


# Two groups that take turns on tiles of their own; or two that share one, which reads less and leaves gaps between tiles.
HOPPER_GLUON = [
    _asynchronous(128, 128, 4, 4, 2, 16),
    _asynchronous(128, 128, 5, 4, 2, 8),
    _asynchronous(128, 128, 4, 4, 2, 4),
    _asynchronous(128, 256, 3, 8, 1, 16),
    _asynchronous(128, 256, 3, 8, 1, 32),
]
# Triton waits for integer matrix instructions at the end of every step of K, so two programs per processor that fill each
# other's gaps come first, and tiles whose steps are long next.
HOPPER_POINTERS = [_tile(128, 128, 128, 8, 3, GROUP=16)]
HOPPER_TMA = [
    _tile(128, 128, 128, 8, 3, GROUP=16, TMA=1),
    _tile(128, 128, 128, 8, 2, GROUP=16, TMA=1, PERSISTENT=2),
    _tile(128, 128, 128, 4, 3, GROUP=16, TMA=1),
    _tile(128, 256, 128, 8, 3, GROUP=16, TMA=1, PERSISTENT=1),
    _tile(256, 128, 256, 8, 2, GROUP=16, TMA=1),
]
OTHERS = [_tile(128, 128, 64, 8, 4), _tile(128, 128, 64, 4, 3), _tile(64, 128, 64, 4, 4), _tile(128, 256, 64, 8, 3)]


def row_candidates(device: torch.device, describable: bool) -> list[Launch]:
    """Launches of the row kernel, best guess first; `describable`: whether operands can be tensor descriptors."""
    if capability(device)[0] != 9:
        return OTHERS
    if not describable:
        return HOPPER_POINTERS
    return [*HOPPER_GLUON, *HOPPER_TMA[:3]] if has_gluon() else [*HOPPER_TMA, *HOPPER_POINTERS]


def _describable(*operands: Tensor) -> bool:
    return all(x.stride(0) * x.itemsize % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0 for x in operands)


def _described(x: Tensor, launch: Launch, rows: str, columns: str) -> Tensor | TensorDescriptor:
    if not launch["TMA"]:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [launch[rows], launch[columns]])


def _run_hopper(
    x_MK: Tensor,
    x_scale_M: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    y_MN: Tensor,
    gelu: bool,
    launch: Launch,
) -> None:
    """As `_rows_kernel`, into y_MN."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor  # not in every Triton

    from turbokernels.w8a8 import kernel_hopper

    def described(x: Tensor, rows: str, columns: str) -> HopperDescriptor:
        tile = [launch[rows], launch[columns]]
        return HopperDescriptor(x, list(x.shape), list(x.stride()), tile, kernel_hopper.tile_layout(x.dtype, *tile))

    n_tiles = triton.cdiv(len(y_MN), launch["BLOCK_M"]) * triton.cdiv(len(w_NK), launch["BLOCK_N"])
    kernel_hopper.rows_kernel[(min(n_tiles, _processors(x_MK.device)),)](
        described(x_MK, "BLOCK_M", "BLOCK_K"),
        described(w_NK, "BLOCK_N", "BLOCK_K"),
        x_scale_M,
        w_scale_N,
        w_scale_N if bias_N is None else bias_N,
        described(y_MN, "BLOCK_M", "BLOCK_N"),
        *(*y_MN.shape, x_MK.shape[1]),
        **{name: launch[name] for name in ("SLOTS", "CONSUMERS", "GROUP")},
        BIAS=bias_N is not None,
        GELU=gelu,
        num_warps=launch.num_warps,
        **OPTIONS,
    )


@torch.library.custom_op("turbokernels::w8a8_rows", mutates_args=())
def _linear_rows(
    x_MK: Tensor,
    x_scale_M: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    (n_rows, n_in), n_out = x_MK.shape, w_NK.shape[0]
    y_MN = torch.empty((n_rows, n_out), dtype=dtype, device=x_MK.device)
    if not n_rows:
        return y_MN

    def run(launch: Launch) -> None:
        if "CONSUMERS" in launch:
            return _run_hopper(x_MK, x_scale_M, w_NK, w_scale_N, bias_N, y_MN, gelu, launch)
        n_tiles = triton.cdiv(n_rows, launch["BLOCK_M"]) * triton.cdiv(n_out, launch["BLOCK_N"])
        programs = n_tiles
        if launch["PERSISTENT"]:
            programs = min(n_tiles, launch["PERSISTENT"] * _processors(x_MK.device))
        _rows_kernel[(programs,)](
            _described(x_MK, launch, "BLOCK_M", "BLOCK_K"),
            _described(w_NK, launch, "BLOCK_N", "BLOCK_K"),
            x_scale_M,
            w_scale_N,
            bias_N,
            _described(y_MN, launch, "BLOCK_M", "BLOCK_N"),
            n_rows,
            n_out,
            n_in,
            x_MK.stride(0),
            w_NK.stride(0),
            RAGGED_K=n_in % launch["BLOCK_K"] != 0,
            GELU=gelu,
            **launch.kwargs(),
            **OPTIONS,
        )

    # A float32 tile would not fit beside the operands' stages.
    candidates = row_candidates(x_MK.device, dtype.itemsize == 2 and _describable(x_MK, w_NK, y_MN))
    run(best("w8a8_rows", (n_in, n_out, dtype, gelu), candidates, run, x_MK.device))
    return y_MN


@_linear_rows.register_fake
def _(
    x_MK: Tensor,
    x_scale_M: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], w_NK.shape[0]), dtype=dtype)


def _processors(device: torch.device) -> int:
    """How many the GPU has; where kernels are interpreted, so few that a persistent program walks several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit(do_not_specialize=["length"])
def _tiles_kernel(
    p_x,
    p_w,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_y,
    length,
    n_out,
    n_in,
    n_samples,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """y = sum over tiles of K of (x w^T of the tile) * x_scale * w_scale, + bias. All operands are packed.

    BLOCK_M and BLOCK_N divide BLOCK, the side of a scale's tile, so that both scales are numbers within a program.
    """
    n_m, n_u = tl.cdiv(length, BLOCK_M), tl.cdiv(n_in, BLOCK)
    i_tile_m, i_tile_n = _place(tl.program_id(0), n_samples * n_m, tl.cdiv(n_out, BLOCK_N), GROUP)
    i_b, start_l = i_tile_m // n_m, i_tile_m % n_m * BLOCK_M
    i_l, i_n, i_k = start_l + tl.arange(0, BLOCK_M), i_tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK)
    i_n_in = tl.minimum(i_n, n_out - 1)
    i_row = i_b.to(tl.int64) * length + tl.minimum(i_l, length - 1)
    p_x += i_row[:, None] * n_in + i_k[None, :]
    p_w += i_n_in[:, None].to(tl.int64) * n_in + i_k[None, :]
    p_x_scale += (i_b * tl.cdiv(length, BLOCK) + start_l // BLOCK) * n_u
    p_w_scale += i_tile_n * BLOCK_N // BLOCK * n_u
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_u in tl.range(0, n_in // BLOCK):
        b_x, b_w = tl.load(p_x), tl.load(p_w)  # [BLOCK_M, BLOCK], [BLOCK_N, BLOCK]
        scale = tl.load(p_x_scale + i_u) * tl.load(p_w_scale + i_u)
        b_y += tl.dot(b_x, tl.trans(b_w), out_dtype=tl.int32).to(tl.float32) * scale
        p_x += BLOCK
        p_w += BLOCK
    if RAGGED_K:
        m_k = (i_k < n_in % BLOCK)[None, :]
        b_x, b_w = tl.load(p_x, mask=m_k, other=0), tl.load(p_w, mask=m_k, other=0)
        scale = tl.load(p_x_scale + n_u - 1) * tl.load(p_w_scale + n_u - 1)
        b_y += tl.dot(b_x, tl.trans(b_w), out_dtype=tl.int32).to(tl.float32) * scale
    if p_bias is not None:
        b_y += tl.load(p_bias + i_n_in).to(tl.float32)[None, :]
    if GELU:
        b_y = gelu_tanh(b_y)
    m_y = (i_l < length)[:, None] & (i_n < n_out)[None, :]
    tl.store(p_y + i_row[:, None] * n_out + i_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


TILES = [
    Launch(num_warps, num_stages, BLOCK_M=block_m, BLOCK_N=block_n, GROUP=16)
    for block_m, block_n, num_warps, num_stages in (
        (128, 128, 8, 3),
        (64, 128, 4, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 2),
    )
]


@torch.library.custom_op("turbokernels::w8a8_tiles", mutates_args=())
def _linear_tiles(
    x_BLK: Tensor,
    x_scale_BTU: Tensor,
    w_NK: Tensor,
    w_scale_VU: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    (n_samples, length, n_in), n_out = x_BLK.shape, w_NK.shape[0]
    y_BLN = torch.empty((n_samples, length, n_out), dtype=dtype, device=x_BLK.device)
    if not n_samples * length:
        return y_BLN

    def run(launch: Launch) -> None:
        n_m, n_n = triton.cdiv(length, launch["BLOCK_M"]), triton.cdiv(n_out, launch["BLOCK_N"])
        _tiles_kernel[(n_samples * n_m * n_n,)](
            x_BLK,
            w_NK,
            x_scale_BTU,
            w_scale_VU,
            bias_N,
            y_BLN,
            length,
            n_out,
            n_in,
            n_samples,
            BLOCK=BLOCK,
            RAGGED_K=n_in % BLOCK != 0,
            GELU=gelu,
            **launch.kwargs(),
        )

    run(best("w8a8_tiles", (n_in, n_out, dtype, gelu), TILES, run, x_BLK.device))
    return y_BLN


@_linear_tiles.register_fake
def _(
    x_BLK: Tensor,
    x_scale_BTU: Tensor,
    w_NK: Tensor,
    w_scale_VU: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x_BLK.new_empty((*x_BLK.shape[:2], w_NK.shape[0]), dtype=dtype)


@functools.cache
def _log_steps(n_in: int, n_out: int, dtype: torch.dtype, gelu: bool) -> None:
    """Log, once per layer shape, that an fp8 linear does not run in one pass."""
    logger.info(
        "turbokernels: w8a8_linear fp8_channel %d -> %d for %s%s multiplies, scales and adds in steps of their own; one pass "
        "needs a CUDA device, bfloat16 results and bias, no activation, and features in 16s",
        n_in, n_out, dtype, " with gelu_tanh" if gelu else "",
    )  # fmt: skip


def _linear_fp8(
    x_MK: Tensor,
    x_scale_M: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """PyTorch's row-wise scaled product, where it makes the result in one pass: bf16 with a bf16 bias and features in
    16s. Anything else takes its product with float32 results, and scales, adds and activates in steps of their own.
    """
    in_one_pass = dtype == torch.bfloat16 and not gelu and x_MK.is_cuda and len(x_MK)
    in_one_pass = in_one_pass and (bias_N is None or bias_N.dtype == dtype)
    if not in_one_pass or x_MK.shape[1] % 16 or w_NK.shape[0] % 16:
        if not torch.compiler.is_compiling():  # a log call would break the graph
            _log_steps(x_MK.shape[1], w_NK.shape[0], dtype, gelu)
        activation = "gelu_tanh" if gelu else None
        return reference.w8a8_linear((x_MK, x_scale_M), w_NK, w_scale_N, bias_N, "fp8_channel", activation, dtype)
    return torch._scaled_mm(
        x_MK, w_NK.t(), scale_a=x_scale_M[:, None], scale_b=w_scale_N[None], bias=bias_N, out_dtype=dtype
    )


def w8a8_linear(
    x: Tensor | tuple[Tensor, Tensor],
    w_q_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    scheme: str,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As reference.w8a8_linear; int8 results differ from it by the rounding of the activation alone."""
    if out_dtype not in DTYPES:
        raise ValueError(f"w8a8_linear: the kernel computes in float32, not for {out_dtype}; use impl='reference'")
    in_tiles = scheme == "int8_block128"
    if not isinstance(x, Tensor):
        values, scale = x
    else:
        values, scale = quantize.quantize_block(x, BLOCK) if in_tiles else quantize.quantize_rows(x, w_q_NK.dtype)
    function = _linear_tiles if in_tiles else _linear_rows if w_q_NK.dtype == torch.int8 else _linear_fp8
    # Views, unless a given x is strided.
    x_view = as_samples(values) if in_tiles else values.flatten(0, -2)
    x_view = x_view if function is _linear_rows and x_view.stride(-1) == 1 else x_view.contiguous()
    scale, w_q_NK, w_scale = scale.reshape(-1).contiguous(), w_q_NK.contiguous(), w_scale.contiguous()
    y = function(x_view, scale, w_q_NK, w_scale, bias_N, activation == "gelu_tanh", out_dtype)
    return y.view(*values.shape[:-1], w_q_NK.shape[0])

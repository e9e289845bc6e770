"""Tiles of attention operands in Triton kernels, and what every attention kernel of this library shares. Imports triton.

A kernel receives each operand either as a pointer with three strides, or (`TMA`) as a tensor descriptor, for which the
strides are unused. Descriptors need sm90 and 16-byte alignment; they cost one instruction per tile and almost no
registers, which decides whether two programs fit a multiprocessor. Pointers serve everything else.

Programs are laid out as (tiles, heads, samples). In kernels: `p_` pointers or descriptors, `b_` blocks of values, `i_`
program ids and row indices, `m_` masks; R query rows of a program, T keys of one step, D head dim.

Of 16-bit operands, scores are in units of log2: exp2 is one instruction, and its factor is one that the scores need
anyway. That instruction, a quotient's, and the rounding of log2 of a denominator are each some float32 roundings off. For
float32 operands (EXACT) that would show: they take `exp_exact`, correctly rounded quotients, scores in natural units, and
the maximum and the denominator of each row apart.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turbokernels import tuning

LOG2E = 1.0 / math.log(2.0)
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16  # bytes: of a descriptor's base and strides


@dataclass(frozen=True)
class Gpu:
    """What the lists of launch candidates depend on."""

    capability: tuple[int, int]
    shared: int  # bytes of shared memory that one program may use

    @property
    def is_large(self) -> bool:
        """A data centre's GPU: sm80, sm90, sm100; the others have 99 KiB of shared memory."""
        return self.shared >= 160 * 1024

    @property
    def has_wgmma(self) -> bool:
        """Hopper's matrix instructions, which read operands from shared memory and run on their own."""
        return self.capability[0] == 9

    @property
    def has_tensor_memory(self) -> bool:
        """Blackwell's memory for accumulators: registers are no limit, its 512 columns are."""
        return self.capability[0] == 10


def gpu_of(x: Tensor) -> Gpu:
    """The GPU that x is on; an H200 where kernels are interpreted."""
    return Gpu(tuning.capability(x.device), tuning.shared_memory(x.device))


def check_kernel_operands(op: str, q: Tensor) -> None:
    """Require what the attention kernels know of; `checks.check_attention` has compared the other operands with q."""
    if q.dtype not in DTYPES:
        raise ValueError(f"{op}: the kernel has no {q.dtype}; use float16, bfloat16, float32 or impl='reference'")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"{op}: the kernel has no head dim {q.shape[3]}; use {', '.join(map(str, HEAD_DIMS))} or impl='reference'"
        )
    if q.device.type != "cuda" and not tuning.interpreted():
        raise ValueError(f"{op}: the kernel needs a CUDA device and q is on {q.device}; use impl='reference'")


def describable(*operands: Tensor | None) -> bool:
    """Whether the kernel may take all `operands` (B, L, N, D) as tensor descriptors."""

    def is_aligned(x: Tensor) -> bool:
        strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3]) if size > 1]
        in_steps = all(stride > 0 and stride * x.itemsize % ALIGNMENT == 0 for stride in strides)
        return in_steps and x.itemsize == 2 and x.stride(3) == 1 and x.data_ptr() % ALIGNMENT == 0

    given = [x for x in operands if x is not None]
    return tuning.capability(given[0].device) >= (9, 0) and all(map(is_aligned, given))


def operand(x_BLND: Tensor | None, rows: int, tma: bool) -> Any:
    """What a kernel receives for an operand that it reads in tiles of `rows` tokens of one head."""
    if x_BLND is None or not tma:
        return x_BLND
    shape, dim = list(x_BLND.shape), x_BLND.shape[3]
    # The stride of a dimension of size 1 is never used, but it must be a valid one.
    strides = [stride if size > 1 else dim for stride, size in zip(x_BLND.stride()[:3], shape)]
    return TensorDescriptor(x_BLND, shape, [*strides, 1], [1, rows, 1, dim])


def strides_of(x_BLND: Tensor | None) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads; an absent operand has none."""
    return (0, 0, 0) if x_BLND is None else x_BLND.stride()[:3]  # pyright: ignore[reportReturnType]


def score_scale(q: Tensor) -> float:
    """What kernels multiply q k^T by: 1 / sqrt(D) in the units of their exponential."""
    scale = q.shape[3] ** -0.5
    return scale if q.dtype == torch.float32 else scale * LOG2E


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """Of what a forward keeps of its softmax, float32: log2 of the denominators (B, N, Lq), of float32 operands the
    maxima and the sums relative to them (2, B, N, Lq)."""
    batch, length, heads, _ = q.shape
    return (2, batch, heads, length) if q.dtype == torch.float32 else (batch, heads, length)


@triton.jit
def program_head():
    """Index of this program's head among those of all samples, int64."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def head_offset(i_g, heads, stride_b, stride_n):
    """Elements from the start of a (B, L, N, D) tensor to its first token of batch * head i_g."""
    return (i_g // heads).to(tl.int64) * stride_b + (i_g % heads).to(tl.int64) * stride_n


@triton.jit
def load_tile(p_x, stride_b, stride_l, stride_n, i_row, length, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows i_row .. i_row + ROWS of this program's head, [ROWS, D]. Those from `length` on are finite if the last
    row is, and must not count: zero from a descriptor, the last row from a pointer."""
    if TMA:
        b_x = p_x.load([tl.program_id(2), i_row, tl.program_id(1), 0]).reshape([ROWS, D])
    else:
        # Offsets within a tile fit 32 bits; where it begins may not.
        start = tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_n
        rows = tl.minimum(tl.arange(0, ROWS), length - 1 - i_row)
        offsets = rows[:, None] * stride_l + tl.arange(0, D)[None, :]
        b_x = tl.load(p_x + (start + i_row.to(tl.int64) * stride_l) + offsets)
    return b_x


@triton.jit
def store_tile(p_x, stride_b, stride_l, stride_n, i_row, length, b_x, ROWS: tl.constexpr, D: tl.constexpr):
    """Write [ROWS, D] to rows i_row .. i_row + ROWS before `length`, rounded to the dtype of the destination."""
    start = tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_n
    offsets = tl.arange(0, ROWS)[:, None] * stride_l + tl.arange(0, D)[None, :]
    m_rows = i_row + tl.arange(0, ROWS)[:, None] < length
    tl.store(p_x + (start + i_row.to(tl.int64) * stride_l) + offsets, b_x.to(p_x.dtype.element_ty), mask=m_rows)


@triton.jit
def next_tile(p_list, block, step, n_blocks, BLOCK: tl.constexpr, TILE: tl.constexpr, DENSE: tl.constexpr):
    """Where tile `step` of the listed blocks begins, in `block`, and the block of the next tile. DENSE: no list."""
    if DENSE:
        i_row = step * TILE
    else:
        i_row = block * BLOCK + step % (BLOCK // TILE) * TILE
        # One step ahead: the address of the next tile must not wait for memory.
        block = tl.load(p_list + tl.minimum((step + 1) // (BLOCK // TILE), n_blocks - 1))
    return i_row, block


@triton.jit
def mask_scores(b_s, i_key, length_k, T: tl.constexpr):
    """Scores [R, T] of keys i_key .. i_key + T; -inf where there is no key. Costs a branch where all exist."""
    if i_key + T > length_k:
        b_s = tl.where(i_key + tl.arange(0, T)[None, :] < length_k, b_s, float("-inf"))
    return b_s


@triton.jit
def dot_rows(b_x, b_y, EXACT: tl.constexpr):
    """x y^T [R, T] of rows x [R, D] and y [T, D]. EXACT: in pieces of 16 channels. Without matrix units a product is one
    chain of additions, and errs with its length."""
    if EXACT:
        PIECES: tl.constexpr = b_x.shape[1] // 16
        b_x = tl.permute(tl.reshape(b_x, [b_x.shape[0], PIECES, 16]), [1, 0, 2])
        b_y = tl.permute(tl.reshape(b_y, [b_y.shape[0], PIECES, 16]), [1, 2, 0])
        b_xy = tl.sum(tl.dot(b_x, b_y, input_precision="ieee"), 0)
    else:
        b_xy = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    return b_xy


@triton.jit
def exp_exact(b_x):
    """exp of float32 up to 88 within one unit in the last place; 0 below -87; NaN stays NaN.

    exp(x) = 2^n exp(r) with x = n ln 2 + r, n whole, |r| <= ln 2 / 2. ln 2 is split so that n times its first part is
    exact (Cody and Waite); exp(r) = 1 + r + r^2 q(r) with the q of degree 4 that errs least, by 3e-9.
    """
    b_in = tl.where(b_x < -87.0, -87.0, b_x)
    b_shifted = b_in * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: rounds to a whole number, into the low bits
    b_n = b_shifted - 12582912.0
    b_r = tl.fma(b_n, -1.428606765330187e-06, tl.fma(b_n, -0.693145751953125, b_in))
    b_q = tl.fma(tl.fma(b_r, 0.0013814596459269524, 0.0083687175065279), b_r, 0.04166838899254799)
    b_q = tl.fma(tl.fma(b_q, b_r, 0.1666652113199234), b_r, 0.4999999403953552)
    b_exp = tl.fma(b_r * b_r, b_q, b_r) + 1.0
    b_power = ((b_shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^n
    return tl.where(b_x < -87.0, 0.0, b_exp * b_power)


@triton.jit
def divide(b_x, b_y, EXACT: tl.constexpr):
    """x / y; EXACT: correctly rounded."""
    return tl.div_rn(b_x, b_y) if EXACT else b_x / b_y


@triton.jit
def online_softmax(b_s, b_max, scale, EXACT: tl.constexpr):
    """A step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) with scores [R, T]: p [R, T], the new
    maximum [R], and the factor [R] of everything summed so far. scale: `score_scale`."""
    if EXACT:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = exp_exact(tl.fma(b_s, scale, -b_new[:, None]))
        b_alpha = exp_exact(b_max - b_new)
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
    return b_p, b_new, b_alpha


@triton.jit
def store_lse(p_lse, i_row, length, b_max, b_sum, R: tl.constexpr, EXACT: tl.constexpr):
    """Keep the softmax of rows i_row .. i_row + R of this program's head; see `lse_shape`."""
    rows = i_row + tl.arange(0, R)
    p_lse += program_head() * length
    if EXACT:
        n_heads = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
        tl.store(p_lse + rows, b_max, mask=rows < length)
        tl.store(p_lse + n_heads * length + rows, b_sum, mask=rows < length)
    else:
        tl.store(p_lse + rows, b_max + tl.log2(b_sum), mask=rows < length)


@triton.jit
def load_lse(p_lse, rows, length, EXACT: tl.constexpr):
    """What `store_lse` kept of `rows` of this program's head, for `probabilities`: a shift and a sum (1 if not EXACT)."""
    p_lse += program_head() * length
    b_shift = tl.load(p_lse + rows)
    if EXACT:
        b_sum = tl.load(p_lse + tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * length + rows)
    else:
        b_sum = tl.full(rows.shape, 1.0, tl.float32)
    return b_shift, b_sum


@triton.jit
def probabilities(b_s, scale, b_shift, b_sum, EXACT: tl.constexpr):
    """Softmax of scores again from `load_lse`, whose results are broadcast to the scores' shape."""
    if EXACT:
        b_p = tl.div_rn(exp_exact(tl.fma(b_s, scale, -b_shift)), b_sum)
    else:
        b_p = tl.exp2(b_s * scale - b_shift)
    return b_p

"""What the element-wise kernels share: one program holds a token's row in registers, so memory is read once.

A row of WIDTH features is a tuple of pieces of CHUNK features, a power of two; the last piece may be ragged and is the
only one with a mask. WIDTH need not be a power of two then, and few lanes idle (8960 features in pieces of 2048: 12%;
rounded up to 16384: 83%). Every piece is float32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.tuning import MAX_CANDIDATES, Launch, interpreted

INTERPRETED = tl.constexpr(interpreted())
# The smallest normal float32: a scale below it counts as zero (quantize/reference.py).
SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
# 1.5 * 2^23: floats of this size are whole numbers, so that adding it rounds to nearest even, into the low mantissa bits.
ROUNDING = tl.constexpr(12582912.0)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 32768  # 16 warps of 32 threads with 64 features each
MAX_PER_THREAD = 64


@triton.jit
def load_row(p_row, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The row's pieces as float32; zero beyond WIDTH. Read once, so not at the expense of what is cached for all rows."""
    i_c = tl.arange(0, CHUNK)
    row = ()
    for start in tl.static_range(0, WIDTH, CHUNK):
        if start + CHUNK <= WIDTH:
            b_x = tl.load(p_row + start + i_c, eviction_policy="evict_first")
        else:
            b_x = tl.load(p_row + start + i_c, mask=start + i_c < WIDTH, other=0.0, eviction_policy="evict_first")
        row = row + (b_x.to(tl.float32),)  # noqa: RUF005 (Triton has no starred tuples)
    return row


@triton.jit
def load_piece(p_row, INDEX: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """Piece INDEX of a row, as float32; OTHER beyond WIDTH."""
    i_c = INDEX * CHUNK + tl.arange(0, CHUNK)
    if (INDEX + 1) * CHUNK <= WIDTH:
        b_x = tl.load(p_row + i_c)
    else:
        b_x = tl.load(p_row + i_c, mask=i_c < WIDTH, other=OTHER)
    return b_x.to(tl.float32)


@triton.jit
def store_piece(p_row, b_x, INDEX: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Write piece INDEX of a row in the pointer's dtype."""
    i_c = INDEX * CHUNK + tl.arange(0, CHUNK)
    if (INDEX + 1) * CHUNK <= WIDTH:
        tl.store(p_row + i_c, b_x.to(p_row.dtype.element_ty))
    else:
        tl.store(p_row + i_c, b_x.to(p_row.dtype.element_ty), mask=i_c < WIDTH)


@triton.jit
def row_sum(row):
    """Sum over the row: pieces first, lane by lane, so that threads meet once."""
    b_sum = row[0]
    for i in tl.static_range(1, len(row)):
        b_sum += row[i]
    return tl.sum(b_sum, 0)


@triton.jit
def row_sum_of_squares(row, mean, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of (x - mean)^2 over the row's WIDTH features."""
    b_sum = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(len(row)):
        b_centred = row[i] - mean
        if (i + 1) * CHUNK > WIDTH:
            b_centred = tl.where(i * CHUNK + tl.arange(0, CHUNK) < WIDTH, b_centred, 0.0)
        b_sum += b_centred * b_centred
    return tl.sum(b_sum, 0)


@triton.jit
def row_amax(row):
    """Largest magnitude of the row; NaN if there is one.

    Magnitudes order like their bits, and NaN's bits are above Inf's: integer maxima propagate NaN, float maxima do not.
    """
    b_bits = row[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, len(row)):
        b_bits = tl.maximum(b_bits, row[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(b_bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def safe_scale(amax, limit):
    """amax / limit, correctly rounded; 1 where that is not a normal number. NaN stays NaN."""
    scale = tl.div_rn(amax, limit)
    return tl.where(scale < SMALLEST_SCALE, 1.0, scale)


@triton.jit
def quotient(b_x, divisor, inverse):
    """b_x / divisor, correctly rounded, with inverse = 1 / divisor correctly rounded: five operations per element
    instead of the division's twenty.

    Each step adds the exact remainder times the inverse: after the first the quotient is within one unit in the last
    place, after the second it is the correctly rounded one (Markstein, IBM J. Res. Dev. 34(1), 1990), if the remainder
    does not underflow: divisors from about 1e-30.
    """
    if INTERPRETED:  # whose fma rounds twice
        b_q = tl.div_rn(b_x, divisor)
    else:
        b_q = b_x * inverse
        b_q = tl.fma(tl.fma(b_q, -divisor, b_x), inverse, b_q)
        b_q = tl.fma(tl.fma(b_q, -divisor, b_x), inverse, b_q)
    return b_q


@triton.jit
def to_8_bits(b_x, dtype: tl.constexpr):
    """Round values of at most dtype's limit to nearest even. Non-finite values become some number of that type."""
    if dtype == tl.int8:
        b_q = (b_x + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        b_q = b_x.to(dtype, fp_downcast_rounding="rtne")
    return b_q


@triton.jit
def store_quantized(p_q, p_scale, row, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Write the row as 8-bit values of p_q's type and its scale amax / limit (quantize/reference.py, rounded_rows).

    No clamp: |x| / (amax / limit) exceeds the limit by at most one rounding, which the rounding to 8 bits takes back.
    """
    dtype: tl.constexpr = p_q.dtype.element_ty
    scale = safe_scale(row_amax(row), 127.0 if dtype == tl.int8 else 448.0)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(row)):
        store_piece(p_q, to_8_bits(quotient(row[i], scale, inverse), dtype), i, WIDTH, CHUNK)
    tl.store(p_scale, scale)


@triton.jit
def gelu_tanh(b_x):
    """0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3); the exponential in base 2."""
    # -2 sqrt(2 / pi) log2(e), and the same times 0.044715.
    b_divisor = 1.0 + tl.exp2(b_x * (-2.302208198 - 0.1029432397 * b_x * b_x))
    if INTERPRETED:
        b_y = b_x / b_divisor
    else:
        # Two units in the last place, as the exponential; the division that Triton writes also scales extreme operands,
        # in as many instructions as all the rest. By 2^126 and more this one gives 0, which is the limit here.
        b_y = tl.inline_asm_elementwise(
            "div.approx.f32 $0, $1, $2;", "=f,f,f", [b_x, b_divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_y


def check_row_kernel(op: str, x: Tensor, width: int, quantized: torch.dtype | None = None) -> None:
    """Require what the row kernels can do. Errors: ValueError that names the remedy."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: the kernel computes in float32 and x has dtype {x.dtype}; use impl='reference'")
    if width > MAX_WIDTH:
        raise ValueError(
            f"{op}: the kernel holds a row of up to {MAX_WIDTH} features and x has {width}; use impl='reference'"
        )
    if quantized == torch.float8_e4m3fn and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
        raise ValueError(
            f"{op}: conversion to {quantized} needs compute capability 8.9 or newer, this GPU has {capability}; "
            "use torch.int8, or impl='reference'"
        )


@functools.cache
def row_launches(width: int, preferred: int = MAX_PER_THREAD) -> tuple[Launch, ...]:
    """Candidates for rows of `width`, at most MAX_CANDIDATES.

    First those whose threads hold at most `preferred` features of a row, by how little their last piece reaches beyond it,
    then by warps: few of them meet sooner.
    """
    ranks = {}
    # 8 features of a thread in a piece are one 16-byte load of 16-bit values; 4 leave less of a last piece idle.
    for features in (8, 4):
        for num_warps in (1, 2, 4, 8, 16):
            chunk = min(32 * features * num_warps, max(32, triton.next_power_of_2(width)))
            padded = triton.cdiv(width, chunk) * chunk
            per_thread = padded // (32 * num_warps)
            if per_thread <= MAX_PER_THREAD:
                rank = (per_thread > preferred, padded, features != 8, num_warps)
                ranks.setdefault(Launch(num_warps, 1, CHUNK=chunk), rank)
    return tuple(sorted(ranks, key=ranks.__getitem__)[:MAX_CANDIDATES])


def as_samples(x: Tensor) -> Tensor:
    """x (..., C) as (B, L, C) with a contiguous last dimension; a view unless its strides allow none."""
    rows = x.view(1, 1, -1) if x.ndim == 1 else x[None] if x.ndim == 2 else x.flatten(0, -3)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()

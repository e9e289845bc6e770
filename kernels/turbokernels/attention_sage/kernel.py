"""Quantised attention in Triton (SageAttention 2, arXiv 2411.10958; method.md end of section 7).

Three passes over memory prepare the operands, then one kernel attends:

    statistics   the mean of k and the scale of v of each channel: what several programs found, then one for all
    rows         q, and k minus its mean, to int8 with one scale per block of tokens; q's scale holds the softmax's, and
                 the same pass finds its block means for those who select by them
    values       v to e4m3 with one scale per channel, transposed in tiles: Hopper's 8-bit products want tokens
                 contiguous in both operands; or to float16
    attend       int8 scores, online softmax in float32, P V in e4m3 or float16; on Hopper, `kernel_hopper.py`

The tokens of e4m3 values are in `product_order`. 8-bit operands are packed (batch * heads first) and padded to whole
blocks with zeros, so that the loop over blocks has no masks; only a row's last kept block can be ragged. Hopper's e4m3
products keep about 14 bits of their sums: each key tile is summed on its own and added in float32.

In kernels: G batch * heads, R query rows of a program, T keys of one step, D head dim, W width of int8 rows (D, at least
32: an 8-bit product is no narrower).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from turbokernels.attention_tiles import head_offset
from turbokernels.rows import safe_scale, to_8_bits
from turbokernels.tuning import interpreted

SPLITS = tl.constexpr(32)  # programs per head that share the statistics
LOG2_FP8_MAX = tl.constexpr(8.807354922057604)  # log2(448): probabilities use the whole range of e4m3
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def largest_magnitude(b_x, AXIS: tl.constexpr):
    """max |x| of float32 along an axis, NaN if there is one: as integers, magnitudes are ordered and NaN is the largest."""
    return tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), AXIS).to(tl.float32, bitcast=True)


@triton.jit
def to_fp8(b_x):
    """Float32 of magnitude up to 448 to e4m3, to nearest even."""
    if INTERPRETED:  # whose conversion loses a carry: round to the grid of e4m3 first, normal and subnormal
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_normal = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        b_subnormal = (b_x + 24576.0) - 24576.0  # the last place of 1.5 * 2^14 is 2^-9, e4m3's smallest step
        b_x = tl.where(b_x != b_x, b_x, tl.minimum(tl.where(tl.abs(b_x) < 0.015625, b_subnormal, b_normal), 448.0))
    return to_8_bits(b_x, tl.float8e4nv)


@triton.jit
def product_order(b_x):
    """[X, T] with the columns 8b + 2c + d of every 16 at 4c + 2b + d: in this order of keys, a thread that has summed
    scores holds the probabilities that the next product wants of it, and nothing moves between threads."""
    X: tl.constexpr = b_x.shape[0]
    T: tl.constexpr = b_x.shape[1]
    b_x = tl.permute(tl.reshape(b_x, (X, T // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(b_x, (X, T))


@triton.constexpr_function
def tokens_of(block: int) -> int:
    """Of e4m3 values, how many tokens of a channel lie side by side: a tile that one copy moves is contiguous."""
    return min(block, 64)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def statistics_kernel(
    p_k,
    p_v,
    p_sums,  # float32 (G, SPLITS, D): of k
    p_largest,  # float32 (G, SPLITS, D): |v|
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    heads,
    length,
    tiles_per_program,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a block, summed apart: as many as all threads load at once
):
    i_split, i_g = tl.program_id(0), tl.program_id(1)
    p_k += head_offset(i_g, heads, stride_kb, stride_kn)
    p_v += head_offset(i_g, heads, stride_vb, stride_vn)
    i_d = tl.arange(0, D)
    # The order of a sum depends on the strides, through the layout that suits their loads; 8-bit values must not. Sums of
    # float32 are float64, which rounds to the same float32 in any order; those of 16-bit values lose next to nothing.
    dtype: tl.constexpr = tl.float64 if p_k.dtype.element_ty == tl.float32 else tl.float32
    # A thread adds up the rows that it has loaded; threads meet once, at the end.
    b_sum = tl.zeros((ROWS, D), dtype)
    b_bits = tl.zeros((ROWS, D), tl.int32)  # of the largest |v|
    first = i_split * tiles_per_program
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        b_k = tl.load(p_k + i_t * stride_kl + i_d[None, :], mask=i_t < length, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_t * stride_vl + i_d[None, :], mask=i_t < length, other=0.0).to(tl.float32)
        b_sum += tl.sum(tl.reshape(b_k.to(dtype), (BLOCK // ROWS, ROWS, D)), 0)
        b_v = tl.reshape(tl.abs(b_v).to(tl.int32, bitcast=True), (BLOCK // ROWS, ROWS, D))
        b_bits = tl.maximum(b_bits, tl.max(b_v, 0))
    out = (i_g.to(tl.int64) * SPLITS + i_split) * D + i_d
    tl.store(p_sums + out, tl.sum(b_sum, 0).to(tl.float32))
    tl.store(p_largest + out, tl.max(b_bits, 0).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=("length", "programs"))
def combine_kernel(
    p_sums,  # float32 (G, programs, D), read if MEAN
    p_largest,  # float32 (G, programs, D)
    p_mean,  # float32 (G, D): of k
    p_scale,  # float32 (G, D): of v in e4m3
    length,
    programs,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of two that is not less
):
    i_g, i_d, i_p = tl.program_id(0).to(tl.int64), tl.arange(0, D), tl.arange(0, PROGRAMS)[:, None]
    offsets = (i_g * programs + i_p) * D + i_d[None, :]
    if MEAN:
        tl.store(p_mean + i_g * D + i_d, tl.sum(tl.load(p_sums + offsets, mask=i_p < programs, other=0.0), 0) / length)
    b_largest = largest_magnitude(tl.load(p_largest + offsets, mask=i_p < programs, other=0.0), 0)
    tl.store(p_scale + i_g * D + i_d, safe_scale(b_largest, 448.0))


@triton.jit(do_not_specialize=("length",))
def rows_kernel(
    p_x,
    p_mean,  # float32 (G, D), read if SMOOTH
    p_values,  # int8 (G, blocks * BLOCK, W)
    p_scale,  # float32 (G, blocks)
    p_block_mean,  # float32 (G, blocks, D), written if MEANS
    stride_b,
    stride_l,
    stride_n,
    heads,
    length,
    factor,
    SMOOTH: tl.constexpr,
    MEANS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of q, or of k minus its mean, to int8; its scale times `factor`; its mean over the tokens that exist."""
    i_block, i_g = tl.program_id(0), tl.program_id(1)
    i_d = tl.arange(0, W)[None, :]
    i_t = (i_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    m_x = (i_t < length) & (i_d < D)  # [BLOCK, W]
    p_x += head_offset(i_g, heads, stride_b, stride_n)
    b_x = tl.load(p_x + i_t * stride_l + i_d, mask=m_x, other=0.0).to(tl.float32)
    if SMOOTH:
        b_mean = tl.load(p_mean + i_g * D + i_d, mask=i_d < D, other=0.0)  # [1, W]
        b_x = tl.where(m_x, b_x - b_mean, 0.0)
    scale = safe_scale(largest_magnitude(largest_magnitude(b_x, 1), 0), 127.0)
    n_tokens = tl.minimum(length - i_block * BLOCK, BLOCK)
    i_block = i_g.to(tl.int64) * tl.num_programs(0) + i_block
    if MEANS:
        i_w = tl.arange(0, W)
        tl.store(p_block_mean + i_block * D + i_w, tl.sum(b_x, 0) / n_tokens, mask=i_w < D)
    p_values += (i_block * BLOCK + tl.arange(0, BLOCK))[:, None] * W + i_d
    tl.store(p_values, to_8_bits(b_x * (1.0 / scale), tl.int8))
    tl.store(p_scale + i_block, scale * factor)


@triton.jit(do_not_specialize=("length",))
def values_kernel(
    p_v,
    p_scale,  # float32 (G, D), read if FP8
    p_values,  # e4m3 (G, blocks * BLOCK / TOKENS, D, TOKENS) if FP8, else float16 (G, blocks * BLOCK, D)
    stride_b,
    stride_l,
    stride_n,
    heads,
    length,
    FP8: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of v to the format of P V."""
    i_block, i_g = tl.program_id(0), tl.program_id(1)
    i_d = tl.arange(0, D)
    i_t = (i_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    p_v += head_offset(i_g, heads, stride_b, stride_n)
    m_t = (i_t < length)[:, None]
    b_v = tl.load(p_v + i_t[:, None] * stride_l + i_d[None, :], mask=m_t, other=0.0)
    p_values += (i_g.to(tl.int64) * tl.num_programs(0) + i_block) * BLOCK * D
    rows = tl.arange(0, BLOCK)
    if FP8:
        b_inverse = 1.0 / tl.load(p_scale + i_g * D + i_d)
        b_values = to_fp8(b_v.to(tl.float32) * b_inverse[None, :])
        TOKENS: tl.constexpr = tokens_of(BLOCK)
        offsets = (rows // TOKENS * D * TOKENS + rows % TOKENS)[None, :] + i_d[:, None] * TOKENS
        tl.store(p_values + offsets, product_order(tl.trans(b_values)))
    else:
        tl.store(p_values + rows[:, None] * D + i_d[None, :], b_v.to(tl.float16))


@triton.jit
def load_keys(
    p_k, p_v, i_key, TOKENS: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr
):
    """k [T, W] and the pieces [T, CHANNELS] of v, of the keys i_key (int64), in their 8- or 16-bit formats."""
    b_k = tl.load(p_k + i_key[:, None] * W + tl.arange(0, W)[None, :])
    v = ()
    for i_piece in tl.static_range(D // CHANNELS):
        i_d = i_piece * CHANNELS + tl.arange(0, CHANNELS)
        if FP8:
            i_token = i_key // TOKENS * D * TOKENS + i_key % TOKENS
            b_v = tl.trans(tl.load(p_v + i_d[:, None] * TOKENS + i_token[None, :]))
        else:
            b_v = tl.load(p_v + i_key[:, None] * D + i_d[None, :])
        v = v + (b_v,)  # noqa: RUF005 (Triton has no starred tuples)
    return b_k, v


@triton.jit
def add_keys(o, b_sum, b_max, b_new, b_p, v, FP8: tl.constexpr):
    """Add one tile of keys with unnormalised probabilities b_p [R, T] to the pieces of the output and the row sums."""
    b_alpha = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    if FP8:
        b_p = product_order(to_fp8(b_p))
    else:
        b_p = b_p.to(tl.float16)
    new_o = ()
    for i in tl.static_range(len(v)):
        if FP8:
            b_o = o[i] * b_alpha[:, None] + tl.dot(b_p, v[i])
        else:
            b_o = tl.dot(b_p, v[i], o[i] * b_alpha[:, None])
        new_o = new_o + (b_o,)  # noqa: RUF005
    return new_o, b_sum, b_new


@triton.jit
def step(o, b_sum, b_max, b_q, b_k, v, scale, FP8: tl.constexpr):
    """A tile of keys that all exist and share one scale: the softmax's factor and shift are one multiply-add."""
    b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)  # [R, T]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_shift = b_new - LOG2_FP8_MAX if FP8 else b_new
    b_p = tl.exp2(b_s * scale - b_shift[:, None])
    return add_keys(o, b_sum, b_max, b_new, b_p, v, FP8)


@triton.jit
def masked_step(o, b_sum, b_max, b_q, b_k, v, b_scale, m_key, FP8: tl.constexpr):
    """A tile of keys of which some may not exist; b_scale is a scalar or [1, T]."""
    b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32) * b_scale
    b_s = tl.where(m_key[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = b_new - LOG2_FP8_MAX if FP8 else b_new
    b_p = tl.exp2(b_s - b_shift[:, None])
    return add_keys(o, b_sum, b_max, b_new, b_p, v, FP8)


@triton.jit(do_not_specialize=("length_q", "length_k", "n_q_blocks", "n_k_blocks", "n_kept"))
def attend_kernel(
    p_q,  # int8 (G, n_q_blocks * BLOCK_Q, W)
    p_k,  # int8 (G, n_k_blocks * BLOCK_K, W)
    p_v,  # see `values_kernel`
    p_q_scale,  # float32 (G, n_q_blocks), with the softmax's scale in units of log2
    p_k_scale,  # float32 (G, n_k_blocks)
    p_v_scale,  # float32 (G, D), read if FP8
    p_kept,  # int32 (G, n_q_blocks, n_kept), read if SPARSE
    p_o,
    stride_ob,
    stride_ol,
    stride_on,
    heads,
    length_q,
    length_k,
    n_q_blocks,
    n_k_blocks,
    n_kept,
    SPARSE: tl.constexpr,
    FP8: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,  # queries of a program, at most BLOCK_Q
    KEYS: tl.constexpr,  # keys of a step: part of a block, or several small blocks
    CHANNELS: tl.constexpr,  # of one piece of v and of the output: smaller pieces, fewer registers for their sums
):
    i_tile, i_g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_block = i_tile // (BLOCK_Q // ROWS)
    TOKENS: tl.constexpr = tokens_of(BLOCK_K)
    padded_k = n_k_blocks.to(tl.int64) * BLOCK_K
    p_k += i_g * padded_k * W
    p_v += i_g * padded_k * D
    p_k_scale += i_g * n_k_blocks
    p_kept += (i_g * n_q_blocks + i_block) * n_kept
    i_row = i_tile * ROWS + tl.arange(0, ROWS)
    p_q += (i_g * n_q_blocks * BLOCK_Q + i_row)[:, None] * W
    b_q = tl.load(p_q + tl.arange(0, W)[None, :])  # [R, W]
    q_scale = tl.load(p_q_scale + i_g * n_q_blocks + i_block)
    i_t = tl.arange(0, KEYS)
    o = ()
    for _ in tl.static_range(D // CHANNELS):
        o = o + (tl.zeros((ROWS, CHANNELS), tl.float32),)  # noqa: RUF005
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_max = tl.full((ROWS,), float("-inf"), tl.float32)

    if BLOCK_K >= KEYS:
        PARTS: tl.constexpr = BLOCK_K // KEYS
        n_whole = (n_kept - 1) * PARTS
        # The list's next entry is loaded a step ahead, so that no address waits for it.
        i_next = tl.load(p_kept) if SPARSE else 0
        for i_step in range(n_whole):
            i_k = i_next if SPARSE else i_step // PARTS
            if SPARSE:
                i_next = tl.load(p_kept + (i_step + 1) // PARTS)
            i_key = (i_k * BLOCK_K + (i_step % PARTS) * KEYS + i_t).to(tl.int64)
            b_k, v = load_keys(p_k, p_v, i_key, TOKENS, FP8, D, W, CHANNELS)
            scale = q_scale * tl.load(p_k_scale + i_k)
            o, b_sum, b_max = step(o, b_sum, b_max, b_q, b_k, v, scale, FP8)
        i_k = tl.load(p_kept + n_kept - 1) if SPARSE else n_kept - 1
        for i_part in tl.static_range(PARTS):
            i_key = (i_k * BLOCK_K + i_part * KEYS + i_t).to(tl.int64)
            b_k, v = load_keys(p_k, p_v, i_key, TOKENS, FP8, D, W, CHANNELS)
            scale = q_scale * tl.load(p_k_scale + i_k)
            o, b_sum, b_max = masked_step(o, b_sum, b_max, b_q, b_k, v, scale, i_key < length_k, FP8)
    else:
        GROUP: tl.constexpr = KEYS // BLOCK_K
        for i_step in range(tl.cdiv(n_kept, GROUP)):
            i_slot = i_step * GROUP + i_t // BLOCK_K  # [T]
            m_slot = i_slot < n_kept
            i_k = tl.load(p_kept + i_slot, mask=m_slot, other=0) if SPARSE else tl.where(m_slot, i_slot, 0)
            i_key = (i_k * BLOCK_K + i_t % BLOCK_K).to(tl.int64)
            b_k, v = load_keys(p_k, p_v, i_key, TOKENS, FP8, D, W, CHANNELS)
            b_scale = (q_scale * tl.load(p_k_scale + i_k))[None, :]
            m_key = m_slot & (i_key < length_k)
            o, b_sum, b_max = masked_step(o, b_sum, b_max, b_q, b_k, v, b_scale, m_key, FP8)

    p_o += head_offset(i_g, heads, stride_ob, stride_on) + i_row.to(tl.int64)[:, None] * stride_ol
    b_inverse = (1.0 / b_sum)[:, None]
    for i_piece in tl.static_range(D // CHANNELS):
        i_d = i_piece * CHANNELS + tl.arange(0, CHANNELS)
        b_o = o[i_piece] * b_inverse
        if FP8:
            b_o *= tl.load(p_v_scale + i_g * D + i_d)[None, :]
        tl.store(p_o + i_d[None, :], b_o.to(p_o.dtype.element_ty), mask=(i_row < length_q)[:, None])

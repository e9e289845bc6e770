"""Triton kernels of block selection (method.md section 3, steps 1-3), and of transposing the lists that it makes.

q and k are read once, in place. What follows works on their block means, which are a 64th of them: smooth-k's mean is
that of the means, and the best blocks of a row are found by searching for the score of the last one kept, bit by bit,
so that nothing is sorted and lists come out ascending.

Shape suffixes: B batch, L tokens, N heads, D head dim, I query blocks, J key blocks, M kept key blocks per query block.
In kernels: `p_` pointers, `b_` blocks of values, `i_` program ids, `m_` masks; programs are one per row of all samples
and heads, unless a kernel says otherwise.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.attention_tiles import check_kernel_operands, program_head, strides_of
from turbokernels.block_selection import reference
from turbokernels.blocks import BlockMask

CHUNK, LONG_CHUNK = 512, 2048  # entries of a row that a program holds at once
CENTRE_ROWS, CENTRE_COLUMNS = 128, 16  # tile of the block means that smooth-k sums at once


@triton.jit(do_not_specialize=["heads", "length"])
def mean_kernel(p_x, p_mean, stride_b, stride_l, stride_n, heads, length, BLOCK: tl.constexpr, D: tl.constexpr):
    """Mean [D] of one block of tokens, over those that exist, in float32: (B, N, blocks, D). Programs are (heads and
    blocks, samples), heads fastest: neighbours read what lies side by side in memory."""
    i_head, i_block, n_blocks = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.num_programs(0) // heads
    i_row = i_block * BLOCK
    start = tl.program_id(1).to(tl.int64) * stride_b + i_head.to(tl.int64) * stride_n
    rows = tl.arange(0, BLOCK)
    offsets = rows[:, None] * stride_l + tl.arange(0, D)[None, :]
    m_rows = i_row + rows[:, None] < length
    b_x = tl.load(p_x + (start + i_row.to(tl.int64) * stride_l) + offsets, mask=m_rows, other=0.0)
    b_mean = tl.sum(b_x.to(tl.float32), 0) / tl.minimum(length - i_row, BLOCK)
    p_mean += ((tl.program_id(1).to(tl.int64) * heads + i_head) * n_blocks + i_block) * D
    tl.store(p_mean + tl.arange(0, D), b_mean)


@triton.jit(do_not_specialize=["length", "n_blocks"])
def centre_kernel(
    p_mean, p_total, length, n_blocks, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Subtract from block means (B, N, J, D), in place, the mean over all tokens, and write that (B, N, D). Means that are
    not finite do not count, so that they stay the only ones that are not. Programs are (parts of COLUMNS channels, heads,
    samples)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p_mean += program_head() * n_blocks * D + columns[None, :]
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n_blocks, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        b_mean = tl.load(p_mean + rows * D, mask=rows < n_blocks, other=0.0)
        tokens = tl.minimum(length - rows * BLOCK, BLOCK).to(tl.float32)  # the last block may be ragged
        b_sum += tl.sum(tl.where(tl.abs(b_mean) < float("inf"), b_mean * (tokens / length), 0.0), 0)
    tl.store(p_total + program_head() * D + columns, b_sum)
    for first in range(0, n_blocks, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        b_mean = tl.load(p_mean + rows * D, mask=rows < n_blocks, other=0.0)
        tl.store(p_mean + rows * D, b_mean - b_sum[None, :], mask=rows < n_blocks)


@triton.jit
def load_ranks(p_score, columns, n_blocks):
    """Scores as uint32 in the order in which they sort: -inf < ... < -0 = 0 < ... < inf < NaN. 0, less than every
    score's, where there is none."""
    b_score = tl.load(p_score + columns, mask=columns < n_blocks, other=0.0)
    bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    # Of two negative numbers the one with larger bits is smaller; a flipped sign bit puts them below the others.
    ranks = tl.where(bits < 0, ~bits, bits ^ (-(2**31))).to(tl.uint32, bitcast=True)
    ranks = tl.where(b_score == b_score, ranks, 0xFFFFFFFF)
    return tl.where(columns < n_blocks, ranks, 0)


@triton.jit(do_not_specialize=["n_blocks", "n_kept"])
def select_kernel(p_score, p_kept, n_blocks, n_kept, CHUNK: tl.constexpr, SINGLE: tl.constexpr):
    """The n_kept best of a row of n_blocks scores, ties to the lower index: their indices, ascending. SINGLE: the row
    is at most a chunk, so registers hold its ranks throughout."""
    i_row = tl.program_id(0).to(tl.int64)
    p_score += i_row * n_blocks
    p_kept += i_row * n_kept
    end = CHUNK if SINGLE else n_blocks
    b_ranks = load_ranks(p_score, tl.arange(0, CHUNK), n_blocks)

    # The rank of the last score kept is the largest that at least n_kept ranks reach: its bits, from the highest.
    last_rank = tl.full([], 0, tl.uint32)
    bit = tl.full([], 2**31, tl.uint32)
    for _ in range(0, 32):
        candidate = last_rank | bit
        bit = bit >> 1
        n_reached = 0
        for first in range(0, end, CHUNK):
            if not SINGLE:
                b_ranks = load_ranks(p_score, first + tl.arange(0, CHUNK), n_blocks)
            n_reached += tl.sum((b_ranks >= candidate).to(tl.int32), 0)
        last_rank = tl.where(n_reached >= n_kept, candidate, last_rank)

    n_above = 0
    for first in range(0, end, CHUNK):
        if not SINGLE:
            b_ranks = load_ranks(p_score, first + tl.arange(0, CHUNK), n_blocks)
        n_above += tl.sum((b_ranks > last_rank).to(tl.int32), 0)
    n_ties = n_kept - n_above  # of those that tie for the last place, the first ones are kept
    n_seen = 0
    n_written = 0
    for first in range(0, end, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        if not SINGLE:
            b_ranks = load_ranks(p_score, columns, n_blocks)
        m_tie = (b_ranks == last_rank) & (columns < n_blocks)
        seen = n_seen + tl.cumsum(m_tie.to(tl.int32), 0)
        m_kept = (b_ranks > last_rank) | (m_tie & (seen <= n_ties))
        place = n_written + tl.cumsum(m_kept.to(tl.int32), 0) - 1
        tl.store(p_kept + place, columns, mask=m_kept)
        n_seen += tl.sum(m_tie.to(tl.int32), 0)
        n_written += tl.sum(m_kept.to(tl.int32), 0)


@triton.jit(do_not_specialize=["n_q_blocks", "n_k_blocks", "n_kept"])
def mark_kernel(p_kept, p_marks, n_q_blocks, n_k_blocks, n_kept, CHUNK: tl.constexpr):
    """Set marks (B, N, J, I), zero before, where query block i keeps key block j."""
    i_head, i_q = (tl.program_id(0) // n_q_blocks).to(tl.int64), tl.program_id(0) % n_q_blocks
    p_kept += tl.program_id(0).to(tl.int64) * n_kept
    p_marks += i_head * n_k_blocks * n_q_blocks + i_q
    for first in range(0, n_kept, CHUNK):
        places = first + tl.arange(0, CHUNK)
        b_k = tl.load(p_kept + places, mask=places < n_kept, other=0)
        tl.store(p_marks + b_k * n_q_blocks, tl.full([CHUNK], 1, tl.int8), mask=places < n_kept)


@triton.jit(do_not_specialize=["n_q_blocks", "n_k_blocks", "n_pairs"])
def transpose_kernel(p_marks, p_offsets, p_q_blocks, n_q_blocks, n_k_blocks, n_pairs, CHUNK: tl.constexpr):
    """Write the marked query blocks of one key block, ascending, from where its list starts."""
    i_head, i_k = (tl.program_id(0) // n_k_blocks).to(tl.int64), tl.program_id(0) % n_k_blocks
    p_marks += tl.program_id(0).to(tl.int64) * n_q_blocks
    p_q_blocks += i_head * n_pairs + tl.load(p_offsets + i_head * (n_k_blocks + 1) + i_k)
    n_written = 0
    for first in range(0, n_q_blocks, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        b_marks = tl.load(p_marks + columns, mask=columns < n_q_blocks, other=0).to(tl.int32)
        tl.store(p_q_blocks + (n_written + tl.cumsum(b_marks, 0) - 1), columns, mask=b_marks > 0)
        n_written += tl.sum(b_marks, 0)


def block_means(x: Tensor, block: int) -> Tensor:
    """As reference.block_means: (B, L, N, D) to (B, N, blocks, D) in float32."""
    batch, length, heads, dim = x.shape
    n_blocks = triton.cdiv(length, block)
    means = torch.empty(batch, heads, n_blocks, dim, dtype=torch.float32, device=x.device)
    warps = 1 if x.itemsize == 2 else 4  # as few as hold a block: threads of one warp share a sum without a barrier
    mean_kernel[(n_blocks * heads, batch)](x, means, *strides_of(x), heads, length, BLOCK=block, D=dim, num_warps=warps)
    return means


def centred_key_means(k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Block means (B, N, J, D) of k minus the mean over all tokens, and that mean (B, N, D); float32."""
    batch, length, heads, dim = k.shape
    k_BNJD = block_means(k, block)
    total = torch.empty(batch, heads, dim, dtype=torch.float32, device=k.device)
    centre_kernel[(dim // CENTRE_COLUMNS, heads, batch)](
        *(k_BNJD, total, length, k_BNJD.shape[2]),
        **{"BLOCK": block, "D": dim, "ROWS": CENTRE_ROWS, "COLUMNS": CENTRE_COLUMNS, "num_warps": 4},
    )
    return k_BNJD, total


def keep_best(score_BNIJ: Tensor, n_kept: int) -> Tensor:
    """Indices (B, N, I, M) of the n_kept best scores of each row of contiguous float32 scores, ascending."""
    *rows, n_blocks = score_BNIJ.shape
    kept = torch.empty(*rows, n_kept, dtype=torch.int32, device=score_BNIJ.device)
    # Sixteen scores per thread. Up to CHUNK blocks one warp has a row, so that its sums need no barrier.
    chunk, warps = (CHUNK, 1) if n_blocks <= CHUNK else (LONG_CHUNK, 4)
    select_kernel[(math.prod(rows),)](
        score_BNIJ, kept, n_blocks, n_kept, CHUNK=chunk, SINGLE=n_blocks <= chunk, num_warps=warps
    )
    return kept


def best_blocks(q_BNID: Tensor, k_BNJD: Tensor, n_kept: int) -> Tensor:
    """`keep_best` of the scores of block means, k's centred."""
    with torch.autocast(q_BNID.device.type, enabled=False):  # rounded scores would tie and flip between neighbours
        score_BNIJ = q_BNID @ k_BNJD.mT
    return keep_best(score_BNIJ, n_kept)


@torch.library.custom_op("turbokernels::select_blocks", mutates_args=())
def _select(q: Tensor, k: Tensor, n_kept: int, block_q: int, block_k: int) -> Tensor:
    return best_blocks(block_means(q, block_q), centred_key_means(k, block_k)[0], n_kept)


@_select.register_fake
def _(q: Tensor, k: Tensor, n_kept: int, block_q: int, block_k: int) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], -(-q.shape[1] // block_q), n_kept), dtype=torch.int32)


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> BlockMask:
    """As reference.select_blocks."""
    check_kernel_operands("select_blocks", q)
    kept = _select(q.detach(), k.detach(), reference.kept_blocks(topk, k.shape[1], block_k), block_q, block_k)
    return BlockMask(kept, block_q, block_k, q.shape[1], k.shape[1])


def transpose_lists(kept: Tensor, n_k_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockMask`'s counts (B, N, J), offsets (B, N, J + 1) and q_blocks (B, N, I * M) of kept (B, N, I, M), int32.

    Through a byte per pair of blocks (28 MiB at L = 75,600 with 40 heads): nothing is sorted, and no order is left to
    chance.
    """
    batch, heads, n_q_blocks, n_kept = kept.shape
    n_pairs = n_q_blocks * n_kept
    marks = torch.zeros(batch, heads, n_k_blocks, n_q_blocks, dtype=torch.int8, device=kept.device)
    lengths = (n_q_blocks, n_k_blocks)
    mark_kernel[(batch * heads * n_q_blocks,)](kept.contiguous(), marks, *lengths, n_kept, CHUNK=128, num_warps=1)
    counts = marks.sum(3, dtype=torch.int32)
    offsets = torch.nn.functional.pad(counts.cumsum(2, dtype=torch.int32), (1, 0))
    q_blocks = torch.empty(batch, heads, n_pairs, dtype=torch.int32, device=kept.device)
    transpose_kernel[(batch * heads * n_k_blocks,)](
        marks, offsets, q_blocks, *lengths, n_pairs, CHUNK=CHUNK, num_warps=4
    )
    return counts, offsets, q_blocks

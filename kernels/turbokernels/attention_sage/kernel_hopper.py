# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportReturnType=false
"""The quantised attention kernel for Hopper, in Gluon: matrix products run while the softmax does.

One warp copies two tiles of keys and values at a time into a ring of shared memory (TMA). Four warps hold 64 query rows
and walk the ring: they start the next pair's scores, compute this pair's probabilities meanwhile, then start their
products with the values. Two programs share a processor, and one's products hide behind the other's softmax.

Names as in `kernel.py`. R = 64 query rows of a program, T = 64 keys of a tile, two tiles to a step.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)
TILE = gl.constexpr(64)
LOG2_FP8_MAX = gl.constexpr(8.807354922057604)  # as in `kernel.py`


@functools.cache
def tile_layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How tiles of an 8-bit operand lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8 if dtype == torch.int8 else gl.float8e4nv)


@gluon.jit
def _block(p_kept, i_tile, n_tiles, SPARSE: gl.constexpr, PARTS: gl.constexpr):
    """The key block of the list's tile i_tile; the last one's beyond the end."""
    i_slot = gl.minimum(i_tile, n_tiles - 1) // PARTS
    return gl.load(p_kept + i_slot) if SPARSE else i_slot


@gluon.jit
def _produce(
    q, k, v, p_kept, q_tile, k_ring, v_ring, q_full, full, empty, row_q, row_k, n_tiles,
    SPARSE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Copy the queries and then the list's tiles, a pair as soon as a slot is free."""
    SLOTS: gl.constexpr = k_ring.shape[0] // 2
    W: gl.constexpr = k_ring.shape[2]
    D: gl.constexpr = v_ring.shape[1]
    mbarrier.expect(q_full, ROWS * W)
    tma.async_copy_global_to_shared(q, [row_q, 0], q_full, q_tile)
    slot = 0
    parity = 1  # of the slots' last release; the first round waits for none
    i_next = _block(p_kept, 0, n_tiles, SPARSE, PARTS)
    for i_step in range(gl.cdiv(n_tiles, 2)):
        mbarrier.wait(empty.index(slot), parity)
        mbarrier.expect(full.index(slot), 2 * TILE * (W + D))
        for half in gl.static_range(2):
            i_tile = i_step * 2 + half
            i_key = (i_next * PARTS + gl.minimum(i_tile, n_tiles - 1) % PARTS) * TILE
            i_next = _block(p_kept, i_tile + 1, n_tiles, SPARSE, PARTS)
            tma.async_copy_global_to_shared(k, [row_k + i_key, 0], full.index(slot), k_ring.index(slot * 2 + half))
            tma.async_copy_global_to_shared(
                v, [(row_k + i_key) // TILE * D, 0], full.index(slot), v_ring.index(slot * 2 + half)
            )
        slot += 1
        parity = parity ^ (slot == SLOTS)
        slot = gl.where(slot == SLOTS, 0, slot)


@gluon.jit
def _scores(q_tile, k_tile, S: gl.constexpr):
    """Start q k^T of one tile: [R, T] in int32."""
    zero = gl.zeros((ROWS, TILE), gl.int32, S)
    return hopper.warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _largest(b_s):
    """Of scores [R, T]: one for each of the four threads that share a row, [R, 4]."""
    return gl.max(gl.max(b_s.reshape((ROWS, TILE // 8, 4, 2)), 3), 1)


@gluon.jit
def _probabilities(b_s, scale, b_shift, P: gl.constexpr):
    """Of one tile: as e4m3 in the layout of a product's left operand, and their sums by thread, [R, 4].

    A thread has columns 8b + 2c, 8b + 2c + 1 of every 16 and a product wants 4 adjacent ones of it: v's keys are stored
    in the order (c, b), so that nothing moves between threads.
    """
    b_shift = gl.convert_layout(b_shift, gl.SliceLayout(1, b_s.type.layout), assert_trivial=True)
    b_p = gl.exp2(b_s * scale - b_shift[:, None])
    b_sum = gl.sum(gl.sum(b_p.reshape((ROWS, TILE // 8, 4, 2)), 3), 1)
    b_p8 = b_p.to(gl.float8e4nv, fp_downcast_rounding="rtne").reshape((ROWS, TILE // 16, 2, 4, 2))
    b_p8 = b_p8.permute((0, 1, 3, 2, 4)).reshape((ROWS, TILE))
    return gl.convert_layout(b_p8, P, assert_trivial=True), b_sum


@gluon.jit
def _add_values(b_pa, b_pb, v_ring, slot, O: gl.constexpr, D: gl.constexpr):
    """Start p v of both tiles, in one sum of their own: e4m3 products keep about 14 bits of it."""
    zero = gl.zeros((ROWS, D), gl.float32, O)
    new = hopper.warpgroup_mma(b_pa, v_ring.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(b_pb, v_ring.index(slot * 2 + 1).permute((1, 0)), new, is_async=True)


@gluon.jit
def _consume(arguments, SPARSE: gl.constexpr, PARTS: gl.constexpr):
    q_tile, k_ring, v_ring, q_full, full, empty, p_kept, p_k_scale, p_v_scale, p_o = arguments[:10]
    row_o, stride_ol, q_scale, length_q, length_k, n_tiles = arguments[10:]
    SLOTS: gl.constexpr = k_ring.shape[0] // 2
    D: gl.constexpr = v_ring.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 4)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    b_o = gl.zeros((ROWS, D), gl.float32, O)
    zero = gl.zeros((ROWS, TILE), gl.float32, S).reshape((ROWS, TILE // 8, 4, 2))
    b_sum = gl.sum(gl.sum(zero, 3), 1)
    b_max = gl.max(b_sum, 1) - float("inf")

    # Blocks are read two tiles ahead, their scales one: nothing waits for an address.
    i_a = _block(p_kept, 0, n_tiles, SPARSE, PARTS)
    i_b = _block(p_kept, 1, n_tiles, SPARSE, PARTS)
    k_scale_a, k_scale_b = gl.load(p_k_scale + i_a), gl.load(p_k_scale + i_b)
    i_a_next = _block(p_kept, 2, n_tiles, SPARSE, PARTS)
    i_b_next = _block(p_kept, 3, n_tiles, SPARSE, PARTS)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    s_a = _scores(q_tile, k_ring.index(0), S)
    s_b = _scores(q_tile, k_ring.index(1), S)
    b_sa, b_sb = hopper.warpgroup_mma_wait(0, deps=(s_a, s_b))
    slot = 0
    parity = 0
    for i_step in range(1, gl.cdiv(n_tiles, 2)):
        last = slot
        slot += 1
        parity = parity ^ (slot == SLOTS)
        slot = gl.where(slot == SLOTS, 0, slot)
        mbarrier.wait(full.index(slot), parity)
        s_a = _scores(q_tile, k_ring.index(slot * 2), S)
        s_b = _scores(q_tile, k_ring.index(slot * 2 + 1), S)
        scale_a, scale_b = k_scale_a * q_scale, k_scale_b * q_scale
        k_scale_a, k_scale_b = gl.load(p_k_scale + i_a_next), gl.load(p_k_scale + i_b_next)
        i_a, i_b = i_a_next, i_b_next
        i_a_next = _block(p_kept, i_step * 2 + 2, n_tiles, SPARSE, PARTS)
        i_b_next = _block(p_kept, i_step * 2 + 3, n_tiles, SPARSE, PARTS)

        b_fa, b_fb = b_sa.to(gl.float32), b_sb.to(gl.float32)
        b_new = gl.maximum(b_max, gl.max(gl.maximum(_largest(b_fa) * scale_a, _largest(b_fb) * scale_b), 1))
        b_alpha = gl.exp2(b_max - b_new)
        b_shift = b_new - LOG2_FP8_MAX
        b_pa, b_sum_a = _probabilities(b_fa, scale_a, b_shift, P)
        b_pb, b_sum_b = _probabilities(b_fb, scale_b, b_shift, P)
        b_sum = b_sum * b_alpha[:, None] + (b_sum_a + b_sum_b)
        b_max = b_new
        new = _add_values(b_pa, b_pb, v_ring, last, O, D)
        b_sa, b_sb, b_new_o = hopper.warpgroup_mma_wait(0, deps=(s_a, s_b, new))
        mbarrier.arrive(empty.index(last))
        b_o = b_o * gl.convert_layout(b_alpha, O_ROWS)[:, None] + b_new_o

    # The last two tiles: keys may be missing from one, and all of the other.
    i_t = gl.arange(0, TILE, gl.SliceLayout(0, S))
    last_tile = (gl.cdiv(n_tiles, 2) - 1) * 2
    keys_a = length_k - (i_a * PARTS + last_tile % PARTS) * TILE
    keys_b = gl.where(last_tile + 1 < n_tiles, length_k - (i_b * PARTS + (last_tile + 1) % PARTS) * TILE, 0)
    b_fa = gl.where((i_t < keys_a)[None, :], b_sa.to(gl.float32) * (k_scale_a * q_scale), float("-inf"))
    b_fb = gl.where((i_t < keys_b)[None, :], b_sb.to(gl.float32) * (k_scale_b * q_scale), float("-inf"))
    b_new = gl.maximum(b_max, gl.max(gl.maximum(_largest(b_fa), _largest(b_fb)), 1))
    b_alpha = gl.exp2(b_max - b_new)
    b_shift = b_new - LOG2_FP8_MAX
    b_pa, b_sum_a = _probabilities(b_fa, 1.0, b_shift, P)
    b_pb, b_sum_b = _probabilities(b_fb, 1.0, b_shift, P)
    b_sum = b_sum * b_alpha[:, None] + (b_sum_a + b_sum_b)
    b_new_o = hopper.warpgroup_mma_wait(0, deps=(_add_values(b_pa, b_pb, v_ring, slot, O, D),))
    b_o = b_o * gl.convert_layout(b_alpha, O_ROWS)[:, None] + b_new_o

    b_v_scale = gl.load(p_v_scale + gl.arange(0, D, gl.SliceLayout(0, O)))
    b_o = b_o * gl.convert_layout(1.0 / gl.sum(b_sum, 1), O_ROWS)[:, None] * b_v_scale[None, :]
    i_row = row_o + gl.arange(0, ROWS, O_ROWS)
    offsets = i_row.to(gl.int64)[:, None] * stride_ol + gl.arange(0, D, gl.SliceLayout(0, O))[None, :]
    gl.store(p_o + offsets, b_o.to(p_o.dtype.element_ty), mask=(i_row < length_q)[:, None])


@gluon.jit(do_not_specialize=("length_q", "length_k", "n_q_blocks", "n_k_blocks", "n_kept"))
def attend_kernel(
    q,  # int8 (G * n_q_blocks * BLOCK_Q, W), tiles of [ROWS, W]
    k,  # int8 (G * n_k_blocks * BLOCK_K, W), tiles of [TILE, W]
    v,  # e4m3 (G * n_k_blocks * BLOCK_K / TILE * D, TILE), tiles of [D, TILE]
    p_q_scale,  # this and what follows: as in `kernel.attend_kernel`
    p_k_scale,
    p_v_scale,
    p_kept,
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
    SPARSE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,  # pairs of tiles in the ring
):
    PARTS: gl.constexpr = BLOCK_K // TILE
    W: gl.constexpr = k.block_type.shape[1]
    D: gl.constexpr = v.block_type.shape[0]
    q_tile = gl.allocate_shared_memory(q.dtype, [ROWS, W], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [2 * SLOTS, TILE, W], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [2 * SLOTS, D, TILE], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)

    i_g = gl.program_id(1)
    row_o = gl.program_id(0) * ROWS
    i_block = row_o // BLOCK_Q
    row_q = i_g * n_q_blocks * BLOCK_Q + row_o
    row_k = i_g * n_k_blocks * BLOCK_K
    i_g = i_g.to(gl.int64)
    p_kept += (i_g * n_q_blocks + i_block) * n_kept
    p_k_scale += i_g * n_k_blocks
    p_v_scale += i_g * D
    p_o += (i_g // heads) * stride_ob + (i_g % heads) * stride_on
    q_scale = gl.load(p_q_scale + i_g * n_q_blocks + i_block)
    # Only the list's last block can be ragged: tiles of it without keys do not count.
    i_last = gl.load(p_kept + n_kept - 1) if SPARSE else n_kept - 1
    n_tiles = (n_kept - 1) * PARTS + gl.cdiv(gl.minimum(length_k - i_last * BLOCK_K, BLOCK_K), TILE)

    produce = (
        q, k, v, p_kept, q_tile, k_ring, v_ring, q_full, full, empty, row_q, row_k, n_tiles, SPARSE, PARTS
    )  # fmt: skip
    consume = (
        q_tile, k_ring, v_ring, q_full, full, empty, p_kept, p_k_scale, p_v_scale, p_o, row_o, stride_ol, q_scale,
        length_q, length_k, n_tiles,
    )  # fmt: skip
    gl.warp_specialize([(_consume, (consume, SPARSE, PARTS)), (_produce, produce)], [1], [24])

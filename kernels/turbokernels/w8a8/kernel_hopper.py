# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportReturnType=false
"""The int8 row kernel for Hopper, in Gluon: integer matrix instructions that nobody waits for.

Triton waits for integer products at every step of K; Gluon says when. One warp copies tiles of x and w into a ring of
shared memory (TMA), `CONSUMERS` groups of four or eight warps multiply them, each group a tile of its own: while one
scales, activates and stores its tile, the others keep the matrix units busy. Tiles are copied in the order in which
groups take turns.

Everything that is ragged is left to the descriptors: they read zeros beyond the end and write nothing there.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from turbokernels.rows import gelu_tanh


@functools.cache  # 24 microseconds: as long as a small product
def tile_layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8 if dtype == torch.int8 else gl.float16)


@gluon.jit
def _place(i_tile, n_m, n_n, GROUP: gl.constexpr):
    """As `kernel._place`."""
    i_group = i_tile // (GROUP * n_n)
    rows = gl.minimum(n_m - i_group * GROUP, GROUP)
    i_in_group = i_tile - i_group * GROUP * n_n
    return i_group * GROUP + i_in_group % rows, i_in_group // rows


@gluon.jit
def _produce(x, w, x_ring, w_ring, full, empty, n_tiles, n_m, n_n, n_in, GROUP: gl.constexpr):
    """Copy the operands of this program's tiles, one step of K after the other, each as soon as its slot is free."""
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_N: gl.constexpr = w.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    SLOTS: gl.constexpr = x_ring.shape[0]
    slot = 0
    parity = 1  # of the slots' last release; the first round waits for none
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_tile_m, i_tile_n = _place(i_tile, n_m, n_n, GROUP)
        for start in range(0, n_in, BLOCK_K):
            mbarrier.wait(empty.index(slot), parity)
            mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(x, [i_tile_m * BLOCK_M, start], full.index(slot), x_ring.index(slot))
            tma.async_copy_global_to_shared(w, [i_tile_n * BLOCK_N, start], full.index(slot), w_ring.index(slot))
            slot += 1
            parity = parity ^ (slot == SLOTS)
            slot = gl.where(slot == SLOTS, 0, slot)


@gluon.jit
def _consume(
    arguments, y_tile, INDEX: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """Multiply and store tiles INDEX, INDEX + CONSUMERS, ... of this program."""
    x_ring, w_ring, full, empty, turns, y, p_x_scale, p_w_scale, p_bias = arguments[:9]
    n_tiles, n_m, n_n, n_rows, n_out, n_in = arguments[9:]
    SLOTS: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    WARPS: gl.constexpr = gl.num_warps()
    # A group of four warps multiplies 64 rows at a time; two groups share the columns of a wide tile.
    WIDTH: gl.constexpr = BLOCK_N if BLOCK_N <= 128 else BLOCK_N // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS * WIDTH // BLOCK_N, BLOCK_N // WIDTH], [16, WIDTH, 32]
    )
    n_k = gl.cdiv(n_in, BLOCK_K)
    i_copy = INDEX * n_k  # of the first of this tile's steps, among all that are copied
    turn = 1 - INDEX  # parity of the turn before; the first group waits for none
    for i_tile in range(gl.program_id(0) + INDEX * gl.num_programs(0), n_tiles, CONSUMERS * gl.num_programs(0)):
        slot = i_copy % SLOTS
        parity = i_copy // SLOTS & 1
        # A slot tells its last two rounds apart: nobody looks at it before the group of the tile before has seen it full.
        if CONSUMERS > 1:
            mbarrier.wait(turns.index(INDEX), turn)
            turn = turn ^ 1
        sums = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, SUMS)
        for i_k in range(n_k):
            mbarrier.wait(full.index(slot), parity)
            sums = hopper.warpgroup_mma(
                x_ring.index(slot), w_ring.index(slot).permute((1, 0)), sums, use_acc=i_k > 0, is_async=True
            )
            # The step before this one is done: its slot is free.
            sums = hopper.warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index(gl.where(slot == 0, SLOTS, slot) - 1), pred=i_k > 0)
            slot += 1
            parity = parity ^ (slot == SLOTS)
            slot = gl.where(slot == SLOTS, 0, slot)
        if CONSUMERS > 1:
            mbarrier.arrive(turns.index(1 - INDEX))
        b_sum = hopper.warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(gl.where(slot == 0, SLOTS, slot) - 1))
        i_copy += CONSUMERS * n_k

        i_tile_m, i_tile_n = _place(i_tile, n_m, n_n, GROUP)
        i_m = i_tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUMS))
        i_n = i_tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
        i_m, i_n = gl.minimum(i_m, n_rows - 1), gl.minimum(i_n, n_out - 1)
        b_y = b_sum.to(gl.float32) * gl.load(p_x_scale + i_m)[:, None] * gl.load(p_w_scale + i_n)[None, :]
        if BIAS:
            b_y += gl.load(p_bias + i_n).to(gl.float32)[None, :]
        if GELU:
            b_y = gelu_tanh(b_y)
        tma.store_wait(0)  # for the tile before this one, which leaves from the same memory
        y_tile.store(b_y.to(y.dtype))
        hopper.fence_async_shared()
        tma.async_copy_shared_to_global(y, [i_tile_m * BLOCK_M, i_tile_n * BLOCK_N], y_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_rows"])
def rows_kernel(
    x, w, p_x_scale, p_w_scale, p_bias, y, n_rows, n_out, n_in,
    SLOTS: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """y = x w^T * x_scale * w_scale + bias, as `kernel._rows_kernel`. x (M, K), w (N, K) int8 and y (M, N): descriptors."""
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_N: gl.constexpr = w.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    x_ring = gl.allocate_shared_memory(x.dtype, [SLOTS, BLOCK_M, BLOCK_K], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [SLOTS, BLOCK_N, BLOCK_K], w.layout)
    y_tiles = gl.allocate_shared_memory(y.dtype, [CONSUMERS, BLOCK_M, BLOCK_N], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    n_m, n_n = gl.cdiv(n_rows, BLOCK_M), gl.cdiv(n_out, BLOCK_N)
    n_tiles = n_m * n_n
    produce = (x, w, x_ring, w_ring, full, empty, n_tiles, n_m, n_n, n_in, GROUP)
    consume = (
        x_ring, w_ring, full, empty, turns, y, p_x_scale, p_w_scale, p_bias, n_tiles, n_m, n_n, n_rows, n_out, n_in
    )  # fmt: skip
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_consume, (consume, y_tiles.index(0), 0, 1, GROUP, BIAS, GELU)), (_produce, produce)],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consume, y_tiles.index(0), 0, 2, GROUP, BIAS, GELU)),
                (_consume, (consume, y_tiles.index(1), 1, 2, GROUP, BIAS, GELU)),
                (_produce, produce),
            ],
            [gl.num_warps(), 1],
            [240, 24],
        )

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportReturnType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
"""The convolution kernel for Hopper, in Gluon: a matrix product whose left operand is read from the image as it lies.

A program has six rows of an output frame, `WIDTH` pixels wide; three groups of four warps have two of them each. One warp
copies (TMA) the input rows for one tap in time, one in width and `DEPTH` channels, one after the other: the rows of all
taps in height are among them, so that each tap's left operand is a stretch of what is there. What lies outside the image is
read as zeros, and what would be written there is left out, by the copying hardware.

Columns of the output are multiplied N1 and N2 at a time, as matrix instructions have widths that are powers of two here: 96
channels are 64 + 32.
"""

from __future__ import annotations

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

CONSUMERS = gl.constexpr(3)
ROWS = gl.constexpr(2)  # of a consumer


@functools.cache  # 24 microseconds
def layout(box: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """How a box of 16-bit values lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)


@gluon.jit
def _place(i_tile, n_n, n_t, n_w, WIDTH: gl.constexpr, N: gl.constexpr):
    """(channel, frame, row, column) at which a tile begins. Neighbours in time run together: they read the same frames."""
    i_n = i_tile % n_n
    i_tile = i_tile // n_n
    i_t = i_tile % n_t
    i_tile = i_tile // n_t
    return i_n * N, i_t, i_tile // n_w * (CONSUMERS * ROWS), i_tile % n_w * WIDTH


@gluon.jit
def _next(slot, parity, SLOTS: gl.constexpr):
    slot += 1
    parity = parity ^ (slot == SLOTS)
    return gl.where(slot == SLOTS, 0, slot), parity


@gluon.jit
def _produce(arguments, TAPS_T: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr):
    """Copy the operands of this program's tiles, each as soon as its slot is free."""
    x, w1, w2, x_ring, w1_ring, w2_ring, x_full, x_empty, w_full, w_empty = arguments[:10]
    n_tiles, n_n, n_t, n_w, n_in, n_out, shift_h, shift_w = arguments[10:]
    WIDTH: gl.constexpr = x.block_type.shape[2]
    DEPTH: gl.constexpr = x.block_type.shape[3]
    N1: gl.constexpr = w1.block_type.shape[0]
    N2: gl.constexpr = 0 if w2 is None else w2.block_type.shape[0]
    BOX_ROWS: gl.constexpr = CONSUMERS * ROWS + TAPS_H - 1
    X_SLOTS: gl.constexpr = x_ring.shape[0] // BOX_ROWS
    W_SLOTS: gl.constexpr = w1_ring.shape[0]
    x_slot = 0
    x_parity = 1  # of the slots' last release; the first round waits for none
    w_slot = 0
    w_parity = 1
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_n, i_t, i_h, i_w = _place(i_tile, n_n, n_t, n_w, WIDTH, N1 + N2)
        for tap in range(TAPS_T * TAPS_W):
            tap_t = tap // TAPS_W
            tap_w = tap % TAPS_W
            for i_c in range(0, n_in, DEPTH):
                mbarrier.wait(x_empty.index(x_slot), x_parity)
                mbarrier.expect(x_full.index(x_slot), BOX_ROWS * WIDTH * DEPTH * 2)
                for row in range(BOX_ROWS):
                    at = [i_t + tap_t, i_h + row + shift_h, i_w + tap_w + shift_w, i_c]
                    x_row = x_ring.index(x_slot * BOX_ROWS + row)
                    tma.async_copy_global_to_shared(x, at, x_full.index(x_slot), x_row)
                x_slot, x_parity = _next(x_slot, x_parity, X_SLOTS)
                for tap_h in range(TAPS_H):
                    row = ((tap_t * TAPS_H + tap_h) * TAPS_W + tap_w) * n_out + i_n
                    mbarrier.wait(w_empty.index(w_slot), w_parity)
                    mbarrier.expect(w_full.index(w_slot), (N1 + N2) * DEPTH * 2)
                    tma.async_copy_global_to_shared(w1, [row, i_c], w_full.index(w_slot), w1_ring.index(w_slot))
                    if N2 > 0:
                        tma.async_copy_global_to_shared(
                            w2, [row + N1, i_c], w_full.index(w_slot), w2_ring.index(w_slot)
                        )
                    w_slot, w_parity = _next(w_slot, w_parity, W_SLOTS)


@gluon.jit
def _store(sums, p_bias, y, y_tile, at, N: gl.constexpr, SUMS: gl.constexpr):
    """Add the bias and write [ROWS, WIDTH] pixels of N channels."""
    i_t, i_h, i_w, i_n = at
    b_bias = gl.load(p_bias + i_n + gl.arange(0, N, gl.SliceLayout(0, SUMS))).to(gl.float32)
    b_y = (sums + b_bias[None, :]).to(y.dtype)
    tma.store_wait(0)  # for what was written from the same memory before
    y_tile.reshape([sums.shape[0], N]).store(b_y)
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(y, [i_t, i_h, i_w, i_n], y_tile)


@gluon.jit
def _consume(
    arguments, y1_tile, y2_tile, INDEX: gl.constexpr, TAPS_T: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr
):
    """Multiply and store rows 2 INDEX and 2 INDEX + 1 of this program's tiles."""
    x_ring, w1_ring, w2_ring, x_full, x_empty, w_full, w_empty, y1, y2, p_bias = arguments[:10]
    n_tiles, n_n, n_t, n_w, n_in = arguments[10:]
    BOX_ROWS: gl.constexpr = CONSUMERS * ROWS + TAPS_H - 1
    X_SLOTS: gl.constexpr = x_ring.shape[0] // BOX_ROWS
    WIDTH: gl.constexpr = x_ring.shape[3]
    DEPTH: gl.constexpr = x_ring.shape[4]
    W_SLOTS: gl.constexpr = w1_ring.shape[0]
    N1: gl.constexpr = w1_ring.shape[1]
    N2: gl.constexpr = 0 if w2_ring is None else w2_ring.shape[1]
    PIXELS: gl.constexpr = ROWS * WIDTH
    SUMS1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N1, 16])
    SUMS2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N2 if N2 > 0 else N1, 16])
    PIXELS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIXELS, DEPTH], gl.bfloat16)
    RUNNING: gl.constexpr = 2 if N2 > 0 else 1  # products of the newest step
    x_slot = 0
    x_parity = 0
    w_slot = 0
    w_parity = 0
    n_steps = TAPS_T * TAPS_W * gl.cdiv(n_in, DEPTH)
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        sums1 = gl.zeros((PIXELS, N1), gl.float32, SUMS1)
        if N2 > 0:
            sums2 = gl.zeros((PIXELS, N2), gl.float32, SUMS2)
        for step in range(n_steps):
            mbarrier.wait(x_full.index(x_slot), x_parity)
            for tap_h in gl.static_range(TAPS_H):
                mbarrier.wait(w_full.index(w_slot), w_parity)
                first = x_ring.index(x_slot * BOX_ROWS + ROWS * INDEX + tap_h)
                pixels = first._reinterpret(x_ring.dtype, [PIXELS, DEPTH], PIXELS_LAYOUT)  # it and the rows after it
                sums1 = hopper.warpgroup_mma(pixels, w1_ring.index(w_slot).permute((1, 0)), sums1, is_async=True)
                if N2 > 0:
                    sums2 = hopper.warpgroup_mma(pixels, w2_ring.index(w_slot).permute((1, 0)), sums2, is_async=True)
                    sums1, sums2 = hopper.warpgroup_mma_wait(RUNNING, deps=(sums1, sums2))
                else:
                    sums1 = hopper.warpgroup_mma_wait(RUNNING, deps=(sums1,))
                # The step before this one is done: its slots are free.
                before = (step > 0) | (tap_h > 0)
                mbarrier.arrive(w_empty.index(gl.where(w_slot == 0, W_SLOTS, w_slot) - 1), pred=before)
                if tap_h == 0:
                    mbarrier.arrive(x_empty.index(gl.where(x_slot == 0, X_SLOTS, x_slot) - 1), pred=before)
                w_slot, w_parity = _next(w_slot, w_parity, W_SLOTS)
            x_slot, x_parity = _next(x_slot, x_parity, X_SLOTS)
        if N2 > 0:
            b_sum1, b_sum2 = hopper.warpgroup_mma_wait(0, deps=(sums1, sums2))
        else:
            b_sum1 = hopper.warpgroup_mma_wait(0, deps=(sums1,))
        mbarrier.arrive(w_empty.index(gl.where(w_slot == 0, W_SLOTS, w_slot) - 1))
        mbarrier.arrive(x_empty.index(gl.where(x_slot == 0, X_SLOTS, x_slot) - 1))

        i_n, i_t, i_h, i_w = _place(i_tile, n_n, n_t, n_w, WIDTH, N1 + N2)
        i_h += ROWS * INDEX
        _store(b_sum1, p_bias, y1, y1_tile, (i_t, i_h, i_w, i_n), N1, SUMS1)
        if N2 > 0:
            _store(b_sum2, p_bias, y2, y2_tile, (i_t, i_h, i_w, i_n + N1), N2, SUMS2)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_t", "n_h", "n_w", "shift_h", "shift_w"])
def conv3d_kernel(
    x, w1, w2, p_bias, y1, y2, n_t, n_h, n_w, n_in, n_out, shift_h, shift_w,
    TAPS_T: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, X_SLOTS: gl.constexpr, W_SLOTS: gl.constexpr,
):  # fmt: skip
    """y[t, h, w] = bias + sum of x[t + a, h + b + shift_h, w + c + shift_w] w[a, b, c]^T, over n_t, n_h, n_w places.

    Descriptors: x (T, H, W, I) in boxes of one row, w1 and w2 (taps * O, I), y1 and y2 (T, H, W, O) in boxes of two rows;
    w2 and y2 are None if all columns go through one width.
    """
    WIDTH: gl.constexpr = x.block_type.shape[2]
    DEPTH: gl.constexpr = x.block_type.shape[3]
    N1: gl.constexpr = w1.block_type.shape[0]
    N2: gl.constexpr = 0 if w2 is None else w2.block_type.shape[0]
    BOX_ROWS: gl.constexpr = CONSUMERS * ROWS + TAPS_H - 1
    x_ring = gl.allocate_shared_memory(x.dtype, [X_SLOTS * BOX_ROWS, 1, 1, WIDTH, DEPTH], x.layout)
    w1_ring = gl.allocate_shared_memory(w1.dtype, [W_SLOTS, N1, DEPTH], w1.layout)
    y1_tiles = gl.allocate_shared_memory(y1.dtype, [CONSUMERS, 1, ROWS, WIDTH, N1], y1.layout)
    if N2 > 0:
        w2_ring = gl.allocate_shared_memory(w2.dtype, [W_SLOTS, N2, DEPTH], w2.layout)
        y2_tiles = gl.allocate_shared_memory(y2.dtype, [CONSUMERS, 1, ROWS, WIDTH, N2], y2.layout)
    else:
        w2_ring: gl.constexpr = None
        y2_tiles: gl.constexpr = None
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_SLOTS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(x_empty.index(slot), count=CONSUMERS)
    for slot in gl.static_range(W_SLOTS):
        mbarrier.init(w_full.index(slot), count=1)
        mbarrier.init(w_empty.index(slot), count=CONSUMERS)
    n_columns = gl.cdiv(n_w, WIDTH)
    n_n = gl.cdiv(n_out, N1 + N2)
    n_tiles = n_n * n_t * gl.cdiv(n_h, CONSUMERS * ROWS) * n_columns
    produce = (
        x, w1, w2, x_ring, w1_ring, w2_ring, x_full, x_empty, w_full, w_empty,
        n_tiles, n_n, n_t, n_columns, n_in, n_out, shift_h, shift_w,
    )  # fmt: skip
    consume = (
        x_ring, w1_ring, w2_ring, x_full, x_empty, w_full, w_empty, y1, y2, p_bias, n_tiles, n_n, n_t, n_columns, n_in
    )  # fmt: skip
    if N2 > 0:
        gl.warp_specialize(
            [
                (_consume, (consume, y1_tiles.index(0), y2_tiles.index(0), 0, TAPS_T, TAPS_H, TAPS_W)),
                (_consume, (consume, y1_tiles.index(1), y2_tiles.index(1), 1, TAPS_T, TAPS_H, TAPS_W)),
                (_consume, (consume, y1_tiles.index(2), y2_tiles.index(2), 2, TAPS_T, TAPS_H, TAPS_W)),
                (_produce, (produce, TAPS_T, TAPS_H, TAPS_W)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consume, y1_tiles.index(0), None, 0, TAPS_T, TAPS_H, TAPS_W)),
                (_consume, (consume, y1_tiles.index(1), None, 1, TAPS_T, TAPS_H, TAPS_W)),
                (_consume, (consume, y1_tiles.index(2), None, 2, TAPS_T, TAPS_H, TAPS_W)),
                (_produce, (produce, TAPS_T, TAPS_H, TAPS_W)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )

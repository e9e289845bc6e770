"""A small kernel to test the tools on: c = a b^T over tiles of 64."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(p_a, p_b, p_c, stride_a, length, BLOCK: tl.constexpr):
    i_row, i_k = tl.arange(0, BLOCK), tl.arange(0, 64)
    b_c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, length, 64):
        b_a = tl.load(p_a + i_row[:, None] * stride_a + start + i_k[None, :])
        b_b = tl.load(p_b + i_row[:, None] * stride_a + start + i_k[None, :])
        b_c = tl.dot(b_a, tl.trans(b_b), b_c)
    tl.store(p_c + i_row[:, None] * BLOCK + i_row[None, :], b_c)

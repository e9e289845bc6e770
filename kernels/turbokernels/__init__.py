"""turbokernels: the attention, quantisation and element-wise operators of turbotrain, as a library of its own.

Operands are (B, L, N, D) with a contiguous last dimension. Every op has a reference in plain PyTorch, which is its
specification and runs anywhere, and takes `impl="auto" | "triton" | "reference"`. See README.md in this folder.
"""

from turbokernels.attention_dense.api import attention_jvp
from turbokernels.attention_linear.api import linear_attention, linear_attention_jvp
from turbokernels.attention_sparse.api import sparse_attention, sparse_attention_jvp
from turbokernels.block_selection.api import select_blocks
from turbokernels.blocks import BlockMask

__all__ = [
    "BlockMask",
    "attention_jvp",
    "linear_attention",
    "linear_attention_jvp",
    "select_blocks",
    "sparse_attention",
    "sparse_attention_jvp",
]

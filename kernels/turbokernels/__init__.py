"""turbokernels: the attention, quantisation and element-wise operators of turbotrain, as a library of its own.

Operands are (B, L, N, D) with a contiguous last dimension. Every op has a reference in plain PyTorch, which is its
specification and runs anywhere, and takes `impl="auto" | "triton" | "reference"`. See README.md in this folder.
"""

from turbokernels.attention_dense.api import attention_jvp
from turbokernels.attention_linear.api import (
    add_linear_attention,
    add_linear_attention_jvp,
    linear_attention,
    linear_attention_jvp,
)
from turbokernels.attention_sage.api import sage_attention, sage_sparse_attention
from turbokernels.attention_sla.api import sage_sla
from turbokernels.attention_sparse.api import sparse_attention, sparse_attention_jvp
from turbokernels.block_selection.api import select_blocks
from turbokernels.blocks import BlockMask
from turbokernels.conv3d.api import conv3d
from turbokernels.fused_gate_residual.api import gate_residual, gate_residual_norm, gate_residual_norm_quantize
from turbokernels.fused_norm_modulate.api import layer_norm_modulate, layer_norm_modulate_quantize
from turbokernels.fused_rms_rope.api import rms_norm_rope
from turbokernels.fused_rms_silu.api import rms_norm_silu
from turbokernels.quantize.api import quantize_block, quantize_channel, quantize_token
from turbokernels.w8a8.api import w8a8_linear

__all__ = [
    "BlockMask",
    "add_linear_attention",
    "add_linear_attention_jvp",
    "attention_jvp",
    "conv3d",
    "gate_residual",
    "gate_residual_norm",
    "gate_residual_norm_quantize",
    "layer_norm_modulate",
    "layer_norm_modulate_quantize",
    "linear_attention",
    "linear_attention_jvp",
    "quantize_block",
    "quantize_channel",
    "quantize_token",
    "rms_norm_rope",
    "rms_norm_silu",
    "sage_attention",
    "sage_sla",
    "sage_sparse_attention",
    "select_blocks",
    "sparse_attention",
    "sparse_attention_jvp",
    "w8a8_linear",
]

"""The official umT5 encoder file: module names, official first, then transformers' UMT5EncoderModel; `{n}` is the block number.

Every module has one tensor, its weight. The feed-forward multiplies gelu(gate.0 x) by fc1 x, then applies fc2.
"""

from __future__ import annotations

OFFICIAL_TO_TRANSFORMERS: dict[str, str] = {
    "token_embedding": "shared",
    "blocks.{n}.norm1": "encoder.block.{n}.layer.0.layer_norm",
    "blocks.{n}.attn.q": "encoder.block.{n}.layer.0.SelfAttention.q",
    "blocks.{n}.attn.k": "encoder.block.{n}.layer.0.SelfAttention.k",
    "blocks.{n}.attn.v": "encoder.block.{n}.layer.0.SelfAttention.v",
    "blocks.{n}.attn.o": "encoder.block.{n}.layer.0.SelfAttention.o",
    "blocks.{n}.pos_embedding.embedding": "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias",
    "blocks.{n}.norm2": "encoder.block.{n}.layer.1.layer_norm",
    "blocks.{n}.ffn.gate.0": "encoder.block.{n}.layer.1.DenseReluDense.wi_0",
    "blocks.{n}.ffn.fc1": "encoder.block.{n}.layer.1.DenseReluDense.wi_1",
    "blocks.{n}.ffn.fc2": "encoder.block.{n}.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}

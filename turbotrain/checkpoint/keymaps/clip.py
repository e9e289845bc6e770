"""The visual tower of the official CLIP file: official names first, then transformers' CLIPVisionModel; `{n}` is the layer.

`to_qkv` holds the rows of q, k and v one after the other.
"""

from __future__ import annotations

OFFICIAL_TO_TRANSFORMERS: dict[str, str] = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",
    "visual.transformer.{n}.norm1": "encoder.layers.{n}.layer_norm1",
    "visual.transformer.{n}.attn.to_qkv": "encoder.layers.{n}.self_attn.qkv_proj",
    "visual.transformer.{n}.attn.proj": "encoder.layers.{n}.self_attn.out_proj",
    "visual.transformer.{n}.norm2": "encoder.layers.{n}.layer_norm2",
    "visual.transformer.{n}.mlp.0": "encoder.layers.{n}.mlp.fc1",
    "visual.transformer.{n}.mlp.2": "encoder.layers.{n}.mlp.fc2",
    "visual.post_norm": "post_layernorm",
}
FUSED = "qkv_proj"
FUSED_PARTS = ("q_proj", "k_proj", "v_proj")
# The text tower and both projections, which no video network reads.
IGNORED = ("textual.", "visual.head", "log_scale")

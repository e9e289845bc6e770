"""diffusers' WanTransformer3DModel (formats.md 3): module names, native first; `{n}` is the block number.

Every tensor of a module keeps its own name (weight, bias, scale, ...). Names that end in a parameter are listed whole.
diffusers counts the norms by position, so the official norm3 (before cross-attention) is its norm2.
"""

from __future__ import annotations

NATIVE_TO_DIFFUSERS: dict[str, str] = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.{n}.modulation": "blocks.{n}.scale_shift_table",
    "blocks.{n}.norm3": "blocks.{n}.norm2",
    "blocks.{n}.self_attn.q": "blocks.{n}.attn1.to_q",
    "blocks.{n}.self_attn.k": "blocks.{n}.attn1.to_k",
    "blocks.{n}.self_attn.v": "blocks.{n}.attn1.to_v",
    "blocks.{n}.self_attn.o": "blocks.{n}.attn1.to_out.0",
    "blocks.{n}.self_attn.norm_q": "blocks.{n}.attn1.norm_q",
    "blocks.{n}.self_attn.norm_k": "blocks.{n}.attn1.norm_k",
    "blocks.{n}.self_attn.attn_op.local_attn.proj_l": "blocks.{n}.attn1.attn_impl.proj_l",
    "blocks.{n}.cross_attn.q": "blocks.{n}.attn2.to_q",
    "blocks.{n}.cross_attn.k": "blocks.{n}.attn2.to_k",
    "blocks.{n}.cross_attn.v": "blocks.{n}.attn2.to_v",
    "blocks.{n}.cross_attn.o": "blocks.{n}.attn2.to_out.0",
    "blocks.{n}.cross_attn.norm_q": "blocks.{n}.attn2.norm_q",
    "blocks.{n}.cross_attn.norm_k": "blocks.{n}.attn2.norm_k",
    "blocks.{n}.cross_attn.k_img": "blocks.{n}.attn2.add_k_proj",
    "blocks.{n}.cross_attn.v_img": "blocks.{n}.attn2.add_v_proj",
    "blocks.{n}.cross_attn.norm_k_img": "blocks.{n}.attn2.norm_added_k",
    "blocks.{n}.ffn.0": "blocks.{n}.ffn.net.0.proj",
    "blocks.{n}.ffn.2": "blocks.{n}.ffn.net.2",
}

# Tensors that some exports carry and no network uses.
IGNORED = ("blocks.{n}.attn2.norm_added_q",)

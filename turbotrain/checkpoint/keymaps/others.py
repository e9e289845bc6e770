"""Files that people have beside Wan transformers (formats.md 2, 7), by the names in them: pattern, what it is, what to do."""

from __future__ import annotations

OTHERS: tuple[tuple[str, str, str], ...] = (
    (
        r"(^|\.)lora_(unet_|[AB]\.|up\.|down\.)|_lora\.(up|down)\.|\.(diff|diff_b|diff_m|alpha)$",
        "a LoRA, which adds to a network but is none",
        "merge it into its base network, python tools/merge.py --base NETWORK --lora FILE, then convert the result",
    ),
    (
        r"^vace_(blocks|patch_embedding)\.",
        "a VACE network, whose control branch turbotrain does not build",
        "convert the T2V network that it extends",
    ),
    (
        r"^(img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed)$",
        "a first-last-frame network",
        "use an I2V one",
    ),
    (
        r"^(encoder|decoder|quant_conv|post_quant_conv)\.(conv|down|up|mid|middle|head|weight)",
        "a VAE",
        "name the transformer",
    ),
    (r"^(shared|token_embedding|encoder\.embed_tokens)\.weight$", "a text encoder", "name the transformer"),
    (r"^(visual|textual|vision_model|text_model)\.", "a CLIP encoder", "name the transformer"),
)

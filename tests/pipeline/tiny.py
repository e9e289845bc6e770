"""A whole checkpoint of the shapes variant with random weights: network, VAE, text encoder and tokenizer, as real folders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.data.shapes import vocabulary
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, WanConfig
from turbotrain.model.wan import WanTransformer

COMPONENTS = ("vae", "text_encoder", "tokenizer")
SHAPES = VARIANTS["shapes"]
LATENT = SHAPES.latent_shape(SHAPES.frames, SHAPES.height, SHAPES.width)


def write_components(folder: Path, text_dim: int = 64, channels: int = LATENT[0]) -> dict[str, str]:
    """VAE of stride (4, 8, 8), umT5 encoder and word tokenizer with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
    )
    vae.save_pretrained(folder / "vae")
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *vocabulary()])}
    config = UMT5Config(
        vocab_size=len(words),
        d_model=text_dim,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    return {name: str(folder / name) for name in COMPONENTS}


def random_network(config: WanConfig, attention: AttentionConfig, seed: int = 0) -> WanTransformer:
    """Random weights, also where training starts from zero, so that every part has an effect."""
    torch.manual_seed(seed)
    network = WanTransformer(config, attention)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 / max(1, parameter.shape[-1]) ** 0.5))
    return network


def write_checkpoint(
    folder: Path, attention: str = "sla", variant: str = "shapes", layer_topk: tuple[float, ...] = ()
) -> Path:
    """`folder` as a Turbo checkpoint of the shapes variant."""
    config = VARIANTS[variant].config
    how = AttentionConfig(kind=attention, topk=0.25, block_q=32, block_k=32, layer_topk=layer_topk)
    components = write_components(folder.with_name(f"{folder.name}-components"))
    meta = CheckpointMeta(
        variant=variant,
        config=config.to_dict(),
        attention=how.to_dict(),
        sampler={"sigma_max": 80.0, "times": [1.5, 1.4, 1.0], "ode": False},
        license="Apache-2.0",
    )
    save_checkpoint(folder, random_network(config, how).state_dict(), meta, components_from=components)
    return folder

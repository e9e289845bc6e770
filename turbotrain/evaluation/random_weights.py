"""Parts of a pipeline with random weights at their true sizes, made where they compute: what a clock needs, without a file.

Everything is laid out on the meta device first, so that no weight exists in a precision or place in which it is not used: a
quantised network of 14B parameters takes 14 GB while it is made, one block in floats beside them.

Legend: B videos, C channels, T latent frames, H, W latent height and width, L tokens, D their width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from turbotrain.checkpoint.keymaps.vae import LATENT_STATISTICS
from turbotrain.checkpoint.targets import config_json
from turbotrain.codecs import PromptEncoder, TextEncoder, VideoCodec
from turbotrain.codecs.prompts import encoding_place
from turbotrain.codecs.text import quantize_linears
from turbotrain.conditioning import Conditioning, condition_on_image
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import prepare_for_inference, quantize_block_linears
from turbotrain.model.variants import CLIP_TOKENS, Variant, WanConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline
from turbotrain.placement.budget import Setting

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

# Query and key blocks that SLA's kernels run fastest with.
BLOCKS = (128, 64)
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
WAN_22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": LATENT_STATISTICS[48][0],
    "latents_std": LATENT_STATISTICS[48][1],
}


def random_pipeline(
    variant: Variant,
    attention: AttentionConfig,
    scheme: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    text_device: str = "auto",
    text_dtype: str = "auto",
    setting: Setting | None = None,
) -> TurboPipeline:
    """Text encoder, networks and VAE; arguments as `random_network` and `TurboPipeline.from_checkpoint` take them."""
    text_device = text_device if setting is None else setting.text
    prompts = _random_prompt_encoder(variant.config, device, dtype, text_device, text_dtype)
    codec = VideoCodec(_filled(_vae_on_meta(variant, dtype), device))
    home = torch.device("cpu") if setting is not None and setting.offload != "none" else device
    experts = [random_network(variant.config, attention, scheme, device, dtype, home) for _ in variant.experts]
    return TurboPipeline(experts, codec, prompts, variant, device=device, setting=setting)


@torch.no_grad()
def random_network(
    config: WanConfig,
    attention: AttentionConfig,
    scheme: str | None,
    device: torch.device,
    dtype: torch.dtype,
    home: torch.device | None = None,
) -> WanTransformer:
    """A network ready for inference, made block by block. scheme: of the blocks' linears but P, or None for floats. home: where
    the weights go from the device that makes them."""
    with torch.device("meta"):
        model = WanTransformer(config, attention).set_weight_dtype(dtype).eval().requires_grad_(False)
    for name, part in model.named_children():
        if name != "blocks":
            _filled(part, device, home)
    for block in model.blocks:
        _filled(block, device)
        if scheme is not None:
            quantize_block_linears(block, scheme)
        block.to(home)
    prepare_for_inference(model)
    return model


@torch.no_grad()
def random_diffusers_network(config: WanConfig, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """The network as most people run it: diffusers' class, in the precisions that its `from_pretrained` gives it."""
    from diffusers import WanTransformer3DModel

    said = config_json(config, "diffusers")
    said.pop("text_len", None)  # ours alone
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: Any = WanTransformer3DModel.from_config(said)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in made.named_parameters():
        wide = not set(WanTransformer3DModel._keep_in_fp32_modules or ()).isdisjoint(name.split("."))
        parameter.data = _random(name, parameter.data).to(torch.promote_types(dtype, torch.float32) if wide else dtype)
    return made.eval().requires_grad_(False)


def random_inputs(config: WanConfig, latent_shape: tuple[int, int, int, int], batch_size: int) -> dict[str, Tensor]:
    """Keyword arguments of a call of a network, on the current default device."""
    sizes = latent_shape[1:]
    given = {
        "x_BCTHW": torch.randn(batch_size, config.out_channels, *sizes),
        "timestep": torch.full((batch_size,), 500.0),
        "context_BLD": torch.randn(batch_size, config.text_len, config.text_dim),
    }
    if config.condition_channels:
        given["y_BCTHW"] = torch.randn(batch_size, config.condition_channels, *sizes)
    if config.image_dim is not None:
        given["clip_BLD"] = torch.randn(batch_size, CLIP_TOKENS, config.image_dim)
    return given


def random_image_conditioning(pipe: TurboPipeline, shape: tuple[int, int, int, int]) -> Conditioning:
    """What an image-to-video network sees of a random image, through the VAE; CLIP tokens, where it reads any, are drawn."""
    _, stride_h, stride_w = pipe.codec.stride
    size = (shape[2] * stride_h, shape[3] * stride_w, 3)
    image_HWC = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    config = pipe.variant.config
    without_clip = dataclasses.replace(pipe.variant, config=dataclasses.replace(config, image_dim=None))
    given = condition_on_image(without_clip, pipe.codec, image_HWC, shape, device=pipe.device)
    if config.image_dim is None:
        return given
    return dataclasses.replace(given, clip_BLD=torch.randn(1, CLIP_TOKENS, config.image_dim, device=pipe.device))


def _vae_on_meta(variant: Variant, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKLWan

    channels = variant.config.out_channels
    sizes: dict[str, Any] = {
        "wan2.1": {},  # diffusers' defaults
        "wan2.2": WAN_22_VAE,
        "shapes": {
            "base_dim": 8,
            "z_dim": channels,
            "dim_mult": [1, 1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [0.0] * channels,
            "latents_std": [1.0] * channels,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
        },
    }
    with torch.device("meta"):
        return nn.Module.to(AutoencoderKLWan(**sizes[variant.vae]), dtype=dtype)


def _random_prompt_encoder(
    config: WanConfig, device: torch.device, dtype: torch.dtype, wanted: str, weights: str
) -> PromptEncoder:
    """umT5-XXL, or a small umT5 where the network reads other embeddings, on the device where it will compute if it may stay."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    is_published = config.text_dim == UMT5_XXL["d_model"]
    small = {"vocab_size": 3, "d_model": config.text_dim, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    # Embeddings are padded to one length, so words without a vocabulary cost what others cost.
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    precision = {"auto": torch.bfloat16 if is_published else dtype, "int8": torch.bfloat16}.get(weights)

    def load() -> TextEncoder:
        with torch.device("meta"):
            sizes: dict[str, Any] = UMT5_XXL if is_published else small
            encoder: Any = UMT5EncoderModel(UMT5Config(**sizes))
        nn.Module.to(encoder, dtype=precision or getattr(torch, weights))
        nbytes = sum(parameter.nbytes for parameter in encoder.parameters())
        way, place = encoding_place(wanted, device, nbytes)
        _filled(encoder, place, place if way == "stay" else torch.device("cpu"))
        encoder.set_input_embeddings(encoder.shared)  # one parameter again: filling made two of it
        if weights == "int8":
            quantize_linears(encoder)
        return TextEncoder(encoder, fast, config.text_len)

    prompts = PromptEncoder(load, device, wanted)
    _ = prompts.text_encoder  # made now: a clock must not see it
    return prompts


@torch.no_grad()
def _filled(module: nn.Module, device: torch.device, home: torch.device | None = None) -> Any:
    """A module with random weights, made on a device and kept there or at `home`, in place of those on the meta device."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                made = _random(name, torch.empty_like(parameter, device=device)).to(home)
                setattr(owner, name, nn.Parameter(made, requires_grad=parameter.requires_grad))
    return module


def _random(name: str, parameter: Tensor) -> Tensor:
    """Matrices that keep the size of what they multiply, norms of 1, biases of 0, in place."""
    if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
        return parameter.fill_(1)
    return parameter.zero_() if parameter.ndim == 1 else parameter.normal_(std=parameter[0].numel() ** -0.5)

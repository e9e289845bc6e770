"""The teacher's videos beside diffusers' own pipelines: equal latents for equal weights, noise, steps and guidance.

Each family has its own pipeline there: WanPipeline, WanImageToVideoPipeline with CLIP tokens (2.1) or with two experts (2.2), and
either of them with a timestep for every token (2.2 TI2V-5B). Tiny random networks, every other part shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tiny import random_network, write_components
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from turbotrain import TurboPipeline
from turbotrain.checkpoint.layouts import to_layout
from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.diffusion.samplers import draw_noise, seeded_generators
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant, WanConfig

STEPS = 5
SEEDS = [3, 9]
PROMPTS = ["a small red circle moves left slowly", "a large blue square moves up fast on a white background"]
NEGATIVE = "a green cross"
CHANNELS = 4
SIZE = {"height": 32, "width": 64}  # the sides differ: swapped axes would show
FRAMES = 9
CLIP_WIDTH = 32


def tiny_variant(model_type: str, **fields: Any) -> Variant:
    """One network of the family: its inputs, experts, boundary and guidance, two layers deep."""
    image_dim = fields.pop("image_dim", None)
    config = WanConfig(
        dim=64,
        ffn_dim=96,
        num_heads=2,
        num_layers=2,
        in_channels=CHANNELS + (4 + CHANNELS if model_type == "i2v" else 0),
        out_channels=CHANNELS,
        text_dim=64,
        text_len=512,  # with CLIP tokens, diffusers takes the last 512 of the context for text
        freq_dim=32,
        image_dim=image_dim,
        model_type=model_type,
    )
    return replace(VARIANTS["shapes"], config=config, shift=5.0, **fields)


FAMILIES = {
    "wan2.1 t2v": tiny_variant("t2v"),
    "wan2.2 t2v": tiny_variant("t2v", experts=("high", "low"), boundary=0.875, cfg=(2.0, 4.0)),
    "wan2.1 i2v": tiny_variant("i2v", image_dim=CLIP_WIDTH),
    "wan2.2 i2v": tiny_variant("i2v", experts=("high", "low"), boundary=0.9, cfg=(2.0, 4.0)),
    "wan2.2 5b": tiny_variant("ti2v"),
}
CASES = [
    (family, with_image)
    for family in FAMILIES
    for with_image in (False, True)
    if with_image == ("i2v" in family) or "5b" in family
]


@dataclass(frozen=True)
class Parts:
    codec: VideoCodec
    text: TextEncoder
    clip: str


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    places = write_components(folder, channels=CHANNELS)
    vae: Any = VideoCodec.from_pretrained(places["vae"]).vae
    # Not the identity, so that both have to normalise, and in the same direction.
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 0.9])
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "clip"
    )
    return Parts(
        VideoCodec(vae), TextEncoder.from_pretrained(places["text_encoder"], places["tokenizer"]), str(folder / "clip")
    )


def networks(variant: Variant) -> list[Any]:
    return [random_network(variant.config, AttentionConfig(), seed) for seed in range(len(variant.experts))]


def as_diffusers(network: Any) -> WanTransformer3DModel:
    config: WanConfig = network.config
    theirs = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    )
    theirs.load_state_dict(to_layout(network.state_dict(), "diffusers"), strict=True)
    return theirs.eval()


def diffusers_pipeline(variant: Variant, experts: list[Any], parts: Parts, scheduler: Any, with_image: bool) -> Any:
    given: dict[str, Any] = {
        "tokenizer": parts.text.tokenizer,
        "text_encoder": parts.text.encoder,
        "vae": parts.codec.vae,
        "scheduler": scheduler,
        "transformer": as_diffusers(experts[0]),
        "transformer_2": as_diffusers(experts[1]) if len(experts) == 2 else None,
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.config.model_type == "ti2v",
    }
    if with_image:
        if variant.config.image_dim is not None:
            given["image_encoder"] = CLIPVisionModel.from_pretrained(parts.clip)
            given["image_processor"] = CLIPImageProcessor.from_pretrained(parts.clip)
        pipe = WanImageToVideoPipeline(**given)
    else:
        pipe = WanPipeline(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unipc(shift: float) -> UniPCMultistepScheduler:
    """As Wan's diffusers folders configure it."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


class EulerOnOurGrid(FlowMatchEulerDiscreteScheduler):
    """diffusers' own grid for Euler shifts its last point twice, so the solver is compared on sigmas that are given."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        u = 1 + np.arange(num_inference_steps) * ((0.001 - 1) / num_inference_steps)
        super().set_timesteps(sigmas=u.tolist(), device=device)


def picture(height: int, width: int) -> Image.Image:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BILINEAR)


def their_latents(pipe: Any, cfg: tuple[float, float], image: Image.Image | None) -> torch.Tensor:
    noise_BCTHW = draw_noise(
        (len(SEEDS), CHANNELS, (FRAMES - 1) // 4 + 1, SIZE["height"] // 8, SIZE["width"] // 8),
        seeded_generators(SEEDS, "cpu"),
    )
    low, high = cfg
    two = pipe.config.boundary_ratio is not None
    return pipe(
        **({} if image is None else {"image": image}),
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=high if two else low,
        **({"guidance_scale_2": low} if two else {}),
        latents=noise_BCTHW,
        output_type="latent",
        **SIZE,
    ).frames


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


SOLVERS: dict[str, Callable[[float], Any]] = {
    "unipc": unipc,
    "euler": lambda shift: EulerOnOurGrid(shift=shift),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("family", "with_image"), CASES)
def test_equal_latents(parts: Parts, family: str, with_image: bool, solver: str) -> None:
    variant = FAMILIES[family]
    experts = networks(variant)
    image = picture(2 * SIZE["height"], 2 * SIZE["width"]) if with_image else None
    theirs = diffusers_pipeline(variant, experts, parts, SOLVERS[solver](variant.shift), with_image)
    expected_BCTHW = their_latents(theirs, variant.cfg, image)
    ours = TurboPipeline(experts, parts.codec, parts.text, variant, components={"image_encoder": parts.clip})
    result = ours(
        PROMPTS,
        image=image,
        steps=STEPS,
        seeds=SEEDS,
        frames=FRAMES,
        negative_prompt=NEGATIVE,
        mode="teacher",
        solver=solver,
        grid="diffusers",
        integer_timesteps=solver == "unipc",  # that scheduler truncates them
        **SIZE,
    )
    # Measured: 2e-7 to 8e-7. Padding frames half a grey level off, as 8 bits would have them, give 3e-4.
    assert relative(result.latents, expected_BCTHW) < 1e-5

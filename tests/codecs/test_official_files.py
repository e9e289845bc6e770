"""Official `.pth` files: what they load as computes what the modules that they were written from compute, bit for bit.

Legend: L tokens, M attended tokens, H heads, D width, B images.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from codec_folders import TEXT_LEN
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from official_files import (
    UMT5_XXL,
    VIT_H,
    WAN_21,
    WAN_22,
    official_clip,
    official_umt5,
    official_vae,
    tiny_clip,
    tiny_umt5,
    tiny_vae,
    write,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from turbokernels.testing import assert_within_budget

from turbotrain.checkpoint import CheckpointProblem
from turbotrain.checkpoint.keymaps.vae import LATENT_STATISTICS
from turbotrain.codecs import TextEncoder, VideoCodec, official
from turbotrain.codecs.image import clip_tokens, official_pixels
from turbotrain.codecs.official_vae import diffusers_names
from turbotrain.stages.codec import tiny_text_encoder

PROMPT = "a small red circle moves left slowly"


@pytest.fixture(scope="module")
def umt5() -> UMT5EncoderModel:
    return tiny_umt5(len(tiny_text_encoder(TEXT_LEN).tokenizer))


@pytest.fixture(scope="module")
def umt5_file(umt5: UMT5EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(official_umt5(umt5), tmp_path_factory.mktemp("t5") / "models_t5_umt5-xxl-enc-bf16.pth")


# ---- equal to the modules that they come from -----------------------------------------------------------------------------


def test_the_text_encoder_of_a_file_is_the_one_that_was_written(
    umt5: UMT5EncoderModel, umt5_file: Path, text_folders: tuple[Path, Path]
) -> None:
    text = TextEncoder.from_pretrained(umt5_file, text_folders[1], text_len=TEXT_LEN)
    expected = TextEncoder(umt5, text.tokenizer, TEXT_LEN)
    prompts = [PROMPT, "", "a large blue cross"]
    assert torch.equal(text.encode(prompts), expected.encode(prompts))
    parameters = dict(text.encoder.named_parameters(remove_duplicate=False))
    assert parameters["shared.weight"] is parameters["encoder.embed_tokens.weight"]
    assert not any(tensor.is_meta for tensor in [*text.encoder.parameters(), *text.encoder.buffers()])


def test_a_file_keeps_its_dtype_unless_one_is_asked_for(umt5: UMT5EncoderModel, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in official_umt5(umt5).items()}
    file = write(half, tmp_path / "t5.pth")
    assert {tensor.dtype for tensor in official.load_umt5(file).parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in official.load_umt5(file, torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_the_vae_of_a_file_is_the_one_that_was_written(version: str, tmp_path: Path) -> None:
    vae = tiny_vae(version)
    codec = VideoCodec.from_pretrained(write(official_vae(vae), tmp_path / f"Wan{version}_VAE.pth"))
    channels = {"2.1": 16, "2.2": 48}[version]
    mean, std = LATENT_STATISTICS[channels]
    assert codec.latent_channels == channels
    assert codec.stride == {"2.1": (4, 8, 8), "2.2": (4, 16, 16)}[version]
    assert (list(codec.vae.config.latents_mean), list(codec.vae.config.latents_std)) == (list(mean), list(std))
    vae.register_to_config(latents_mean=list(mean), latents_std=list(std))
    expected = VideoCodec(vae)
    frames_BTHWC = torch.randint(0, 256, (1, 5, 32, 32, 3), dtype=torch.uint8)
    latents_BCTHW = codec.encode(frames_BTHWC)
    assert torch.isfinite(latents_BCTHW).all()
    assert torch.equal(latents_BCTHW, expected.encode(frames_BTHWC))
    assert torch.equal(codec.decode(latents_BCTHW), expected.decode(latents_BCTHW))


def test_the_image_encoder_of_a_file_is_the_one_that_was_written(tmp_path: Path) -> None:
    tower = tiny_clip()
    file = write(official_clip(tower), tmp_path / "models_clip.pth")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    pixels_BCHW = official_pixels(picture, 42)
    assert pixels_BCHW.shape == (1, 3, 42, 42)
    with torch.no_grad():
        expected = tower(pixels_BCHW, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(clip_tokens(str(file), picture, "cpu"), expected)
    assert expected.shape == (1, 10, 160)


# ---- equal to the official arithmetic, from the names in the file -----------------------------------------------------------


def bucket(distance_LM: Tensor, buckets: int = 32, furthest: int = 128) -> Tensor:
    """T5's buckets: exact up to a quarter of them each way, logarithmic beyond."""
    half, exact = buckets // 2, buckets // 4
    size = distance_LM.abs()
    far = exact + (torch.log(size.clamp(min=1) / exact) / math.log(furthest / exact) * (half - exact)).long()
    return half * (distance_LM > 0) + torch.where(size < exact, size, far.clamp(max=half - 1))


def umt5_by_hand(state: dict[str, Tensor], ids_L: Tensor) -> Tensor:
    def norm(x_LD: Tensor, name: str) -> Tensor:
        return x_LD * torch.rsqrt(x_LD.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T

    x_LD = state["token_embedding.weight"][ids_L]
    places = torch.arange(len(ids_L))
    for number in range(3):
        here = f"blocks.{number}"
        table = state[f"{here}.pos_embedding.embedding.weight"]
        h_LD = norm(x_LD, f"{here}.norm1")
        q, k, v = (linear(h_LD, f"{here}.attn.{letter}").unflatten(-1, (table.shape[1], -1)) for letter in "qkv")
        bias_LMH = table[bucket(places[None, :] - places[:, None])]
        weights_LMH = (torch.einsum("lhd,mhd->lmh", q, k) + bias_LMH).softmax(1)
        x_LD = x_LD + linear(torch.einsum("lmh,mhd->lhd", weights_LMH, v).flatten(1), f"{here}.attn.o")
        h_LD = norm(x_LD, f"{here}.norm2")
        gate = F.gelu(linear(h_LD, f"{here}.ffn.gate.0"), approximate="tanh")
        x_LD = x_LD + linear(linear(h_LD, f"{here}.ffn.fc1") * gate, f"{here}.ffn.fc2")
    return norm(x_LD, "norm")


def test_umt5_computes_what_the_names_mean(umt5_file: Path, text_folders: tuple[Path, Path]) -> None:
    text = TextEncoder.from_pretrained(umt5_file, text_folders[1], text_len=200)
    long = " and ".join([PROMPT] * 20)  # past the exact buckets
    ids_L = text.tokenizer([long], return_tensors="pt")["input_ids"][0]
    state = torch.load(umt5_file, weights_only=True)
    exact_LD = umt5_by_hand({name: tensor.double() for name, tensor in state.items()}, ids_L)
    assert_within_budget(text.encode([long])[0, : len(ids_L)], umt5_by_hand(state, ids_L), exact_LD)


def clip_by_hand(state: dict[str, Tensor], pixels_BCHW: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    patches = F.conv2d(pixels_BCHW, state["visual.patch_embedding.weight"], stride=14)
    x_BLD = torch.cat([state["visual.cls_embedding"], patches.flatten(2).mT], dim=1) + state["visual.pos_embedding"]
    x_BLD = norm(x_BLD, "visual.pre_norm")
    for number in range(2):  # of three: the last one is left out
        here = f"visual.transformer.{number}"
        q, k, v = (
            part.unflatten(-1, (2, 80)).transpose(1, 2)
            for part in linear(norm(x_BLD, f"{here}.norm1"), f"{here}.attn.to_qkv").chunk(3, -1)
        )
        mixed_BLD = ((q @ k.mT / 80**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BLD = x_BLD + linear(mixed_BLD, f"{here}.attn.proj")
        x_BLD = x_BLD + linear(F.gelu(linear(norm(x_BLD, f"{here}.norm2"), f"{here}.mlp.0")), f"{here}.mlp.2")
    return x_BLD


@torch.no_grad()
def test_clip_computes_what_the_names_mean(tmp_path: Path) -> None:
    state = official_clip(tiny_clip())
    file = write(state, tmp_path / "clip.pth")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=np.uint8))
    pixels_BCHW = official_pixels(picture, 42)
    exact_BLD = clip_by_hand({name: tensor.double() for name, tensor in state.items()}, pixels_BCHW.double())
    assert_within_budget(clip_tokens(str(file), picture, "cpu"), clip_by_hand(state, pixels_BCHW), exact_BLD)


def test_latent_statistics_are_the_published_ones() -> None:
    with torch.device("meta"):
        config = AutoencoderKLWan().config
    mean, std = LATENT_STATISTICS[16]
    assert (list(mean), list(std)) == (list(config.latents_mean), list(config.latents_std))
    mean, std = LATENT_STATISTICS[48]
    assert (len(mean), len(std)) == (48, 48)
    assert (mean[0], mean[-1], std[0], std[-1]) == (-0.2289, -0.0667, 0.4765, 0.7744)  # formats.md, section 8
    assert all(value > 0 for value in std)


# ---- full size, without memory ----------------------------------------------------------------------------------------------


def full_umt5() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    return model, official_umt5(model)


def full_clip() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = CLIPVisionModel(CLIPVisionConfig(**VIT_H, image_size=224, patch_size=14, hidden_act="gelu"))
    return model, official_clip(model)


def full_vae(config: dict) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    mean, std = LATENT_STATISTICS[config.get("z_dim", 16)]
    model = AutoencoderKLWan(**config, latents_mean=list(mean), latents_std=list(std))
    return model, official_vae(model)


FULL = {
    "umT5-XXL": (full_umt5, official.load_umt5, 242),
    "ViT-H": (full_clip, official.load_clip, 391 + 4),
    "Wan2.1 VAE": (lambda: full_vae(WAN_21), official.load_vae, 194),
    "Wan2.2 VAE": (lambda: full_vae(WAN_22), official.load_vae, 196),
}


def plain_config(model: torch.nn.Module) -> dict:
    """What the configuration says, without how it was said."""
    config: Any = model.config
    values = config if isinstance(config, dict) else config.to_dict()
    said = {key: value for key, value in values.items() if not key.startswith("_")}
    if "decoder_base_dim" in said:
        said["decoder_base_dim"] = said["decoder_base_dim"] or said["base_dim"]
    return said


@pytest.mark.parametrize("name", FULL)
def test_full_size_every_name_has_its_place_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, load, count = FULL[name]
    with torch.device("meta"):
        model, state = make()
    monkeypatch.setattr(official, "read_tensors", lambda path, mmap: dict(state))
    loaded = load("file")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in loaded.state_dict().items()} == shapes
    assert plain_config(loaded) == plain_config(model)
    # Every tensor that a network reads is used once, and every place is filled.
    assert len(state) == count


def test_the_names_of_the_21_vae_agree_with_diffusers_own_converter() -> None:
    with torch.device("meta"):
        _, state = full_vae(WAN_21)
    ours = {theirs: id(state[name]) for name, theirs in diffusers_names(state).items()}
    assert ours == {name: id(tensor) for name, tensor in convert_wan_vae_to_diffusers(dict(state)).items()}


# ---- what is refused --------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch exploded",))


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


LAST_K = "encoder.block.2.layer.0.SelfAttention.k.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("blocks.2.attn.k.weight"), f"does not fit UMT5EncoderModel: 1 missing: {LAST_K}$"),
        (lambda state: state | {"blocks.1.extra.weight": torch.zeros(2)}, "1 unexpected: blocks.1.extra.weight$"),
        (
            lambda state: state | {"blocks.2.attn.k.weight": torch.zeros(3, 64)},
            rf"1 of the wrong shape: {LAST_K} \(3, 64\) instead of \(64, 64\)$",
        ),
        (
            lambda state: state | {"shared.weight": torch.zeros(2, 64)},
            "token_embedding.weight and shared.weight both mean",
        ),
        (drop("token_embedding.weight"), "not a umT5 encoder .*, it has no tensor token_embedding.weight"),
        (
            lambda state: {"nothing": torch.zeros(1)},
            r"has no tensor token_embedding.weight \(its tensors begin: nothing\)",
        ),
    ],
    ids=["missing", "unexpected", "shape", "twice", "no embedding", "something else"],
)
def test_text_encoders_that_do_not_fit_say_what_is_wrong(
    umt5: UMT5EncoderModel, tmp_path: Path, change: Callable, reason: str
) -> None:
    file = write(change(official_umt5(umt5)), tmp_path / "t5.pth")
    with pytest.raises(CheckpointProblem, match=reason) as raised:
        official.load_umt5(file)
    assert str(raised.value).startswith(f"text_encoder={str(file)!r}: ")


def test_a_file_of_another_component_is_refused(umt5_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match=r"vae=.*not a Wan VAE .*its tensors begin: token_embedding.weight"):
        VideoCodec.from_pretrained(umt5_file)
    with pytest.raises(CheckpointProblem, match=r"image_encoder=.*not a CLIP image encoder"):
        clip_tokens(str(umt5_file), Image.new("RGB", (8, 8)), "cpu")
    vae = write(official_vae(tiny_vae("2.1", 4)), tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointProblem, match=r"text_encoder=.*not a umT5 encoder .*its tensors begin: conv1.weight"):
        official.load_umt5(vae)


def test_a_vae_whose_statistics_nobody_published_is_refused(tmp_path: Path) -> None:
    vae = AutoencoderKLWan(base_dim=4, z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    with pytest.raises(
        CheckpointProblem, match=r"8 latent channels, whose mean .* known are those of 16, 48: use a diff"
    ):
        official.load_vae(write(official_vae(vae), tmp_path / "vae.pth"))


@pytest.mark.parametrize("lost", ["decoder.upsamples.14.residual.6.bias", "encoder.downsamples.2.resample.1.weight"])
def test_a_vae_with_a_tensor_missing_is_refused(lost: str, tmp_path: Path) -> None:
    state = official_vae(tiny_vae("2.1", 4))
    assert lost in state
    with pytest.raises(CheckpointProblem, match=r"does not fit AutoencoderKLWan: 1 missing: (de|en)coder"):
        official.load_vae(write(drop(lost)(state), tmp_path / "vae.pth"))


@pytest.mark.parametrize("load", [official.load_umt5, official.load_vae, official.load_clip])
def test_damaged_and_hostile_files_are_refused(load: Callable, umt5_file: Path, tmp_path: Path) -> None:
    cut, bomb, empty = tmp_path / "cut.pth", tmp_path / "bomb.pth", tmp_path / "empty.pth"
    cut.write_bytes(umt5_file.read_bytes()[:5_000])
    bomb.write_bytes(pickle.dumps({"token_embedding.weight": Bomb()}, protocol=2))
    empty.write_bytes(b"")
    for file, reason in (
        (cut, "truncated"),
        (bomb, "refused, because loading this pickle would run"),
        (empty, "truncated"),
    ):
        with pytest.raises(CheckpointProblem, match=reason):
            load(file)
    assert not Path("exploded").exists()
    with pytest.raises(CheckpointProblem, match=r"does not exist"):
        load(tmp_path / "gone.pth")

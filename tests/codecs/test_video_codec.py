"""VideoCodec: what diffusers' VAE computes, normalised; what does not fit is refused instead of cropped.

Legend: B batch, T frames, H, W pixels, C channels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from codec_folders import CHANNELS, MEAN, STD
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.vae import frames_to_pixels, pixels_to_frames

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def codec(vae_folder: Path) -> VideoCodec:
    return VideoCodec.from_pretrained(vae_folder)


def noise_frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_stride_and_channels_come_from_the_configuration(codec: VideoCodec) -> None:
    spatial = 4 * (codec.vae.config.patch_size or 1)
    assert codec.stride == (4, spatial, spatial)
    assert codec.latent_channels == CHANNELS
    assert codec.device == torch.device("cpu")
    assert codec.latent_shape(13, 64, 32) == (CHANNELS, 4, 64 // spatial, 32 // spatial)
    assert codec.latent_shape(1, spatial, spatial) == (CHANNELS, 1, 1, 1)


def test_shapes_and_types_there_and_back(codec: VideoCodec) -> None:
    for frames, height, width in ((13, 32, 16), (1, 16, 24), (5, 16, 16)):
        latents_BCTHW = codec.encode(noise_frames(2, frames, height, width, 3))
        assert latents_BCTHW.shape == (2, *codec.latent_shape(frames, height, width))
        assert latents_BCTHW.dtype == torch.float32
        again_BTHWC = codec.decode(latents_BCTHW)
        assert again_BTHWC.shape == (2, frames, height, width, 3)
        assert again_BTHWC.dtype == torch.uint8


def test_latents_are_the_mode_normalised_by_the_configurations_statistics(codec: VideoCodec, vae_folder: Path) -> None:
    frames_BTHWC = noise_frames(1, 5, 16, 16, 3)
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    pixels_BCTHW = frames_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mode_BCTHW = vae.encode(pixels_BCTHW).latent_dist.mode()
        expected_BCTHW = vae.decode(mode_BCTHW).sample
    latents_BCTHW = codec.encode(frames_BTHWC)
    assert torch.allclose(latents_BCTHW, (mode_BCTHW - mean) / std, atol=1e-6)
    expected_BTHWC = ((expected_BCTHW.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 4, 1)
    # Normalising and back rounds: a value at the middle between two levels may go either way.
    difference_BTHWC = codec.decode(latents_BCTHW).float() - expected_BTHWC
    assert difference_BTHWC.abs().max() <= 1
    assert (difference_BTHWC != 0).float().mean() < 1e-3


def test_the_same_clip_gives_the_same_numbers_whatever_came_before(codec: VideoCodec) -> None:
    """The VAE keeps a cache of features between chunks of frames: it must not outlive a call."""
    frames_BTHWC = noise_frames(1, 13, 16, 16, 3)
    first_BCTHW = codec.encode(frames_BTHWC)
    video_BTHWC = codec.decode(first_BCTHW)
    codec.decode(codec.encode(noise_frames(2, 5, 16, 24, 3, seed=1)))
    assert torch.equal(codec.encode(frames_BTHWC), first_BCTHW)
    assert torch.equal(codec.decode(first_BCTHW), video_BTHWC)


def test_clips_of_a_batch_do_not_see_each_other(codec: VideoCodec) -> None:
    frames_BTHWC = noise_frames(3, 5, 16, 16, 3)
    together = codec.encode(frames_BTHWC)
    for index in range(3):
        assert torch.allclose(codec.encode(frames_BTHWC[index : index + 1])[0], together[index], atol=1e-5)


def test_the_first_frame_is_coded_alone(codec: VideoCodec) -> None:
    """Causal in time: later frames change nothing before them."""
    frames_BTHWC = noise_frames(1, 13, 16, 16, 3)
    whole, first = codec.encode(frames_BTHWC), codec.encode(frames_BTHWC[:, :1])
    assert torch.allclose(whole[:, :, :1], first, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 14, 16, 16, 3), r"frames=14: this VAE takes 4 n \+ 1 frames"),
        ((1, 0, 16, 16, 3), "frames=0: "),
        ((1, 5, 17, 16, 3), "height=17: this VAE takes multiples of [48]"),
        ((1, 5, 16, 18, 3), "width=18: this VAE takes multiples of [48]"),
        ((1, 5, 2, 16, 3), "height=2: "),
        ((1, 5, 16, 16, 4), r"frames are \(1, 5, 16, 16, 4\) torch.uint8: expected uint8 \(B, T, H, W, 3\)"),
        ((5, 16, 16, 3), r"frames are \(5, 16, 16, 3\)"),
        ((1, 3, 5, 16, 16), r"frames are \(1, 3, 5, 16, 16\)"),
    ],
)
def test_clips_that_do_not_fit_are_refused(codec: VideoCodec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape, dtype=torch.uint8))


def test_floats_and_other_latents_are_refused(codec: VideoCodec) -> None:
    with pytest.raises(ValueError, match=r"torch.float32: expected uint8"):
        codec.encode(torch.zeros(1, 5, 16, 16, 3))
    for shape in ((1, CHANNELS + 1, 2, 4, 4), (CHANNELS, 2, 4, 4)):
        with pytest.raises(ValueError, match=rf"expected \(B, {CHANNELS}, T, H, W\)"):
            codec.decode(torch.zeros(shape))


def test_all_levels_survive_the_way_to_pixels_and_back() -> None:
    frames_BTHWC = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    pixels_BCTHW = frames_to_pixels(frames_BTHWC, torch.float32)
    assert pixels_BCTHW.shape == (1, 3, 2, 16, 16)
    assert (pixels_BCTHW.min(), pixels_BCTHW.max()) == (-1, 1)
    pixels_BTHWC = pixels_BCTHW.movedim(1, -1)
    assert torch.equal(pixels_to_frames(pixels_BTHWC), frames_BTHWC)
    assert torch.equal(pixels_to_frames(pixels_BTHWC * 3)[0, 0, 0, 0], torch.zeros(3, dtype=torch.uint8))  # clamped


def test_half_precision_weights_are_used_as_such(vae_folder: Path) -> None:
    frames_BTHWC = noise_frames(1, 5, 16, 16, 3)
    half, full = (VideoCodec.from_pretrained(vae_folder, dtype=dtype) for dtype in (torch.bfloat16, None))
    latents_BCTHW, exact_BCTHW = half.encode(frames_BTHWC), full.encode(frames_BTHWC)
    assert half.vae.dtype == torch.bfloat16
    assert latents_BCTHW.dtype == torch.float32
    assert 0 < (latents_BCTHW - exact_BCTHW).norm() / exact_BCTHW.norm() < 0.05


def break_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5_000])


def drop_weight(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["decoder.conv_out.weight"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def widen_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_dim": 16}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "no readable"),
        (break_weights, "Unable to load weights"),
        (drop_weight, "1 weights are missing, the first is decoder.conv_out.weight"),
        (widen_configuration, "expected shape|shape"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no file named"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    ],
    ids=["gone", "truncated", "incomplete", "other sizes", "no weights", "bad config"],
)
def test_unreadable_folders_say_so_and_what_to_do(vae_folder: Path, tmp_path: Path, damage, reason: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(vae_folder, broken)
    damage(broken)
    with pytest.raises(ValueError, match=reason) as raised:
        VideoCodec.from_pretrained(broken)
    assert str(raised.value).startswith(f"vae={str(broken)!r}: no readable AutoencoderKLWan folder (")
    assert "say vae=FOLDER" in str(raised.value)

"""The VAE's kernels on a GPU, and the whole VAE with them against diffusers' own."""

from __future__ import annotations

import copy

import cases_video as cases
import pytest
import torch
import turbokernels as tk
from diffusers import AutoencoderKLWan
from turbokernels.conv3d import kernel
from turbokernels.conv3d.api import has_kernel
from turbokernels.testing import assert_within_budget

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.wan_forward import decode_chunks, encode_chunks

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONVOLUTIONS = [
    ((3, 3, 3), (-1, -1), 96, 96),
    ((3, 3, 3), (-1, -1), 192, 384),
    ((3, 3, 3), (-1, -1), 3, 96),
    ((3, 3, 3), (-1, -1), 96, 3),
    ((3, 3, 3), (-1, -1), 160, 320),
    ((3, 3, 3), (-1, -1), 256, 256),
    ((3, 3, 3), (-1, -1), 48, 1024),
    ((3, 1, 1), (0, 0), 384, 384),
    ((1, 2, 2), (-1, 0), 384, 192),
    ((1, 2, 2), (0, -1), 192, 96),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (1, 4, 33, 70, 96), (1, 2, 30, 52, 384), (1, 2, 9, 9, 1024)])
def test_rms_norm_silu(shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype) -> None:
    cases.check_rms_norm_silu(shape, dtype, with_residual, "cuda")


def test_non_finite() -> None:
    cases.check_non_finite("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("taps", "shift", "n_in", "n_out"), CONVOLUTIONS)
def test_conv3d(
    taps: tuple[int, int, int],
    shift: tuple[int, int],
    n_in: int,
    n_out: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged in every axis, two clips, into every other pixel of a larger image; every launch, and always the same bits."""
    if not has_kernel(torch.empty(0, dtype=dtype, device="cuda")):
        pytest.skip("the convolution's kernel needs compute capability 9.0 and Triton 3.6 or 3.7")
    x = torch.randn(2, taps[0] + 2, 13, 67, n_in).to(dtype)
    weight, bias = (torch.randn(*taps, n_out, n_in) / (n_in * 9) ** 0.5).to(dtype), torch.randn(n_out).to(dtype)
    shape = (2, 3, 13, 67, n_out)
    exact = tk.conv3d(*(t.double() for t in (x, weight, bias)), torch.empty(shape, dtype=torch.float64), shift)
    plain = exact.to(dtype)
    operands = [tensor.cuda() for tensor in (x, weight, bias)]
    launches = kernel.launches(taps[1], n_in + -n_in % 16, n_out + -n_out % 16)
    for launch in launches if dtype == torch.bfloat16 else launches[:1]:
        monkeypatch.setattr(kernel, "best", lambda *_, launch=launch: launch)
        results = []
        for _ in range(3):
            image = torch.full((2, 3, 13, 2, 67, 2, n_out), float("nan"), dtype=dtype, device="cuda")
            results.append(tk.conv3d(*operands, image[:, :, :, 1, :, 0], shift, impl="triton").cpu())
            assert image[:, :, :, 0].isnan().all()
        assert_within_budget(results[0], plain, exact, str(launch))
        assert torch.equal(results[1], results[0])
        assert torch.equal(results[2], results[0])


def vae(version: str) -> AutoencoderKLWan:
    """Few channels, of which the kernels have tiles; random weights."""
    torch.manual_seed(0)
    more = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 64}
    return AutoencoderKLWan(base_dim=32, **(more if version == "2.2" else {})).eval().requires_grad_(False).cuda()


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_half_precision_is_no_worse_than_diffusers(version: str) -> None:
    half = vae(version).bfloat16()
    wide = copy.deepcopy(half).double()
    latents_BCTHW = torch.randn(1, 16, 5, 6, 10, device="cuda").bfloat16()
    exact, plain = wide.decode(latents_BCTHW.double()).sample, half.decode(latents_BCTHW).sample
    side = 8 * (half.config.patch_size or 1)
    frames_BTHWC = torch.randint(0, 256, (1, 9, 5 * side, 7 * side, 3), dtype=torch.uint8, device="cuda")
    pixels_BCTHW = (frames_BTHWC.float() / 127.5 - 1).bfloat16().movedim(-1, 1)
    exact_moments = wide.encode(pixels_BCTHW.double()).latent_dist.parameters
    plain_moments = half.encode(pixels_BCTHW).latent_dist.parameters
    for chunk in (1, 2, 5):
        pixels = torch.cat(list(decode_chunks(half, latents_BCTHW, chunk)), 1).movedim(-1, 1).clamp(-1, 1)
        assert_within_budget(pixels, plain, exact)
        moments = torch.cat(list(encode_chunks(half, frames_BTHWC, chunk)), 1).movedim(-1, 1)
        assert_within_budget(moments, plain_moments, exact_moments)


def test_streamed_frames_are_the_decoded_ones() -> None:
    """What is yielded has arrived: it is read at once, while the GPU is at work on the next."""
    codec = VideoCodec(vae("2.1").bfloat16())
    codec.chunk = 1
    latents_BCTHW = torch.randn(2, 16, 6, 12, 20)
    pieces = [(clips, frames.numpy().copy()) for clips, frames in codec.decode_stream(latents_BCTHW)]
    whole = codec.decode(latents_BCTHW)
    for clip in range(2):
        frames = [torch.from_numpy(found[clips.index(clip)]) for clips, found in pieces if clip in clips]
        assert len(frames) == 6
        assert torch.equal(torch.cat(frames), whole[clip])

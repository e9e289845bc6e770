"""Videos to latents and back through diffusers' `AutoencoderKLWan`, any of its sizes: the shapes world's, Wan 2.1's, Wan 2.2's.

Latents are what the networks see: the mode of the posterior, normalised by the `latents_mean` and `latents_std` of the VAE's own
configuration (formats.md, section 8).

Legend: B batch, T frames, H, W pixels, C channels (frames: 3, latents: z_dim); latents are (B, C, T', H', W').
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from turbotrain.codecs.folders import reading, require_complete
from turbotrain.codecs.official import is_official_file, load_vae

if TYPE_CHECKING:  # importing diffusers takes seconds, which a command that fails on bad input should not pay
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class VideoCodec:
    """A VAE with its normalisation. `stride`: pixels per latent cell (t, h, w)."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config: Any = vae.config  # diffusers' frozen dictionary, whose entries are also attributes
        spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        self.stride = (2 ** sum(config.temperal_downsample), spatial, spatial)
        self.latent_channels: int = config.z_dim
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=vae.device).view(shape)
        self._std = torch.tensor(config.latents_std, dtype=torch.float32, device=vae.device).view(shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> VideoCodec:
        """Load a diffusers VAE folder (or hub id), or an official `.pth`.

        Raises:
            ValueError: no `AutoencoderKLWan`, a pickle that would run code, or weights are missing.
        """
        from diffusers import AutoencoderKLWan

        if is_official_file(path):
            vae = load_vae(path, dtype or torch.float32)
        else:
            with reading("vae", path, "AutoencoderKLWan"):
                loaded: Any = AutoencoderKLWan.from_pretrained(
                    str(path), torch_dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True
                )
                # Annotated for the call without info.
                vae, info = cast("tuple[AutoencoderKLWan, dict[str, Any]]", loaded)
                require_complete(info)
        nn.Module.to(vae, device)  # diffusers' decorator hides the signature of its own `to`
        return cls(vae)

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T', H', W') of a clip. The VAE itself crops silently what does not fit, so it is refused here.

        Raises:
            ValueError: frames is not stride n + 1, or a size does not divide.
        """
        stride_t, stride_h, stride_w = self.stride
        if frames < 1 or (frames - 1) % stride_t:
            raise ValueError(f"frames={frames}: this VAE takes {stride_t} n + 1 frames")
        for name, value, stride in (("height", height, stride_h), ("width", width, stride_w)):
            if value < stride or value % stride:
                raise ValueError(f"{name}={value}: this VAE takes multiples of {stride}")
        return (self.latent_channels, 1 + (frames - 1) // stride_t, height // stride_h, width // stride_w)

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 frames (B, T, H, W, 3) to normalised latents (B, C, T', H', W') float32."""
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3 or frames_BTHWC.dtype != torch.uint8:
            given = f"{tuple(frames_BTHWC.shape)} {frames_BTHWC.dtype}"
            raise ValueError(f"frames are {given}: expected uint8 (B, T, H, W, 3)")
        return self.encode_pixels(frames_to_pixels(frames_BTHWC.to(self.device), self.vae.dtype))

    @torch.no_grad()
    def encode_pixels(self, pixels_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, T', H', W') float32."""
        self.latent_shape(*pixels_BCTHW.shape[2:])
        pixels_BCTHW = pixels_BCTHW.to(self.device, self.vae.dtype)
        return (posterior(self.vae, pixels_BCTHW).mode().float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Normalised latents to uint8 frames (B, T, H, W, 3)."""
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[1] != self.latent_channels:
            raise ValueError(f"latents are {tuple(latents_BCTHW.shape)}: expected (B, {self.latent_channels}, T, H, W)")
        latents = latents_BCTHW.to(self.device).float() * self._std + self._mean
        return pixels_to_frames(reconstruct(self.vae, latents.to(self.vae.dtype)))


def posterior(vae: AutoencoderKLWan, pixels_BCTHW: Tensor) -> DiagonalGaussianDistribution:
    """What the VAE makes of pixels in [-1, 1]: a Gaussian over latents (B, C, T', H', W') that are not normalised yet."""
    return vae.encode(pixels_BCTHW, return_dict=False)[0]


def reconstruct(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W), about [-1, 1], of latents that are not normalised."""
    return cast(tuple[Tensor], vae.decode(latents_BCTHW, return_dict=False))[0]  # the annotation forgets this tuple


def frames_to_pixels(frames_BTHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, T, H, W, 3) to (B, 3, T, H, W) in [-1, 1]."""
    return (frames_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(dtype)


def pixels_to_frames(pixels_BCTHW: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] to uint8 (B, T, H, W, 3)."""
    scaled = (pixels_BCTHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()

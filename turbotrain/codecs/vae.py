"""Videos to latents and back with diffusers' `AutoencoderKLWan`, any of its sizes: the shapes world's, Wan 2.1's, Wan 2.2's.

diffusers brings the weights and trains them; inference takes the same steps in an order of its own (`wan_forward`). Latents are
what the networks see: the mode of the posterior, normalised by the `latents_mean` and `latents_std` of the VAE's own
configuration (formats.md, section 8).

Legend: B batch, T frames, H, W pixels, C channels (frames: 3, latents: z_dim); latents are (B, C, T', H', W').
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from turbotrain.codecs.folders import reading, require_complete
from turbotrain.codecs.official import is_official_file, load_vae

if TYPE_CHECKING:  # importing diffusers takes seconds, which a command that fails on bad input should not pay
    from diffusers import AutoencoderKLWan

# Pixels of all frames that go through together where `chunk` does not say. On an H200 two latent frames of 832x480, one of
# 1280x720: longer chunks gain 4% at most, and keep whoever waits for frames waiting. On a CPU what its caches like.
CHUNK_PIXELS = {"cuda": 2**22}
CHUNK_PIXELS_DEFAULT = 2**20


class VideoCodec:
    """A VAE with its normalisation.

    Attributes:
        stride: pixels per latent cell (t, h, w).
        chunk: latent frames that are computed at once; None: as `CHUNK_PIXELS` allows. The result is the same; fewer need less
            memory.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.chunk: int | None = None
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
        return self._encode(frames_BTHWC)

    @torch.no_grad()
    def encode_pixels(self, pixels_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, T', H', W') float32."""
        return self._encode(pixels_BCTHW.movedim(1, -1))

    def _encode(self, frames_BTHWC: Tensor) -> Tensor:
        _, *cells = self.latent_shape(*frames_BTHWC.shape[1:4])
        rows, chunk = self._portions(*cells)
        modes = [self._encode_clips(part_BTHWC, chunk) for part_BTHWC in frames_BTHWC.split(rows)]
        return (torch.cat(modes).movedim(-1, 1) - self._mean) / self._std

    def _encode_clips(self, frames_BTHWC: Tensor, chunk: int) -> Tensor:
        """The posterior's mode (B, T', H', W', C) float32."""
        from turbotrain.codecs.wan_forward import encode_chunks

        moments_BTHWC = torch.cat(list(encode_chunks(self.vae, frames_BTHWC, chunk)), 1)
        return moments_BTHWC[..., : self.latent_channels].float()

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Normalised latents to uint8 frames (B, T, H, W, 3), on the CPU."""
        out_BTHWC = self.host_frames(latents_BCTHW)
        for _ in self.decode_stream(latents_BCTHW, out_BTHWC):
            pass
        return out_BTHWC

    @torch.no_grad()
    def decode_here(self, latents_BCTHW: Tensor) -> Tensor:
        """The same frames on the codec's own device, for who reads them there."""
        out_BTHWC = torch.empty(self._frames_shape(latents_BCTHW), dtype=torch.uint8, device=self.device)
        for _ in self.decode_stream(latents_BCTHW, out_BTHWC):
            pass
        return out_BTHWC

    def host_frames(self, latents_BCTHW: Tensor) -> Tensor:
        """Room on the CPU for the frames (B, T, H, W, 3) of such latents, which a GPU can write to while it computes."""
        pinned = self.device.type == "cuda"
        return torch.empty(self._frames_shape(latents_BCTHW), dtype=torch.uint8, pin_memory=pinned)

    @torch.no_grad()
    def decode_stream(self, latents_BCTHW: Tensor, out_BTHWC: Tensor | None = None) -> Iterator[tuple[range, Tensor]]:
        """Decodes clip after clip, and yields (clips, uint8 frames (b, t, H, W, 3) that follow those before) as they come.

        The frames are parts of `out`, or of a new `host_frames`. While a caller has them, a GPU computes the next.
        """
        from turbotrain.codecs.wan_forward import decode_chunks

        out_BTHWC = self.host_frames(latents_BCTHW) if out_BTHWC is None else out_BTHWC
        rows, chunk = self._portions(*latents_BCTHW.shape[2:])
        for start in range(0, len(latents_BCTHW), rows):
            clips = range(start, min(start + rows, len(latents_BCTHW)))
            part = latents_BCTHW[clips.start : clips.stop].to(self.device).float() * self._std + self._mean
            pieces = decode_chunks(self.vae, part.to(self.vae.dtype), chunk)
            place_BTHWC = out_BTHWC[clips.start : clips.stop]
            yield from ((clips, frames_BTHWC) for frames_BTHWC in _to_host(map(pixels_to_frames, pieces), place_BTHWC))

    def _portions(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(clips, latent frames) that go through together, of latents of so many cells."""
        budget = CHUNK_PIXELS.get(self.device.type, CHUNK_PIXELS_DEFAULT)
        pixels = self.stride[0] * height * self.stride[1] * width * self.stride[2]  # of a latent frame
        chunk = min(frames, max(1, budget // pixels if self.chunk is None else self.chunk))
        return max(1, budget // (chunk * pixels)), chunk

    def _frames_shape(self, latents_BCTHW: Tensor) -> tuple[int, int, int, int, int]:
        """(B, T, H, W, 3). Raises ValueError for what are no latents of this VAE."""
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[1] != self.latent_channels:
            raise ValueError(f"latents are {tuple(latents_BCTHW.shape)}: expected (B, {self.latent_channels}, T, H, W)")
        batch, _, frames, height, width = latents_BCTHW.shape
        stride_t, stride_h, stride_w = self.stride
        return (batch, (frames - 1) * stride_t + 1, height * stride_h, width * stride_w, 3)


def _to_host(pieces: Iterator[Tensor], out_BTHWC: Tensor) -> Iterator[Tensor]:
    """Copies pieces (b, t, H, W, 3) into stretches of `out`, and yields each once it is there.

    A piece is waited for after the next has been asked for, so that a GPU always has work.
    """
    start = 0
    waiting: tuple[Tensor, torch.cuda.Event | None] | None = None
    for piece in pieces:
        place_BTHWC = out_BTHWC[:, start : start + piece.shape[1]]
        start += piece.shape[1]
        place_BTHWC.copy_(piece, non_blocking=True)
        event = None
        if piece.is_cuda:
            event = torch.cuda.Event()
            event.record()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = (place_BTHWC, event)
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(frames_BTHWC: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return frames_BTHWC


def frames_to_pixels(frames_BTHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, T, H, W, 3) to (B, 3, T, H, W) in [-1, 1]."""
    return (frames_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(dtype)


def pixels_to_frames(pixels_BTHWC: Tensor) -> Tensor:
    """(B, T, H, W, 3) in [-1, 1] to uint8."""
    return pixels_BTHWC.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)

"""What image-to-video networks see besides text: the first frame, in the form that each family was trained with (formats.md 12).

Wan 2.1 I2V and 2.2 I2V-A14B: mask and latent of the padded clip, concatenated to the noisy latent (2.1 also CLIP tokens). 2.2
TI2V-5B: the latent of the first frame itself, clean, with timestep 0 on its tokens.

Shapes: B videos, C latent channels, T latent frames, H, W latent height and width; L image tokens, D their width; images are
uint8 (height, width, 3); pixels are RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.image import ImageEncoder, clip_tokens
from turbotrain.codecs.vae import frames_to_pixels
from turbotrain.images import cover, load_image
from turbotrain.model.variants import Variant

MASK_CHANNELS = 4  # one a pixel frame of a latent frame


@dataclass(frozen=True)
class Conditioning:
    """Extra inputs of the network; all None for text to video. Batch size 1 until `for_batch`.

    Attributes:
        y_BCTHW: concatenated to the noisy latent: 4 mask channels, then the conditioning latent.
        clip_BLD: CLIP image tokens.
        clean_BCTHW, clean_frames_BT: latent frames that stay clean, and which they are.
    """

    y_BCTHW: Tensor | None = None
    clip_BLD: Tensor | None = None
    clean_BCTHW: Tensor | None = None
    clean_frames_BT: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What is there, by the names that `diffusion.velocity.bind` and the network take."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def for_batch(self, size: int) -> Conditioning:
        """The same image for `size` videos."""
        return Conditioning(**{name: value.expand(size, *value.shape[1:]) for name, value in self.arguments.items()})

    def restore(self, latents_BCTHW: Tensor) -> Tensor:
        """Puts the clean frames back: what the network says about them means nothing."""
        if self.clean_BCTHW is None or self.clean_frames_BT is None:
            return latents_BCTHW
        return torch.where(
            self.clean_frames_BT[:, None, :, None, None], self.clean_BCTHW.to(latents_BCTHW), latents_BCTHW
        )


def condition_on_image(
    variant: Variant,
    codec: VideoCodec,
    image: Any,
    shape: tuple[int, int, int, int],
    components: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    image_encoder: ImageEncoder | None = None,
) -> Conditioning:
    """The conditioning of one image for latents of `shape` (C, T, H, W).

    Args:
        image: path, PIL image, uint8 array, or None for text to video.
        components: resolved places; `image_encoder` is needed by networks with CLIP tokens.
        image_encoder: that encoder where it is loaded already, for many images.

    Raises:
        ValueError: an image for a text-to-video variant, none for an image-to-video one, no image encoder where one is needed.
    """
    kind = variant.config.model_type
    if image is None:
        if kind == "i2v":
            raise ValueError(f"image is missing: variant {variant.name} starts from an image")
        return Conditioning()
    if kind == "t2v":
        raise ValueError(f"image input needs an i2v variant; this checkpoint is {variant.name}")
    _, _, height, width = shape
    picture = load_image(image)
    first_HWC = cover(picture, height * codec.stride[1], width * codec.stride[2])
    first_BTHWC = torch.from_numpy(first_HWC.copy())[None, None]
    if kind == "ti2v":
        return _first_latent(codec, first_BTHWC, shape, device)
    y_BCTHW = _masked_clip(codec, first_BTHWC, shape, device)
    clip_BLD = None
    if variant.config.image_dim is not None and image_encoder is not None:
        clip_BLD = image_encoder(picture).to(device)
    elif variant.config.image_dim is not None:
        place = (components or {}).get("image_encoder")
        if not place:
            raise ValueError(
                f"image_encoder is missing: variant {variant.name} reads CLIP tokens of the image; "
                "say image_encoder=PATH, a CLIP vision folder or the official file"
            )
        clip_BLD = clip_tokens(place, picture, device)
    return Conditioning(y_BCTHW=y_BCTHW, clip_BLD=clip_BLD)


def _masked_clip(
    codec: VideoCodec, first_BTHWC: Tensor, shape: tuple[int, int, int, int], device: str | torch.device
) -> Tensor:
    """(1, 4 + C, T, H, W): the mask is one on latent frame 0; behind it the latent of the image, padded by frames that are 0 in
    [-1, 1] (between two levels of 8 bits, so the clip is made of floats)."""
    _, length, height, width = shape
    count = (length - 1) * codec.stride[0] + 1
    first_BCTHW = frames_to_pixels(first_BTHWC.to(codec.device), codec.vae.dtype)
    clip_BCTHW = F.pad(first_BCTHW, (0, 0, 0, 0, 0, count - 1))
    latent_BCTHW = codec.encode_pixels(clip_BCTHW).to(device)
    mask_BCTHW = torch.zeros(1, MASK_CHANNELS, length, height, width, device=device)
    mask_BCTHW[:, :, 0] = 1
    return torch.cat([mask_BCTHW, latent_BCTHW.float()], dim=1)


def _first_latent(
    codec: VideoCodec, first_BTHWC: Tensor, shape: tuple[int, int, int, int], device: str | torch.device
) -> Conditioning:
    channels, length, height, width = shape
    clean_BCTHW = torch.zeros(1, channels, length, height, width, device=device)
    clean_BCTHW[:, :, :1] = codec.encode(first_BTHWC).to(device).float()
    clean_frames_BT = torch.zeros(1, length, dtype=torch.bool, device=device)
    clean_frames_BT[:, 0] = True
    return Conditioning(clean_BCTHW=clean_BCTHW, clean_frames_BT=clean_frames_BT)

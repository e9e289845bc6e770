"""Images to CLIP tokens, as Wan 2.1 I2V reads them (formats.md, section 12): the output of the last layer but one.

Legend: B images, C colours, H, W pixels, L tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from turbotrain.codecs.folders import reading, require_complete
from turbotrain.codecs.official import is_official_file, load_clip

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

PROCESSOR_FILE = "preprocessor_config.json"


class ImageEncoder:
    """A CLIP vision tower on `device`: a transformers folder, a hub id, or the official `.pth`.

    Raises:
        ValueError: the folder or file cannot be read, would run code, or lacks weights.
    """

    def __init__(self, place: str, device: str | torch.device) -> None:
        self.device = torch.device(device)
        if is_official_file(place):
            self.tower = load_clip(place, torch.float32)
            size = cast(int, self.tower.config.image_size)  # as `load_clip` says it
            self._pixels: Callable[[Image.Image], Tensor] = partial(official_pixels, size=size)
        else:
            self.tower, self._pixels = _from_folder(place)
        nn.Module.to(self.tower, self.device)  # transformers' decorator hides the signature of its own `to`

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> Tensor:
        """(1, L, D) float32 tokens before the last layer."""
        pixels_BCHW = self._pixels(picture).to(self.device, self.tower.dtype)
        return self.tower(pixels_BCHW, output_hidden_states=True).hidden_states[-2].float()


def clip_tokens(place: str, picture: Image.Image, device: str | torch.device) -> Tensor:
    """The same for one image: the tower is gone afterwards."""
    return ImageEncoder(place, device)(picture)


def official_pixels(picture: Image.Image, size: int) -> Tensor:
    """(1, 3, size, size): the whole picture, squeezed into a square by bicubic interpolation, in CLIP's normalisation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels_BCHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    pixels_BCHW = F.interpolate(pixels_BCHW, size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels_BCHW - mean) / std


def _from_folder(place: str) -> tuple[CLIPVisionModel, Callable[[Image.Image], Tensor]]:
    from transformers import CLIPImageProcessor, CLIPVisionModel  # seconds to import: only i2v with CLIP pays for it

    with reading("image_encoder", place, "CLIP vision"):
        loaded: Any = CLIPVisionModel.from_pretrained(place, output_loading_info=True)
        tower, info = cast("tuple[CLIPVisionModel, dict[str, Any]]", loaded)  # annotated for the call without info
        require_complete(info)
        beside = Path(place).expanduser().with_name("image_processor")  # where a diffusers pipeline keeps it
        own = (Path(place).expanduser() / PROCESSOR_FILE).is_file() or not beside.is_dir()
        processor = CLIPImageProcessor.from_pretrained(place if own else str(beside))
    return tower.eval(), lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"]

"""Images to CLIP tokens, as Wan 2.1 I2V reads them (formats.md, section 12): the output of the last layer but one.

Legend: B images, C colours, H, W pixels, L tokens, D their width.
"""

from __future__ import annotations

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


@torch.no_grad()
def clip_tokens(place: str, picture: Image.Image, device: str | torch.device) -> Tensor:
    """(1, L, D) tokens before the last layer of a CLIP vision tower: a transformers folder, a hub id, or the official `.pth`.

    The tower is loaded for this one image and gone afterwards.

    Raises:
        ValueError: the folder or file cannot be read, would run code, or lacks weights.
    """
    if is_official_file(place):
        tower = load_clip(place, torch.float32)
        pixels_BCHW = official_pixels(picture, cast(int, tower.config.image_size))  # as `load_clip` says it
    else:
        tower, pixels_BCHW = _from_folder(place, picture)
    nn.Module.to(tower, device)  # transformers' decorator hides the signature of its own `to`
    hidden = tower(pixels_BCHW.to(device, tower.dtype), output_hidden_states=True).hidden_states
    return hidden[-2].float()


def official_pixels(picture: Image.Image, size: int) -> Tensor:
    """(1, 3, size, size): the whole picture, squeezed into a square by bicubic interpolation, in CLIP's normalisation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels_BCHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    pixels_BCHW = F.interpolate(pixels_BCHW, size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels_BCHW - mean) / std


def _from_folder(place: str, picture: Image.Image) -> tuple[CLIPVisionModel, Tensor]:
    from transformers import CLIPImageProcessor, CLIPVisionModel  # seconds to import: only i2v with CLIP pays for it

    with reading("image_encoder", place, "CLIP vision"):
        loaded: Any = CLIPVisionModel.from_pretrained(place, output_loading_info=True)
        tower, info = cast("tuple[CLIPVisionModel, dict[str, Any]]", loaded)  # annotated for the call without info
        require_complete(info)
        beside = Path(place).expanduser().with_name("image_processor")  # where a diffusers pipeline keeps it
        own = (Path(place).expanduser() / PROCESSOR_FILE).is_file() or not beside.is_dir()
        processor = CLIPImageProcessor.from_pretrained(place if own else str(beside))
    return tower.eval(), processor(images=picture, return_tensors="pt")["pixel_values"]

"""Filmstrips small enough to live in a result's JSON: figures are then drawn from JSON alone."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

from turbotrain.evaluation.video import filmstrip

SHOWN = 6  # frames of a clip, evenly spaced


def filmstrips(frames_BTHWC: Tensor) -> list[str]:
    """Of every clip, uint8 (B, T, H, W, 3), `SHOWN` frames side by side: a WebP image of some 3 kB, in base64."""
    strips = [filmstrip(clip_THWC, SHOWN, gap=0) for clip_THWC in frames_BTHWC.cpu().numpy()]
    return [base64.b64encode(_webp(strip_HWC)).decode() for strip_HWC in strips]


def _webp(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()

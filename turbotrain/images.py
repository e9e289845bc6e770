"""Pictures from outside: any file that people have becomes upright RGB of a sane size, or a clear refusal. No torch here."""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# More pixels than any video needs: larger pictures are averaged down first, so that what follows takes little memory.
WORKING_PIXELS = 1 << 24
# What a decoder of a damaged file raises.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def load_image(image: Any) -> Image.Image:
    """An RGB picture from a path, a PIL image or a uint8 array (height, width, 3).

    Turned as its EXIF orientation says, transparency composited over white as viewers show it, 16-bit grey scaled to 8 bits,
    the first frame of an animation; at most WORKING_PIXELS large (an exact fraction of the size, by averaging).

    Raises:
        ValueError: no such file, not an image, damaged, over 178 megapixels, or of another kind than these.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(f"image has shape {image.shape}, dtype {image.dtype}: expected uint8 (height, width, 3)")
        return _as_rgb(Image.fromarray(image))
    if isinstance(image, Image.Image):
        return _as_rgb(image)
    try:
        path = Path(image).expanduser()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large photographs, which are no attack, and of odd tags
            with Image.open(path) as opened:
                return _as_rgb(opened)
    except TypeError as error:
        raise ValueError(f"image = {image!r}: expected a path, a PIL image or a uint8 array") from error
    except _DAMAGE as error:
        raise ValueError(f"image = {str(image)!r}: not a readable image file ({_reason(error)})") from error


def cover(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The centre of the picture after the smallest Lanczos scaling that covers (height, width): uint8 (height, width, 3).

    Nothing is distorted; what a different aspect loses is cut off at two sides. Lanczos because TI2V-5B's official code and all
    of diffusers' pipelines use it, and because it averages when it shrinks (the bicubic of Wan's 14B code does not).
    """
    scale = max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    scaled = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))


def _as_rgb(picture: Image.Image) -> Image.Image:
    picture.load()
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)  # not every conversion below keeps it
    if picture.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip instead of scaling
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating point pixels have no known range; save it with 8 or 16 bits")
    elif picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    factor = math.ceil(math.sqrt(picture.width * picture.height / WORKING_PIXELS))
    if factor > 1:
        picture = picture.reduce(factor)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "more than 178 megapixels; scale it down"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__

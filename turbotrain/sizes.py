"""How large a video is: a resolution by name, an aspect ratio, the image's own, or pixels. No torch here.

Sizes are (height, width) in pixels, aspect ratios width to height, as people write them.
"""

from __future__ import annotations

import math
from fractions import Fraction

from turbotrain.model.variants import Variant

# (width, height) of the landscape aspects of each resolution; portrait swaps them. 480p and 720p are the sizes that Wan and
# TurboDiffusion were trained and published with (formats.md 10); 580p lies between them. A variant whose cells are larger rounds
# down, so that 720p of TI2V-5B is its published 1280x704.
RESOLUTIONS: dict[str, dict[Fraction, tuple[int, int]]] = {
    "480p": {Fraction(16, 9): (832, 480), Fraction(4, 3): (640, 480), Fraction(1): (640, 640)},
    "580p": {Fraction(16, 9): (1024, 576), Fraction(4, 3): (768, 576), Fraction(1): (768, 768)},
    "720p": {Fraction(16, 9): (1280, 720), Fraction(4, 3): (960, 720), Fraction(1): (960, 960)},
}
ADAPTIVE = "adaptive"
MOST_EXTREME = 4  # beyond 4:1 one side is so short that little of what the networks learnt fits into it
_WIDE = Fraction(16, 9)


def video_size(
    variant: Variant,
    resolution: str | None = None,
    aspect: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """(height, width) of a video.

    Args:
        resolution: a name of RESOLUTIONS; None: the variant's own.
        aspect: `W:H`, or `adaptive` (that of the image). The aspects of RESOLUTIONS have the published sizes, any other keeps
            the resolution's area. None: `adaptive` where there is an image, as in every published pipeline, else 16:9 or the
            variant's own.
        height, width: pixels instead of names; one that is missing is the variant's own.
        image: (height, width) of the image that the video starts from.

    Raises:
        ValueError: an unknown name, pixels and names together, `adaptive` without an image, an aspect beyond 4:1.
    """
    if height is not None or width is not None:
        for name, value in (("resolution", resolution), ("aspect", aspect)):
            if value is not None:
                raise ValueError(f"{name}={value!r}: width and height say the size already; leave one or the other out")
        return (variant.height if height is None else height, variant.width if width is None else width)
    check_names(variant, resolution, aspect)
    if aspect is None and image is None and resolution is None:
        return variant.height, variant.width
    if aspect == ADAPTIVE and image is None:
        raise ValueError(f"aspect={aspect!r}: is the image's own, and there is no image; say W:H or image=PATH")
    unit_h, unit_w = variant.size_multiple
    resolution = resolution or _own_resolution(variant)
    published = RESOLUTIONS[resolution] if resolution else {}
    if image is not None and aspect in (None, ADAPTIVE):
        ratio = Fraction(image[1], image[0])
        _check_extreme("image", f"{image[1]}x{image[0]} pixels", ratio, "crop it, or say aspect=W:H")
    else:
        ratio = _WIDE if aspect is None else parse_aspect(aspect)
        exact = published.get(max(ratio, 1 / ratio))
        if exact is not None:
            wide, high = exact if ratio >= 1 else exact[::-1]
            return high // unit_h * unit_h, wide // unit_w * unit_w
    wide, high = published[_WIDE] if published else (variant.width, variant.height)
    area = (high // unit_h * unit_h) * (wide // unit_w * unit_w)
    return size_for_area(ratio, area, variant.size_multiple)


def check_names(variant: Variant, resolution: str | None, aspect: str | None) -> None:
    """Raises ValueError for a resolution or an aspect that no video of this variant can have."""
    if resolution is not None:
        if resolution not in RESOLUTIONS:
            raise ValueError(
                f"resolution={resolution!r}: choose one of {', '.join(RESOLUTIONS)}, or say width and height"
            )
        if _own_resolution(variant) is None:
            raise ValueError(
                f"resolution={resolution!r}: variant {variant.name} makes {variant.width}x{variant.height} pixels; "
                "say width and height for another size"
            )
    if aspect is not None and aspect != ADAPTIVE:
        parse_aspect(aspect)


def parse_aspect(aspect: str) -> Fraction:
    """`16:9` to 16/9. Raises ValueError for other forms and for aspects beyond 4:1."""
    try:
        wide, high = (Fraction(part.strip()) for part in aspect.split(":"))
        ratio = wide / high
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"aspect={aspect!r}: say W:H, for example 16:9, 1:1 or 3:4, or {ADAPTIVE}") from error
    _check_extreme("aspect", repr(aspect), ratio, "choose one between 1:4 and 4:1")
    return ratio


def size_for_area(ratio: Fraction, area: int, unit: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of at most about `area` pixels, each side rounded down to a multiple of `unit`, as Wan's own code does."""
    high = max(unit[0], int(math.sqrt(area / ratio)) // unit[0] * unit[0])
    wide = max(unit[1], int(math.sqrt(area * ratio)) // unit[1] * unit[1])
    return high, wide


def _own_resolution(variant: Variant) -> str | None:
    """The name of the variant's default size; None for small worlds, which have no others."""
    unit_h, unit_w = variant.size_multiple
    own = (variant.width, variant.height)
    for name, sizes in RESOLUTIONS.items():
        wide, high = sizes[_WIDE]
        if own == (wide // unit_w * unit_w, high // unit_h * unit_h):
            return name
    return None


def _check_extreme(field: str, value: str, ratio: Fraction, remedy: str) -> None:
    if not Fraction(1, MOST_EXTREME) <= ratio <= MOST_EXTREME:
        raise ValueError(f"{field}={value}: more extreme than {MOST_EXTREME}:1; {remedy}")

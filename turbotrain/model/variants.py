"""Every published Wan network that turbotrain builds, with its dimensions and sampling defaults (formats.md 1, 10, 11).

No torch here: the configuration reads this table to check values before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

MODEL_TYPES = ("t2v", "i2v", "ti2v")
CLIP_TOKENS = 257  # of an image, where a network reads any
_LARGE = 600_000  # pixels, between the largest 480p (640x640) and the smallest 720p (960x720)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Dimensions of one transformer.

    in_channels counts everything concatenated at the input (36 for I2V: 16 noisy + 4 mask + 16 image latent).
    image_dim: width of the CLIP tokens (Wan 2.1 I2V), None for networks without them.
    text_len: tokens to which the text encoder pads. eps: of every norm except those of the CLIP projection (1e-5).
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    model_type: str = "t2v"

    def __post_init__(self) -> None:
        for field in ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels", "text_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model.dim={self.dim} with model.num_heads={self.num_heads}: the head width dim / num_heads must be "
                "an even whole number (published networks use 128)"
            )
        if self.freq_dim % 2:
            raise ValueError(f"model.freq_dim={self.freq_dim}: must be even (cosine and sine halves)")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model.model_type={self.model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
        object.__setattr__(self, "patch_size", tuple(self.patch_size))

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels that the caller concatenates to the noisy latent (`y_BCTHW`); 0 for text-to-video."""
        return self.in_channels - self.out_channels

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"model has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published model: its network(s) and how it is sampled.

    experts: ("",) for one network, ("high", "low") for two; `boundary`: the RF time s at and above which the high-noise
    expert runs. vae_stride: pixels per latent cell (t, h, w). shift: of the teacher's time grid; shift_720p: of large videos,
    where it differs. cfg: guidance scale as (low, high) noise expert. sigma_max: first noise level of the Turbo sampler.
    width, height, frames, fps: defaults.
    """

    name: str
    config: WanConfig
    experts: tuple[str, ...] = ("",)
    vae: str = "wan2.1"
    vae_stride: tuple[int, int, int] = (4, 8, 8)
    boundary: float | None = None
    shift: float = 5.0
    shift_720p: float | None = None
    cfg: tuple[float, float] = (5.0, 5.0)
    sigma_max: float = 80.0
    teacher_steps: int = 50
    frames: int = 81
    fps: int = 16
    width: int = 832
    height: int = 480

    @property
    def size_multiple(self) -> tuple[int, int]:
        """Pixel height and width must be whole multiples of these: VAE stride times patch."""
        return (self.vae_stride[1] * self.config.patch_size[1], self.vae_stride[2] * self.config.patch_size[2])

    def shift_at(self, height: int, width: int) -> float:
        """The teacher's shift for a size in pixels."""
        return self.shift if self.shift_720p is None or height * width < _LARGE else self.shift_720p

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latent of a clip of `frames` (4 n + 1 for stride 4) frames of height x width pixels."""
        stride_t, stride_h, stride_w = self.vae_stride
        if frames < 1 or (frames - 1) % stride_t:
            below = max(0, (frames - 1) // stride_t) * stride_t + 1
            raise ValueError(
                f"frames={frames}: {self.name} needs {stride_t} n + 1 frames; nearest are {below} and "
                f"{below + stride_t}"
            )
        for field, value, multiple in zip(("height", "width"), (height, width), self.size_multiple, strict=True):
            if value < 1 or value % multiple:
                below = max(1, value // multiple) * multiple
                raise ValueError(
                    f"{field}={value}: {self.name} needs a multiple of {multiple}; nearest are {below} and "
                    f"{below + multiple}"
                )
        return (self.config.out_channels, 1 + (frames - 1) // stride_t, height // stride_h, width // stride_w)


_WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_WAN_14B_I2V = dataclasses.replace(_WAN_14B, in_channels=36, model_type="i2v")
_WAN_5B = WanConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48, model_type="ti2v"
)
_SHAPES = WanConfig(
    dim=128,
    ffn_dim=384,
    num_heads=4,
    num_layers=4,
    in_channels=24,
    out_channels=24,
    text_dim=64,
    text_len=32,
    freq_dim=64,
    patch_size=(1, 1, 1),
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("wan2.1_t2v_1.3b", _WAN_1_3B),
        Variant("wan2.1_t2v_14b", _WAN_14B),
        Variant(
            "wan2.1_i2v_14b",
            dataclasses.replace(_WAN_14B_I2V, image_dim=1280),
            shift=3.0,
            shift_720p=5.0,
            sigma_max=200.0,
            teacher_steps=40,
        ),
        Variant(
            "wan2.2_t2v_a14b",
            _WAN_14B,
            experts=("high", "low"),
            boundary=0.875,
            shift=12.0,
            cfg=(3.0, 4.0),
            teacher_steps=40,
        ),
        Variant(
            "wan2.2_i2v_a14b",
            _WAN_14B_I2V,
            experts=("high", "low"),
            boundary=0.9,
            cfg=(3.5, 3.5),
            sigma_max=200.0,
            teacher_steps=40,
            width=1280,
            height=720,
        ),
        Variant(
            "wan2.2_ti2v_5b",
            _WAN_5B,
            vae="wan2.2",
            vae_stride=(4, 16, 16),
            frames=121,
            fps=24,
            width=1280,
            height=704,
        ),
        Variant(
            "shapes",
            _SHAPES,
            vae="shapes",
            vae_stride=(4, 8, 8),
            shift=3.0,
            cfg=(3.0, 3.0),
            frames=13,
            fps=8,
            width=64,
            height=64,
        ),
    )
}


def variants_with(config: WanConfig) -> list[str]:
    """Names of the variants whose network has exactly these dimensions (Wan 2.1 14B and 2.2 A14B share theirs)."""
    return [name for name, variant in VARIANTS.items() if variant.config == config]


def default_negative_prompt(variant: Variant) -> str:
    """The published negative prompt of Wan (formats.md 9); the shapes world has none."""
    if variant.vae == "shapes":
        return ""
    return ("镜头晃动，" if variant.name.startswith("wan2.1_i2v") else "") + _WAN_NEGATIVE


_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

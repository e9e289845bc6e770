"""What conversion writes (formats.md 2, 3, 4, 7): where the files of a layout lie, and what it has a place for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """A layout as an output.

    label: for messages. names: of one network, of the high-noise and of the low-noise expert: folders in the output, or, where
    `suffix` says that a network is one file, files in it (one network: the output itself). stem: of the weights in a folder.
    config_json: written beside them. prefix: of every name. schemes: of 8-bit weights, the preferred one first. smooth:
    SmoothQuant vectors; sla: P of the linear branch; metadata: ours, in the file's header.
    """

    label: str
    names: tuple[str, str, str]
    suffix: str = ""
    stem: str = "diffusion_pytorch_model"
    config_json: bool = False
    prefix: str = ""
    schemes: tuple[str, ...] = ()
    smooth: bool = False
    sla: bool = False
    metadata: bool = True


TARGETS: dict[str, Target] = {
    "turbotrain": Target(
        label="a turbotrain folder",
        names=("", "high", "low"),
        stem="model",
        schemes=("int8_channel", "int8_block128", "fp8_channel"),
        smooth=True,
        sla=True,
    ),
    "official": Target("an official Wan folder", ("", "high_noise_model", "low_noise_model"), config_json=True),
    "diffusers": Target(
        "a diffusers folder", ("transformer", "transformer", "transformer_2"), config_json=True, sla=True
    ),
    "turbodiffusion": Target(
        label="a TurboDiffusion file",
        names=("", "high", "low"),
        suffix=".pth",
        schemes=("int8_block128",),
        sla=True,
        metadata=False,
    ),
    "rcm": Target("an rCM teacher file", ("", "high", "low"), suffix=".pth", prefix="net.", sla=True, metadata=False),
    "comfyui": Target(
        label="a ComfyUI file",
        names=("", "high_noise", "low_noise"),
        suffix=".safetensors",
        schemes=("int8_channel", "fp8_channel"),
    ),
}

# Our schemes as ComfyUI names them: int8 with a scale per row, fp8 with one per tensor.
COMFYUI_FORMATS: dict[str, str] = {"int8_channel": "int8_tensorwise", "fp8_channel": "float8_e4m3fn"}

"""8-bit files of LightX2V and ComfyUI (formats.md 6, 7): official names, an 8-bit `X.weight` with its scale beside it."""

from __future__ import annotations

# float32, one for the tensor or one per output channel; LightX2V and ComfyUI, then older ComfyUI files.
SCALES: tuple[str, ...] = ("weight_scale", "scale_weight")

# What says how a file was made; ComfyUI's own, and a scale that is named as older ComfyUI files name it, tell its files.
FORMAT_MARKER = "comfy_quant"
FORMATS: tuple[str, ...] = ("int8_tensorwise", "float8_e4m3fn")
MARKERS: tuple[str, ...] = ("scaled_fp8", FORMAT_MARKER)
COMFYUI: tuple[str, ...] = (*MARKERS, "scale_weight", "input_scale", "scale_input")

# Scales of activations, which dynamic quantization does not need.
INPUT_SCALES: tuple[str, ...] = ("input_scale", "scale_input")
IGNORED: tuple[str, ...] = (*MARKERS, *INPUT_SCALES)

# dtype of the weight: our name of it. Other dtypes (packed 4-bit formats) are not read.
WEIGHTS: dict[str, str] = {"int8": "int8_weight", "float8_e4m3fn": "fp8_weight"}

"""8-bit files of LightX2V and ComfyUI (formats.md 6, 7): official names, an 8-bit `X.weight` with its scale beside it."""

from __future__ import annotations

# float32, one for the tensor or one per output channel; LightX2V and ComfyUI, then older ComfyUI files.
SCALES: tuple[str, ...] = ("weight_scale", "scale_weight")

# What says how a file was made, or scales that dynamic activation quantization does not need.
IGNORED: tuple[str, ...] = ("scaled_fp8", "comfy_quant", "input_scale", "scale_input")

# torch dtype of the weight: our name of it. Other dtypes (packed 4-bit formats) are not read.
WEIGHTS: dict[str, str] = {"torch.int8": "int8_weight", "torch.float8_e4m3fn": "fp8_weight"}

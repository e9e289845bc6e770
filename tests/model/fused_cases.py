"""The network's inference, in fused operators, beside its plain path and float64; run by tests/model and tests/gpu."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from turbokernels.testing import assert_within_budget
from wan_networks import STRUCTURES, build, inputs

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import BLOCK_VECTORS, QuantLinear
from turbotrain.model.wan import WanTransformer

GRID = (3, 6, 8)
ATTENTIONS = {
    "dense": AttentionConfig(),
    "sla": AttentionConfig("sla", 0.5, 16, 16),
    "cube": AttentionConfig("sla", 0.5, 16, 16, "cube"),
    "sage_sla": AttentionConfig("sage_sla", 0.5, 16, 16),
}


@torch.no_grad()
def smooth(model: WanTransformer, seed: int = 3) -> WanTransformer:
    """Give the blocks SmoothQuant vectors, and the weights what cancels them."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name, layers in BLOCK_VECTORS.items():
            vector = 0.5 + torch.rand(model.config.dim, generator=generator)
            setattr(block, name, vector.to(model.device))
            for layer in layers:
                weight = block.get_submodule(layer).get_parameter("weight")
                weight.copy_(weight.float() * vector.to(weight.device))
    return model


def quantize(model: WanTransformer, scheme: str, keep: tuple[str, ...] = (), smooth_ffn2: bool = False) -> None:
    """Every linear of the blocks in 8 bits, but P and the names in `keep`."""
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not name.endswith("proj_l") and name not in keep:
                vector = torch.linspace(0.5, 2, layer.in_features) if smooth_ffn2 and name == "ffn.2" else None
                block.set_submodule(name, QuantLinear.from_linear(layer, scheme, vector))


def fused_plain_exact(
    structure: str,
    attention: str,
    scheme: str | None,
    dtype: torch.dtype,
    device: str,
    *,
    smoothed: bool = False,
    keep: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Three results of one call, all with the plain path's block lists: fused, plain, and the float network's in float64."""
    model = build(structure, ATTENTIONS[attention], dtype).requires_grad_(False)
    given = inputs(STRUCTURES[structure], grid=GRID)
    exact_model = copy.deepcopy(model).set_weight_dtype(torch.float64)
    if attention == "sage_sla":
        exact_model.set_attention(ATTENTIONS["sla"])
    if smoothed:
        smooth(model)
    if scheme is not None:
        quantize(model, scheme, keep, smoothed)
    model.to(device)
    on_device = {name: value.to(device) for name, value in given.items()}
    with torch.enable_grad():  # nothing here requires a gradient, but something could
        plain, selection = model(**on_device, return_selection=True)
    with torch.no_grad():
        fused = model(**on_device, selection=selection)
        on_cpu = [None if mask is None else dataclasses.replace(mask, kept=mask.kept.cpu()) for mask in selection]
        exact = exact_model(**{name: value.double() for name, value in given.items()}, selection=on_cpu)
    return fused.cpu(), plain.cpu(), exact


def check(structure: str, attention: str, scheme: str | None, dtype: torch.dtype, device: str, **changes) -> None:
    fused, plain, exact = fused_plain_exact(structure, attention, scheme, dtype, device, **changes)
    assert fused.dtype == plain.dtype
    assert_within_budget(fused, plain, exact)

"""Linear layers with 8-bit weights and activations as modules, and their names in files (method.md section 7).

A quantised network is a float one whose block linears were replaced: `prepare_quantized(model, state_dict)` makes
the places that a quantised state dict fills, `load_state_dict(strict=True)` fills them, `dequantize_model` goes back.

| in memory  | on disk                        | what                                                                      |
|------------|--------------------------------|---------------------------------------------------------------------------|
| X.weight_q | X.int8_weight or X.fp8_weight  | (N, K) int8 or float8_e4m3fn                                              |
| X.scale    | X.scale                        | float32: (N,) per channel; (ceil(N / 128), ceil(K / 128)) per tile        |
| X.bias     | X.bias                         | (N,), the source's dtype; absent without one                              |
| X.smooth   | X.smooth                       | optional (K,) float32: divides the input before it is quantised           |

Shape suffixes: N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from turbokernels.checks import check_inference
from turbokernels.quantize.api import quantize_block, quantize_token
from turbokernels.w8a8.api import (
    WEIGHT_DTYPES,
    check_scheme,
    dequantize_weight,
    quantize_weight,
    scale_shape,
    w8a8_linear,
)

from turbotrain.model.tangent import Dual, Linear, Quantized

DISK_SUFFIXES = {torch.int8: ".int8_weight", torch.float8_e4m3fn: ".fp8_weight"}
# SmoothQuant vectors that a block applies in its modulation, and the linears whose columns were multiplied by them.
BLOCK_VECTORS = {"smooth_attn": ("self_attn.q", "self_attn.k", "self_attn.v"), "smooth_ffn": ("ffn.0",)}


class QuantLinear(nn.Module):
    """y = W8A8(activation(x) / smooth) + bias, in x's dtype; x (..., K), y (..., N). No gradient, no tangent.

    x may also come quantised (`quantize_for`); activation: None or "gelu_tanh", applied where x is quantised.

    The constructor leaves the values uninitialised, for loading (any device, meta included); `from_linear` quantises.
    Casting the model (`.to(dtype)`) casts the bias alone: scales, `smooth` and 8-bit values are what they are.
    Errors: ValueError for an unknown scheme; see `w8a8_linear` for the forward pass.
    """

    weight_q: Tensor
    scale: Tensor
    bias: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        *,
        bias: bool = True,
        smooth: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_scheme("QuantLinear", scheme)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        weight_q = torch.empty(out_features, in_features, dtype=WEIGHT_DTYPES[scheme], device=device)
        scale = torch.empty(scale_shape(scheme, out_features, in_features), dtype=torch.float32, device=device)
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.empty(out_features, device=device, dtype=dtype) if bias else None)
        self.register_buffer("smooth", torch.empty(in_features, device=device) if smooth else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, scheme: str, smooth_K: Tensor | None = None) -> QuantLinear:
        """Quantise a float linear. With `smooth_K`, its weight's columns are multiplied by the vector that divides
        the input.
        """
        weight_NK = linear.weight.float()
        if smooth_K is not None:
            smooth_K = smooth_K.float().to(weight_NK.device)
            weight_NK = weight_NK * smooth_K
        layer = cls(linear.in_features, linear.out_features, scheme, bias=False, device="meta")
        layer.weight_q, layer.scale = quantize_weight(weight_NK, scheme)
        layer.bias = None if linear.bias is None else linear.bias.detach().clone()
        layer.smooth = smooth_K
        return layer.train(linear.training)

    def forward(self, x: Tensor | Quantized, activation: str | None = None) -> Tensor:
        operand: Tensor | tuple[Tensor, Tensor]
        if isinstance(x, Quantized):
            operand = (x.values, x.scale)
        elif self.smooth is None and activation is None:
            operand = x
        else:
            # In float32, so that a bf16 x is not rounded once more before its quantisation.
            check_inference("QuantLinear", x=x)
            if self.scheme == "int8_block128":
                operand = quantize_block(x, activation=activation, smooth=self.smooth)
            else:
                operand = quantize_token(x, self.weight_q.dtype, activation=activation, smooth=self.smooth)
        return w8a8_linear(operand, self.weight_q, self.scale, self.bias, self.scheme, out_dtype=x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight (N, K) that this layer stands for; `smooth` is folded back into it."""
        weight_NK = dequantize_weight(self.weight_q, self.scale, self.scheme)
        return (weight_NK if self.smooth is None else weight_NK / self.smooth).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}, "
            f"bias={self.bias is not None}, smooth={self.smooth is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        bias = self.bias

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def common_scheme(layers: Iterable[nn.Module]) -> str | None:
    """The scheme in which one quantisation of their input serves all the layers; None where there is no such scheme."""
    schemes = {layer.scheme if isinstance(layer, QuantLinear) and layer.smooth is None else None for layer in layers}
    return schemes.pop() if len(schemes) == 1 else None


def quantize_block_linears(block: nn.Module, scheme: str) -> None:
    """Every linear of a Wan block but P in 8 bits, in place, without calibration."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear) and not name.endswith("proj_l"):
            block.set_submodule(name, QuantLinear.from_linear(layer, scheme))


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Lay the 8-bit weights of q, k and v, which read one input, side by side in memory, in place: one product computes all.

    Names, values and bytes stay what they are. Moving the model (`.to`) parts them again, which costs speed alone; layers
    that cannot lie together (floating, smoothed one by one, ragged tiles) stay as they are.
    """
    for block in model.get_submodule("blocks").children():
        layers = [block.get_submodule(name) for name in BLOCK_VECTORS["smooth_attn"]]
        if _fit_together(layers) and _joined(layers, "weight_q") is None:
            _lay_together(layers)
    return model


def multiply_together(layers: Sequence[nn.Module], x: Quantized) -> list[Tensor] | None:
    """Every layer's result for one quantised input by one product, views of one tensor (..., sum of N); None for layers
    that do not lie together (`prepare_for_inference`).

    int8 results are those of the layers one by one, bit for bit: their sums are exact.
    """
    if torch.compiler.is_compiling() or not _fit_together(layers):  # a compiled graph knows no addresses
        return None
    weight_q, scale = _joined(layers, "weight_q"), _joined(layers, "scale")
    bias = None if layers[0].bias is None else _joined(layers, "bias")
    if weight_q is None or scale is None or (bias is None) != (layers[0].bias is None):
        return None
    y = w8a8_linear((x.values, x.scale), weight_q, scale, bias, layers[0].scheme, out_dtype=x.dtype)
    return list(y.split([layer.out_features for layer in layers], dim=-1))


def _fit_together(layers: Sequence[nn.Module]) -> TypeGuard[Sequence[QuantLinear]]:
    """Whether the weights of layers that read one input are rows of one 8-bit weight."""
    if common_scheme(layers) is None:
        return False
    joined: Any = layers
    whole_tiles = joined[0].scheme != "int8_block128" or all(layer.out_features % 128 == 0 for layer in joined[:-1])
    return whole_tiles and len({None if layer.bias is None else layer.bias.dtype for layer in joined}) == 1


@torch.no_grad()
def _lay_together(layers: Sequence[QuantLinear]) -> None:
    for name in ("weight_q", "scale", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is not None:
            for layer, part in zip(layers, torch.cat(parts).split([len(part) for part in parts])):
                setattr(layer, name, part)


def _joined(layers: Sequence[QuantLinear], name: str) -> Tensor | None:
    """The layers' tensors of that name as one along their first dimension, a view; None unless that is how they lie."""
    parts = [getattr(layer, name) for layer in layers]
    first, storage = parts[0], parts[0].untyped_storage().data_ptr()
    end = first.data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def quantize_for(scheme: str | None, x: Tensor) -> Dual | Quantized:
    """x quantised as the layers of a scheme read it; as it is for None."""
    if scheme is None:
        return Dual(x)
    values, scale = quantize_block(x) if scheme == "int8_block128" else quantize_token(x, WEIGHT_DTYPES[scheme])
    return Quantized(values, scale, x.dtype)


def replace_linears(model: nn.Module, layers: Mapping[str, str], smoothed: Collection[str] = ()) -> nn.Module:
    """Put an empty QuantLinear in the place of each named linear, in place; `smoothed` are the names with a `smooth`
    vector.

    layers: {module name: scheme}. Device and the bias' presence and dtype follow the linear that is replaced.
    Errors: ValueError for a name that is not a linear of the model, or a smoothed one that is not among the layers.
    """
    stray = sorted(set(smoothed) - set(layers))
    if stray:
        raise ValueError(
            f"replace_linears: {', '.join(stray)} have a smooth vector but no scheme; add them to the layers"
        )
    modules = dict(model.named_modules())
    for name, scheme in layers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "nothing of that name" if linear is None else type(linear).__name__
            raise ValueError(
                f"replace_linears: {name!r} should be a linear layer, but the model has {found}; "
                "check that the checkpoint belongs to this variant"
            )
        has_bias, weight = linear.bias is not None, linear.weight
        empty = QuantLinear(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=has_bias,
            smooth=name in smoothed,
            device=weight.device,
            dtype=linear.bias.dtype if has_bias else None,
        )
        model.set_submodule(name, empty.train(linear.training))
    return model


def to_disk_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with the names of files: X.weight_q becomes X.int8_weight or X.fp8_weight; every other key stays."""
    return {
        key[: -len(".weight_q")] + DISK_SUFFIXES[tensor.dtype] if key.endswith(".weight_q") else key: tensor
        for key, tensor in state_dict.items()
    }


def from_disk_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_disk_names`. Errors: ValueError for a weight whose dtype is not what its name says."""
    named: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        for dtype, suffix in DISK_SUFFIXES.items():
            if key.endswith(suffix):
                if tensor.dtype != dtype:
                    raise ValueError(
                        f"{key} has dtype {tensor.dtype}; its name says {dtype}: the file is damaged or mislabelled"
                    )
                key = key[: -len(suffix)] + ".weight_q"
        named[key] = tensor
    return named


def quantized_layers(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, str], set[str]]:
    """({module name: scheme}, names with a `smooth` vector) of a state dict with in-memory names; both empty for a
    float one.

    The scheme follows from the weight's dtype and the scale's rank, so that published files need no metadata.
    Errors: ValueError for a missing scale, or one whose shape fits no scheme.
    """
    layers: dict[str, str] = {}
    for key, weight_q in state_dict.items():
        if not key.endswith(".weight_q"):
            continue
        name = key[: -len(".weight_q")]
        scale = state_dict.get(f"{name}.scale")
        if scale is None:
            raise ValueError(f"{name}: the 8-bit weight has no {name}.scale beside it; the file is incomplete")
        tiled = weight_q.dtype == torch.int8 and scale.ndim == 2
        scheme = (
            "fp8_channel" if weight_q.dtype == torch.float8_e4m3fn else "int8_block128" if tiled else "int8_channel"
        )
        expected = scale_shape(scheme, *weight_q.shape)
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"{name}.scale has shape {tuple(scale.shape)}; a {tuple(weight_q.shape)} weight in {scheme} has {expected}"
            )
        layers[name] = scheme
    return layers, {name for name in layers if f"{name}.smooth" in state_dict}


def prepare_quantized(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Make, in place, the empty modules and vectors that a quantised state dict (in-memory names) fills by a strict
    load.

    A float state dict leaves the model as it is. Errors: ValueError as in `replace_linears` and `quantized_layers`.
    """
    replace_linears(model, *quantized_layers(state_dict))
    for key, tensor in state_dict.items():
        prefix, _, vector = key.rpartition(".")
        if vector in BLOCK_VECTORS:
            device = next(model.get_submodule(prefix).parameters()).device
            setattr(model.get_submodule(prefix), vector, torch.empty_like(tensor, device=device))
    return model


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every QuantLinear back into a float linear, in place; the blocks' smoothing vectors are folded back as well.

    dtype: of the new weights; by default the dtype of the layer's bias, or float32 without one.
    """
    for block in list(model.modules()):
        for vector, names in BLOCK_VECTORS.items():
            smooth_K = getattr(block, vector, None)
            if smooth_K is None:
                continue
            for name in names:
                linear = block.get_submodule(name)
                if isinstance(linear, QuantLinear):
                    linear.smooth = smooth_K if linear.smooth is None else linear.smooth * smooth_K
                else:
                    weight: Any = linear.weight
                    weight.copy_(weight.float() / smooth_K)
            setattr(block, vector, None)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            target = dtype or (torch.float32 if layer.bias is None else layer.bias.dtype)
            linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.dequantize(target))
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().to(target))
            model.set_submodule(name, linear.train(layer.training))
    return model

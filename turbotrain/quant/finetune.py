"""Quantisation-aware fine-tuning: the weights learn to live with the rounding (arXiv 1308.3432, section 2: straight-through).

Self-distillation without data. The float network's passes through the Turbo sampler (input, time, text, velocity) are recorded
once; the quantised network then learns to give the same velocities for the same inputs. Its own trajectories would ask for a pass
of the float network at every step, and differ from the recorded ones by no more than the error that is being removed.

Every forward product is the W8A8 product that will run, by the operators of inference, so training and result cannot drift
apart. Its gradient is that of a float product of the values that 8 bits hold; rounding itself counts as the identity.

Shape suffixes: L tokens (after any leading dimensions), N output features, K input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbokernels.quantize.api import quantize_block, quantize_token
from turbokernels.w8a8.api import WEIGHT_DTYPES, dequantize_weight, quantize_weight, w8a8_linear
from turbokernels.w8a8.reference import BLOCK

from turbotrain.model.quant_linear import QuantLinear
from turbotrain.quant.observe import ForwardCall


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune: calls, as `quantize_transformer` takes them, whose passes are learnt from; AdamW's steps, its learning
    rate (a cosine takes it to 0), and passes a step.
    """

    calls: Sequence[ForwardCall]
    steps: int = 200
    lr: float = 1e-6
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("finetune.calls is empty: pass at least one sampling run to learn from")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < 1:
            raise ValueError(f"finetune.lr={self.lr}: a learning rate in (0, 1)")


@dataclass(frozen=True)
class Pass:
    """One forward pass of the float network, in host memory: its arguments, tensors with the batch first, and what came out."""

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor]
    velocity: Tensor


class _StraightThrough(torch.autograd.Function):
    """W8A8(x, weight) + bias, quantised as inference does; what it keeps for the backward pass is 8 bits wide."""

    @staticmethod
    def forward(ctx: Any, x_LK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, scheme: str) -> Tensor:
        if scheme == "int8_block128":
            quantised = quantize_block(x_LK)
        else:
            quantised = quantize_token(x_LK, WEIGHT_DTYPES[scheme])
        weight_q, scale = quantize_weight(weight_NK, scheme)
        ctx.save_for_backward(*quantised, weight_q, scale)
        ctx.scheme, ctx.has_bias = scheme, bias_N is not None
        return w8a8_linear(quantised, weight_q, scale, bias_N, scheme, out_dtype=x_LK.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (dy_LN,) = gradients
        values, x_scale, weight_q, scale = ctx.saved_tensors
        weight_NK = dequantize_weight(weight_q, scale, ctx.scheme, dy_LN.dtype)
        x_LK = _dequantize(values, x_scale).to(dy_LN.dtype)
        dweight_NK = dy_LN.flatten(0, -2).t() @ x_LK.flatten(0, -2)
        return dy_LN @ weight_NK, dweight_NK, dy_LN.flatten(0, -2).sum(0) if ctx.has_bias else None, None


def _dequantize(values_LK: Tensor, scale: Tensor) -> Tensor:
    """The floats that quantised activations stand for; scale: of every token (..., L), or of tiles (..., T, U)."""
    if scale.ndim < values_LK.ndim:
        return values_LK.float() * scale[..., None]
    n_tokens, n_features = values_LK.shape[-2:]
    scale_LU = scale.repeat_interleave(BLOCK, -2)[..., :n_tokens, :]
    return values_LK.float() * scale_LU.repeat_interleave(BLOCK, -1)[..., :n_features]


class TrainedQuantLinear(nn.Linear):
    """A linear with the values of `QuantLinear.from_linear(self, scheme, smooth_K)` and straight-through gradients; made of a
    float linear, whose weight and bias it takes over.
    """

    smooth_K: Tensor | None

    def __init__(self, linear: nn.Linear, scheme: str, smooth_K: Tensor | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scheme = linear.weight, linear.bias, scheme
        self.register_buffer("smooth_K", None if smooth_K is None else smooth_K.float().to(linear.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        x_LK, weight_NK = input, self.weight
        if self.smooth_K is not None:
            x_LK, weight_NK = x_LK / self.smooth_K, weight_NK * self.smooth_K
        y: Any = _StraightThrough.apply(x_LK, weight_NK, self.bias, self.scheme)
        return y

    def quantised(self) -> QuantLinear:
        return QuantLinear.from_linear(self, self.scheme, self.smooth_K)


@torch.no_grad()
def record_passes(model: nn.Module, calls: Sequence[ForwardCall]) -> list[Pass]:
    """Every forward pass that the calls make through the model."""
    passes: list[Pass] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], velocity: Tensor) -> None:
        kept = {name: value.cpu() for name, value in kwargs.items()}
        passes.append(Pass(tuple(value.cpu() for value in args), kept, velocity.cpu()))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        for call in calls:
            call(model)
    finally:
        handle.remove()
    return passes


def finetune_quantised(
    folded: nn.Module, quantised: nn.Module, passes: Sequence[Pass], settings: Finetune, seed: int = 0
) -> dict[str, Tensor]:
    """State of `quantised` after its 8-bit linears were trained to answer the passes as the float network did.

    folded: the float network that `quantised` was made of, its smoothing vectors folded in; it is used up. Weights and biases of
    the linears that are quantised are trained, in float32 (under autocast where the network is in bf16); all else is left alone.
    A loss that is not finite leaves weights that are not either.

    Raises:
        ValueError: no linear of `quantised` is in 8 bits.
    """
    first = next(folded.parameters())
    device = first.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=first.dtype == torch.bfloat16)
    trained = folded.float().requires_grad_(False)
    layers: dict[str, TrainedQuantLinear] = {}
    for name, layer in quantised.named_modules():
        if isinstance(layer, QuantLinear):
            linear = trained.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layers[name] = TrainedQuantLinear(linear.requires_grad_(), layer.scheme, layer.smooth)
            trained.set_submodule(name, layers[name])
    if not layers:
        raise ValueError("finetune: every linear stays in float, so there is nothing to tune; quantise some of them")

    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / settings.steps)) / 2
    )
    batches = _batches(passes, settings.batch_size, seed)
    with torch.enable_grad():
        for _ in range(settings.steps):
            batch = next(batches)
            optimizer.zero_grad(set_to_none=True)
            args = [value.to(device) for value in batch.args]
            kwargs = {name: value.to(device) for name, value in batch.kwargs.items()}
            with autocast:
                velocity = trained(*args, **kwargs)
            F.mse_loss(velocity.float(), batch.velocity.to(device)).backward()
            optimizer.step()
            schedule.step()
    for name, layer in layers.items():
        trained.set_submodule(name, layer.quantised())
    return trained.state_dict()


def _batches(passes: Sequence[Pass], batch_size: int, seed: int) -> Iterator[Pass]:
    """Passes drawn without repetition within a batch, side by side as one; without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = [passes[i] for i in torch.randperm(len(passes), generator=generator)[:batch_size].tolist()]
        yield Pass(
            tuple(torch.cat(values).float() for values in zip(*(one.args for one in drawn), strict=True)),
            {name: torch.cat([one.kwargs[name] for one in drawn]).float() for name in drawn[0].kwargs},
            torch.cat([one.velocity for one in drawn]).float(),
        )

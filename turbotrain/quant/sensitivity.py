"""Which linears can bear 8 bits: the error that each causes alone, and the fewest to keep in float for an error that is wanted.

Noise of different layers is nearly independent, so squares of their errors add up: measured one by one, they predict a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from turbotrain.model.quant_linear import QuantLinear
from turbotrain.quant.observe import ForwardCall
from turbotrain.quant.sites import block_linears, model_sites


def latent_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, in float64."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


@torch.no_grad()
def float_latents(model: nn.Module, calls: Sequence[ForwardCall]) -> list[Tensor]:
    """What the calls return before anything is quantised. Raises ValueError where that is not finite."""
    latents = [call(model) for call in calls]
    if not all(bool(latent.isfinite().all()) for latent in latents):
        raise ValueError("the float network gives latents that are not finite: check the checkpoint and the prompts")
    return latents


def linear_names(model: nn.Module) -> list[str]:
    """Every linear that calibration looks at, in the order of the model's sites."""
    return [f"{block_name}.{name}" for block_name, _, site in model_sites(model) for name in site.linears]


@torch.no_grad()
def layer_sensitivity(model: nn.Module, calls: Sequence[ForwardCall], scheme: str = "int8_channel") -> dict[str, float]:
    """{linear: mean relative error of the latents when it alone is quantised, without smoothing}.

    calls: as `quantize_transformer` takes them; each returns the latent of the model that it is given. The model is as before
    when this returns.

    Raises:
        ValueError: no calls, a model that is quantised already, or latents that are not finite, in float or with one linear
            quantised.
    """
    if not calls:
        raise ValueError("calls is empty: sensitivity is measured on the latents of at least one call")
    for _, block, _ in model_sites(model):
        block_linears(block)  # refuses what is quantised already
    references = float_latents(model, calls)
    errors: dict[str, float] = {}
    for name in linear_names(model):
        with _quantised(model, name, scheme):
            found = [latent_error(call(model), reference) for call, reference in zip(calls, references)]
        errors[name] = sum(found) / len(found)
        if not math.isfinite(errors[name]):
            raise ValueError(f"{name}: latents are not finite when it alone is in {scheme}: check its weights")
    return errors


@contextmanager
def _quantised(model: nn.Module, name: str, scheme: str) -> Iterator[None]:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    model.set_submodule(name, QuantLinear.from_linear(linear, scheme))
    try:
        yield
    finally:
        model.set_submodule(name, linear)


def predicted_error(errors: Mapping[str, float]) -> float:
    """Of all these linears quantised together: the root of the sum of squares."""
    return math.sqrt(sum(error * error for error in errors.values()))


def float_layers(errors: Mapping[str, float], target: float) -> list[str]:
    """The fewest linears to keep in float so that the predicted error of the others is at most `target`, worst first. A target of
    0 keeps all that err.

    Raises:
        ValueError: a negative target.
    """
    if not target >= 0:
        raise ValueError(f"target={target}: the relative error that is allowed must not be negative")
    left = dict(errors)
    kept: list[str] = []
    for name in sorted(errors, key=errors.__getitem__, reverse=True):
        if predicted_error(left) <= target:
            break
        kept.append(name)
        del left[name]
    return kept

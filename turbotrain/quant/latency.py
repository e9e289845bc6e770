"""Which linears to keep in float within a time that is wanted: seconds of each in float and in 8 bits, and a choice by both.

Every linear is timed by itself, on the path that it takes alone: an 8-bit one quantises its own input. Linears that read one
input and are all in 8 bits share its quantisation (model/elementwise.py), which is not counted: a network errs to the fast side.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from turbokernels.timing import device_name, measure

from turbotrain.model.elementwise import gelu_linear
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.tangent import Dual
from turbotrain.quant.calibrate import can_smooth
from turbotrain.quant.observe import ForwardCall
from turbotrain.quant.sensitivity import predicted_error
from turbotrain.quant.sites import model_sites

SECONDS_EACH = 0.02  # of the device, for one median
# A GPU that has idled while the CPU compiled runs slowly at first: of each linear's medians the best counts.
ROUNDS = 2


class Use(NamedTuple):
    """All that the time of one call depends on. shape: of the input (..., in_features). gelu: applied to it, by an 8-bit linear
    where it quantises. smooth: an 8-bit linear divides by a vector there."""

    shape: tuple[int, ...]
    out_features: int
    bias: bool
    dtype: torch.dtype
    gelu: bool
    smooth: bool


class Seconds(NamedTuple):
    """What one linear takes in one calibration call, all its uses together."""

    floating: float
    quantised: float


@dataclass(frozen=True)
class LinearTimes:
    """seconds: by the linear's full name. device: the name of what they were measured on. dtype: of the float linears."""

    seconds: Mapping[str, Seconds]
    device: str
    dtype: str

    def share(self, floating: Collection[str]) -> float:
        """The time of all linears with these in float, as a share of their time with all in float."""
        spent = sum(took.floating if name in floating else took.quantised for name, took in self.seconds.items())
        return spent / sum(took.floating for took in self.seconds.values())

    def no_faster(self) -> list[str]:
        """Those that 8 bits save no time."""
        return [name for name, took in self.seconds.items() if took.quantised >= took.floating]

    def check(self, target: float) -> None:
        """
        Raises:
            ValueError: a target that is no share between 0 and 1, or that no choice of linears reaches.
        """
        if not 0 < target < 1:
            raise ValueError(
                f"target_latency={target:g}: a share of the linears' time in float, above 0 and below 1; at 1 all of them stay "
                "in float, and there is nothing to quantise"
            )
        least = self.share(self.no_faster())
        if least <= target:
            return
        lowest = math.ceil(1e3 * least) / 1e3
        remedy = f"choose a target from {lowest:.3f}, or" if lowest < 1 else "8 bits win no time there:"
        raise ValueError(
            f"target_latency={target:g}: measured on {self.device}, the block linears take {self.share(()):.3f} of their time "
            f"in {self.dtype} when all are in 8 bits, and {least:.3f} when those that 8 bits do not speed up stay in float; "
            f"{remedy} calibrate on the device that will sample"
        )


@dataclass(frozen=True)
class LatencyReport:
    """What a choice by time rests on. target, predicted, all_quantised: shares of the linears' time in float, as asked, of the
    network that came out, and with all in 8 bits; predicted_error: of its latents."""

    target: float
    predicted: float
    all_quantised: float
    predicted_error: float
    times: LinearTimes

    @classmethod
    def of(
        cls, target: float, floating: Collection[str], errors: Mapping[str, float], times: LinearTimes
    ) -> LatencyReport:
        """floating: all linears that stay in float, whatever for; errors: as `float_layers_in_time` takes them."""
        left = {name: error for name, error in errors.items() if name not in floating}
        return cls(target, times.share(floating), times.share(()), predicted_error(left), times)

    def summary(self) -> dict[str, Any]:
        """For a checkpoint's metadata: {"target", "predicted", "all_quantised", "predicted_error", "device", "dtype"}."""
        return {
            "target": self.target,
            "predicted": self.predicted,
            "all_quantised": self.all_quantised,
            "predicted_error": self.predicted_error,
            "device": self.times.device,
            "dtype": self.times.dtype,
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and "seconds": {linear: [in float, in 8 bits]}."""
        return {**self.summary(), "seconds": {name: list(took) for name, took in self.times.seconds.items()}}


def float_layers_in_time(errors: Mapping[str, float], times: LinearTimes, target: float) -> list[str]:
    """The linears to keep in float so that all of them take at most `target` of their time in float.

    First those that 8 bits save no time; then, in the order of the squared error that each removes per second that it adds,
    every one that still fits. The error that is left never grows with the target, and the best of all choices removes no more
    than this one and the largest squared error that did not fit (the greedy bound of the knapsack problem).

    errors: of each linear alone, as `layer_sensitivity` gives them for the linears of `times`.

    Raises:
        ValueError: a target that cannot be reached (`LinearTimes.check`).
    """
    times.check(target)
    kept = times.no_faster()

    def gain(name: str) -> float:
        took = times.seconds[name]
        return errors[name] ** 2 / (took.floating - took.quantised)

    slower = [name for name in times.seconds if name not in kept and errors[name] > 0]
    for name in sorted(slower, key=gain, reverse=True):
        if times.share([*kept, name]) <= target:
            kept.append(name)
    return kept


def reasons(kept: Collection[str], times: LinearTimes, target: float) -> dict[str, str]:
    """Why each linear of `float_layers_in_time` stays in float, for people who read the report."""
    idle = set(times.no_faster())
    chosen = f"of those whose error is largest for the time that 8 bits save, wanted {target:g} of the time in float"
    return {name: f"8 bits save it no time on {times.device}" if name in idle else chosen for name in kept}


@torch.no_grad()
def time_linears(model: nn.Module, calls: Sequence[ForwardCall], scheme: str, smoothed: bool) -> LinearTimes:
    """Seconds of every block linear in one call, in float and in 8 bits, on the device where the model is.

    calls: as `quantize_transformer` takes them, alike in size; the first is watched for what reaches each linear. Linears of
    one use are timed once, with random input. smoothed: whether calibration will try SmoothQuant vectors.

    Raises:
        ValueError: no calls, a linear that the first does not reach, or a model that is quantised already.
    """
    if not calls:
        raise ValueError("calls is empty: linears are timed with the shapes that one call sends through them")
    uses = _uses(model, calls[0], scheme, smoothed)
    for name, found in uses.items():
        if not found:
            raise ValueError(f"the first calibration call did not reach {name}: it must run the whole model")
    first = {use: name for name, found in reversed(uses.items()) for use in found}
    best: dict[Use, Seconds] = {}
    for _ in range(ROUNDS):
        for use, name in first.items():
            took = _time_use(model.get_submodule(name), use, scheme)
            best[use] = Seconds(*map(min, took, best.get(use, took)))
    seconds = {
        name: Seconds(*(sum(count * best[use][form] for use, count in found.items()) for form in range(2)))
        for name, found in uses.items()
    }
    device = next(model.parameters()).device
    dtypes = sorted({str(use.dtype).removeprefix("torch.") for use in first})
    return LinearTimes(seconds, device_name(device), " and ".join(dtypes))


def _time_use(linear: nn.Module, use: Use, scheme: str) -> Seconds:
    assert isinstance(linear, nn.Linear)
    device = linear.weight.device
    smooth_K = torch.ones(linear.in_features, device=device) if use.smooth else None
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(use.shape, dtype=use.dtype, device=device, generator=generator)
    return Seconds(
        *(
            measure([functools.partial(_run, layer, x, use.gelu)], SECONDS_EACH, True, device)[0] / 1e3
            for layer in (linear, QuantLinear.from_linear(linear, scheme, smooth_K))
        )
    )


def _run(layer: nn.Module, x: Tensor, gelu: bool) -> Tensor:
    return gelu_linear(layer, Dual(x)).x if gelu else layer(x)


def _uses(model: nn.Module, call: ForwardCall, scheme: str, smoothed: bool) -> dict[str, Counter[Use]]:
    """What one call sends through every block linear, and how often."""
    uses: dict[str, Counter[Use]] = {}
    handles = []
    for block_name, block, site in model_sites(model):
        own_vector = site.fold == "layer"  # ffn.2's, behind GELU
        for name in site.linears:
            found = uses[f"{block_name}.{name}"] = Counter[Use]()

            def hook(
                linear: Any,
                args: tuple[Tensor, ...],
                found: Counter[Use] = found,
                gelu: bool = own_vector,
                smooth: bool = own_vector and smoothed and can_smooth(site, scheme),
            ) -> None:
                x = args[0]
                found[Use(tuple(x.shape), linear.out_features, linear.bias is not None, x.dtype, gelu, smooth)] += 1

            handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    try:
        call(model)
    finally:
        for handle in handles:
            handle.remove()
    return uses

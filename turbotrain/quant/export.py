"""From a float transformer to a quantised one, with the metadata of its checkpoint and the report of what it cost."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from turbotrain.model.quant_linear import QuantLinear
from turbotrain.quant.calibrate import DEFAULT_ALPHAS, LayerReport, Plan, choose, sqnr_db
from turbotrain.quant.finetune import Finetune, finetune_quantised, record_passes
from turbotrain.quant.latency import LatencyReport, float_layers_in_time, reasons, time_linears
from turbotrain.quant.observe import ForwardCall, observe
from turbotrain.quant.sensitivity import float_latents, float_layers, latent_error, layer_sensitivity, predicted_error
from turbotrain.quant.sites import fold, model_sites

PROBES = 8  # calibration calls that tell how much each linear bears; the held-out ones then judge a choice that never saw them


@dataclass(frozen=True)
class QuantizationReport:
    """layers: every block linear, as calibration found it. latent_errors: |quantised - float| / |float| of each held-out call's
    output. sensitivity: the error of each linear alone, where a target was to be met. latency: what was measured and foretold,
    where that target was a time. finetune: None where the weights were not fine-tuned, else {"steps", "lr", "batch_size",
    "passes", "latent_error_before", "latent_error_after", "kept"}: medians, and whether the tuned weights are the ones that
    came out."""

    scheme: str
    layers: list[LayerReport]
    latent_errors: list[float]
    sensitivity: dict[str, float] = field(default_factory=dict)
    finetune: dict[str, Any] | None = None
    latency: LatencyReport | None = None

    def metadata(self) -> dict[str, Any]:
        """The `quantization` entry of a checkpoint's metadata: {"scheme", "layers", "kept_float", "latent_error", "finetune",
        "latency"}.

        layers: {name: {"scheme", "alpha", "sqnr_db"}} of the quantised linears; kept_float: {name: reason}; latency: None, or
        `LatencyReport.summary`.
        """
        return {
            "scheme": self.scheme,
            "layers": {
                layer.name: {"scheme": layer.scheme, "alpha": layer.alpha, "sqnr_db": round(layer.sqnr_db, 2)}
                for layer in self.layers
                if layer.kept_float is None
            },
            "kept_float": {layer.name: layer.kept_float for layer in self.layers if layer.kept_float is not None},
            "latent_error": self.mean_latent_error,
            "finetune": self.finetune,
            "latency": None if self.latency is None else self.latency.summary(),
        }

    @property
    def mean_latent_error(self) -> float | None:
        """Mean relative error over the held-out calls; None without any."""
        return statistics.fmean(self.latent_errors) if self.latent_errors else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for report.json: {"scheme", "layers": [...], "latent_errors": [...], "latent_error",
        "latent_sqnr_db", "sensitivity", "finetune", "latency"}; latency: None, or `LatencyReport.to_dict`.
        """
        error = self.mean_latent_error
        return {
            "scheme": self.scheme,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "latent_errors": self.latent_errors,
            "latent_error": error,
            "latent_sqnr_db": None if error is None else sqnr_db(statistics.fmean(e * e for e in self.latent_errors)),
            "sensitivity": self.sensitivity,
            "finetune": self.finetune,
            "latency": None if self.latency is None else self.latency.to_dict(),
        }


@torch.no_grad()
def fold_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Fold the plan's vectors, in place: a float model that computes what it did. `layer` vectors wait for `apply_plan`."""
    for block_name, block, site in model_sites(model):
        vector = plan.vectors.get(f"{block_name}.{site.linears[0]}")
        if vector is not None and site.fold != "layer":
            fold(block, site, vector)
    return model


@torch.no_grad()
def quantize_folded(model: nn.Module, plan: Plan) -> nn.Module:
    """Put QuantLinear in the place of every linear that the plan quantises, in place, after `fold_plan`."""
    quantised = {layer.name for layer in plan.layers if layer.kept_float is None}
    for block_name, block, site in list(model_sites(model)):
        for name in site.linears:
            if f"{block_name}.{name}" not in quantised:
                continue
            vector = plan.vectors.get(f"{block_name}.{name}") if site.fold == "layer" else None
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            block.set_submodule(name, QuantLinear.from_linear(linear, plan.scheme, vector))
    return model


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Fold the plan's vectors and put QuantLinear in the place of every linear that it quantises, in place."""
    # After every fold: o's changes the rows of v.
    return quantize_folded(fold_plan(model, plan), plan)


@torch.no_grad()
def quantize_transformer(
    model: nn.Module,
    calls: Iterable[ForwardCall],
    held_out: Sequence[ForwardCall] = (),
    *,
    scheme: str = "int8_channel",
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    min_sqnr_db: float = 0.0,
    target_error: float = 0.0,
    target_latency: float = 0.0,
    max_rows: int = 256,
    seed: int = 0,
    finetune: Finetune | None = None,
) -> QuantizationReport:
    """Calibrate and quantise every block linear of a WanTransformer except P, in place; the report says what was done.

    calls: run the model on calibration prompts, through the sampler's own steps: each takes the model. held_out:
    calls on other prompts that return the latent; run before and after, they give the end-to-end error. alphas:
    SmoothQuant exponents to try, () for none. min_sqnr_db: a linear whose output stays below it is kept in float.
    target_error: relative error of the latents that is wanted; as many linears stay in float as the errors of the others
    foretell (see `sensitivity`); 0: none for this reason. It takes a pass of the last PROBES of `calls`, which must return the
    latent then, for every linear. target_latency: the time of the block linears that is wanted, as a share of their time in
    float on the model's device; as many stay in float as fit into it (see `latency`); 0: none for this reason. It takes the
    same passes. max_rows: inputs sampled per linear. finetune: the weights that are quantised are fine-tuned afterwards; where
    that does not lower the median error of `held_out`, the untuned ones stay, and the report says so.
    Errors: ValueError from calibration (see `observe`, `choose`, `layer_sensitivity`), for two targets, for a time that cannot
    be reached, for latents that are not finite, and for a fine-tuning that no held-out call can judge. The model is unchanged
    if one is raised before its weights are quantised.
    Source: method.md section 7; SmoothQuant, arXiv 2211.10438.
    """
    if finetune is not None and not held_out:
        raise ValueError("held_out is empty: whether fine-tuning helped is judged on calls that it never saw")
    if target_error and target_latency:
        raise ValueError(
            f"target_error={target_error:g}, target_latency={target_latency:g}: give one of the two targets"
        )
    calls = list(calls)
    references = float_latents(model, held_out)
    errors: dict[str, float] = {}
    keep: dict[str, str] = {}
    times = None
    if target_error:
        errors = layer_sensitivity(model, calls[-PROBES:], scheme)
        reason = f"of those that cause most of a latent error of {predicted_error(errors):.4f}, wanted {target_error:g}"
        keep = dict.fromkeys(float_layers(errors, target_error), reason)
    elif target_latency:
        times = time_linears(model, calls, scheme, bool(alphas))
        times.check(target_latency)  # before the errors, whose measurement takes longest
        errors = layer_sensitivity(model, calls[-PROBES:], scheme)
        keep = reasons(float_layers_in_time(errors, times, target_latency), times, target_latency)
    plan = choose(model, observe(model, calls, max_rows, seed), scheme, alphas, min_sqnr_db, keep)
    latency = None
    if times is not None:
        floating = {layer.name for layer in plan.layers if layer.kept_float is not None}
        latency = LatencyReport.of(target_latency, floating, errors, times)
    passes = [] if finetune is None else record_passes(model, finetune.calls)
    fold_plan(model, plan)
    folded = None if finetune is None else copy.deepcopy(model)
    quantize_folded(model, plan)

    def left() -> list[float]:
        return [latent_error(call(model), reference) for call, reference in zip(held_out, references)]

    found, said = left(), None
    if finetune is not None and folded is not None:
        untuned = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(finetune_quantised(folded, model, passes, finetune, seed))
        tuned = left()
        said = _tuning(finetune, len(passes), found, tuned)
        if said["kept"]:
            found = tuned
        else:
            model.load_state_dict(untuned)
    return QuantizationReport(scheme, plan.layers, found, errors, said, latency)


def _tuning(finetune: Finetune, passes: int, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """`QuantizationReport.finetune`. A distilled student is not continuous: one sample that falls another way can make most of a
    mean, so medians decide."""
    medians = [statistics.median(found) if all(map(math.isfinite, found)) else None for found in (before, after)]
    return {
        "steps": finetune.steps,
        "lr": finetune.lr,
        "batch_size": finetune.batch_size,
        "passes": passes,
        "latent_error_before": medians[0],
        "latent_error_after": medians[1],
        "kept": medians[1] is not None and (medians[0] is None or medians[1] < medians[0]),
    }

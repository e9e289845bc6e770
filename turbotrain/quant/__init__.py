"""Post-training quantisation of the transformer's linears to 8 bits (method.md section 7)."""

from turbotrain.quant.calibrate import DEFAULT_ALPHAS, LayerReport, Plan, choose
from turbotrain.quant.export import QuantizationReport, apply_plan, quantize_transformer
from turbotrain.quant.finetune import Finetune
from turbotrain.quant.latency import LatencyReport, LinearTimes, Seconds, float_layers_in_time, time_linears
from turbotrain.quant.observe import ForwardCall, InputStats, observe
from turbotrain.quant.sensitivity import float_layers, latent_error, layer_sensitivity, predicted_error
from turbotrain.quant.sites import SITES, Site, fold, model_sites

__all__ = [
    "DEFAULT_ALPHAS",
    "SITES",
    "Finetune",
    "ForwardCall",
    "InputStats",
    "LatencyReport",
    "LayerReport",
    "LinearTimes",
    "Plan",
    "QuantizationReport",
    "Seconds",
    "Site",
    "apply_plan",
    "choose",
    "float_layers",
    "float_layers_in_time",
    "fold",
    "latent_error",
    "layer_sensitivity",
    "model_sites",
    "observe",
    "predicted_error",
    "quantize_transformer",
    "time_linears",
]

"""Post-training quantisation of the transformer's linears to 8 bits (method.md section 7)."""

from turbotrain.quant.calibrate import DEFAULT_ALPHAS, LayerReport, Plan, choose
from turbotrain.quant.export import QuantizationReport, apply_plan, latent_error, quantize_transformer
from turbotrain.quant.observe import ForwardCall, InputStats, observe
from turbotrain.quant.sites import SITES, Site, fold, model_sites

__all__ = [
    "DEFAULT_ALPHAS",
    "SITES",
    "ForwardCall",
    "InputStats",
    "LayerReport",
    "Plan",
    "QuantizationReport",
    "Site",
    "apply_plan",
    "choose",
    "fold",
    "latent_error",
    "model_sites",
    "observe",
    "quantize_transformer",
]

"""The choice that calibration makes for each linear: how strongly to smooth its input, and whether 8 bits are enough.

Everything is judged by the arithmetic that will run: the W8A8 product of sampled inputs against the float product.

Shape suffixes: R sampled rows, N output features, K input features, H features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbokernels.w8a8.api import check_scheme, quantize_weight, w8a8_linear

from turbotrain.quant.observe import InputStats
from turbotrain.quant.sites import Site, block_linears, model_sites, tile_heads

DEFAULT_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# A vector wider than this would only move the outliers into the other operand.
MAX_SMOOTHING = 4096.0
# Noise below this share of the signal counts as none, so that every SQNR is a finite number.
SMALLEST_NOISE = 1e-20


@dataclass(frozen=True)
class LayerReport:
    """What was decided for one linear, and why.

    scheme: of the layer, or `float` when it is kept; alpha: SmoothQuant's exponent, None without smoothing.
    sqnr_db: signal-to-quantisation-noise ratio of its output (bias left out) on sampled inputs; unsmoothed_sqnr_db:
    without smoothing. input_absmax: largest input before smoothing. kept_float: the reason, None for a quantised layer.
    """

    name: str
    scheme: str
    alpha: float | None
    sqnr_db: float
    unsmoothed_sqnr_db: float
    input_absmax: float
    kept_float: str | None = None


@dataclass(frozen=True)
class Plan:
    """layers: one report per block linear, in the model's order of sites; vectors: smoothing vector by a site's
    first linear.
    """

    scheme: str
    layers: list[LayerReport] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)


def sqnr_db(noise_ratio: float) -> float:
    """Decibels of |signal|^2 / |noise|^2, given its inverse; at most 200."""
    return -10.0 * math.log10(max(noise_ratio, SMALLEST_NOISE))


def noise_ratio(x_RK: Tensor, weight_NK: Tensor, scheme: str) -> float:
    """|W8A8(x) - W x|^2 / |W x|^2 over the rows; 0 where both are zero."""
    signal_RN = F.linear(x_RK, weight_NK)
    noise_RN = w8a8_linear(x_RK, *quantize_weight(weight_NK, scheme), scheme=scheme) - signal_RN
    power = signal_RN.double().square().sum()
    return float(noise_RN.double().square().sum() / power.clamp_min(torch.finfo(torch.float64).tiny))


def smoothing_vector(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = input_absmax^alpha / weight_absmax^(1 - alpha) per channel (SmoothQuant, arXiv 2211.10438, equation 4).

    Scaled to a geometric mean of 1 (a common factor changes no quantised value); 1 for channels that are always
    zero. Rounded to bf16, so that casting the model later does not separate the vector from the weights that were
    multiplied by it.
    """
    known = (input_absmax > 0) & (weight_absmax > 0)
    log_s = alpha * input_absmax.double().log() - (1 - alpha) * weight_absmax.double().log()
    log_s = torch.where(known, log_s, 0.0)
    log_s = torch.where(known, log_s - log_s.sum() / known.sum().clamp_min(1), 0.0)
    bound = math.log(MAX_SMOOTHING)
    return log_s.clamp(-bound, bound).exp().bfloat16().float()


def can_smooth(site: Site, scheme: str) -> bool:
    # Published int8_block128 files have no place for vectors that are applied at run time.
    return site.fold != "none" and not (scheme == "int8_block128" and site.at_run_time)


def _site_vector(site: Site, block: nn.Module, stat_K: Tensor, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Candidate vector (K,), or (H,) for the sites of o: the extremes of all linears, and of all heads, together."""
    weight_absmax_K = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    if site.fold == "values":
        n_heads = int(block.get_submodule(site.linears[0].split(".")[0]).num_heads)  # pyright: ignore[reportArgumentType]
        stat_K, weight_absmax_K = (extreme.unflatten(0, (n_heads, -1)).amax(0) for extreme in (stat_K, weight_absmax_K))
    return smoothing_vector(stat_K, weight_absmax_K, alpha)


@torch.no_grad()
def choose(
    model: nn.Module,
    stats: Mapping[str, InputStats],
    scheme: str = "int8_channel",
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    min_sqnr_db: float = 0.0,
    keep: Mapping[str, str] | None = None,
) -> Plan:
    """Choose, for each site, the alpha whose quantised outputs are nearest to the float ones; no smoothing is always
    a candidate.

    The linears of a site share its vector: their noise ratios are added. A linear whose SQNR stays below `min_sqnr_db`,
    or that `keep` names (with the reason), is kept in float; when that leaves none of a site, the site is not
    smoothed. The model is not changed.
    Errors: ValueError for an unknown scheme, an alpha outside [0, 1], a model that is quantised already, and weights that are
    not finite.
    """
    check_scheme("calibrate", scheme)
    outside = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if outside:
        raise ValueError(f"alphas={outside} are out of range; SmoothQuant's exponent is in [0, 1]")
    plan = Plan(scheme)
    # Divisors of output features that an earlier site's fold brings: o's vector in the rows of v.
    row_divisors: dict[str, Tensor] = {}
    for block_name, block, site in model_sites(model):
        linears = block_linears(block)
        stat = stats[f"{block_name}.{site.linears[0]}"]
        assert stat.absmax_K is not None
        x_RK = stat.rows_RK
        weights = {name: linears[name].weight.float() for name in site.linears}
        for name in weights:
            divisor = row_divisors.get(f"{block_name}.{name}")
            if divisor is not None:
                weights[name] = weights[name] / divisor[:, None]

        best_alpha, best_vector, best_noise = None, None, {n: noise_ratio(x_RK, w, scheme) for n, w in weights.items()}
        plain_noise = best_noise
        for name, noise in plain_noise.items():
            if math.isnan(noise):
                raise ValueError(f"the weight of {block_name}.{name} holds NaN or Inf: check the checkpoint")
        for alpha in alphas if can_smooth(site, scheme) else ():
            vector = _site_vector(site, block, stat.absmax_K, weights, alpha)
            vector_K = tile_heads(vector, x_RK.shape[1])
            noise = {name: noise_ratio(x_RK / vector_K, weight * vector_K, scheme) for name, weight in weights.items()}
            if sum(noise.values()) < sum(best_noise.values()):
                best_alpha, best_vector, best_noise = alpha, vector, noise

        reasons = {
            name: f"SQNR {sqnr_db(noise):.1f} dB is below min_sqnr_db={min_sqnr_db:g}"
            for name, noise in best_noise.items()
            if sqnr_db(noise) < min_sqnr_db
        }
        named = {name: (keep or {}).get(f"{block_name}.{name}") for name in weights}
        reasons |= {name: reason for name, reason in named.items() if reason is not None}
        if len(reasons) == len(weights):
            best_alpha, best_vector = None, None
        if best_vector is not None:
            plan.vectors[f"{block_name}.{site.linears[0]}"] = best_vector
            if site.fold == "values":
                row_divisors |= {f"{block_name}.{name}": tile_heads(best_vector, x_RK.shape[1]) for name in site.target}
        for name in weights:
            sqnr, reason = sqnr_db(best_noise[name]), reasons.get(name)
            plan.layers.append(
                LayerReport(
                    name=f"{block_name}.{name}",
                    scheme=scheme if reason is None else "float",
                    alpha=best_alpha,
                    sqnr_db=sqnr,
                    unsmoothed_sqnr_db=sqnr_db(plain_noise[name]),
                    input_absmax=float(stat.absmax_K.max()),
                    kept_float=reason,
                )
            )
    return plan

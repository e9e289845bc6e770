"""Quality of thousands of clips in the shapes world, as numbers with 95% intervals that respect prompts.

Several seeds of one prompt are no independent samples: every interval resamples prompts, with all seeds of a prompt together.
Means and ratios are bootstrapped; statistics of how many different things there are (coverage, entropy) and the Frechet distance
are jackknifed, because a bootstrap sample repeats prompts and so always looks poorer than the sample that it was drawn from.

Legend: P prompts, E seeds of each, N = P E clips (seeds of a prompt side by side), S objects of a caption, R resamples, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from turbotrain.data.shapes import GRID
from turbotrain.evaluation.frechet import gaussian, gaussian_distance
from turbotrain.evaluation.metrics import RANGE, SIGMA, WINDOW, jackknife_reach
from turbotrain.evaluation.readings import NAMES, Judgements

RESAMPLES, GROUPS = 1000, 16
CELLS = GRID * GRID


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        return [round(float(number), 6) for number in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class Measured:
    """What is known of N clips, on the CPU: judgements, features (N, 128), PSNR (dB) and SSIM to reference clips, and judgements
    by other prompts' captions."""

    judged: Judgements
    features: np.ndarray
    psnr: np.ndarray | None = None
    ssim: np.ndarray | None = None
    shuffled: Judgements | None = None


def summarise(measured: Measured, seeds: int, real_features: np.ndarray) -> dict[str, list[float]]:
    """{metric: [value, low, high]}.

    accuracy and one entry an attribute: the share of captioned attributes read right. shuffled: accuracy by other prompts'
    captions, the level of chance. motion: of objects whose direction and speed are both right. steady: of frames in which an
    object keeps its straight path and its area (temporal consistency). coverage: exp(entropy) of the start cells over their
    number; entropy in bits. spread: mean distance in pixels between the starts of one object in two seeds of a prompt. frechet:
    to the features of rendered clips (see `frechet`).

    Args:
        seeds: clips of each prompt; they lie side by side.

    Raises:
        ValueError: the clips are no multiple of `seeds`, or only one prompt.
    """
    judged = measured.judged
    clips = len(judged.ground_B)
    if seeds < 1 or clips % seeds or clips // seeds < 2:
        raise ValueError(
            f"{clips} clips with {seeds} seeds a prompt: expected at least two prompts, each with all seeds"
        )
    named_NS = judged.named_BS.numpy()
    right_NSA = judged.right_BSA.numpy()
    found: dict[str, Estimate] = {}
    found["accuracy"] = _ratio(*_right_claims(judged), seeds)
    if measured.shuffled is not None:
        found["shuffled"] = _ratio(*_right_claims(measured.shuffled), seeds)
    for index, name in enumerate(NAMES):
        found[name] = _ratio(right_NSA[..., index].sum(1), named_NS.sum(1), seeds)
    found["background"] = _ratio(judged.ground_B.numpy(), np.ones(clips), seeds)
    moving_NS = right_NSA[..., NAMES.index("direction")] & right_NSA[..., NAMES.index("speed")]
    found["motion"] = _ratio(moving_NS.sum(1), named_NS.sum(1), seeds)
    found["steady"] = _ratio(judged.steady_BS.numpy().sum(1), named_NS.sum(1), seeds)
    counts_PC = _cell_counts(judged.cell_BS.numpy(), seeds)
    found["coverage"] = _jackknifed(counts_PC, coverage_of_counts, (0.0, 1.0))
    found["entropy"] = _jackknifed(counts_PC, entropy_of_counts, (0.0, float(np.log2(CELLS))))
    if seeds > 1:
        found["spread"] = _ratio(*_start_distances(judged, seeds), 1)
    found["frechet"] = _frechet(measured.features, real_features, seeds)
    for name, values in (("psnr", measured.psnr), ("ssim", measured.ssim)):
        if values is not None:
            found[name] = _ratio(values, np.ones(clips), seeds)
    return {name: estimate.to_list() for name, estimate in found.items()}


def prompt_values(judged: Judgements, seeds: int) -> dict[str, np.ndarray]:
    """{metric: (P,)} of accuracy, coverage and, of several seeds, spread: a number a prompt, so that two networks can be compared
    prompt by prompt. Not finite where leaving a prompt out leaves nothing.

    They are the jackknife's pseudo-values, P f(all) - (P - 1) f(all but this prompt) (Tukey 1958). Of a mean these are the
    prompts' own values; of any smooth statistic their mean is the estimate but for a bias of order 1 / P, and their variance
    over P is its variance.
    """
    above_P, below_P = (numbers_N.reshape(-1, seeds).sum(1) for numbers_N in _right_claims(judged))
    found = {"accuracy": _pseudo_values(*_left_out_ratios(above_P, below_P))}
    counts_PC = _cell_counts(judged.cell_BS.numpy(), seeds)
    found["coverage"] = _pseudo_values(*_left_out_counts(counts_PC, coverage_of_counts))
    if seeds > 1:
        found["spread"] = _pseudo_values(*_left_out_ratios(*_start_distances(judged, seeds)))
    return found


def _pseudo_values(value: float, left_out_P: np.ndarray) -> np.ndarray:
    return len(left_out_P) * value - (len(left_out_P) - 1) * left_out_P


def _left_out_ratios(above_P: np.ndarray, below_P: np.ndarray) -> tuple[float, np.ndarray]:
    """sum(above) / sum(below) of all prompts, and without each (P,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return above_P.sum() / below_P.sum(), (above_P.sum() - above_P) / (below_P.sum() - below_P)


def _left_out_counts(counts_PC: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, np.ndarray]:
    """The statistic of all prompts' counts together, and without each prompt's (P,)."""
    whole_C = counts_PC.sum(0)
    return statistic(whole_C), np.asarray([statistic(whole_C - counts_C) for counts_C in counts_PC])


def _right_claims(judged: Judgements) -> tuple[np.ndarray, np.ndarray]:
    """How many captioned attributes of each clip are read right, and how many there are: (N,) each."""
    right_N = judged.right_BSA.numpy().sum((1, 2)) + judged.ground_B.numpy()
    return right_N, len(NAMES) * judged.named_BS.numpy().sum(1) + 1


def coverage_of_counts(counts_C: np.ndarray) -> float:
    """exp(entropy) / number of cells, as `judge.coverage`; 0 without a count."""
    return float(2 ** entropy_of_counts(counts_C) / len(counts_C)) if counts_C.sum() else 0.0


def entropy_of_counts(counts_C: np.ndarray) -> float:
    """In bits; 0 without a count."""
    share = counts_C[counts_C > 0] / max(1, counts_C.sum())
    return float(-(share * np.log2(share)).sum())


def _ratio(above_N: np.ndarray, below_N: np.ndarray, seeds: int) -> Estimate:
    """sum(above) / sum(below), bootstrapped over prompts."""
    above_P, below_P = (np.asarray(values, dtype=np.float64).reshape(-1, seeds).sum(1) for values in (above_N, below_N))
    prompts = len(above_P)
    times_RP = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        values_R = (times_RP @ above_P) / (times_RP @ below_P)
        value = float(above_P.sum() / below_P.sum())
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R):
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(values_R, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _cell_counts(cell_NS: np.ndarray, seeds: int) -> np.ndarray:
    """How many objects of each prompt began in each cell (P, C)."""
    cell_PX = cell_NS.reshape(-1, seeds * cell_NS.shape[1])
    return np.stack([(cell_PX == cell).sum(1) for cell in range(CELLS)], 1)


def _jackknifed(
    counts_PC: np.ndarray, statistic: Callable[[np.ndarray], float], limits: tuple[float, float]
) -> Estimate:
    """Leave-one-prompt-out, cut off where the statistic ends."""
    value, left_out_P = _left_out_counts(counts_PC, statistic)
    reach = jackknife_reach(left_out_P)
    return Estimate(value, max(limits[0], value - reach), min(limits[1], value + reach))


def _start_distances(judged: Judgements, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over pairs of seeds of the distance between an object's starts, where both found it, and their number: (P,) each."""
    found_PES = judged.found_BS.numpy().reshape(-1, seeds, judged.found_BS.shape[1])
    start_PES2 = judged.start_BS2.numpy().reshape(*found_PES.shape, 2)
    above, below = np.zeros(len(found_PES)), np.zeros(len(found_PES))
    for first, second in itertools.combinations(range(seeds), 2):
        both_PS = found_PES[:, first] & found_PES[:, second]
        apart_PS = np.linalg.norm(start_PES2[:, first] - start_PES2[:, second], axis=-1)
        above += np.where(both_PS, apart_PS, 0.0).sum(1)
        below += both_PS.sum(1)
    return above, below


def _frechet(features_ND: np.ndarray, real_ND: np.ndarray, seeds: int) -> Estimate:
    """Distance to the real clips; groups of prompts are left out in turn."""
    real = gaussian(real_ND)
    value = gaussian_distance(*gaussian(features_ND), *real)
    prompt_N = np.arange(len(features_ND)) // seeds
    groups = min(GROUPS, len(features_ND) // seeds)
    if len(features_ND) - len(features_ND) // groups < 2:
        return Estimate(value, np.nan, np.nan)
    left_out = [gaussian_distance(*gaussian(features_ND[prompt_N % groups != group]), *real) for group in range(groups)]
    reach = jackknife_reach(left_out)
    return Estimate(value, max(0.0, value - reach), value + reach)


# ---- likeness to other clips of the same noise ---------------------------------------------------------------------


@torch.no_grad()
def clip_psnr(a_BTHWC: Tensor, b_BTHWC: Tensor) -> Tensor:
    """`metrics.psnr` of each pair of clips (B,), at most 100 dB: identical clips would make every mean infinite."""
    error_B = (a_BTHWC.float() - b_BTHWC.float()).square().mean((1, 2, 3, 4))
    return (20 * np.log10(RANGE) - 10 * error_B.log10()).clamp_max(100.0)


@torch.no_grad()
def clip_ssim(a_BTHWC: Tensor, b_BTHWC: Tensor) -> Tensor:
    """`metrics.ssim` of each pair of clips (B,)."""
    offsets = torch.arange(WINDOW, dtype=torch.float32, device=a_BTHWC.device) - WINDOW // 2
    window = (-(offsets**2) / (2 * SIGMA**2)).exp()
    window = (window / window.sum()).expand(3, 1, 1, -1)

    def blur(plane_NCHW: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(plane_NCHW, window, groups=3), window.mT, groups=3)

    clips, frames = a_BTHWC.shape[:2]
    # Around the middle of the range, where float32 resolves the variances' differences of squares.
    a, b = (clip.flatten(0, 1).permute(0, 3, 1, 2).float() - RANGE / 2 for clip in (a_BTHWC, b_BTHWC))
    with torch.backends.cudnn.flags(allow_tf32=False):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + RANGE / 2, mean_b + RANGE / 2
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3)).view(clips, frames).mean(1)

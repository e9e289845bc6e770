"""Frechet distance between sets of clips, in the feature space of a fixed random network.

Features: a convolutional network over space and time whose weights are drawn once from a seeded generator and never trained.
Random features see colour, shape, place and motion of simple worlds, need no download, and are the same everywhere; they are no
substitute for a trained network's on natural videos. Distances of different feature spaces cannot be compared.

Legend: B clips, T frames, H, W pixels, C channels, N samples, D features.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 128
_CHANNELS = (3, 16, 32, 32)
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
_EVERY = 4  # frames: one a latent frame
_CELLS = 2  # features are averaged in each quarter of the picture


@functools.cache
def _weights(device: torch.device) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(20240501)
    weights = []
    for before, after in itertools.pairwise(_CHANNELS):
        drawn = rng.standard_normal((after, before, 3, 3, 3)) * np.sqrt(2 / (before * 27))
        weights.append(torch.from_numpy(drawn.astype(np.float32)).to(device))
    return tuple(weights)


@torch.no_grad()
def clip_features(frames_BTHWC: Tensor) -> Tensor:
    """Features (B, 128) float32 of clips uint8 (B, T, H, W, 3), of any length and size."""
    x = frames_BTHWC[:, ::_EVERY].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.backends.cudnn.flags(allow_tf32=False):  # the same features on every device
        for weight, stride in zip(_weights(x.device), _STRIDES):
            x = F.relu(F.conv3d(x, weight, stride=stride, padding=1))
    return F.adaptive_avg_pool2d(x.mean(2), _CELLS).flatten(1)


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians fitted to two sets of features (Heusel et al. 2017)."""
    return gaussian_distance(*gaussian(a_ND), *gaussian(b_ND))


def gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) in float64. Raises ValueError for fewer than two samples."""
    if len(features_ND) < 2:
        raise ValueError(f"{len(features_ND)} samples: a covariance needs at least two")
    features_ND = np.asarray(features_ND, dtype=np.float64)
    return features_ND.mean(0), np.cov(features_ND, rowvar=False)


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric."""
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    crossed = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * crossed
    return float(max(0.0, distance))

"""The arithmetic that MFU divides by is what torch counts in a pass; speeds are per step over all processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.training.flops import forward_flops
from turbotrain.training.meter import Meter, Work


@pytest.mark.parametrize("variant", ["wan2.1_t2v_1.3b", "wan2.1_i2v_14b"])
def test_flops_are_those_of_a_pass(variant: str) -> None:
    """A small network of the variant's structure, dense attention. Left out of the estimate: the time embedding."""
    full = VARIANTS[variant].config
    config = dataclasses.replace(full, dim=256, ffn_dim=640, num_heads=2, num_layers=2, text_dim=384)
    grid = (4, 16, 16)
    network = WanTransformer(config)
    x = torch.randn(1, config.out_channels, *grid)
    extra = config.in_channels - config.out_channels
    y = torch.randn(1, extra, *grid) if extra else None
    clip = None if config.image_dim is None else torch.randn(1, 257, config.image_dim)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own is not counted
        network(x, torch.tensor([500.0]), torch.randn(1, config.text_len, config.text_dim), y, clip)
    assert forward_flops(config, AttentionConfig(), grid) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_sparse_attention_counts_what_it_keeps() -> None:
    config = VARIANTS["wan2.1_t2v_1.3b"].config
    grid = (21, 60, 104)
    dense, half, tenth = (
        forward_flops(config, attention, grid)
        for attention in (AttentionConfig(), AttentionConfig("sla", 0.5, 64, 64), AttentionConfig("sla", 0.1, 64, 64))
    )
    pairs = 4 * 32760**2 * config.dim * config.num_layers
    assert dense - half == pytest.approx(0.5 * pairs, rel=0.02)
    assert half - tenth == pytest.approx(0.4 * pairs, rel=0.01)
    by_layer = AttentionConfig("sla", block_q=64, block_k=64, layer_topk=(0.5, *[0.1] * (config.num_layers - 1)))
    found = forward_flops(config, by_layer, grid)
    assert found == pytest.approx(tenth + (half - tenth) / config.num_layers, rel=1e-9)


def test_a_step_says_how_fast_it_was() -> None:
    meter = Meter(torch.device("cpu"))
    meter.start()
    meter.before_last_backward()
    assert meter.own_times().keys() == {"alone"}
    said = meter.stop({"alone": [0.25, 1.0]}, Work(tokens=1000, flops=1e9))
    assert said["tokens_per_s"] == pytest.approx(1000 / said["seconds"])
    assert (said["straggle_seconds"], said["slowest_rank"]) == (0.75, 1.0)
    assert said["memory_gib"] > 0
    assert "mfu" not in said, "no peak is known for a CPU"

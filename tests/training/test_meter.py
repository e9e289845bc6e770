"""The arithmetic that MFU divides by is what torch counts in a pass; speeds are per step over all processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from turbotrain.config import LoraSection, load_config
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.lora import add_lora
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.context import Passes, StageContext
from turbotrain.stages.rcm import StepWork
from turbotrain.training.flops import backward_flops, forward_flops
from turbotrain.training.meter import Meter, Work

GRID = (4, 16, 16)
SPARSE = AttentionConfig("sla", 0.1, 128, 64)
LORAS = {
    "whole": None,
    "lora": LoraSection(rank=16),
    "lora of attention": LoraSection(rank=32, targets=["self_attn.*", "cross_attn.*"]),
}


@pytest.mark.parametrize("how", LORAS)
@pytest.mark.parametrize("variant", ["wan2.1_t2v_1.3b", "wan2.1_i2v_14b"])
def test_flops_are_those_of_a_pass(variant: str, how: str) -> None:
    """Forward and backward of a small network of the variant's structure, dense attention, as torch counts its products. Left out
    of the estimate: the time embedding."""
    full, lora = VARIANTS[variant].config, LORAS[how]
    config = dataclasses.replace(full, dim=256, ffn_dim=640, num_heads=2, num_layers=4, text_dim=384)
    network = WanTransformer(config)
    if lora is not None:
        add_lora(network, lora.rank, lora.rank, lora.targets, seed=0)
    x = torch.randn(1, config.out_channels, *GRID)
    extra = config.in_channels - config.out_channels
    y = torch.randn(1, extra, *GRID) if extra else None
    clip = None if config.image_dim is None else torch.randn(1, 257, config.image_dim)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own is not counted
        with FlopCounterMode(display=False) as forward:
            out = network(x, torch.tensor([500.0]), torch.randn(1, config.text_len, config.text_dim), y, clip)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    pair = (count(config, AttentionConfig(), GRID, lora) for count in (forward_flops, backward_flops))
    assert tuple(pair) == pytest.approx((forward.get_total_flops(), backward.get_total_flops()), rel=0.02)


def test_a_frozen_network_has_no_gradients_of_weights() -> None:
    """Wan 2.1 14B at 480p counted by hand, in products of all linears of its blocks: forward, backward without and with LoRA."""
    config = VARIANTS["wan2.1_t2v_14b"].config
    grid, length = (21, 60, 104), 32760
    linears = config.num_layers * length * 2 * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    attention = config.num_layers * 4 * length * config.dim * (length + config.text_len)
    factors = 32 * config.num_layers * length * 2 * (6 * 2 * config.dim + 2 * (config.dim + config.ffn_dim))
    forward, whole = (count(config, AttentionConfig(), grid) for count in (forward_flops, backward_flops))
    lora = backward_flops(config, AttentionConfig(), grid, LoraSection(rank=32))
    assert forward == pytest.approx(linears + attention, rel=0.01)
    assert whole == pytest.approx(2 * linears + 2 * attention, rel=0.01)
    assert lora == pytest.approx(linears + 2 * factors + 2 * attention, rel=0.01)
    assert lora < 0.8 * whole


def test_a_step_counts_what_it_trains(tmp_path: Path) -> None:
    """A step of SLA: the teacher's forward pass, the student's, and a backward pass that LoRA makes cheaper."""
    given = ["recipe=wan2.1_t2v_1.3b_480p", "data.path=shards", "model.teacher=teacher"]
    work = {}
    for rank in (0, 8):
        config = load_config([*given, f"lora.rank={rank}"])
        context = StageContext("sla", config, tmp_path, {}, Accelerator(cpu=True))
        work[rank] = context.work(2, Passes(SPARSE, 1.0, 1.0), Passes(AttentionConfig(), 1.0, trained=False)).flops
        network, grid, lora = context.variant.config, context.latent_shape[1:], config.lora if rank else None
        one = forward_flops(network, SPARSE, grid, lora) + backward_flops(network, SPARSE, grid, lora)
        assert work[rank] == pytest.approx(2 * (one + forward_flops(network, AttentionConfig(), grid)))
    assert work[8] < 0.9 * work[0]


def test_a_high_noise_experts_step_counts_its_boundary_condition(tmp_path: Path) -> None:
    """One more forward and backward pass of the student, and a forward pass of the low-noise one's: in scm alone."""
    config = load_config(["recipe=wan2.2_t2v_a14b", "model.expert=high", "data.path=shards", "model.teacher=teacher"])
    context = StageContext("rcm", config, tmp_path, {}, Accelerator(cpu=True))
    low = AttentionConfig("sla", 0.2, 64, 64)
    alone, bound = StepWork(context, SPARSE, AttentionConfig()), StepWork(context, SPARSE, AttentionConfig(), low)
    network, grid = context.variant.config, context.latent_shape[1:]
    more = (
        forward_flops(network, SPARSE, grid) + backward_flops(network, SPARSE, grid) + forward_flops(network, low, grid)
    )
    for dmd in (False, True):
        found = bound.student("scm", dmd).flops - alone.student("scm", dmd).flops
        assert found == pytest.approx(config.rcm.batch_size * more)
        assert bound.student("dcm", dmd) == alone.student("dcm", dmd)
    assert bound.critic() == alone.critic()


def test_simulated_samples_take_as_many_passes_as_the_task_draws(tmp_path: Path) -> None:
    """One to `passes` in turn, the last of each counted apart: two fewer draws are one forward pass less on average."""
    config = load_config(["recipe=wan2.1_t2v_1.3b_480p", "data.path=shards", "model.teacher=teacher"])
    context = StageContext("rcm", config, tmp_path, {}, Accelerator(cpu=True))
    four, two = (StepWork(context, SPARSE, AttentionConfig(), passes=passes) for passes in (4, 2))
    one = config.rcm.batch_size * forward_flops(context.variant.config, SPARSE, context.latent_shape[1:])
    assert four.critic().flops - two.critic().flops == pytest.approx(one)
    assert four.student("none", True).flops - two.student("none", True).flops == pytest.approx(one)
    assert four.student("scm", False) == two.student("scm", False)


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

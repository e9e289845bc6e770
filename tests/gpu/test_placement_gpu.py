"""Swapped networks on a GPU: the same numbers, copies from page-locked memory, and the memory that the arithmetic says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from turbotrain.evaluation.random_weights import random_inputs, random_network
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.placement import footprint
from turbotrain.placement.swap import Swap

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
VARIANT = VARIANTS["wan2.1_t2v_1.3b"]
CONFIG = dataclasses.replace(VARIANT.config, num_layers=5)
SAGE = AttentionConfig("sage_sla", block_q=128, block_k=64)
FRAMES, HEIGHT, WIDTH = 33, 480, 832
SHAPE = VARIANT.latent_shape(FRAMES, HEIGHT, WIDTH)
TOKENS = SHAPE[1] * SHAPE[2] * SHAPE[3] // 4


@pytest.fixture(autouse=True)
def real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what is filled with NaN first is timed and counted with it


@pytest.mark.parametrize("scheme", [None, "int8_channel"])
@pytest.mark.parametrize("kept", [0, 1, 5])
@torch.inference_mode()
def test_swapped_networks_give_the_same_numbers(kept: int, scheme: str | None) -> None:
    model = random_network(CONFIG, SAGE, scheme, CUDA, torch.bfloat16)
    with CUDA:
        given = random_inputs(CONFIG, VARIANT.latent_shape(5, 128, 128), 1)
    expected = model(**given)
    model.to("cpu")
    swap = Swap([[model, *model.blocks]], CUDA, kept=kept)
    assert all(parameter.is_pinned() for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(model(**given), expected)
    held = torch.cuda.memory_allocated()
    swap.release()
    assert held - torch.cuda.memory_allocated() >= 0.95 * swap.device_bytes
    assert torch.equal(model(**given), expected)
    swap.close()


@pytest.mark.parametrize(
    ("attention", "scheme", "rows"),
    [
        (SAGE, "int8_channel", None),
        (SAGE, "int8_channel", 4096),
        (AttentionConfig(), None, None),
        (SAGE, "int8_block128", 4096),
    ],
)
@torch.inference_mode()
def test_activations_take_what_the_arithmetic_says(
    attention: AttentionConfig, scheme: str | None, rows: int | None
) -> None:
    model = random_network(CONFIG, attention, scheme, CUDA, torch.bfloat16)
    for block in model.blocks:
        block.ffn_rows = rows
    with CUDA:
        given = random_inputs(CONFIG, SHAPE, 1)
    model(**given)  # what is compiled or searched for once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(**given)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = footprint.forward_bytes(CONFIG, attention, scheme, TOKENS, ffn_rows=rows)
    assert predicted == pytest.approx(measured, rel=0.1)

"""Training passes on a GPU with what stands between the linears compiled, and blocks computed again without tangents."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from turbotrain.evaluation.random_weights import random_inputs, random_network
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer

pytestmark = pytest.mark.gpu

SHAPE = (16, 3, 16, 24)
Result = dict[str, Tensor]


def results(model: WanTransformer, given: dict[str, Tensor], mixed: bool) -> Result:
    """Velocity, tangent and every gradient."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = given["x_BCTHW"]
    direction, weight = (torch.randn(x.shape, generator=generator, device="cuda") for _ in range(2))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed, cache_enabled=False):
        v, tv = model(**given, tangents=(direction, torch.full_like(given["timestep"], 30.0)))
    (v * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"v": v.detach(), "tangent": tv, **gradients}


def distance(found: Result, exact: Result) -> float:
    """Over all of it, each part relative to its own size."""
    parts = [(found[name] - exact[name]).norm() / exact[name].norm() for name in exact if exact[name].norm() > 0]
    return torch.stack(parts).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["dense", "sla"])
def test_compiled_and_checkpointed_passes_round_as_plain_ones_do(kind: str) -> None:
    published = VARIANTS["wan2.1_t2v_1.3b"].config
    config = dataclasses.replace(published, dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=32)
    torch.manual_seed(0)
    # Every block kept: in bf16 other blocks might be chosen.
    attention = AttentionConfig(kind, topk=1.0, block_q=64, block_k=64)
    model = random_network(config, attention, None, torch.device("cuda"), torch.float32).train().requires_grad_(True)
    with torch.device("cuda"):
        given = random_inputs(config, SHAPE, 1)
    exact, plain = results(model, given, mixed=False), results(model, given, mixed=True)
    model.compile_element_wise().enable_activation_checkpointing()
    assert distance(results(model, given, mixed=True), exact) < 1.3 * distance(plain, exact)

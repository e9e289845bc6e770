"""Prompt to mp4 with random weights: every part is there, of its variant's sizes, and the teachers stand beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from turbotrain.evaluation import random_weights
from turbotrain.evaluation.end_to_end import benchmark_random, print_random
from turbotrain.evaluation.forward import DENSE, FIELD, attention_of
from turbotrain.evaluation.random_weights import random_diffusers_network, random_image_conditioning, random_network
from turbotrain.inference import main
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import VARIANTS, Variant, WanConfig

TINY_I2V = Variant(
    "tiny_i2v",
    WanConfig(
        dim=128, ffn_dim=160, num_heads=1, num_layers=1, in_channels=36, text_dim=64, image_dim=48, model_type="i2v"
    ),
    experts=("high", "low"),
    boundary=0.9,
    frames=5,
    width=32,
    height=32,
)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "end_to_end.json"
    given = ["mode=benchmark", "weights=random", "model=shapes", "frames=5", "repeats=1", "warmup=0", "device=cpu"]
    assert main([*given, f"json={target}"]) == 0
    result = json.loads(target.read_text())
    assert list(result["phases"]) == ["text", "dit_step", "dit", "vae", "encode", "total"]
    assert result["settings"]["steps"] == 4
    assert result["cold_start_s"] > result["first_video_s"] == result["phases"]["total"]["median_s"]
    dit_s, rows = result["phases"]["dit"]["median_s"], result["forward"]["rows"]
    assert result["forward"]["settings"]["attention_kind"] == "sage_sla"
    for name in (DENSE, FIELD):
        assert result["teacher_over_dit"][name] == pytest.approx(100 * rows[name]["median_s"] / dit_s)
    printed = " ".join(capsys.readouterr().out.split())
    assert "first mp4, weights made and not read" in printed
    assert f"times the {dit_s * 1e3:.1f} ms of all DiT steps" in printed


def test_two_experts_and_an_image(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = random_weights._vae_on_meta

    def narrow(variant: Variant, dtype: torch.dtype) -> Any:
        vae: Any = small(variant, dtype)
        with torch.device("meta"):
            return type(vae)(**{**vae.config, "base_dim": 8})

    monkeypatch.setattr(random_weights, "_vae_on_meta", narrow)
    result = benchmark_random(TINY_I2V, device=torch.device("cpu"), repeats=1, warmup=0, steps=4)
    assert list(result["phases"]) == ["text", "image", "dit_step", "dit", "vae", "encode", "total"]
    parts = sum(result["phases"][name]["median_s"] for name in ("text", "image", "dit", "vae", "encode"))
    assert parts == pytest.approx(result["phases"]["total"]["median_s"])
    assert result["settings"]["video_shape"] == [5, 32, 32, 3]
    print_random(result)
    assert "image" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", [None, "int8_channel"])
def test_a_network_is_made_as_it_is_used(scheme: str | None) -> None:
    variant = VARIANTS["shapes"]
    network = random_network(variant.config, attention_of(variant, "sla"), scheme, torch.device("cpu"), torch.bfloat16)
    linears = [layer for layer in network.modules() if isinstance(layer, QuantLinear)]
    assert len(linears) == (0 if scheme is None else 10 * variant.config.num_layers)
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}
    assert network.head.head.weight.dtype == torch.float32
    assert network.patch_embedding.weight.dtype == torch.bfloat16
    assert all(tensor.float().isfinite().all() for tensor in network.state_dict().values())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_diffusers_network_keeps_its_islands() -> None:
    """What its `from_pretrained` keeps in float32; a cast of everything would be faster and is not what people run."""
    network: Any = random_diffusers_network(VARIANTS["shapes"].config, torch.device("cpu"), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
    for name in (
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.weight",
        "condition_embedder.time_embedder.linear_1.weight",
    ):
        assert dtypes[name] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert network.rope.freqs_cos.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_clip_tokens_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        class codec:
            stride = (4, 8, 8)

        variant, device = TINY_I2V, "cpu"

    seen: list[Variant] = []

    def conditioned(variant: Variant, codec: Any, image: Any, shape: Any, device: Any) -> random_weights.Conditioning:
        seen.append(variant)
        assert image.shape == (32, 32, 3)
        return random_weights.Conditioning(y_BCTHW=torch.zeros(1, 20, 2, 4, 4))

    monkeypatch.setattr(random_weights, "condition_on_image", conditioned)
    given = random_image_conditioning(Pipe(), (16, 2, 4, 4))  # type: ignore[arg-type]
    assert given.clip_BLD is not None
    assert given.clip_BLD.shape == (1, 257, 48)
    assert seen[0].config.image_dim is None

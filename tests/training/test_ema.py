"""The power profile, its constants, resume, and what a shadow refuses."""

from __future__ import annotations

import math

import pytest
import torch

from turbotrain.training.ema import PowerEMA, rate_to_gamma


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (2,)))}


def test_rate_solves_the_papers_equation() -> None:
    assert rate_to_gamma(0.1) == pytest.approx(6.9372, abs=5e-5)
    assert rate_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    for rate in (0.01, 0.1, 0.25, 0.28):
        g = rate_to_gamma(rate)
        assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.3, 1.0])
def test_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match=f"got {rate}"):
        rate_to_gamma(rate)


def test_average_weighs_the_past_by_a_power() -> None:
    """The betas telescope: after n updates, update j weighs ((j+1)^(gamma+1) - j^(gamma+1)) / (n+1)^(gamma+1)."""
    n, ema = 400, PowerEMA({"w": torch.zeros(400)})
    for i in range(1, n + 1):
        ema.update({"w": torch.eye(n)[i - 1]}, i)
    j = torch.arange(1, n + 1).double()
    power = ema.gamma + 1
    expected = ((j + 1) / (n + 1)) ** power - (j / (n + 1)) ** power
    assert torch.allclose(ema.shadow["w"].double(), expected, rtol=1e-4, atol=1e-12)


def test_first_update_is_nearly_a_copy() -> None:
    ema, weights = PowerEMA(_weights(0)), _weights(1)
    assert (ema.beta(0), ema.beta(1)) == (0.0, pytest.approx(0.00408, abs=1e-5))
    ema.update(weights, 0)
    assert all(torch.equal(ema.shadow[name], weight) for name, weight in weights.items())


def test_half_precision_is_averaged_in_float32() -> None:
    """bf16 would keep a change of one part in a thousand of a weight from ever counting."""
    weights = {"w": torch.ones(3, dtype=torch.bfloat16)}
    ema = PowerEMA(weights)
    ema.update({"w": torch.full((3,), 1.0078125, dtype=torch.bfloat16)}, 1000)
    beta = ema.beta(1000)
    assert ema.shadow["w"].dtype == torch.float32
    assert torch.allclose(ema.shadow["w"], torch.tensor(beta + (1 - beta) * 1.0078125), rtol=1e-7, atol=0)
    assert ema.shadow["w"].bfloat16()[0] == 1.0


def test_shadow_is_a_copy_of_its_own() -> None:
    weights = _weights(0)
    ema = PowerEMA(weights)
    before = ema.shadow["a"].clone()
    weights["a"].add_(1)
    assert torch.equal(ema.shadow["a"], before)


def test_other_weights_are_refused() -> None:
    ema = PowerEMA(_weights(0))
    before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    with pytest.raises(ValueError, match=r"other parameters: unexpected \['w'\], missing \['a', 'b'\]"):
        ema.update({"w": torch.zeros(1)}, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.shadow.items())

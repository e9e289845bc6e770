"""The power profile, its constants, resume, and what a shadow refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from turbotrain.training.ema import PowerEMA, rate_to_gamma


def _network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def _move(network: nn.Module, i: int) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype))
        for name, b in network.named_buffers():
            b.add_(1 if name.endswith("tracked") else 0.5)


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
    ema, network = PowerEMA(_network()), _network()
    assert (ema.beta(0), ema.beta(1)) == (0.0, pytest.approx(0.00408, abs=1e-5))
    _move(network, 1)
    ema.update(network, 0)
    for name, p in network.named_parameters():
        assert torch.equal(ema.shadow[name], p.detach())


def test_buffers_are_copied_and_half_precision_is_averaged_in_float32() -> None:
    network = _network(torch.bfloat16)
    ema = PowerEMA(network)
    for i in range(1, 6):
        _move(network, i)
        ema.update(network, i)
    assert {t.dtype for t in ema.shadow.values()} == {torch.float32}
    state = network.state_dict()
    assert torch.equal(ema.copied["1.running_mean"], state["1.running_mean"])
    assert ema.copied["1.num_batches_tracked"].item() == 5
    assert ema.shadow.keys() | ema.copied.keys() == state.keys()
    other = _network(torch.bfloat16)
    ema.copy_to(other)
    assert torch.equal(other.state_dict()["0.weight"], ema.shadow["0.weight"].bfloat16())
    assert torch.equal(other.state_dict()["1.running_mean"], state["1.running_mean"])


def test_shadow_is_a_copy_of_its_own() -> None:
    network = _network()
    ema = PowerEMA(network)
    before = ema.shadow["0.weight"].clone()
    _move(network, 1)
    assert torch.equal(ema.shadow["0.weight"], before)


def test_another_model_is_refused() -> None:
    ema = PowerEMA(_network())
    before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    with pytest.raises(ValueError, match="other parameters"):
        ema.update({"w": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="another model"):
        ema.copy_to(nn.Linear(2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.shadow.items())

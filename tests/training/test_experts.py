"""Training one expert of two: its times, its part of dcm's grid, its steps of the sampler; given frames stay as they are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import turbotrain.stages.rcm as rcm_stage
from turbotrain.config import TimeSection
from turbotrain.diffusion.times import rf_to_trig, shift, trig_to_rf
from turbotrain.diffusion.velocity import VelocityOutput, from_function
from turbotrain.losses import backward_simulation
from turbotrain.model.variants import VARIANTS
from turbotrain.stages.context import draw_times
from turbotrain.stages.experts import grid_range, time_range, times_within
from turbotrain.training.seeding import StepRandom

TIMES = [1.5, 1.4, 1.0]


def test_ranges_meet_at_the_boundary() -> None:
    variant = VARIANTS["wan2.2_t2v_a14b"]
    assert time_range(variant, "low") == (0.0, 0.875)
    assert time_range(variant, "high") == (0.875, 1.0)
    assert time_range(VARIANTS["shapes"], "") == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["lognormal", "uniform_shift"])
@pytest.mark.parametrize("within", [(0.0, 0.9), (0.9, 1.0)])
def test_times_are_drawn_within(kind: str, within: tuple[float, float]) -> None:
    random = StepRandom(0, 0, 4000, range(4000), torch.device("cpu"))
    section = TimeSection(kind=kind, mean=1.5, std=1.6, shift=5.0)
    drawn = draw_times(section, random, "times", within)
    assert float(drawn.min()) >= within[0]
    assert float(drawn.max()) <= within[1]
    # The distribution itself, cut: its share below the middle is that of all draws that fall within.
    every = draw_times(section, random, "all")
    kept = every[(every >= within[0]) & (every <= within[1])]
    middle = float(kept.median())
    assert abs(float((drawn < middle).double().mean()) - 0.5) < 5 * 0.5 * (1 / 4000 + 1 / len(kept)) ** 0.5


@pytest.mark.parametrize("boundary", [0.875, 0.9, shift(torch.tensor(0.5), 5.0).item()])
def test_grids_split_at_the_boundary(boundary: float) -> None:
    low, high = grid_range((0, boundary), 48, 5.0), grid_range((boundary, 1), 48, 5.0)
    assert low.start == 0
    assert high.stop == 48
    assert 0 <= high.start - low.stop <= 1, "at most the step that crosses belongs to neither"
    assert grid_range((0, 1), 48, 5.0) == range(48)
    for grid, (begin, end) in ((low, (0, boundary)), (high, (boundary, 1))):
        starts = [shift(torch.tensor((i + 1 - offset) / 48), 5.0).item() for i in grid for offset in (0.0, 0.999999)]
        assert min(starts) >= begin - 1e-6
        assert max(starts) <= end + 1e-6
    with pytest.raises(ValueError, match=r"rcm\.dcm_grid=2: no step"):
        grid_range((0.9, 1), 2, 5.0)


def test_the_samplers_steps_are_shared_out() -> None:
    """formats.md, section 11: with boundary 0.9, two of four steps are high (the first is sigma_max's) and two low."""
    assert times_within((0.9, 1.0), TIMES) == [1.5]
    assert times_within((0.0, 0.9), TIMES) == [1.4, 1.0]
    assert times_within((0.0, 1.0), TIMES) == TIMES
    edge = rf_to_trig(torch.tensor(0.9, dtype=torch.float64)).item()
    assert times_within((0.9, 1.0), [edge]) == [edge]
    assert times_within((0.0, 0.9), [edge]) == []
    assert math.tan(edge) == pytest.approx(9)


@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_experts_answer_together(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    """A pass of theirs is a collective; other processes' samples may lie on the other side of the boundary."""
    calls: list[str] = []

    def answer(name: str, x: Tensor) -> Tensor:
        calls.append(name)
        return x

    def bound(name: Any, batch: object) -> Any:
        return from_function(lambda x, timestep: answer(name, x))

    monkeypatch.setattr(rcm_stage, "_bound", bound)
    task: Any = object.__new__(rcm_stage.RcmTask)
    task.low, task.boundary = "low", 0.9
    task.roles = {"student": SimpleNamespace(needs_all_ranks=sharded)}
    task._both(bound("high", None), None)(torch.zeros(1, 3), torch.tensor([950.0]))
    assert calls == (["high", "low"] if sharded else ["high"])


def test_simulation_starts_where_it_is_told() -> None:
    asked = []

    def student(x: torch.Tensor, timestep: torch.Tensor, /, **_: object) -> VelocityOutput:
        asked.append(timestep / 1000)
        return VelocityOutput(torch.zeros_like(x))

    start = torch.tensor([1.2, 0.7], dtype=torch.float64)
    draws = [torch.tensor([1.4, 0.3], dtype=torch.float64)]
    noise = torch.ones(2, 1, 1, 1, 1)
    backward_simulation(student, noise, draws, [noise], start)
    torch.testing.assert_close(asked[0], trig_to_rf(start))
    torch.testing.assert_close(asked[1], trig_to_rf(torch.tensor([1.2, 0.3], dtype=torch.float64)))
    asked.clear()
    backward_simulation(student, noise)
    assert asked[0].tolist() == [1.0, 1.0]

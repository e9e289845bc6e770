"""Losses where the answer is known: Gaussian data in float64, and small networks checked against autograd."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import GaussianWorld, TinyVelocity

from turbotrain.diffusion import tangents as tangents_of
from turbotrain.diffusion import times
from turbotrain.diffusion.velocity import Tangents, VelocityOutput, bind, from_function
from turbotrain.losses import (
    backward_simulation,
    boundary_consistency,
    critic,
    dcm,
    dmd,
    flow_matching,
    scm,
    sla_alignment,
)
from turbotrain.losses.consistency import consistency_tangent

B, D = 64, 3
ISOTROPIC = GaussianWorld(torch.tensor(0.4).double(), torch.tensor(0.6).double())
DIAGONAL = GaussianWorld(torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.2, 0.7, 1.5]).double())
worlds = pytest.mark.parametrize("world", [ISOTROPIC, DIAGONAL], ids=["isotropic", "diagonal"])


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, D)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _times(seed: int = 3, low: float = 0.02, high: float = 1.55) -> Tensor:
    u = torch.rand(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * u


def _network(seed: int = 0) -> TinyVelocity:
    torch.manual_seed(seed)
    return TinyVelocity(D, width=16, layers=2).double()


def _gradient(loss: Tensor, network: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


class Counted:
    """A velocity that counts its evaluations and whether they kept a graph."""

    def __init__(self, velocity: Any) -> None:
        self.velocity, self.with_graph = velocity, []

    def __call__(self, *args: Any, **options: Any) -> VelocityOutput:
        out = self.velocity(*args, **options)
        self.with_graph.append(out.v.requires_grad)
        return out


# -- regression ---------------------------------------------------------------------------------------


@worlds
def test_flow_matching_is_minimal_at_the_true_velocity(world: GaussianWorld) -> None:
    """At a fixed s the best affine correction of E[v | x_s] is none: the loss is stationary in a and b of v + a + b
    x_s."""
    n = 200_000
    x0, noise = world.data(_normal(1, n, D)), _normal(2, n, D)
    s = torch.full((n,), 0.6, dtype=torch.float64)
    teacher = world.teacher()
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    velocity = from_function(lambda x, t: teacher(x, t).v + a + b * x)
    out = flow_matching(velocity, x0, noise, s)
    assert torch.autograd.grad(out.loss, [a, b])[0].abs() < 0.02
    assert torch.autograd.grad(flow_matching(velocity, x0, noise, s).loss, b)[0].abs() < 0.05
    std = world.std.expand(D)
    irreducible = (std**2 / ((0.4 * std) ** 2 + 0.36)).mean()  # Var[e - x0 | x_s]
    assert out.loss.item() == pytest.approx(irreducible.item(), rel=0.01)
    assert out.per_sample.shape == (n,)


def test_flow_matching_ignores_what_is_masked() -> None:
    x0, noise, s = _normal(1), _normal(2), torch.rand(B).double()
    mask = torch.ones(1, D, dtype=torch.bool)
    mask[:, 0] = False
    poisoned = from_function(lambda x, t: torch.cat([torch.full_like(x[:, :1], math.nan), 0 * x[:, 1:]], 1))
    out = flow_matching(poisoned, x0, noise, s, mask)
    assert out.loss.item() == pytest.approx((noise - x0)[:, 1:].square().mean().item())


def test_sla_alignment_is_the_mean_square_difference() -> None:
    world, network = DIAGONAL, _network()
    x0, noise, s = world.data(_normal(1)), _normal(2), torch.rand(B).double()
    assert sla_alignment(world.teacher(), world.teacher(), x0, noise, s).loss == 0
    out = sla_alignment(network, world.teacher(), x0, noise, s)
    x_s = times.noise_rf(x0, noise, s)
    target = world.teacher()(x_s, 1000 * s).v
    expected = (network(x_s, 1000 * s).v - target).square().mean()
    assert out.loss.item() == pytest.approx(expected.item())
    assert out.metrics["relative_error"].item() == pytest.approx((expected / target.square().mean()).sqrt().item())


# -- tangents -----------------------------------------------------------------------------------------


def test_trig_jvp_is_the_derivative_of_the_trig_network() -> None:
    """Against func.jvp of F as a function of (x_t, t), written without the chain rule by hand."""
    network, x_t, t = _network(), _normal(1), _times()
    dx, dt = _normal(2), _normal(4, B)

    def trig_network(x_t: Tensor, t: Tensor) -> Tensor:
        c, d = (t.cos() + t.sin())[:, None], (t.cos() - t.sin())[:, None]
        return (network(x_t / c, 1000 * t.sin() / c[:, 0]).v + d * x_t) / c

    expected = torch.func.jvp(trig_network, (x_t, t), (dx, dt))
    out = tangents_of.trig_jvp(network, x_t, t, dx, dt)
    assert torch.allclose(out.f, expected[0], rtol=1e-10)
    assert torch.allclose(out.tangent, expected[1], rtol=1e-10, atol=1e-12)  # pyright: ignore[reportArgumentType]
    assert out.f.requires_grad
    assert not out.tangent.requires_grad  # pyright: ignore[reportOptionalMemberAccess]


def test_finite_difference_is_second_order() -> None:
    network, x_t, t = _network(), _normal(1), _times()
    direction = _normal(2)
    exact = tangents_of.trig_jvp(network, x_t, t, direction, torch.ones(B)).tangent
    assert exact is not None

    def error(h: float) -> float:
        return float(
            (tangents_of.trig_finite_difference(network, x_t, t, direction, h=h) - exact).norm() / exact.norm()
        )

    assert error(1e-4) < 1e-6
    assert 80 < error(1e-2) / error(1e-3) < 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_difference_refuses_half_precision(dtype: torch.dtype) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x: Tensor, timestep: Tensor, context: Tensor, return_selection: bool = False) -> Any:
            return (self.weight * x, None) if return_selection else self.weight * x

    student = bind(Half(), torch.zeros(B, 1, 1))
    with pytest.raises(ValueError, match=r"finite_difference needs a float32 network.*jvp"):
        scm(student, DIAGONAL.teacher(), _normal(1), _normal(2), _times(), tangent="finite_difference")


def test_finite_difference_refuses_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="bfloat16"):
        tangents_of.trig_finite_difference(_network(), _normal(1), _times(), _normal(2))


# -- scm ----------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("form", ["rcm", "scm"])
@pytest.mark.parametrize(("tangent", "floor"), [("jvp", 1e-13), ("finite_difference", 1e-7)])
def test_g_vanishes_at_the_exact_student(world: GaussianWorld, form: Any, tangent: Any, floor: float) -> None:
    x0, noise, t = world.data(_normal(1)), _normal(2), _times()
    out = scm(world.student(), world.teacher(), x0, noise, t, 1.0, tangent=tangent, form=form)
    assert out.metrics["tangent_norm"] < floor
    assert out.metrics["dropped"] == 0
    assert out.loss < 1e-6


@worlds
@pytest.mark.parametrize("form", ["rcm", "scm"])
def test_g_vanishes_only_when_warm(world: GaussianWorld, form: Any) -> None:
    x0, noise, t = world.data(_normal(1)), _normal(2), _times()
    assert scm(world.student(), world.teacher(), x0, noise, t, 0.5, form=form).metrics["tangent_norm"] > 0.01


@pytest.mark.parametrize("form", ["rcm", "scm"])
def test_tangents_by_jvp_and_by_finite_difference_agree(form: Any) -> None:
    network, x0, noise, t = _network(), DIAGONAL.data(_normal(1)), _normal(2), _times()
    losses = [
        scm(network, DIAGONAL.teacher(), x0, noise, t, 0.8, tangent=how, form=form)
        for how in ("jvp", "finite_difference")
    ]
    assert losses[0].metrics["tangent_norm"] > 0.1
    assert torch.allclose(losses[0].per_sample, losses[1].per_sample, rtol=1e-6)
    by_jvp, by_difference = (_gradient(out.loss, network) for out in losses)
    assert torch.allclose(by_jvp, by_difference, rtol=1e-5, atol=1e-6 * by_jvp.abs().max().item())


@pytest.mark.parametrize("form", ["rcm", "scm"])
def test_g_is_the_written_formula(form: Any) -> None:
    f, f_teacher, f_dot, x_t = (_normal(i) for i in range(4))
    t, r = _times(), 0.3
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    if form == "rcm":
        expected = -cos * (1 - r**2 * sin**2).sqrt() * (f - f_teacher) - (r * cos * sin * x_t + f_dot)
    else:
        expected = -(cos**2) * (f - f_teacher) - r * (cos * sin * x_t + f_dot)
    assert torch.allclose(consistency_tangent(f, f_teacher, f_dot, x_t, t, r, form), expected, rtol=1e-13)


def test_scm_moves_f_along_the_normalised_tangent() -> None:
    """The gradient is that of -2 * 100 * <F_theta, g / (||g|| + .1)> / B, everything but F_theta held."""
    network, x0, noise, t = _network(), DIAGONAL.data(_normal(1)), _normal(2), _times()
    out = scm(network, DIAGONAL.teacher(), x0, noise, t, 1.0)
    x_t = times.noise_trig(x0, noise, t)
    f_teacher = tangents_of.trig_forward(DIAGONAL.teacher(), x_t, t).f
    sin_cos = (t.sin() * t.cos())[:, None]
    f, f_dot, _ = tangents_of.trig_jvp(network, x_t, t, sin_cos * f_teacher, sin_cos[:, 0])
    assert f_dot is not None
    g = consistency_tangent(f.detach(), f_teacher, f_dot, x_t, t, 1.0)
    unit = g / (g.norm(dim=1, keepdim=True) + 0.1)
    expected = _gradient(-200 * (f * unit).sum() / B, network)
    assert torch.allclose(_gradient(out.loss, network), expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(out.per_sample, 100 * unit.square().sum(1), rtol=1e-10)


def test_scm_evaluates_the_student_once_by_jvp_and_thrice_by_difference() -> None:
    for how, graphs in (("jvp", [True]), ("finite_difference", [True, False, False])):
        student, teacher = Counted(_network()), Counted(DIAGONAL.teacher())
        scm(student, teacher, _normal(1), _normal(2), _times(), tangent=how)  # pyright: ignore[reportArgumentType]
        assert student.with_graph == graphs
        assert teacher.with_graph == [False]


def test_displaced_points_use_the_block_lists_of_the_undisplaced() -> None:
    class Selecting:
        dtype = torch.float64

        def __init__(self) -> None:
            self.seen: list[tuple[Any, bool]] = []

        def __call__(
            self,
            x: Tensor,
            t: Tensor,
            *,
            tangents: Tangents | None = None,
            selection: Any = None,
            return_selection: bool = False,
        ) -> VelocityOutput:
            self.seen.append((selection, return_selection))
            return VelocityOutput(x, None, "chosen at x_t" if return_selection else None)

    student = Selecting()
    scm(student, DIAGONAL.teacher(), _normal(1), _normal(2), _times(), tangent="finite_difference")
    assert student.seen == [(None, True), ("chosen at x_t", False), ("chosen at x_t", False)]


class Poisoned:
    """A network whose output or tangent is NaN or Inf for chosen samples."""

    def __init__(self, network: TinyVelocity, rows: list[int], value: float, where: str) -> None:
        self.network, self.rows, self.value, self.where = network, rows, value, where

    def __call__(self, *args: Any, **options: Any) -> VelocityOutput:
        out = self.network(*args, **options)
        bad = torch.zeros(B, 1, dtype=torch.bool)
        bad[self.rows] = True
        if self.where == "tangent":
            assert out.tangent is not None
            return out._replace(tangent=out.tangent.masked_fill(bad, self.value))
        return out._replace(v=out.v.masked_fill(bad, self.value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["output", "tangent"])
def test_samples_that_are_not_finite_are_dropped_and_counted(value: float, where: str) -> None:
    network, x0, noise, t = _network(), DIAGONAL.data(_normal(1)), _normal(2), _times()
    whole = scm(network, DIAGONAL.teacher(), x0, noise, t)
    out = scm(Poisoned(network, [2, 5], value, where), DIAGONAL.teacher(), x0, noise, t)
    assert out.metrics["dropped"] == 2
    assert out.per_sample[[2, 5]].tolist() == [0, 0]
    good = [i for i in range(B) if i not in (2, 5)]
    assert torch.equal(out.per_sample[good], whole.per_sample[good])
    assert out.metrics["tangent_norm"].isfinite()
    # the gradient is that of the samples kept, weighted as in the whole batch
    rest = scm(network, DIAGONAL.teacher(), x0[good], noise[good], t[good])
    expected = _gradient(rest.loss, network) * len(good) / B
    assert torch.allclose(_gradient(out.loss, network), expected, rtol=1e-10, atol=1e-12)


def test_scm_leaves_conditioning_out_of_the_norm_and_the_loss() -> None:
    network, x0, noise, t = _network(), DIAGONAL.data(_normal(1)), _normal(2), _times()
    mask = torch.tensor([[False, True, True]])
    out = scm(network, DIAGONAL.teacher(), x0, noise, t, mask=mask)
    norm = out.metrics["tangent_norm"]
    assert norm < scm(network, DIAGONAL.teacher(), x0, noise, t).metrics["tangent_norm"]

    def nan_outside(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], math.nan), DIAGONAL.teacher()(x, timestep).v[:, 1:]], dim=1)

    poisoned = scm(from_function(nan_outside), DIAGONAL.teacher(), x0, noise, t, mask=mask)
    assert poisoned.metrics["dropped"] == 0
    assert poisoned.loss.isfinite()


def test_scm_names_unknown_options() -> None:
    args = (_network(), DIAGONAL.teacher(), _normal(1), _normal(2), _times())
    with pytest.raises(ValueError, match="'jvp' or 'finite_difference', got 'autodiff'"):
        scm(*args, tangent="autodiff")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'rcm' or 'scm', got 'ecm'"):
        scm(*args, form="ecm")  # pyright: ignore[reportArgumentType]


# -- dcm ----------------------------------------------------------------------------------------------


def _grid(steps: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randint(0, steps, (B,), generator=g), torch.rand(B, generator=g)


@worlds
def test_dcm_of_the_exact_student_is_only_the_teachers_step_error(world: GaussianWorld) -> None:
    """One arc of the teacher is exact to second order in the step, so halving the step divides the squared error by
    16."""
    x0, noise = world.data(_normal(1)), _normal(2)
    index, offset = _grid(48)

    def loss(refine: int) -> float:
        return dcm(
            world.student(), world.teacher(), x0, noise, index * refine, offset, steps=48 * refine, shift=1.0
        ).loss.item()

    assert loss(1) < 0.01
    assert 10 < loss(2) / loss(4) < 22


def test_dcm_target_is_the_point_itself_at_the_end_of_the_grid() -> None:
    """At t' = 0 the student is not asked: x0(x, 0) = x for every network."""
    network, x0, noise = _network(), DIAGONAL.data(_normal(1)), _normal(2)
    index, offset = torch.zeros(B, dtype=torch.long), torch.full((B,), 0.25)
    out = dcm(network, DIAGONAL.teacher(), x0, noise, index, offset)
    t = times.rf_to_trig(times.shift(torch.full((B,), 0.75 / 48), 5.0))
    x_t = times.noise_trig(x0, noise, t)
    stepped = tangents_of.trig_x0(DIAGONAL.teacher(), x_t, t)
    expected = 100 * (tangents_of.trig_x0(network, x_t, t) - stepped).square().sum(1)
    assert torch.allclose(out.per_sample, expected, rtol=1e-9)


def test_dcm_holds_its_target() -> None:
    network, x0, noise = _network(), DIAGONAL.data(_normal(1)), _normal(2)
    student, target = Counted(network), Counted(copy.deepcopy(network))
    out = dcm(student, DIAGONAL.teacher(), x0, noise, *_grid(48), target=target)
    assert (student.with_graph, target.with_graph) == ([True], [False])
    alone = dcm(network, DIAGONAL.teacher(), x0, noise, *_grid(48))
    assert torch.equal(alone.loss, out.loss)
    assert torch.allclose(_gradient(alone.loss, network), _gradient(out.loss, network))


def test_dcm_checks_its_index() -> None:
    with pytest.raises(ValueError, match=r"index must lie in 0\.\.47"):
        dcm(_network(), DIAGONAL.teacher(), _normal(1), _normal(2), torch.full((B,), 48), torch.zeros(B))


def test_boundary_consistency_pulls_the_high_expert_to_the_low_one() -> None:
    high, low, x0, noise = _network(0), _network(1), _normal(1), _normal(2)
    assert boundary_consistency(high, high, x0, noise, 0.9).loss == 0
    out = boundary_consistency(high, low, x0, noise, 0.9)
    assert out.loss > 0
    assert _gradient(out.loss, high).abs().sum() > 0
    with pytest.raises(RuntimeError):
        torch.autograd.grad(boundary_consistency(high, low, x0, noise, 0.9).loss, list(low.parameters()))


# -- score term ---------------------------------------------------------------------------------------


def test_backward_simulation_steps_as_written_with_gradient_through_the_last_only() -> None:
    network = _network()
    noise, fresh = _normal(1), [_normal(2), _normal(3)]
    draws = [_times(4), _times(5)]
    counted = Counted(network)
    out = backward_simulation(counted, noise, draws, fresh)
    assert counted.with_graph == [False, False, True]

    t = torch.full((B,), math.pi / 2, dtype=torch.float64)
    x = noise
    for draw, e in zip(draws, fresh):
        x0 = tangents_of.trig_x0(network, x, t).detach()
        t = torch.minimum(t, draw)
        x = t.cos()[:, None] * x0 + t.sin()[:, None] * e
    assert torch.allclose(out, tangents_of.trig_x0(network, x, t), rtol=1e-12)
    with torch.no_grad():
        assert not backward_simulation(network, noise).requires_grad
    with pytest.raises(ValueError, match="one noise per re-noising"):
        backward_simulation(network, noise, draws, fresh[:1])


def test_backward_simulation_of_the_exact_student_gives_the_data() -> None:
    n = 50_000
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(3)]
    draws = [1.55 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(2)]
    out = backward_simulation(DIAGONAL.student(), noise[0], draws, noise[1:])
    assert torch.allclose(out.mean(0), DIAGONAL.mean, atol=0.03)
    assert torch.allclose(out.std(0), DIAGONAL.std, rtol=0.02)


def test_dmd_has_no_gradient_where_fake_equals_teacher() -> None:
    generated = _normal(1).requires_grad_()
    out = dmd(generated, DIAGONAL.teacher(), DIAGONAL.teacher(), _normal(2), _times())
    out.loss.backward()
    assert out.loss == 0
    assert (generated.grad == 0).all()  # pyright: ignore[reportOptionalMemberAccess]


def test_dmd_gradient_is_the_normalised_score_gap() -> None:
    generated = _normal(1).requires_grad_()
    t, noise = _times(), _normal(2)
    teacher, fake = DIAGONAL.teacher(), ISOTROPIC.teacher()
    dmd(generated, teacher, fake, noise, t, loss_scale=0.5).loss.backward()
    x_t = times.noise_trig(generated.detach(), noise, t)
    ours, theirs = (tangents_of.trig_x0(v, x_t, t) for v in (fake, teacher))
    weight = (generated.detach() - theirs).abs().mean(1, keepdim=True)
    assert torch.allclose(generated.grad, 2 * 0.5 * (ours - theirs) / weight / B, rtol=1e-10)  # pyright: ignore


def test_dmd_weight_is_clamped() -> None:
    """A teacher that predicts G itself would divide by zero."""
    generated = torch.zeros(B, D, dtype=torch.float64)
    zero = from_function(lambda x, t: x / (t[:, None] / 1000))  # x0 = x_s - s v = 0
    off = from_function(lambda x, t: (x - 1e-3) / (t[:, None] / 1000))
    out = dmd(generated, zero, off, torch.zeros(B, D).double(), _times())
    assert out.loss.item() == pytest.approx(D * (1e-3 / 1e-5) ** 2, rel=1e-6)


def test_dmd_pulls_generated_samples_to_the_data() -> None:
    """G ~ N(m, 1) against data N(0.4, .36): with both scores exact, descending the loss finds the mean and the
    spread."""
    m = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([m, log_std], lr=0.05)
    for i in range(250):
        generated = m + log_std.exp() * _normal(3 * i)
        fake = GaussianWorld(m.detach().clone(), log_std.detach().exp())
        loss = dmd(generated, ISOTROPIC.teacher(), fake.teacher(), _normal(3 * i + 1), _times(i)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert m.item() == pytest.approx(0.4, abs=0.02)
    assert log_std.exp().item() == pytest.approx(0.6, abs=0.02)


@worlds
def test_critic_is_minimal_at_the_true_score(world: GaussianWorld) -> None:
    n = 200_000
    generated, noise = world.data(_normal(1, n, D)), _normal(2, n, D)
    t = torch.full((n,), 0.9, dtype=torch.float64)
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    fake = from_function(lambda x, timestep: world.teacher()(x, timestep).v + a + b * x)
    out = critic(fake, generated, noise, t)
    curvature = 2 * D / (math.cos(0.9) + math.sin(0.9)) ** 2
    for gradient in torch.autograd.grad(out.loss, [a, b]):
        assert gradient.abs() < 0.02 * curvature
    variance = world.std.expand(D) ** 2
    irreducible = (variance / (math.cos(0.9) ** 2 * variance + math.sin(0.9) ** 2)).sum()  # Var[F | x_t]
    assert out.loss.item() == pytest.approx(irreducible.item(), rel=0.01)


def test_critic_loss_is_the_clean_error_over_sin_squared() -> None:
    network, generated, noise, t = _network(), _normal(1).requires_grad_(), _normal(2), _times(3, 0.3)
    out = critic(network, generated, noise, t)
    x_t = times.noise_trig(generated, noise, t)
    clean = (generated - tangents_of.trig_x0(network, x_t, t)).square().sum(1)
    assert torch.allclose(out.per_sample, clean.detach() / t.sin() ** 2, rtol=1e-9)
    assert not torch.autograd.grad(out.loss, [generated], allow_unused=True)[0]


def test_bfloat16_latents_are_widened() -> None:
    """Shards may hold bf16: states, losses and gradients are float32."""
    world = GaussianWorld(torch.tensor(0.4), torch.tensor(0.6))
    x0, noise, t = _normal(1).bfloat16(), _normal(2).float(), _times().float()
    for out in (
        scm(world.student(), world.teacher(), x0, noise, t),
        dcm(world.student(), world.teacher(), x0, noise, *_grid(48)),
        dmd(x0, world.teacher(), world.student(), noise, t),
        critic(world.teacher(), x0, noise, t),
        flow_matching(world.teacher(), x0, noise, times.trig_to_rf(t)),
    ):
        assert out.loss.dtype == torch.float32
        assert out.loss.isfinite()

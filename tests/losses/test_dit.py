"""The consistency loss on the real network: tangents through SLA, block lists held, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turbotrain.diffusion.tangents import trig_finite_difference, trig_forward, trig_jvp
from turbotrain.diffusion.velocity import BoundVelocity, bind
from turbotrain.losses import scm
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

SHAPE = (2, 3, 4, 8, 8)


def _bound(dtype: torch.dtype, seed: int = 0) -> BoundVelocity:
    torch.manual_seed(seed)
    config = WanConfig(
        dim=32,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        in_channels=3,
        out_channels=3,
        text_dim=6,
        text_len=5,
        freq_dim=16,
    )
    model = WanTransformer(config, AttentionConfig(kind="sla", topk=0.5, block_q=16, block_k=16))
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return bind(model.set_weight_dtype(dtype), torch.randn(2, 5, 6))


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(*SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return x0, noise, torch.tensor([0.4, 1.2], dtype=torch.float64)


def test_both_tangents_give_one_loss_and_one_gradient() -> None:
    student, teacher = _bound(torch.float64), _bound(torch.float64, seed=1)
    gradients, values = [], []
    for how in ("jvp", "finite_difference"):
        out = scm(student, teacher, *_inputs(), tangent=how, h=1e-6)  # pyright: ignore[reportArgumentType]
        student.model.zero_grad()
        out.loss.backward()
        values.append(out.per_sample)
        gradients.append(torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None]))
    assert torch.allclose(values[0], values[1], rtol=1e-8)
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()
    assert gradients[0].norm() > 0


def test_tangents_of_a_float32_network() -> None:
    """By JVP the error is float32's. By central difference it is the step's, 4e-4 at h = 1e-4 in any precision: the
    fastest time feature turns by 1000 h / (cos t + sin t)^2, up to 0.1 rad, and falls as h^2 until rounding takes
    over."""
    x_t, direction, t = _inputs()
    one = torch.ones(2, dtype=torch.float64)
    exact = trig_jvp(_bound(torch.float64), x_t, t, direction, one).tangent
    narrow = _bound(torch.float32)
    by_jvp = trig_jvp(narrow, x_t.float(), t, direction.float(), one).tangent
    blocks = trig_forward(narrow, x_t.float(), t, return_selection=True).selection
    by_difference = trig_finite_difference(narrow, x_t.float(), t, direction.float(), selection=blocks)
    assert exact is not None
    assert by_jvp is not None
    jvp_error, difference_error = ((x - exact).norm() / exact.norm() for x in (by_jvp, by_difference))
    assert jvp_error < 2e-6
    assert difference_error < 1e-3


def test_finite_difference_of_a_bf16_network_is_refused() -> None:
    student = _bound(torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs a float32 network, got torch\.bfloat16"):
        scm(student, _bound(torch.float32), *_inputs(torch.float32), tangent="finite_difference")
    assert scm(student, _bound(torch.float32), *_inputs(torch.float32)).loss.isfinite()


def test_conditioned_frames_do_not_move_the_loss() -> None:
    """TI2V: the first latent frame is given; what x0 holds there is never seen."""
    x0, noise, t = _inputs()
    frames = torch.tensor([[True, False, False, False]] * 2)
    teacher, student = _bound(torch.float64, seed=1), _bound(torch.float64)
    teacher, student = (
        bind(v.model, v.context_BLD, clean_BCTHW=x0, clean_frames_BT=frames) for v in (teacher, student)
    )
    mask = ~frames[:, None, :, None, None]
    loss = scm(student, teacher, x0, noise, t, mask=mask).loss
    elsewhere = x0.clone()
    elsewhere[:, :, 0] += 3
    assert torch.equal(scm(student, teacher, elsewhere, noise, t, mask=mask).loss, loss)
    assert not torch.equal(scm(student, teacher, x0, noise, t).loss, loss)

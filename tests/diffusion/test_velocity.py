"""What a bound network is given and gives back: dtypes, clean frames, block lists, guidance in one call, two
experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turbotrain.diffusion.guidance import BatchedGuidedVelocity, guided, switch_experts
from turbotrain.diffusion.velocity import bind, clean_frame_mask, from_function
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer


class Recorder(nn.Module):
    """Answers with scale * x + timestep * mean(context), in the precision it is given; remembers its inputs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(0.0, dtype=dtype))
        self.island = nn.Parameter(torch.tensor(1.0))
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        tangents: tuple[Tensor, Tensor] | None = None,
        selection: Any = None,
        return_selection: bool = False,
        **extra: Any,
    ) -> Any:
        self.calls.append(
            {"x": x, "timestep": timestep, "context": context, "tangents": tangents, "selection": selection, **extra}
        )
        shape = (-1, *[1] * (x.ndim - 1))
        time = (timestep if timestep.ndim == 1 else timestep.mean(1)).reshape(shape) / 1000
        mean = context.mean((1, 2)).reshape(shape)
        out: Any = ((self.scale * x + time * mean + self.bias).to(x.dtype),)
        if tangents is not None:
            dtime = (tangents[1] if tangents[1].ndim == 1 else tangents[1].mean(1)).reshape(shape) / 1000
            out = (*out, (self.scale * tangents[0] + dtime * mean).to(x.dtype).detach())
        if return_selection:
            out = (*out, ["blocks"])
        return out if len(out) > 1 else out[0]


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, 4, generator=g).to(dtype)
    return x, torch.tensor([933.8, 12.3], dtype=torch.float64), torch.randn(2, 5, 6, generator=g)


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_bind_casts_the_input_and_keeps_the_timestep(network: torch.dtype, state: torch.dtype) -> None:
    model = Recorder(network)
    x, timestep, context = _inputs(state)
    velocity = bind(model, context, y_BCTHW=torch.ones(1), flag=3)
    out = velocity(x, timestep, tangents=(x, timestep), return_selection=True)
    (call,) = model.calls
    assert velocity.dtype == call["x"].dtype == call["context"].dtype == call["y_BCTHW"].dtype == network
    assert call["tangents"][0].dtype == network
    assert call["timestep"].dtype == call["tangents"][1].dtype == torch.float64
    assert call["flag"] == 3
    assert out.tangent is not None
    assert out.v.dtype == out.tangent.dtype == state
    assert out.selection == ["blocks"]


def test_bind_widens_half_precision_timesteps() -> None:
    model = Recorder(torch.bfloat16)
    x, timestep, context = _inputs()
    bind(model, context)(x, timestep.half())
    assert model.calls[0]["timestep"].dtype == torch.float32


def test_bind_passes_block_lists_on_and_asks_for_nothing_else() -> None:
    model = Recorder()
    x, timestep, context = _inputs()
    out = bind(model, context)(x, timestep, selection=["given"])
    assert model.calls[0]["selection"] == ["given"]
    assert (out.tangent, out.selection) == (None, None)


def test_clean_frames_enter_clean_at_time_zero() -> None:
    model = Recorder()
    x, timestep, context = _inputs()
    clean = torch.full_like(x, 7.0)
    frames = torch.zeros(2, 4, dtype=torch.bool)
    frames[:, 0] = True
    velocity = bind(model, context, clean_BCTHW=clean, clean_frames_BT=frames)
    velocity(x, timestep, tangents=(torch.ones_like(x), torch.ones_like(timestep)))
    (call,) = model.calls
    assert (call["x"][:, :, 0] == 7).all()
    assert torch.equal(call["x"][:, :, 1:], x[:, :, 1:])
    assert call["timestep"].shape == (2, 4 * 2 * 2)  # 4 frames of 2x2 tokens, raster order
    assert (call["timestep"][:, :4] == 0).all()
    assert (call["timestep"][:, 4:] == timestep[:, None]).all()
    assert (call["tangents"][0][:, :, 0] == 0).all()
    assert (call["tangents"][1][:, :4] == 0).all()
    assert (call["tangents"][1][:, 4:] == 1).all()
    mask = clean_frame_mask(frames).expand_as(x)
    assert not mask[:, :, 0].any()
    assert mask[:, :, 1:].all()
    with pytest.raises(ValueError, match="both or neither"):
        bind(model, context, clean_BCTHW=clean)


def test_from_function_differentiates() -> None:
    x, timestep, _ = _inputs(torch.float64)
    velocity = from_function(lambda x, t: x**2 * t[:, None, None, None, None])
    out = velocity(x, timestep, tangents=(torch.ones_like(x), torch.ones_like(timestep)))
    assert torch.allclose(out.tangent, 2 * x * timestep[:, None, None, None, None] + x**2)  # pyright: ignore


# -- guidance -----------------------------------------------------------------------------------------


def test_guidance_is_one_call_and_equals_two() -> None:
    model = Recorder()
    x, timestep, context = _inputs()
    tangents = (torch.ones_like(x), torch.ones_like(timestep))
    cond, uncond = (bind(model, c, y_BCTHW=torch.ones(2, 1)) for c in (context, 0 * context + 1))
    once = guided(cond, uncond, 4.0)(x, timestep, tangents=tangents)
    assert len(model.calls) == 1
    twice = guided(cond, uncond, 4.0, batched=False)(x, timestep, tangents=tangents)
    assert len(model.calls) == 3
    v_c, v_u = cond(x, timestep).v, uncond(x, timestep).v
    assert torch.allclose(twice.v, v_u + 4 * (v_c - v_u))
    assert torch.allclose(once.v, twice.v)
    assert torch.allclose(once.tangent, twice.tangent)  # pyright: ignore[reportArgumentType]


def test_guidance_that_cannot_be_batched_makes_two_calls() -> None:
    model = Recorder()
    x, timestep, context = _inputs()
    cond = bind(model, context)
    for other in (bind(model, context[:, :2]), bind(Recorder(), context), bind(model, context, flag=1)):
        assert not isinstance(guided(cond, other, 2.0), BatchedGuidedVelocity)
    v = guided(cond, bind(model, context[:, :2]), 2.0)(x, timestep).v
    assert v.shape == x.shape


def test_scale_one_is_the_conditional_network() -> None:
    model = Recorder()
    x, timestep, context = _inputs()
    velocity = guided(bind(model, context), bind(model, 0 * context), 1.0)
    velocity(x, timestep)
    assert len(model.calls) == 1
    assert len(model.calls[0]["x"]) == 2


# -- experts ------------------------------------------------------------------------------------------


def _constant(value: float, calls: list[float]):
    def fn(x: Tensor, timestep: Tensor) -> Tensor:
        calls.append(value)
        return torch.full_like(x, value)

    return from_function(fn)


def test_experts_switch_at_the_boundary() -> None:
    calls: list[float] = []
    velocity = switch_experts(_constant(1.0, calls), _constant(-1.0, calls), 0.9)
    x = torch.zeros(2, 3)
    assert (velocity(x, torch.tensor([900.0, 1000.0])).v == 1).all()
    assert calls == [1.0]
    assert (velocity(x, torch.tensor([899.9, 0.0])).v == -1).all()
    assert calls == [1.0, -1.0]
    assert velocity(x, torch.tensor([950.0, 100.0])).v[:, 0].tolist() == [1, -1]
    with pytest.raises(ValueError, match="boundary must lie between 0 and 1"):
        switch_experts(velocity, velocity, 900)


def test_both_experts_are_asked_where_others_may_need_the_one_that_is_not() -> None:
    calls: list[float] = []
    velocity = switch_experts(_constant(1.0, calls), _constant(-1.0, calls), 0.9, always_both=True)
    x = torch.zeros(2, 3)
    assert (velocity(x, torch.tensor([900.0, 1000.0])).v == 1).all()
    assert (velocity(x, torch.tensor([899.9, 0.0])).v == -1).all()
    assert calls == [1.0, -1.0, 1.0, -1.0]


# -- the DiT ------------------------------------------------------------------------------------------


def _dit() -> tuple[WanTransformer, Tensor]:
    torch.manual_seed(0)
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
    model = WanTransformer(config, AttentionConfig(kind="sla", topk=0.3, block_q=16, block_k=16))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.double(), torch.randn(2, 5, 6).double()


def test_dit_reuses_the_block_lists_it_returned() -> None:
    model, context = _dit()
    x = torch.randn(2, 3, 4, 8, 8).double()
    timestep = torch.tensor([900.0, 300.0]).double()
    velocity = bind(model, context)
    first = velocity(x, timestep, return_selection=True)
    moved, moved_time = x + 0.5 * torch.randn_like(x), timestep - 100
    free = velocity(moved, moved_time).v
    held = velocity(moved, moved_time, selection=first.selection).v
    assert torch.equal(velocity(x, timestep, selection=first.selection).v, first.v)
    assert not torch.allclose(free, held)


def test_text_is_encoded_once_by_networks_that_can() -> None:
    class Encoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.encoded: list[Tensor] = []

        def encode_context(self, context_BLD: Tensor, clip_BLD: Tensor | None) -> Tensor:
            assert clip_BLD is not None
            self.encoded.append(context_BLD)
            return -context_BLD

        def forward(self, x_BE: Tensor, timestep: Tensor, context: Tensor, clip_BLD: Tensor | None = None) -> Tensor:
            return x_BE * context.sum() + (0 if clip_BLD is None else clip_BLD.sum())

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Tensor, **options: Tensor) -> Tensor:
            return self.module(*args, **options)

    network, x, timestep = Encoding(), torch.randn(1, 2), torch.tensor([500.0])
    text, clip = torch.ones(1, 2, 2), torch.ones(1, 1, 1)
    once = bind(network, text, encode_once=True, clip_BLD=clip)
    for _ in range(3):
        assert torch.equal(once(x, timestep).v, -4 * x)
    assert len(network.encoded) == 1
    for each in (bind(network, text, clip_BLD=clip), bind(Wrapped(network), text, encode_once=True, clip_BLD=clip)):
        assert torch.equal(each(x, timestep).v, 4 * x + 1)
    assert len(network.encoded) == 1

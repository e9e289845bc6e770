"""Launches of the linear attention kernels, and the autograd function that composes them.

The launches are custom ops, so that a compiled graph neither breaks nor looks inside. They are only called from an
`autograd.Function`: `torch.func.jvp` then refuses, where a bare custom op would silently give it a zero tangent.

Shape suffixes: B batch, L tokens, N heads, D head dim, G batch * heads; state (G, 1, D + 1, D): S, and z as its last
row, float32; with tangents (G, 2, D + 1, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbokernels.attention_linear import kernel
from turbokernels.attention_tiles import check_kernel_operands, strides_of
from turbokernels.tuning import Launch, best, shared_memory

PROGRAMS_PER_PROCESSOR = 2  # each leaves partial sums behind
APPLYING_PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_PROCESSORS = 3  # so that partial sums are tested


def _candidates(x: Tensor) -> list[Launch]:
    """Tiles of BLOCK tokens. Memory is the limit, so small tiles and two programs per processor come first."""
    if x.dtype == torch.float32:
        return [Launch(8, 1, BLOCK=32)]
    if shared_memory(x.device) < 160 * 1024:
        return [Launch(8, 2, BLOCK=32), Launch(4, 2, BLOCK=32)]
    return [Launch(8, 3, BLOCK=32), Launch(8, 3, BLOCK=64), Launch(8, 4, BLOCK=32), Launch(8, 2, BLOCK=64)]


def _split(
    length: int, groups: int, block: int, device: torch.device, per_processor: int = PROGRAMS_PER_PROCESSOR
) -> tuple[int, int]:
    """(programs, tiles per program) along the tokens of each of `groups` heads: enough programs to fill the device."""
    tiles = -(-length // block)
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, per_processor * processors // groups)
    per_program = -(-tiles // min(wanted, tiles))
    return -(-tiles // per_program), per_program


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def compute_state(
    k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, feature_map: str, with_largest: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The state of k, v (B, L, N, D), with its tangent if tk and tv are given; on demand the largest |v| that each program
    found, float32 (G, programs, D)."""
    batch, length, heads, dim = k.shape
    groups, kinds = batch * heads, 1 if tk is None else 2

    def run(launch: Launch) -> tuple[Tensor, Tensor | None]:
        programs, per_program = _split(length, groups, launch["BLOCK"], k.device)
        partial = torch.empty(groups, programs, kinds, dim + 1, dim, dtype=torch.float32, device=k.device)
        largest = partial.new_empty(groups, programs, dim) if with_largest else None
        kernel.state_kernel[programs, groups](
            *(k, v, tk, tv, partial, largest, *strides_of(k), *strides_of(v), *strides_of(tk), *strides_of(tv)),
            *(heads, length, per_program),
            **launch.kwargs(FEATURE_MAP=feature_map, TANGENT=tk is not None, LARGEST=with_largest, D=dim),
        )
        return partial.sum(1), largest

    return run(best("linear_attention_state", (dim, k.dtype, kinds), _candidates(k), run, k.device))


@torch.library.custom_op(
    "turbokernels::linear_attention_state",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor? tk, Tensor? tv, str feature_map) -> Tensor",
)
def state_op(k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, feature_map: str) -> Tensor:
    """The state of k, v (B, L, N, D), with its tangent if tk and tv are given."""
    return compute_state(k, v, tk, tv, feature_map)[0]


@state_op.register_fake
def _(k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, feature_map: str) -> Tensor:
    batch, _, heads, dim = k.shape
    return k.new_empty(batch * heads, 1 if tk is None else 2, dim + 1, dim, dtype=torch.float32)


@torch.library.custom_op(
    "turbokernels::linear_attention_apply",
    mutates_args=(),
    schema="(Tensor q, Tensor? tq, Tensor state, Tensor? base, Tensor? tbase, Tensor? bias, str feature_map) "
    "-> (Tensor, Tensor)",
)
def apply_op(
    q: Tensor,
    tq: Tensor | None,
    state: Tensor,
    base: Tensor | None,
    tbase: Tensor | None,
    bias: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """(o, to) (B, L, N, D) of a contiguous state; to is empty without tq."""
    batch, length, heads, dim = q.shape

    def run(launch: Launch) -> tuple[Tensor, Tensor]:
        block, per_processor = launch["BLOCK"], APPLYING_PROGRAMS_PER_PROCESSOR
        programs, per_program = _split(length, batch * heads, block, q.device, per_processor)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        to = o.new_empty(0) if tq is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernel.apply_kernel[programs, batch * heads](
            *(
                q,
                tq,
                state,
                base,
                tbase,
                bias,
                o,
                to,
                *strides_of(q),
                *strides_of(tq),
                *strides_of(base),
                *strides_of(tbase),
            ),
            *(*strides_of(o), heads, length, per_program),
            **launch.kwargs(
                FEATURE_MAP=feature_map,
                TANGENT=tq is not None,
                HAS_BASE=base is not None,
                HAS_BIAS=bias is not None,
                D=dim,
            ),
        )
        return o, to

    key = (dim, q.dtype, 1 if tq is None else 2, base is not None)
    return run(best("linear_attention_apply", key, _candidates(q), run, q.device))


@apply_op.register_fake
def _(
    q: Tensor,
    tq: Tensor | None,
    state: Tensor,
    base: Tensor | None,
    tbase: Tensor | None,
    bias: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if tq is None else q.shape)


@torch.library.custom_op(
    "turbokernels::linear_attention_query_gradient",
    mutates_args=(),
    schema="(Tensor q, Tensor do, Tensor state, str feature_map) -> (Tensor, Tensor)",
)
def query_gradient_op(q: Tensor, do: Tensor, state: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """dq (B, L, N, D), and the gradient of the state (G, 1, D + 1, D)."""
    batch, length, heads, dim = q.shape
    groups = batch * heads
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.empty(groups, 2, length, dtype=torch.float32, device=q.device)

    def run_query(launch: Launch) -> None:
        programs, per_program = _split(length, groups, launch["BLOCK"], q.device)
        kernel.query_gradient_kernel[programs, groups](
            *(q, do, state, dq, rows, *strides_of(q), *strides_of(do), *strides_of(dq), heads, length, per_program),
            **launch.kwargs(FEATURE_MAP=feature_map, D=dim),
        )

    def run_state(launch: Launch) -> Tensor:
        programs, per_program = _split(length, groups, launch["BLOCK"], q.device)
        partial = torch.empty(groups, programs, 1, dim + 1, dim, dtype=torch.float32, device=q.device)
        kernel.state_gradient_kernel[programs, groups](
            *(q, do, state, rows, partial, *strides_of(q), *strides_of(do), heads, length, per_program),
            **launch.kwargs(FEATURE_MAP=feature_map, D=dim),
        )
        return partial.sum(1)

    run_query(best("linear_attention_query_gradient", (dim, q.dtype), _candidates(q), run_query, q.device))
    return dq, run_state(best("linear_attention_state_gradient", (dim, q.dtype), _candidates(q), run_state, q.device))


@query_gradient_op.register_fake
def _(q: Tensor, do: Tensor, state: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), state.new_empty(state.shape)


@torch.library.custom_op(
    "turbokernels::linear_attention_key_gradient",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor dstate, str feature_map) -> (Tensor, Tensor)",
)
def key_gradient_op(k: Tensor, v: Tensor, dstate: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """dk, dv (B, L, N, D) from the gradient of the state."""
    batch, length, heads, dim = k.shape

    def run(launch: Launch) -> tuple[Tensor, Tensor]:
        programs, per_program = _split(length, batch * heads, launch["BLOCK"], k.device)
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        kernel.key_gradient_kernel[programs, batch * heads](
            *(k, v, dstate, dk, dv, *strides_of(k), *strides_of(v), *strides_of(dk), heads, length, per_program),
            **launch.kwargs(FEATURE_MAP=feature_map, D=dim),
        )
        return dk, dv

    return run(best("linear_attention_key_gradient", (dim, k.dtype), _candidates(k), run, k.device))


@key_gradient_op.register_fake
def _(k: Tensor, v: Tensor, dstate: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), k.new_empty(k.shape)


def project_state(state: Tensor, weight_FE: Tensor) -> Tensor:
    """S P^T in place of S (each kind), z as it was: the state whose application is the projected output."""
    dim = weight_FE.shape[0]
    projected = torch.matmul(state, weight_FE.float().mT)
    projected[..., dim, :] = state[..., dim, :]
    return projected


class _LinearAttention(torch.autograd.Function):
    """(o, to), to empty without tangents. o is differentiable with respect to everything but the tangents."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        tangents: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
        feature_map: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tq, tk, tv, tbase = tangents or (None, None, None, None)
        with torch.autocast(q.device.type, enabled=False):
            state = state_op(k, v, tk, tv, feature_map)
            projected = state if weight is None else project_state(state, weight)
            o, to = apply_op(q, tq, projected, base, tbase, flat(bias), feature_map)
        ctx.save_for_backward(q, k, v, state[:, :1], weight, bias)
        ctx.feature_map = feature_map
        ctx.mark_non_differentiable(to)
        return o, to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do is None:
            return (None,) * 8
        q, k, v, state, weight, bias = ctx.saved_tensors
        dim = q.shape[-1]
        if do.stride(-1) != 1:  # such as the expanded gradient of a sum
            do = do.contiguous()
        dweight = dbias = None
        with torch.autocast(q.device.type, enabled=False):
            state = state.contiguous()
            projected = state if weight is None else project_state(state, weight)
            dq, dstate = query_gradient_op(q, do, projected, ctx.feature_map)
            if weight is not None:
                # o is linear in S P^T, so P's gradient needs no tokens: dP = sum over heads of d(S P^T)^T S.
                dprojected_PF, state_PE = (x[:, 0, :dim].reshape(-1, dim) for x in (dstate, state))
                dweight = (dprojected_PF.mT @ state_PE).to(weight.dtype)
                dstate = project_state(dstate, weight.mT)
            if bias is not None:
                dbias = do.sum((0, 1, 2), dtype=torch.float32).to(bias.dtype)
            dk, dv = key_gradient_op(k, v, dstate, ctx.feature_map)
        dbase = do if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dbase, dweight, dbias, None, None


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """As `reference.linear_attention`."""
    check_kernel_operands("linear_attention", q)
    return _LinearAttention.apply(q, k, v, None, None, None, None, feature_map)[0]  # pyright: ignore[reportOptionalSubscript]


def linear_attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, feature_map: str
) -> tuple[Tensor, Tensor]:
    """As `reference.linear_attention_jvp`."""
    check_kernel_operands("linear_attention_jvp", q)
    tangents = (tq.detach(), tk.detach(), tv.detach(), None)
    return _LinearAttention.apply(q, k, v, None, None, None, tangents, feature_map)  # pyright: ignore[reportReturnType]


def add_linear_attention(
    base: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, feature_map: str
) -> Tensor:
    """As `reference.add_linear_attention`."""
    check_kernel_operands("add_linear_attention", q)
    return _LinearAttention.apply(q, k, v, base, weight, bias, None, feature_map)[0]  # pyright: ignore[reportOptionalSubscript]


def add_linear_attention_jvp(
    base: Tensor,
    tbase: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.add_linear_attention_jvp`."""
    check_kernel_operands("add_linear_attention_jvp", q)
    tangents = (tq.detach(), tk.detach(), tv.detach(), tbase.detach())
    return _LinearAttention.apply(q, k, v, base, weight, bias, tangents, feature_map)  # pyright: ignore[reportReturnType]

"""The choice of an implementation, the validation that all attention ops share, and the error budget itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import turbokernels as tk
from turbokernels import dispatch
from turbokernels.testing import assert_within_budget, errors

Q = torch.randn(2, 32, 2, 8)
MASK = tk.select_blocks(Q, Q, 0.5, 16, 16)
FLAT = Q.flatten(2)

CALLS: dict[str, Callable[..., Any]] = {
    "select_blocks": lambda **kw: tk.select_blocks(Q, Q, 0.5, 16, 16, **kw),
    "sparse_attention": lambda **kw: tk.sparse_attention(Q, Q, Q, MASK, **kw),
    "sparse_attention_jvp": lambda **kw: tk.sparse_attention_jvp(Q, Q, Q, Q, Q, Q, MASK, **kw),
    "attention_jvp": lambda **kw: tk.attention_jvp(Q, Q, Q, Q, Q, Q, **kw),
    "linear_attention": lambda **kw: tk.linear_attention(Q, Q, Q, **kw),
    "linear_attention_jvp": lambda **kw: tk.linear_attention_jvp(Q, Q, Q, Q, Q, Q, **kw),
    "sage_attention": lambda **kw: tk.sage_attention(Q, Q, Q, **kw),
    "sage_sparse_attention": lambda **kw: tk.sage_sparse_attention(Q, Q, Q, MASK, **kw),
    "sage_sla": lambda **kw: tk.sage_sla(Q, Q, Q, torch.ones(8, 8), None, 0.5, 16, 16, **kw),
    "rms_norm_rope": lambda **kw: tk.rms_norm_rope(Q, torch.ones(16), torch.ones(32, 4), torch.ones(32, 4), **kw),
    "layer_norm_modulate": lambda **kw: tk.layer_norm_modulate(FLAT, FLAT, FLAT, **kw),
    "gate_residual": lambda **kw: tk.gate_residual(FLAT, FLAT, FLAT, **kw),
    "rms_norm_silu": lambda **kw: tk.rms_norm_silu(FLAT, torch.ones(16), **kw),
    "conv3d": lambda **kw: tk.conv3d(Q[:, :, :, None], torch.ones(1, 1, 1, 4, 8), **kw),
    "layer_norm_modulate_quantize": lambda **kw: tk.layer_norm_modulate_quantize(FLAT, FLAT, FLAT, **kw),
    "gate_residual_norm": lambda **kw: tk.gate_residual_norm(FLAT, FLAT, FLAT, FLAT, FLAT, **kw),
    "gate_residual_norm_quantize": lambda **kw: tk.gate_residual_norm_quantize(FLAT, FLAT, FLAT, FLAT, FLAT, **kw),
}


@pytest.mark.parametrize("op", CALLS)
def test_every_op_takes_impl(op: str) -> None:
    CALLS[op](impl="auto")
    CALLS[op](impl="reference")
    with pytest.raises(ValueError, match=rf"{op}: impl='cuda' is not known; use one of 'auto', 'triton', 'reference'"):
        CALLS[op](impl="cuda")


def reference() -> str:
    return "reference"


def triton() -> str:
    return "triton"


def test_auto_takes_the_kernel_on_a_gpu_and_the_reference_elsewhere() -> None:
    both = {"reference": reference, "triton": triton}
    assert dispatch.choose("op", "auto", torch.device("cuda"), both) is triton
    assert dispatch.choose("op", "auto", torch.device("cpu"), both) is reference
    assert dispatch.choose("op", "auto", torch.device("cuda"), {"reference": reference}) is reference
    assert dispatch.choose("op", "reference", torch.device("cuda"), both) is reference


def test_a_kernel_that_does_not_exist_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"there is no triton kernel for this op; use impl='reference'"):
        dispatch.choose("op", "triton", torch.device("cuda"), {"reference": reference})


def test_a_kernel_without_a_gpu_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"reference": reference, "triton": triton}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"op: impl='triton' needs a CUDA device.*on cpu.*impl='reference'"):
        dispatch.choose("op", "triton", torch.device("cpu"), both)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", "triton", torch.device("cpu"), both) is triton


def test_a_kernel_runs_where_its_operands_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whichever the operands are on."""
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(there: torch.device) -> Iterator[None]:
        entered.append(there)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    both = {"reference": reference, "triton": lambda x, y=0: (x, y)}
    for impl in ("auto", "triton"):
        assert dispatch.choose("op", impl, torch.device("cuda:1"), both)(1, y=2) == (1, 2)
        assert dispatch.choose("op", impl, torch.device("cuda:0"), both)(1, y=2) == (1, 2)
    assert entered == [torch.device("cuda:1")] * 2


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="turbokernels.dispatch"):
        for _ in range(3):
            dispatch.choose("an op of this test", "auto", torch.device("cpu"), {"reference": reference})
    assert [r.getMessage() for r in caplog.records] == [
        "turbokernels: an op of this test on cpu runs the reference implementation"
    ]


def test_the_choice_does_not_break_a_compiled_graph() -> None:
    compiled = torch.compile(CALLS["linear_attention"], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), CALLS["linear_attention"]())


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (Q[0], Q, "k has shape .* expected 4 dimensions"),
        (Q[:, :0], Q[:, :0], r"k has shape \(2, 0, 2, 8\); every dimension must be at least 1"),
        (Q[:1], Q[:1], "must agree in batch, heads and head dim"),
        (Q[:, :, :1], Q[:, :, :1], "must agree in batch, heads and head dim"),
        (Q, Q[:, :16], r"v has shape \(2, 16, 2, 8\); expected k's shape \(2, 32, 2, 8\)"),
        (Q.double(), Q, "k has dtype torch.float64 but q has torch.float32; cast"),
        (Q.int(), Q.int(), "k has dtype torch.int32; expected float16, bfloat16, float32 or float64"),
        (Q.to("meta"), Q, "k is on meta but q is on cpu; move"),
        (Q, Q.transpose(1, 3).contiguous().transpose(1, 3), r"v has stride 64 .*pass v\.contiguous\(\)"),
    ],
)
def test_operands_that_do_not_fit(k: torch.Tensor, v: torch.Tensor, message: str) -> None:
    for call in (
        lambda: tk.sparse_attention(Q, k, v, MASK),
        lambda: tk.attention_jvp(Q, k, v, Q, None, None),
        lambda: tk.linear_attention(Q, k, v),
        lambda: tk.sage_attention(Q, k, v),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_tangents_must_be_like_their_primals() -> None:
    with pytest.raises(ValueError, match=r"tk has shape \(2, 31, 2, 8\); expected k's shape"):
        tk.attention_jvp(Q, Q, Q, Q, Q[:, :31], Q)
    with pytest.raises(ValueError, match=r"tv has dtype torch\.float64"):
        tk.sparse_attention_jvp(Q, Q, Q, Q, Q, Q.double(), MASK)


def test_the_budget_passes_what_it_should_and_fails_what_it_should() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    plain = exact.float() + 1e-6 * torch.randn(1000)
    assert_within_budget(plain, plain, exact)
    assert_within_budget(exact.float(), exact.float(), exact)  # the rounding to float32 alone
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(exact.float() + 1e-5, plain, exact)
    spread = exact.float() + 4e-6 * torch.randn(1000).sign() * 0.8
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(spread, plain, exact)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.full((1000,), float("nan")), plain, exact)
    with pytest.raises(AssertionError):
        assert_within_budget(plain, torch.full((1000,), float("nan")), exact)
    with pytest.raises(ValueError, match="compute it in float64"):
        errors(plain, plain)
    with pytest.raises(ValueError, match=r"expected \(1000,\)"):
        errors(plain[:1], exact)

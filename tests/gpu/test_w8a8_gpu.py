"""W8A8 linear kernels on a GPU."""

from __future__ import annotations

import cases_w8a8 as cases
import pytest
import torch
from turbokernels import w8a8_linear
from turbokernels.w8a8 import kernel
from turbokernels.w8a8.api import SCHEMES

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def runs(scheme: str) -> None:
    if scheme == "fp8_channel" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 tensor cores need compute capability 8.9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "n_out"), [((1, 1), 1), ((63, 37), 19), ((2, 129, 300), 130), ((257, 1536), 520)])
@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block128"])
def test_odd_shapes(shape: tuple[int, ...], n_out: int, scheme: str, dtype: torch.dtype) -> None:
    cases.check_linear(shape, n_out, scheme, dtype, "cuda")
    cases.check_linear(shape, n_out, scheme, dtype, "cuda", bias=False, activation="gelu_tanh")


@pytest.mark.parametrize("index", range(8))
def test_every_launch(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates compute the same; shapes with ragged tiles in every direction, and many tiles for one program."""
    candidates = kernel.row_candidates(torch.device("cuda"), True)
    if index >= len(candidates):
        pytest.skip(f"this GPU has {len(candidates)} candidates")
    monkeypatch.setattr(kernel, "row_candidates", lambda *_: [candidates[index]])
    for shape, n_out in (((2500, 1536), 1000), ((1, 390, 272), 48), ((4000, 5120), 640), ((20000, 272), 640)):
        cases.check_linear(shape, n_out, "int8_channel", torch.bfloat16, "cuda")
        cases.check_linear(shape, n_out, "int8_channel", torch.bfloat16, "cuda", activation="gelu_tanh")


@pytest.mark.parametrize(("bias", "n_out"), [(True, 48), (False, 48), (True, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8(dtype: torch.dtype, bias: bool, n_out: int) -> None:
    """Hopper's fp8 units add with 14 bits: compared as a whole, not element by element."""
    runs("fp8_channel")
    x, w_q, w_scale, b = (t.cuda() for t in cases.operands((2, 65, 96), n_out, dtype, "fp8_channel"))
    given = b if bias else None
    got = w8a8_linear(x, w_q, w_scale, given, "fp8_channel", "triton").double()
    expected = w8a8_linear(x.float(), w_q, w_scale, given, "fp8_channel", "reference").double()
    assert (got - expected).norm() <= (2.0**-12 + torch.finfo(dtype).eps) * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("check", [cases.check_given_quantised, cases.check_non_finite, cases.check_empty_and_single])
def test_edges(check, scheme: str) -> None:
    runs(scheme)
    check(scheme, "cuda")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_without_a_graph_break(scheme: str) -> None:
    runs(scheme)
    x, w_q, w_scale, bias = (t.cuda() for t in cases.operands((2, 65, 96), 48, torch.bfloat16, scheme))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return w8a8_linear(x, w_q, w_scale, bias, scheme)

    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))

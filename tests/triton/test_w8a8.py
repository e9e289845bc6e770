"""W8A8 linear kernels under the interpreter, with every way of walking tiles and reading them."""

from __future__ import annotations

import cases_w8a8 as cases
import pytest
import torch
from turbokernels import quantize_token, w8a8_linear
from turbokernels.tuning import Launch
from turbokernels.w8a8 import kernel

INT8 = ["int8_channel", "int8_block128"]


@pytest.fixture(params=["tiles", "persistent", "descriptors", "persistent descriptors"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"TMA": int("descriptors" in request.param), "PERSISTENT": int("persistent" in request.param)}
    monkeypatch.setattr(kernel, "row_candidates", lambda *_: [kernel._tile(32, 16, 32, 4, 2, GROUP=2, **flags)])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "n_out"), [((2, 33, 64), 48), ((70, 80), 16)])
def test_rows(shape: tuple[int, ...], n_out: int, dtype: torch.dtype) -> None:
    cases.check_linear(shape, n_out, "int8_channel", dtype, "cpu")


@pytest.mark.parametrize(("shape", "n_out"), [((1, 1), 1), ((63, 37), 19), ((2, 129, 300), 130)])
@pytest.mark.parametrize("scheme", INT8)
def test_ragged_shapes(shape: tuple[int, ...], n_out: int, scheme: str) -> None:
    cases.check_linear(shape, n_out, scheme, torch.float16, "cpu")


def test_tiles_of_half_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TILES", [Launch(4, 2, BLOCK_M=64, BLOCK_N=64, GROUP=2)])
    cases.check_linear((2, 193, 256), 200, "int8_block128", torch.float16, "cpu")


@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_epilogue(scheme: str, dtype: torch.dtype) -> None:
    cases.check_linear((33, 128), 40, scheme, dtype, "cpu", bias=False)
    cases.check_linear((33, 128), 40, scheme, dtype, "cpu", activation="gelu_tanh")


@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize("check", [cases.check_given_quantised, cases.check_non_finite, cases.check_empty_and_single])
def test_edges(check, scheme: str) -> None:
    check(scheme, "cpu")


@pytest.mark.parametrize("scheme", INT8)
def test_no_graph_break(scheme: str) -> None:
    x, w_q, w_scale, bias = cases.operands((2, 9, 64), 48, torch.float16, scheme)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return w8a8_linear(x, w_q, w_scale, bias, scheme, "triton")

    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_operator_registration() -> None:
    x, w_q, w_scale, bias = cases.operands((9, 64), 48, torch.float16, "int8_channel")
    values, scale = quantize_token(x)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._linear_rows, (values, scale, w_q, w_scale, bias, True, x.dtype), test_utils=checks)
    tiles = (values[None], torch.ones(1, 1, 1), w_q, torch.ones(1, 1), None, False, torch.float32)
    torch.library.opcheck(kernel._linear_tiles, tiles, test_utils=checks)
    torch.library.opcheck(kernel.quantize._quantize_rows, (x, None, torch.int8, "gelu_tanh"), test_utils=checks)
    torch.library.opcheck(kernel.quantize._quantize_block, (x, None, 32, "gelu_tanh"), test_utils=checks)


def test_bad_operands_are_named() -> None:
    x, w_q, w_scale, bias = cases.operands((4, 32), 16, torch.float32, "int8_channel")
    pair = cases.quantise(x, "int8_channel")
    with pytest.raises(ValueError, match="pass out_dtype"):
        w8a8_linear(pair, w_q, w_scale, bias)
    with pytest.raises(ValueError, match=r"scales \(3,\); int8_channel expects scales \(4,\)"):
        w8a8_linear((pair[0], pair[1][:3]), w_q, w_scale, bias, out_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"quantised to torch\.float8_e4m3fn with torch\.float32 scales"):
        w8a8_linear((pair[0].to(torch.float8_e4m3fn), pair[1]), w_q, w_scale, bias, out_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"out_dtype=torch\.int32 is not a float type"):
        w8a8_linear(x, w_q, w_scale, bias, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="activation='relu' is not known"):
        w8a8_linear(x, w_q, w_scale, bias, activation="relu")
    with pytest.raises(ValueError, match=r"not for torch\.float64; use impl='reference'"):
        w8a8_linear(pair, w_q, w_scale, bias, impl="triton", out_dtype=torch.float64)


def test_an_fp8_linear_says_when_it_does_not_run_in_one_pass(caplog: pytest.LogCaptureFixture) -> None:
    x, w_q, w_scale, bias = cases.operands((3, 48), 16, torch.float32, "fp8_channel")
    kernel._log_steps.cache_clear()
    with caplog.at_level("INFO", logger="turbokernels"):
        for _ in range(2):
            w8a8_linear(x, w_q, w_scale, bias, "fp8_channel", "triton")
    said = [record.getMessage() for record in caplog.records if "in steps of their own" in record.getMessage()]
    assert len(said) == 1
    assert "48 -> 16 for torch.float32" in said[0]

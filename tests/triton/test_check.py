"""The self-check, on interpreted kernels: it passes what is right, and turns red for what is wrong or raises."""

from __future__ import annotations

import pytest
import torch
from turbokernels import check
from turbokernels.attention_linear import api
from turbokernels.check import Case

SMALL = Case(torch.device("cpu"), torch.float32, length=70, heads=1, dim=32, block_q=32, block_k=32, features=64)


@pytest.mark.parametrize("op", check.ops_for(SMALL.device))
def test_every_op_is_green(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--ops", op], SMALL) == 0, capsys.readouterr().out
    assert "all 1 ok" in capsys.readouterr().out


def test_a_wrong_kernel_is_red(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = api.IMPLEMENTATIONS["reference"]
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", lambda q, k, v, m: right(q, k, 1.05 * v, m))
    assert check.main(["--ops", "linear_attention", "linear_attention_jvp"], SMALL) == 1
    out = capsys.readouterr().out
    assert "RED  linear_attention " in out
    assert "1 of 2 red: linear_attention\n" in out


def test_nan_and_exceptions_are_red(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = api.IMPLEMENTATIONS["reference"]
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", lambda q, k, v, m: right(q, k, v, m) + float("nan"))
    assert check.main(["--ops", "linear_attention"], SMALL) == 1

    def fails(*operands: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", fails)
    assert check.main(["--ops", "linear_attention"], SMALL) == 1
    assert "RuntimeError: out of luck" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out

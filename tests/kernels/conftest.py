"""Uninitialised memory reads as NaN in these tests, so that a result which was never written cannot pass by luck."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return wrapped


@pytest.fixture(autouse=True)
def poison_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))

"""What every test runs under: one thread (results do not depend on the machine), and memory that is NaN until written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

torch.set_num_threads(1)
# `with torch.device("meta")` recognises constructors by identity and remembers them at its first use: let it see the real
# torch.empty, or networks of 14B parameters are built in memory while it is replaced below.
_device_constructors()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        # 8-bit floats cannot be filled everywhere, and are always the result of a conversion.
        if tensor.is_floating_point() and tensor.itemsize > 1:
            tensor.detach().fill_(float("nan"))  # detached: compilers allocate leaves that require grad
        return tensor

    return wrapped


@pytest.fixture(autouse=True, scope="session")
def caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept between runs: not in this process, and not in those that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def work_seconds() -> Callable[[], float]:
    """A clock that runs while this process and those it has waited for compute: a busy machine does not make them slow."""
    return lambda: sum(os.times()[:4])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A failure can be repeated; TURBOTRAIN_TEST_SEED draws other inputs."""
    torch.manual_seed(int(os.environ.get("TURBOTRAIN_TEST_SEED", "0")))


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory reads as NaN, so that a result which was never written cannot pass by luck."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))

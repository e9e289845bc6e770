"""AdamW with 8-bit moments: it trains about as AdamW does, resumes bit for bit, on other numbers of processes too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from turbotrain.compose import UsageError
from turbotrain.config import OptimSection, load_config
from turbotrain.training.optim import make_optimizer
from turbotrain.training.pieces import SavedPieces, write_pieces
from turbotrain.training.roles import Role
from turbotrain.training.zero import zero_role

TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
OPTIM = OptimSection(lr=1e-3, weight_decay=0.0)
EIGHT = OptimSection(lr=1e-3, weight_decay=0.0, kind="adamw_8bit")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, which takes a minute on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 24), nn.GELU(), nn.Linear(24, 256))


def role_of(module: nn.Module, optim: OptimSection) -> Role:
    return Role("student", module, module, make_optimizer(module.parameters(), optim), lambda _: optim.lr, 1e9)


def train(role: Role, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(role.updates))
        loss = (role.module(x) - x.roll(1, -1)).square().mean()
        role.backward(loss)
        role.step(role.norm())
        losses.append(loss.item())
    return losses


def flat(role: Role) -> dict[str, Tensor]:
    return {piece.name: piece.flat.clone() for piece in role.pieces()}


@TORCHAO
def test_it_trains_about_as_float_moments_do() -> None:
    exact, ours = train(role_of(network(), OPTIM), 40), train(role_of(network(), EIGHT), 40)
    assert ours != exact
    assert exact[-1] < 0.97 * exact[0]
    assert ours == pytest.approx(exact, rel=0.01)


@TORCHAO
def test_moments_of_matrices_take_a_byte() -> None:
    sizes = {piece.name: (piece.tensor.dtype, piece.tensor.numel()) for piece in role_of(network(), EIGHT).pieces()}
    assert sizes["student/exp_avg_codes/0.weight"] == (torch.uint8, 256 * 24)
    assert sizes["student/exp_avg_sq_scale/0.weight"] == (torch.float32, 24)
    # Rows that are no whole blocks, and vectors, stay floats.
    assert sizes["student/exp_avg/2.weight"] == (torch.float32, 256 * 24)
    assert sizes["student/exp_avg/0.bias"] == (torch.float32, 24)


@TORCHAO
def test_a_saved_state_continues_bit_for_bit(tmp_path: Path) -> None:
    role = role_of(network(), EIGHT)
    train(role, 3)
    write_pieces(tmp_path / "state.safetensors", role.pieces())
    other = role_of(network(), EIGHT)
    with SavedPieces([tmp_path / "state.safetensors"]) as saved, torch.no_grad():
        saved.fill(other.pieces())
    other.updates = role.updates
    assert train(other, 3) == train(role, 3)
    ours, theirs = flat(other), flat(role)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _on_two(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    from turbotrain.training.fsdp import ShardedRole

    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = network()
    fully_shard(module)
    role = ShardedRole("student", module, module, make_optimizer(module.parameters(), EIGHT), lambda _: EIGHT.lr, 1e9)
    train(role, 3)
    write_pieces(Path(folder) / f"rank_{rank}.safetensors", [p for p in role.pieces() if rank == 0 or not p.replicated])
    dist.barrier()
    dist.destroy_process_group()


@TORCHAO
def test_one_process_continues_what_two_sharded(tmp_path: Path) -> None:
    mp.start_processes(_on_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    whole, other = role_of(network(), EIGHT), role_of(network(), EIGHT)
    train(whole, 3)
    with SavedPieces(sorted(tmp_path.glob("*.safetensors"))) as saved, torch.no_grad():
        saved.fill(other.pieces())
    other.updates = whole.updates
    assert train(other, 3) == pytest.approx(train(whole, 3), rel=1e-5)


def test_engines_that_cannot_say_so() -> None:
    with pytest.raises(UsageError, match=r"optim\.kind='adamw_8bit'.*launch\.engine=fsdp2"):
        zero_role("student", None, EIGHT, lambda _: 0.0, 3, False)  # type: ignore[arg-type]


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"pip install turbotrain\[optim8\]"):
        make_optimizer(network().parameters(), EIGHT)


def test_kinds_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"sla\.optim\.kind='lion'"):
        load_config(["recipe=shapes", "sla.optim.kind=lion"])

"""The tokens of a sample on several processes: values, tangents, gradients are those of one process, to float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from wan_networks import STRUCTURES, inputs, randomise, relative, tangents_of

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.graphs import GraphCache, GraphedNetwork
from turbotrain.model.tangent import Dual
from turbotrain.model.token_share import TokenShare
from turbotrain.model.wan import WanTransformer

PROCESSES = 4
SLA = AttentionConfig("sla", 0.5, 16, 16)
CUBE = AttentionConfig("sla", 0.5, 16, 16, order="cube", feature_map="elu")
EVEN, ODD, LONE = (2, 4, 8), (3, 6, 10), (1, 2, 2)  # 16, 45 and 1 tokens
# Sums are taken in another order, in float64: 1e-16, and a network deep (measured: 4e-15). A wrong share is an error of 1e-2.
ROUNDING = 1e-12


def network(structure: str, attention: AttentionConfig | None = None) -> WanTransformer:
    config = dataclasses.replace(STRUCTURES[structure], num_heads=4)
    return randomise(WanTransformer(config, attention)).set_weight_dtype(torch.float64)


def on_processes(check: Callable[..., None], folder: Path, *arguments: object) -> None:
    mp.start_processes(_one_of, args=(str(folder), check, arguments), nprocs=PROCESSES, start_method="fork")


def _one_of(rank: int, folder: str, check: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    check(*arguments)
    dist.destroy_process_group()


def context(size: int) -> dist.ProcessGroup:
    return init_device_mesh("cpu", (PROCESSES // size, size), mesh_dim_names=("data", "context")).get_group("context")


def differentiated(
    model: WanTransformer, grid: tuple[int, int, int], moving: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """v, its tangent along with `moving`, the gradient of x; the gradients of the weights."""
    given = inputs(model.config, torch.float64, grid=grid)
    x = given["x_BCTHW"].requires_grad_()
    out = model(**given, tangents=tangents_of(given) if moving else None)
    v, *tv = out if moving else (out,)
    (v.square().mean() + (v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v)).sum()).backward()
    with torch.no_grad():
        fused = model(**given)
    found = dict(zip(("v", "x", "fused", "tangent"), (v.detach(), x.grad, fused, *tv)))
    return found, {name: p.grad for name, p in model.named_parameters()}


# Structure, attention, grid, with tangents, processes that share a sample.
CASES = [
    ("t2v", AttentionConfig(), ODD, True, 2),
    ("t2v", SLA, EVEN, False, 4),
    ("i2v_concat", AttentionConfig(), EVEN, False, 2),
    ("i2v_clip", SLA, ODD, True, 4),
    ("ti2v_per_token", SLA, ODD, True, 2),
    ("t2v", CUBE, ODD, True, 4),
    ("ti2v_per_token", SLA, LONE, True, 4),
]


def check_network(expected: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    groups = {size: context(size) for size in (2, 4)}
    for case, (values, gradients) in zip(CASES, expected, strict=True):
        structure, attention, grid, moving, size = case
        shared = network(structure, attention).share_tokens(groups[size])
        # Checkpointed blocks repeat their collectives in the backward pass.
        shared.enable_activation_checkpointing(moving)
        got_values, got = differentiated(shared, grid, moving)
        assert got_values.keys() == values.keys()
        for name, value in got_values.items():
            assert relative(value, values[name]) < ROUNDING, (case, name)
        for name, gradient in got.items():
            dist.all_reduce(gradient, group=groups[size])  # as engines do: the mean
            apart = (gradient / size - gradients[name]).norm()
            assert apart <= ROUNDING * (gradients[name].norm() + 1), (case, name)


def test_a_shared_network_is_the_network(tmp_path: Path) -> None:
    expected = [differentiated(network(case[0], case[1]), *case[2:4]) for case in CASES]
    on_processes(check_network, tmp_path, expected)


def check_selection() -> None:
    """Block lists are of a process's own heads, those that one process chooses for them; given back, they are used."""
    group = context(2)
    whole, shared = network("t2v", SLA), network("t2v", SLA).share_tokens(group)
    given = inputs(whole.config, torch.float64, grid=ODD)
    with torch.no_grad():
        v, chosen = whole(**given, return_selection=True)
        _, own = shared(**given, return_selection=True)
        again = shared(**given, selection=own)
    heads = slice(2 * group.rank(), 2 * group.rank() + 2)
    for mask, part in zip(chosen, own, strict=True):
        assert torch.equal(mask.kept[:, heads], part.kept)
    assert relative(again, v) < ROUNDING


def test_selections_are_of_own_heads(tmp_path: Path) -> None:
    on_processes(check_selection, tmp_path)


def check_one_exchange() -> None:
    """q, k, v and their tangents take one collective there, one back for the gradients of q, k and v alone."""
    share = TokenShare(45, context(4))
    sent: list[int] = []
    exchange = share._exchange
    share._exchange = lambda parts: (sent.append(len(parts)), exchange(parts))[1]  # type: ignore[method-assign]
    q, k, v = (torch.randn(1, share.rows, 4, 6, requires_grad=True) for _ in range(3))
    moved = share.to_heads(*(Dual(x, torch.randn_like(x)) for x in (q, k, v)))
    assert sent == [6]
    assert all(dual.x.shape == (1, 45, 1, 6) and dual.t is not None and not dual.t.requires_grad for dual in moved)
    moved[0].x.sum().backward()  # the others have no gradient
    assert sent == [6, 3]
    padding = share.rows * share.size - 45
    assert q.grad is not None
    assert k.grad is not None
    assert q.grad.sum() == q.numel() - (padding * 24 if share.rank == 3 else 0), "padding is never seen"
    assert not k.grad.any()


def test_tangents_travel_with_their_values(tmp_path: Path) -> None:
    on_processes(check_one_exchange, tmp_path)


class OfThree:
    """As much of a process group as is asked before anything is sent."""

    def size(self) -> int:
        return 3


def test_heads_that_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match="4 heads cannot be dealt to a context group of 3 processes"):
        network("t2v").share_tokens(OfThree())  # type: ignore[arg-type]


def test_shared_networks_are_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    alone = network("t2v")
    assert isinstance(GraphCache(lambda call: pytest.fail("recorded")).network(alone), GraphedNetwork)
    alone.context_group = OfThree()  # type: ignore[assignment]
    with caplog.at_level("INFO"):
        assert GraphCache(lambda call: pytest.fail("recorded")).network(alone) is alone
    assert "other processes" in caplog.text

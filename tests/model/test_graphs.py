"""When calls are recorded, replayed and left alone, with a recorder that needs no GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wan_networks import STRUCTURES, build, inputs

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.graphs import GraphCache, Recording
from turbotrain.model.rope import rope_table, tables_used, token_order
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", 0.5, 16, 16)


class Replaying:
    """As a graph does it: a replay computes again from the tensors of the recording, into the same result."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call: Callable[[], Tensor]) -> Recording:
        self.recorded += 1
        result = call()

        def replay() -> None:
            self.replayed += 1
            result.copy_(call())

        return Recording(result, replay)


def ordered(given: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """As `bind` calls a network: the first three by position."""
    rest = dict(given)
    return tuple(rest.pop(name) for name in ("x_BCTHW", "timestep", "context_BLD")), rest


@pytest.mark.parametrize("structure", STRUCTURES)
@torch.inference_mode()
def test_replays_give_what_the_network_gives(structure: str) -> None:
    model, recorder = build(structure, SLA), Replaying()
    graphs = GraphCache(recorder)
    network = graphs.network(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(4):  # eager, recorded and replayed, replayed, replayed
        positional, named = ordered(inputs(STRUCTURES[structure], seed=seed))
        kept.append((network(*positional, **named), model(*positional, **named)))
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    assert all(torch.equal(graphed, eager) for graphed, eager in kept)  # no result was overwritten by a later one
    with torch.inference_mode(False), torch.no_grad():  # in another mode than it was recorded in
        positional, named = ordered(inputs(STRUCTURES[structure], seed=4))
        assert torch.equal(network(*positional, **named), model(*positional, **named))
    assert recorder.replayed == 4


@torch.no_grad()
def test_an_encoded_context_is_an_input_like_others() -> None:
    model, recorder = build("i2v_clip", SLA), Replaying()
    network = GraphCache(recorder).network(model)
    for seed in range(3):
        given = inputs(STRUCTURES["i2v_clip"], seed=seed)
        expected = model(**given)
        (x, timestep, text), named = ordered(given)
        encoded = model.encode_context(text, named.pop("clip_BLD"))
        assert torch.equal(network(x, timestep, encoded, **named), expected)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@torch.no_grad()
def test_other_shapes_weights_and_attention_are_other_graphs() -> None:
    model, recorder = build("t2v", SLA), Replaying()
    graphs = GraphCache(recorder, limit=8)

    def call(**changes: Any) -> None:
        network = graphs.network(model)
        positional, _ = ordered(inputs(STRUCTURES["t2v"], **changes))
        for _ in range(2):
            assert torch.equal(network(*positional), model(*positional))

    call()
    call()
    assert recorder.recorded == 1
    call(batch=1)
    assert recorder.recorded == 2
    call(grid=(1, 4, 6))
    assert recorder.recorded == 3
    model.blocks[0].get_parameter("modulation").mul_(2)  # values are read anew, wherever they are
    call()
    assert recorder.recorded == 3
    model.set_weight_dtype(torch.float64).set_weight_dtype(torch.float32)  # the same values elsewhere
    call()
    assert recorder.recorded == 4
    model.set_attention(AttentionConfig("sla", 1.0, 16, 16))
    call()
    assert recorder.recorded == 5


@torch.no_grad()
def test_few_graphs_are_kept_the_latest_used() -> None:
    model, recorder = build("t2v", SLA), Replaying()
    graphs = GraphCache(recorder, limit=2)
    network = graphs.network(model)

    def call(batch: int) -> None:
        for _ in range(2):
            network(*ordered(inputs(STRUCTURES["t2v"], batch=batch))[0])

    for batch in (1, 2, 1, 3):
        call(batch)
    assert (len(graphs), recorder.recorded) == (2, 3)
    call(1)
    assert recorder.recorded == 3
    call(2)
    assert recorder.recorded == 4
    graphs.clear()
    assert len(graphs) == 0
    network(*ordered(inputs(STRUCTURES["t2v"], batch=2))[0])
    assert recorder.recorded == 4  # eager first, again


def test_what_is_not_plain_sampling_runs_eagerly() -> None:
    model, recorder = build("t2v", SLA), Replaying()
    given = inputs(STRUCTURES["t2v"])
    positional, _ = ordered(given)
    network = GraphCache(recorder).network(model)
    tangents = (torch.randn_like(given["x_BCTHW"]), torch.randn_like(given["timestep"]))
    for _ in range(3):
        assert network(*positional).requires_grad
        with torch.no_grad():
            assert len(network(*positional, return_selection=True)) == 2
            assert len(network(*positional, tangents=tangents)) == 2
    assert recorder.recorded == 0
    with torch.no_grad():
        large = GraphCache(recorder, largest=2 * 18 * 48 - 1).network(model)
        for _ in range(3):
            large(*positional)
        assert recorder.recorded == 0
        exact = GraphCache(recorder, largest=2 * 18 * 48).network(model)
        for _ in range(3):
            exact(*positional)
        assert recorder.recorded == 1


def test_networks_that_move_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    graphs = GraphCache(Replaying())
    hooked = build("t2v", SLA)
    hooked.blocks[1].register_forward_pre_hook(lambda *_: None)
    apart = build("t2v", SLA)
    apart.head = nn.Linear(2, 2, device="meta")
    for model in (hooked, apart, hooked):
        assert graphs.network(model) is model
    assert [record.message for record in caplog.records] == [
        "no CUDA graph: hooks run between the network's modules",
        "no CUDA graph: the network lies on cpu and meta",
    ]


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    asked = 0

    def refusing(_: Callable[[], Tensor]) -> Recording:
        nonlocal asked
        asked += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    model = build("t2v", SLA)
    network = GraphCache(refusing).network(model)
    positional, _ = ordered(inputs(STRUCTURES["t2v"]))
    for _ in range(4):
        assert torch.equal(network(*positional), model(*positional))
    assert asked == 1
    assert "operation not permitted when stream is capturing" in caplog.text


@torch.no_grad()
def test_tables_live_as_long_as_the_graph() -> None:
    """They are read by address, and the functions that made them remember only the last few."""
    model, recorder = build("t2v", AttentionConfig("sla", 0.5, 16, 16, "cube")), Replaying()
    graphs = GraphCache(recorder)
    network: Callable[..., Tensor] = graphs.network(model)
    for _ in range(2):
        network(*ordered(inputs(STRUCTURES["t2v"]))[0])
    (graph,) = graphs._graphs.values()
    expected = [rope_table((3, 2, 3), 16, 16, torch.device("cpu"), torch.float32)]
    expected.append(token_order((3, 2, 3), 16, torch.device("cpu")))
    assert all(any(table is made for table in graph.tables) for made in expected)
    with tables_used() as outer, tables_used() as inner:
        token_order((1, 1, 1), None, torch.device("cpu"))
    assert outer == inner == []


def test_the_wrapper_shows_the_network() -> None:
    model = build("t2v")
    network: Any = GraphCache(Replaying()).network(model)
    assert isinstance(network.module, WanTransformer)
    assert network.module is model
    assert [id(p) for p in network.parameters()] == [id(p) for p in model.parameters()]

"""Steps that are recorded and replayed, with a recorder that needs no GPU: the same weights as without, from every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, arguments, read_metrics, train_here, weights
from torch import Tensor, nn

from turbotrain.model.graphs import Recording
from turbotrain.stages import context
from turbotrain.training import graphs

KINDS = {
    "teacher": ["stages=[teacher]", "teacher.steps=6", "teacher.batch_size=2", "teacher.optim.lr=1e-3"],
    "sla": ["stages=[sla]", "sla.caption_dropout=0.5"],
    "rcm": [
        "stages=[rcm]",
        "rcm.composition=joint",
        "rcm.tangent_warmup=5",
        "rcm.phases=[{cm: dcm, dmd: false, steps: 4}, {cm: scm, dmd: false, steps: 6}, {cm: scm, dmd: true, steps: 26}]",
    ],
    "rcm, fixed times": [
        "stages=[rcm]",
        "rcm.composition=joint",
        "rcm.simulation_times=fixed",
        "launch.micro_batches=2",
        "rcm.phases=[{cm: none, dmd: true, steps: 28}]",
    ],
}


class Replaying:
    """As a graph does it: the recording computes nothing; a replay computes what was recorded, again from the tensors that it
    read, into the gradients and the results that it wrote."""

    parameters: Sequence[nn.Parameter] = ()

    def __init__(self, stream: object = None) -> None:
        pass

    def __call__(self, call: Callable[[], dict[str, Any]]) -> Recording:
        parameters = self.parameters
        result = call()
        gradients = [parameter.grad for parameter in parameters]
        written = [x for x in (*result.values(), *gradients) if isinstance(x, Tensor)]
        for tensor in written:
            tensor.fill_(float("nan"))

        def replay() -> None:
            for parameter in parameters:
                parameter.grad = None
            again = call()
            computed = (*again.values(), *(parameter.grad for parameter in parameters))
            for tensor, value in zip(written, (x for x in computed if isinstance(x, Tensor)), strict=True):
                tensor.copy_(value)
            for parameter in parameters:
                parameter.grad = None

        return Recording(result, replay)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every recording that was made."""
    made: list[str] = []
    compute = graphs.StepGraph.__call__

    class Counting(Replaying):
        def __call__(self, call: Callable[[], dict[str, Any]]) -> Recording:
            made.append("recorded")
            return super().__call__(call)

    def with_parameters(self: Any, parameters: Sequence[nn.Parameter], call: Any) -> Any:
        Replaying.parameters = parameters
        return compute(self, parameters, call)

    monkeypatch.setattr(graphs.StepGraph, "__call__", with_parameters)
    monkeypatch.setattr(graphs, "CudaRecorder", Counting)
    return made


def train(world: World, output: Path, stage: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    assert train_here(*arguments(world, output, *more)) == 0
    return read_metrics(output / "run" / stage), weights(output / "run" / stage)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_train_as_launched_ones_do(
    kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: list[str]
) -> None:
    stage = kind.split(",")[0]
    plain_lines, plain = train(world, tmp_path / "plain", stage, *KINDS[kind])
    assert not replays
    monkeypatch.setattr(context, "_replays", lambda *_: True)
    lines, replayed = train(world, tmp_path / "replayed", stage, *KINDS[kind])
    # Of student and critic one for each number of renoisings; of every kind of consistency step one.
    assert len(replays) == {"teacher": 1, "sla": 1, "rcm": 10, "rcm, fixed times": 8}[kind]
    assert all(torch.equal(replayed[name], tensor) for name, tensor in plain.items())
    for line, expected in zip(lines, plain_lines, strict=True):
        assert {name: line[name] for name in ("role", "loss", "grad_norm")} == {
            name: expected[name] for name in ("role", "loss", "grad_norm")
        }


def test_a_run_that_stopped_goes_on_with_recordings_of_its_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: list[str]
) -> None:
    _, plain = train(world, tmp_path / "plain", "sla", *KINDS["sla"])
    monkeypatch.setattr(context, "_replays", lambda *_: True)
    begun = [*KINDS["sla"], "sla.optim.decay=constant"]
    _, whole = train(world, tmp_path / "whole", "sla", *begun)
    train(world, tmp_path / "parts", "sla", *begun, "sla.steps=4")
    _, parts = train(world, tmp_path / "parts", "sla", *begun, "sla.steps=8")
    assert len(replays) == 3
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not all(
        torch.equal(parts[name], tensor) for name, tensor in plain.items()
    )  # another rate: the test can fail


def test_what_cannot_be_recorded_is_launched(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(Replaying):
        def __call__(self, call: Callable[[], dict[str, Any]]) -> Recording:
            call()
            raise RuntimeError("operation not permitted when stream is capturing")

    _, plain = train(world, tmp_path / "plain", "sla", *KINDS["sla"])
    monkeypatch.setattr(context, "_replays", lambda *_: True)
    monkeypatch.setattr(graphs, "CudaRecorder", Refusing)
    _, got = train(world, tmp_path / "refused", "sla", *KINDS["sla"])
    assert [record.message for record in caplog.records if "no CUDA graph" in record.message] == [
        "no CUDA graph, the CPU launches every kernel of every step: operation not permitted when stream is capturing"
    ]
    assert all(torch.equal(got[name], tensor) for name, tensor in plain.items())

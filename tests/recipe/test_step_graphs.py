"""Steps that are recorded and replayed, with a recorder that needs no GPU: the same weights as without, from every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, arguments, read_metrics, train_here, train_on, weights
from torch import Tensor, nn

from turbotrain.model.graphs import Recording
from turbotrain.stages import context
from turbotrain.training import graphs, parallel

KINDS = {
    "teacher": ["stages=[teacher]", "teacher.steps=4", "teacher.batch_size=2", "teacher.optim.lr=1e-3"],
    "sla": ["stages=[sla]", "sla.steps=4", "sla.caption_dropout=0.5", "launch.micro_batches=2"],
    "rcm": [
        "stages=[rcm]",
        "rcm.composition=joint",
        "rcm.tangent_warmup=5",
        "rcm.phases=[{cm: dcm, dmd: false, steps: 2}, {cm: scm, dmd: false, steps: 2}, {cm: scm, dmd: true, steps: 17}]",
    ],
}
# Of student and critic one for each number of renoisings; of every kind of consistency step one.
RECORDINGS = {"teacher": 1, "sla": 1, "rcm": 10}


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
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The recorder of every recording that was made; steps are recorded from here on, the second of each kind."""
    made: list[type] = []
    compute = graphs.StepGraph.__call__

    class Counting(Replaying):
        def __call__(self, call: Callable[[], dict[str, Any]]) -> Recording:
            made.append(Counting)
            return super().__call__(call)

    def with_parameters(self: Any, parameters: Sequence[nn.Parameter], call: Any) -> Any:
        Replaying.parameters = parameters
        return compute(self, parameters, call)

    monkeypatch.setattr(graphs.StepGraph, "__call__", with_parameters)
    monkeypatch.setattr(graphs, "CudaRecorder", Counting)
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    for module in (context, parallel):
        monkeypatch.setattr(module, "replays_steps", lambda *_: True)
    return made


def train(world: World, output: Path, kind: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    assert train_here(*arguments(world, output, *KINDS[kind], *more)) == 0
    return results(output, kind)


def results(output: Path, kind: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    return read_metrics(output / "run" / kind), weights(output / "run" / kind)


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list, dict[str, Tensor]]]:
    """What steps give that are launched one by one."""
    return cache(lambda kind: train(world, tmp_path_factory.mktemp("plain"), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_train_as_launched_ones_do(
    kind: str, world: World, tmp_path: Path, plain: Any, request: pytest.FixtureRequest
) -> None:
    expected_lines, expected = plain(kind)
    recordings = request.getfixturevalue("recordings")
    lines, replayed = train(world, tmp_path, kind)
    assert len(recordings) == RECORDINGS[kind]
    assert all(torch.equal(replayed[name], tensor) for name, tensor in expected.items())
    for line, other in zip(lines, expected_lines, strict=True):
        assert all(line[name] == other[name] for name in ("role", "loss", "grad_norm"))


def test_processes_average_replayed_gradients(
    world: World, tmp_path: Path, plain: Any, request: pytest.FixtureRequest
) -> None:
    expected_lines, expected = plain("sla")
    request.getfixturevalue("recordings")
    train_on(2, *arguments(world, tmp_path, *KINDS["sla"], "launch.micro_batches=1"))
    lines, replayed = results(tmp_path, "sla")
    for line, other in zip(lines, expected_lines, strict=True):
        assert [line["loss"], line["grad_norm"]] == pytest.approx([other["loss"], other["grad_norm"]], rel=1e-4)
    for name, tensor in expected.items():
        assert torch.allclose(replayed[name], tensor, rtol=1e-3, atol=1e-5), name


def test_a_run_that_stopped_goes_on_with_recordings_of_its_own(
    world: World, tmp_path: Path, recordings: list[type]
) -> None:
    steady = "sla.optim.decay=constant"
    _, whole = train(world, tmp_path / "whole", "sla", steady)
    train(world, tmp_path / "parts", "sla", steady, "sla.steps=2")
    _, parts = train(world, tmp_path / "parts", "sla", steady)
    assert len(recordings) == 3
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_what_cannot_be_recorded_is_launched(
    world: World,
    tmp_path: Path,
    plain: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(Replaying):
        def __call__(self, call: Callable[[], dict[str, Any]]) -> Recording:
            call()
            raise RuntimeError("operation not permitted when stream is capturing")

    _, expected = plain("sla")
    request.getfixturevalue("recordings")
    monkeypatch.setattr(graphs, "CudaRecorder", Refusing)
    _, got = train(world, tmp_path, "sla")
    assert [record.message for record in caplog.records if "no CUDA graph" in record.message] == [
        "no CUDA graph, the CPU launches every kernel of every step: operation not permitted when stream is capturing"
    ]
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())

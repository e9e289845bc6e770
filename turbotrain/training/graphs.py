"""Training steps as CUDA graphs: the launches of a step's gradients are recorded once for every kind of step, then replayed.

A network of a million parameters is thousands of kernels that take longer to launch than to run. A graph reads its inputs where
they lay when it was recorded: batches and draws are written to tensors that stay (`FixedRandom`, and the batch of `FixedPart`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turbotrain.model.graphs import CudaRecorder, Recorder, Recording
from turbotrain.model.rope import tables_used
from turbotrain.training.seeding import StepRandom

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps of a kind that run as they are: what happens only once, such as compilation, must not be recorded
Draw = tuple[str, tuple[int, ...] | None]  # stream, and the shape of a normal draw
Sums = dict[str, Any]  # losses and metrics of a step, tensors or numbers


class FixedRandom(StepRandom):
    """The draws of a `StepRandom`, the same numbers, each in a tensor that stays where it is from step to step."""

    def __init__(self) -> None:
        self._tensors: dict[Draw, Tensor] = {}
        self._stale: set[Draw] = set()
        self.asked: set[Draw] = set()

    def begin(self, random: StepRandom) -> None:
        """Another step: what is asked for from now on is drawn by `random`."""
        self._random = random
        self._stale = set(self._tensors)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        return self.draw((stream, tuple(shape)))

    def uniform(self, stream: str) -> Tensor:
        return self.draw((stream, None))

    def draw(self, draw: Draw) -> Tensor:
        """This step's numbers, drawn once."""
        self.asked.add(draw)
        if draw in self._tensors and draw not in self._stale:
            return self._tensors[draw]
        stream, shape = draw
        drawn = self._random.uniform(stream) if shape is None else self._random.normal(stream, shape)
        self._stale.discard(draw)
        return self._tensors[draw].copy_(drawn) if draw in self._tensors else self._tensors.setdefault(draw, drawn)


class StepGraphs:
    """The graphs of a task's steps, in one memory pool. randoms: of its micro-batches."""

    def __init__(self, randoms: Sequence[FixedRandom], device: torch.device) -> None:
        self._randoms = randoms
        # Autograd remembers the stream of a weight's gradient: steps before the recording run where it will be made.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._record: Recorder = CudaRecorder(self._stream)
        self._graphs: dict[Hashable, StepGraph] = {}

    def of(self, kind: Hashable) -> StepGraph:
        """The graph of steps that launch the same kernels on the same tensors."""
        if kind not in self._graphs:
            self._graphs[kind] = StepGraph(self._randoms, self._record, self._stream)
        return self._graphs[kind]


class StepGraph:
    """Computes the gradients of one kind of step: as they are at first, then from a recording."""

    def __init__(self, randoms: Sequence[FixedRandom], record: Recorder, stream: torch.cuda.Stream | None) -> None:
        self._randoms, self._record, self._stream = randoms, record, stream
        self._draws: list[set[Draw]] = []
        self._steps_to_record: float = WARM_UP
        self._recording: Recording | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._tables: list[Tensor] = []  # read by address as well, and otherwise only remembered for a while

    def __call__(self, parameters: Collection[nn.Parameter], compute: Callable[[], Sums]) -> Sums:
        """What `compute` returns, after it (or its replay) has given `parameters` their gradients, which must be None before.

        compute: reads weights, a `FixedPart`'s batch, its draws, and nothing else that changes from step to step.
        """
        if self._steps_to_record > 0:
            self._steps_to_record -= 1
            return self._plainly(compute)
        for random, draws in zip(self._randoms, self._draws, strict=True):
            for draw in draws:
                random.draw(draw)
        if self._recording is None:
            try:
                with tables_used() as self._tables:
                    self._recording = self._record(compute)
            except RuntimeError as error:
                logger.warning("no CUDA graph, the CPU launches every kernel of every step: %s", error)
                self._steps_to_record = float("inf")
                for parameter in parameters:
                    parameter.grad = None
                return self._plainly(compute)
            self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._recording.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._recording.result

    def _plainly(self, compute: Callable[[], Sums]) -> Sums:
        for random in self._randoms:
            random.asked.clear()
        if self._stream is None:
            sums = compute()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                sums = compute()
            torch.cuda.current_stream().wait_stream(self._stream)
        self._draws = [set(random.asked) for random in self._randoms]
        return sums

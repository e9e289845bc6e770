"""CUDA graphs of a network: its kernel launches are recorded once for inputs of one form, and replayed at every step after.

Launching the three thousand kernels of a step of Wan 1.3B takes a CPU longer than an H200 computes them; a replay is one
launch. A graph reads weights and inputs at the addresses at which it was recorded: inputs are copied there, and calls with
other weights are other graphs.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from turbotrain.model.rope import tables_used

logger = logging.getLogger(__name__)

# Tokens times width from which on a GPU computes longer than the CPU launches: Wan 1.3B at 480p has 50 million and gains a
# fifth on an H200, 14B at 720p 387 million and gains nothing.
LARGEST = 100_000_000
# Options of a call whose result is more than the velocity, or which no graph can hold.
_EAGER_OPTIONS = frozenset({"tangents", "selection", "return_selection"})


class Recording(NamedTuple):
    """result: what the call gave; replay() writes it anew, from what lies where the call read its inputs."""

    result: Any
    replay: Callable[[], object]


class Recorder(Protocol):
    """Runs or captures a call. Raises RuntimeError where it cannot be recorded."""

    def __call__(self, call: Callable[[], Any]) -> Recording: ...


class CudaRecorder:
    """Captures calls as CUDA graphs in one memory pool: they may replay in any order, but not at the same time.

    The pool keeps a call's activations, so nothing is captured while more than half of the GPU's memory is taken.

    stream: on which calls are captured; one of torch's own by default.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, call: Callable[[], Any]) -> Recording:
        free, total = torch.cuda.mem_get_info()
        if free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < total / 2:
            raise RuntimeError("more than half of the GPU's memory is taken")
        pool = next((graph.pool() for graph in self._graphs), None)  # a pool lives as long as a graph in it
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                result = call()
        except RuntimeError:
            # A capture that fails leaves CUDA's random generator in capture: the end of one that succeeds takes it out.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros(1, device="cuda")  # the current GPU, on which the capture was
            raise
        self._graphs.add(graph)
        return Recording(result, graph.replay)


@dataclass(frozen=True)
class _Graph:
    inputs: list[Tensor]
    recording: Recording
    tables: list[Tensor]  # read by address as well, and otherwise only remembered for a while

    def __call__(self, given: list[Tensor]) -> Tensor:
        for own, tensor in zip(self.inputs, given):
            own.copy_(tensor)
        self.recording.replay()
        return self.recording.result.clone()  # the next replay overwrites it


class GraphCache:
    """The graphs of a pipeline's networks, few of them: each holds its activations' memory while it lives.

    Args:
        limit: graphs kept at a time, the latest used; two serve a model of two experts.
        largest: tokens * width of a call up to which recording pays.
    """

    def __init__(self, recorder: Recorder | None = None, limit: int = 2, largest: int = LARGEST) -> None:
        self._record = recorder or CudaRecorder()
        self._limit, self._largest = limit, largest
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._ran: set[Hashable] = set()  # eagerly: what happens only once, such as compilation, must not be recorded
        self._refused: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def network(self, network: nn.Module) -> nn.Module:
        """The network with its calls recorded and replayed, for one video: its weights must stay where they are meanwhile.

        The network itself where it cannot be recorded; the log says why.
        """
        reason = _why_not(network)
        if reason is None:
            return GraphedNetwork(network, self)
        if reason not in self._refused:
            logger.info("no CUDA graph: %s", reason)
            self._refused.add(reason)
        return network

    def clear(self) -> None:
        """Frees the graphs' memory: before weights move, or when something else needs it."""
        self._graphs.clear()
        self._ran.clear()

    def run(self, network: nn.Module, weights: Hashable, inputs: tuple, options: dict[str, Any]) -> Any:
        """network(*inputs, **options): eagerly at first, recorded the second time, replayed from then on."""
        leaves, form = tree_flatten((inputs, options))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (weights, str(form), others, tuple((x.shape, x.dtype, x.device) for x in given))
        graph = self._graphs.get(key)
        if graph is None and (
            key not in self._ran or key in self._refused or _size(network, inputs[0]) > self._largest
        ):
            self._ran.add(key)
            return network(*inputs, **options)
        with torch.inference_mode(False), torch.no_grad():  # a graph's own tensors are written by calls of any mode
            if graph is None:
                try:
                    graph = self._recorded(network, leaves, form)
                except RuntimeError as error:
                    logger.warning("no CUDA graph, the CPU launches every kernel of every step: %s", error)
                    self._refused.add(key)
                    return network(*inputs, **options)
                self._graphs[key] = graph
            self._graphs.move_to_end(key)
            return graph(given)

    def _recorded(self, network: nn.Module, leaves: list[Any], form: Any) -> _Graph:
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs, options = tree_unflatten(own, form)
        with tables_used() as tables:
            recording = self._record(lambda: network(*inputs, **options))
        return _Graph([leaf for leaf in own if isinstance(leaf, Tensor)], recording, tables)


class GraphedNetwork(nn.Module):
    """A network whose calls go through a GraphCache (build it with `GraphCache.network`); `module` is the network.

    It has no `encode_context`: text that is read in the recording costs Wan 1.3B 0.4 ms a step on an H200, and encoding it
    beside, launch by launch, 37 ms a video.
    """

    def __init__(self, network: nn.Module, graphs: GraphCache) -> None:
        super().__init__()
        self.module = network
        self._graphs = graphs
        # What a recording depends on besides its inputs: where it reads weights, and how it computes with them.
        addresses = tuple(x.data_ptr() for x in chain(network.parameters(), network.buffers()))
        self._weights = (network.config, getattr(network, "attention_config", None), addresses)

    def forward(self, x_BCTHW: Tensor, timestep: Tensor, context: Any, **options: Any) -> Any:
        """As the network's own."""
        inputs = (x_BCTHW, timestep, context)
        if torch.is_grad_enabled() or _EAGER_OPTIONS & options.keys():
            return self.module(*inputs, **options)
        return self._graphs.run(self.module, self._weights, inputs, options)


def _why_not(network: nn.Module) -> str | None:
    """What stands against recording the network at all."""
    places = {str(x.device) for x in chain(network.parameters(), network.buffers())}
    if getattr(network, "context_group", None) is not None:
        return "other processes take part in the network's calls"
    if len(places) > 1:
        return f"the network lies on {' and '.join(sorted(places))}"
    if any(module._forward_pre_hooks or module._forward_hooks for module in network.modules()):
        return "hooks run between the network's modules"
    return None


def _size(network: nn.Module, x_BCTHW: Tensor) -> float:
    """Tokens times width of a call."""
    config: Any = network.config
    return x_BCTHW.shape[0] * math.prod(x_BCTHW.shape[2:]) / math.prod(config.patch_size) * config.dim

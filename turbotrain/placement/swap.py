"""Modules that live in host memory and are on the GPU only around their turn, their copies hidden behind the computation.

A sequence of modules runs over and over in the same order. Device memory is a fixed set of slots: those modules that fit keep one
each, the others take turns in a ring of two, filled by a stream of its own while other modules compute. Nothing is allocated
from one turn to the next, and the weights are frozen, so nothing is copied back.

With a slot for each module it is what moves a whole network: its first pass computes while later blocks are still coming, and
a second network that shares the slots replaces the first one block by block.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
ALIGNMENT = 256  # bytes: of a tensor's start in a slot
RING = 2
Names = dict[str, Any]  # a module's own `_parameters` or `_buffers`: {name: Tensor | None}


@dataclass(eq=False)
class _Slot:
    """Device memory for one module at a time. ready: its copy is complete; used: what computed with the last one has ended."""

    nbytes: int = 0
    memory: Tensor | None = None
    holds: _Unit | None = None
    ready: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


@dataclass(eq=False)
class _Unit:
    """A module of a sequence: where its tensors are named, and each of them at home and in the slot."""

    places: list[tuple[Names, str]]
    home: list[Tensor]
    offsets: list[int]  # in the slot, and in `packed`
    packed: Tensor | None  # uint8, pinned, of which `home` are views
    slot: _Slot
    away: list[Tensor] = field(default_factory=list)

    def bind(self, tensors: Sequence[Tensor]) -> None:
        for (names, name), tensor in zip(self.places, tensors):
            names[name] = tensor


class Swap:
    """Sequences of modules that share slots on a device; one sequence runs at a time, each module through its own `forward`.

    Outside its turn a module holds its host tensors, so that saving and inspecting it is safe. A module that contains others
    of its sequence stands for the tensors that these do not have, and keeps a slot.

    Args:
        sequences: in the order in which their modules run; all of one length, for example the experts of a network.
        kept: how many of the modules (beside those that contain others) keep a slot of their own.
        pin: copies the weights into page-locked memory, from which a GPU reads beside its computation. Without it they stay where
            they are, as suits weights that are needed once.

    Raises:
        ValueError: sequences of several lengths, kept out of range.
    """

    def __init__(
        self, sequences: Sequence[Sequence[nn.Module]], device: torch.device, *, kept: int = 0, pin: bool = True
    ) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        lengths = {len(modules) for modules in sequences}
        if len(lengths) != 1:
            raise ValueError(f"sequences of {sorted(lengths)} modules share slots: they must be of one length")
        containers = [_containers(modules) for modules in sequences]
        count = len(sequences[0]) - len(containers[0])
        if not 0 <= kept <= count:
            raise ValueError(f"kept={kept}: there are {count} modules to keep")
        slots = _assign(len(sequences[0]), containers[0], kept)
        self._active: list[_Unit] = []
        self._order: dict[_Unit, list[_Unit]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._pinned = _Pinned()
        for modules in sequences:
            units = self._make_units(modules, slots, pin and self.device.type == "cuda")
            for place, (module, unit) in enumerate(zip(modules, units)):
                self._order[unit] = units[place + 1 :] + units[:place]
                self._hooks += [
                    module.register_forward_pre_hook(lambda *_, unit=unit: self._enter(unit)),
                    module.register_forward_hook(lambda *_, unit=unit: self._leave(unit), always_call=True),
                ]
        self._slots = list(dict.fromkeys(slots))

    @property
    def device_bytes(self) -> int:
        """What the slots take while something runs."""
        return sum(slot.nbytes for slot in self._slots)

    def release(self) -> None:
        """Gives the device memory back until the next turn."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(
                self._stream
            )  # memory goes to what is computed there next
        for unit in self._order:
            unit.away = []
        for slot in self._slots:
            slot.memory = slot.holds = slot.ready = slot.used = None

    def close(self) -> None:
        """Ends it: the modules are on the host, and run there."""
        self.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        self._pinned.unlock()

    def _make_units(self, modules: Sequence[nn.Module], slots: Sequence[_Slot], pin: bool) -> list[_Unit]:
        inside = {id(module) for module in modules}
        units = []
        for module, slot in zip(modules, slots):
            places = list(_places(module, inside))
            tensors = [tensor for names, name in places if (tensor := names[name]) is not None]
            offsets, nbytes = _layout(tensors)
            slot.nbytes = max(slot.nbytes, nbytes)
            packed = torch.empty(nbytes, dtype=torch.uint8) if pin else None
            with torch.inference_mode(False):
                if packed is None:
                    home = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
                else:
                    home = _views(packed, tensors, offsets)
                    for tensor, source in zip(home, tensors):
                        tensor.copy_(source.detach())
                    self._pinned.lock(packed)
                home = [_like(source, tensor) for source, tensor in zip(tensors, home)]
            unit = _Unit(places, home, offsets, packed, slot)
            unit.bind(home)  # now, so that the first copies are freed one by one
            units.append(unit)
        return units

    def _enter(self, unit: _Unit) -> None:
        if unit.slot.holds is not unit:
            self._fetch(unit)
        if self._stream is not None and unit.slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(unit.slot.ready)
        unit.bind(unit.away)
        self._active.append(unit)
        self._fetch_ahead(unit)

    def _leave(self, unit: _Unit) -> None:
        unit.bind(unit.home)
        if unit not in self._active:  # its copy failed
            return
        self._active.remove(unit)
        if unit.slot.used is not None:
            unit.slot.used.record(torch.cuda.current_stream(self.device))
        self._fetch_ahead(unit)

    def _fetch_ahead(self, unit: _Unit) -> None:
        """Starts the copy of the next module that is not there, unless what its slot holds is needed before."""
        needed = {active.slot for active in self._active}
        for other in self._order[unit]:
            if other.slot.holds is not other:
                if other.slot not in needed:
                    self._fetch(other)
                return
            needed.add(other.slot)

    def _fetch(self, unit: _Unit) -> None:
        slot = unit.slot
        with torch.inference_mode(False):
            if slot.memory is None:
                self._allocate(slot)
            assert slot.memory is not None
            if not unit.away:
                views = _views(slot.memory, unit.home, unit.offsets)
                unit.away = [_like(home, view) for home, view in zip(unit.home, views)]
            slot.holds = unit
            if self._stream is None:
                _copy(unit, slot.memory)
                return
            with torch.cuda.stream(self._stream):
                if slot.used is not None:
                    self._stream.wait_event(slot.used)
                _copy(unit, slot.memory)
                if slot.ready is not None:
                    slot.ready.record(self._stream)

    def _allocate(self, slot: _Slot) -> None:
        slot.memory = torch.empty(slot.nbytes, dtype=torch.uint8, device=self.device)
        if self._stream is not None:
            # The allocator hands out memory that work queued before may still read.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            slot.ready, slot.used = torch.cuda.Event(), torch.cuda.Event()


class _Pinned:
    """Page-locked host memory. torch's own allocator of it rounds up to powers of two: half a network more than there is."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._memory: list[Tensor] = []
        self._is_refused = False
        weakref.finalize(self, _unlock, self._addresses, self._memory)

    def lock(self, memory: Tensor) -> None:
        """Locks memory that is filled already: half the time of filling it locked, on an H200's host (0.3 s a GiB).

        Where the system locks no more, copies hold up the computation.
        """
        if self._is_refused:
            return
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if status:
            self._is_refused = True
            logger.warning("host memory cannot be page-locked (error %d): swapped blocks will hold up the GPU", status)
            return
        self._addresses.append(memory.data_ptr())
        self._memory.append(memory)

    def unlock(self) -> None:
        _unlock(self._addresses, self._memory)


def _unlock(addresses: list[int], memory: list[Tensor]) -> None:
    runtime: Any = torch.cuda.cudart() if addresses else None
    while addresses:
        runtime.cudaHostUnregister(addresses.pop())
    memory.clear()


def _containers(modules: Sequence[nn.Module]) -> set[int]:
    """Places of the modules that contain others."""
    return {
        place
        for place, module in enumerate(modules)
        if any(inner is other for inner in module.modules() if inner is not module for other in modules)
    }


def _assign(count: int, containers: set[int], kept: int) -> list[_Slot]:
    """A slot for each place; those that take turns are spread evenly, to have equal times of computation to hide behind."""
    ring = [_Slot() for _ in range(RING)]
    swapped = count - len(containers) - kept
    slots, seen, turns = [], 0, 0
    for place in range(count):
        if place in containers:
            slots.append(_Slot())
            continue
        seen += 1
        takes_turn = seen * swapped // (swapped + kept) > turns
        slots.append(ring[turns % RING] if takes_turn else _Slot())
        turns += takes_turn
    return slots


def _places(module: nn.Module, inside: set[int], is_top: bool = True) -> list[tuple[Names, str]]:
    """Where the tensors of a module are named, but for those of others of its sequence."""
    if not is_top and id(module) in inside:
        return []
    found = [
        (names, name) for names in (module._parameters, module._buffers) for name in names if names[name] is not None
    ]
    for child in module.children():
        found += _places(child, inside, False)
    return found


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts in packed memory, and how much of it there is. Rows that lie side by side, by which
    `model.quant_linear` multiplies at once, still do."""
    order = sorted(range(len(tensors)), key=lambda place: tensors[place].data_ptr())
    offsets, end, before = [0] * len(tensors), 0, None
    for place in order:
        tensor = tensors[place]
        if before is None or not _follows(tensor, before):
            end = -(-end // ALIGNMENT) * ALIGNMENT
        offsets[place], before = end, tensor
        end += tensor.nbytes
    return offsets, -(-end // ALIGNMENT) * ALIGNMENT


def _follows(tensor: Tensor, before: Tensor) -> bool:
    """Whether it continues the rows of the other."""
    is_same = tensor.dtype == before.dtype and tensor.shape[1:] == before.shape[1:]
    return is_same and tensor.ndim > 0 and tensor.data_ptr() == before.data_ptr() + before.nbytes


def _views(memory: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    return [
        memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, offset in zip(tensors, offsets)
    ]


def _like(source: Tensor, tensor: Tensor) -> Tensor:
    """A frozen parameter where the source is one: a module refuses anything else in its place."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(source, nn.Parameter) else tensor


def _copy(unit: _Unit, memory: Tensor) -> None:
    if unit.packed is not None:
        memory[: unit.packed.nbytes].copy_(unit.packed, non_blocking=True)
        return
    for target, source in zip(unit.away, unit.home):
        target.copy_(source, non_blocking=True)

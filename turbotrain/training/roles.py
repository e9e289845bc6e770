"""A trained network with its optimiser, as one launch wraps it: alone or under DDP here, sharded in `fsdp.py` and `zero.py`.

Student and critic are two roles: each is wrapped on its own, so that alternating updates never touch the other's gradients.
The network itself is single-device code that also computes tangents when it is asked to; every wrapper calls its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from turbotrain.training.ema import PowerEMA
from turbotrain.training.optim import BLOCK, SCALE, set_rate, stored
from turbotrain.training.pieces import Piece, beside, local_piece, per_block

AVERAGE = "average/"  # of a state's names; one role of a task keeps an average


@dataclass
class Role:
    """`module` as wrapped for this launch, `network` the plain module inside; `updates` counts steps that were taken. average: of
    its weights, where one is passed on in their place; it follows every update."""

    name: str
    module: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    grad_clip: float
    updates: int = 0
    average: PowerEMA | None = None

    def __post_init__(self) -> None:
        # As they are outside of passes: a sharded network shows other tensors while it computes.
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def needs_all_ranks(self) -> bool:
        """A forward pass of `network` is a collective."""
        return False

    # ---- one update: micro_step and backward for each loss, then norm, then step or skip ---------------------------

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around one loss and its backward pass; gradients are averaged over the processes in the last of a step."""
        quiet = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to what the step has gathered."""
        loss.backward()

    def norm(self) -> Tensor:
        """The gradient's norm over all processes (a scalar tensor), after which `step` or `skip` follows."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, norm: Tensor) -> None:
        """Clip to `grad_clip`, update with the rate of the moment, forget the gradient."""
        self._update(norm)
        self.updates += 1
        if self.average is not None:
            self.average.update(self.weights(), self.updates)

    def _update(self, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.grad_clip, norm)
        set_rate(self.optimizer, self.rate(self.updates))
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Forget the gradient; weights and optimiser stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)

    # ---- state -----------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, Piece]:
        """What this process holds of the trained weights, by the names that checkpoints use."""
        return {name: local_piece(name, p) for name, p in self.parameters.items()}

    def weights(self) -> dict[str, Tensor]:
        """The tensors of `held`."""
        return {name: piece.tensor for name, piece in self.held().items()}

    def pieces(self) -> list[Piece]:
        """Weights, optimiser state and average as `state.py` saves and fills them."""
        held = self.held()
        found = beside(f"{self.name}/weight/", self.weights(), held) + self._optimizer_pieces(held)
        return found if self.average is None else found + beside(AVERAGE, self.average.shadow, held)

    def _optimizer_pieces(self, held: dict[str, Piece]) -> list[Piece]:
        found = []
        for kind, states in self.optimizer_states().items():
            if kind.endswith(SCALE):
                found += per_block(f"{self.name}/{kind}/", states, held, BLOCK)
            else:
                found += beside(f"{self.name}/{kind}/", states, held)
        return found

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {parameter: local tensor}}; present from the start, see `make_optimizer`. An 8-bit moment is two kinds: codes,
        and scales."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                local = local_piece(name, value).tensor
                for suffix, tensor in stored(local).items():
                    kinds.setdefault(f"{kind}{suffix}", {})[name] = tensor
        return kinds

    def restored(self) -> None:
        """Called after the pieces were filled."""


class BareRole(Role):
    """A network on several processes that nothing wraps, so that a CUDA graph can hold its passes: gradients are averaged after
    them, at once."""

    def norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])
        return super().norm()

"""DeepSpeed ZeRO-2 and ZeRO-3: one engine a network.

accelerate shares one DeepSpeed step between all networks of a process, which steps the wrong one where two are trained in
turn; so each role initialises its own here. Weights stay float32 and the network computes under autocast, as under every
engine: DeepSpeed's own bf16 mode would round the float32 islands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from turbotrain.compose import UsageError
from turbotrain.config import OptimSection
from turbotrain.model.attention import SparseLinearAttention
from turbotrain.model.attention_layers import CrossAttention, RMSNorm, SelfAttention
from turbotrain.model.wan import Block, WanTransformer
from turbotrain.training.optim import allocate_state, new_adamw
from turbotrain.training.pieces import Piece
from turbotrain.training.roles import Role


def zero_role(
    name: str, network: WanTransformer, optim: OptimSection, rate: Callable[[int], float], stage: int, offload: bool
) -> ZeroRole:
    """`network` in an engine of its own. offload: optimiser states rest in host memory.

    Raises:
        UsageError: DeepSpeed is not installed; an optimiser that cannot work on its flat ranges.
    """
    if optim.kind != "adamw":
        raise UsageError(
            f"optim.kind={optim.kind!r}: DeepSpeed keeps moments in flat ranges of its own; use optim.kind=adamw, or "
            "launch.engine=fsdp2"
        )
    try:
        import deepspeed  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise UsageError("launch.engine=zero2, zero3: need DeepSpeed; pip install turbotrain[deepspeed]") from error

    if not torch.cuda.is_available():
        # An operator for shared memory that would be compiled at the first use; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if stage == 3:
        # Norms and P lend their weights to the module around them, whose forward has to bring them.
        for module in network.modules():
            for child in lent_by(module):
                for parameter in child.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
    sharding: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        sharding["stage3_param_persistence_threshold"] = 0  # nothing is kept beside the shards, which are what is saved
        # DeepSpeed's own linear, which it puts in the place of torch's for the whole process, rounds before it adds the bias.
        sharding["memory_efficient_linear"] = False
    if offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": sharding,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    optimizer = new_adamw(network.parameters(), optim)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    flat = (
        engine.optimizer.single_partition_of_fp32_groups
        if stage == 2
        else engine.optimizer.fp32_partitioned_groups_flat
    )
    allocate_state(optimizer, flat)
    return (Zero2Role if stage == 2 else Zero3Role)(name, engine, network, optimizer, rate, optim.grad_clip)


def lent_by(module: nn.Module) -> list[nn.Module]:
    """The submodules whose weights `module` uses in its own forward, without calling them."""
    if isinstance(module, Block):
        return [module.norm3]
    if isinstance(module, (SelfAttention, CrossAttention)):
        return [child for child in module.children() if isinstance(child, RMSNorm)]
    return [module.local_attn] if isinstance(module, SparseLinearAttention) else []


class ZeroRole(Role):
    """What both stages share: the engine (`module`) reduces, clips and steps."""

    @property
    def engine(self) -> Any:
        return self.module

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def norm(self) -> Tensor:
        parts = torch.stack([torch.as_tensor(part) for part in self._norms()])
        # DeepSpeed's -1 stands for a norm that is not finite.
        return torch.where(parts < 0, float("inf"), parts).norm()

    def _norms(self) -> list[Any]:
        raise TypeError("a role of stage 2 or 3")

    def _update(self, norm: Tensor) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate(self.updates)
        self._step_engine()

    def skip(self) -> None:
        """By the engine's own way: a step on a gradient that is not finite is not taken, and cleaned up."""
        for gradients in self.engine.optimizer.averaged_gradients.values():
            for gradient in gradients or []:
                gradient.fill_(float("nan"))
        self._step_engine()

    def _step_engine(self) -> None:
        self.engine.step()

    def _optimizer_pieces(self, held: dict[str, Piece]) -> list[Piece]:
        found = []
        for name, parameter in self.parameters.items():
            flat, begin, length, start = self._place(parameter)
            state = self.optimizer.state[flat]
            shape = held[name].shape
            found.append(Piece(f"{self.name}/step/{name}", state["step"], ()))
            for kind in ("exp_avg", "exp_avg_sq"):
                run = state[kind].narrow(0, begin, length)
                found.append(Piece(f"{self.name}/{kind}/{name}", run, shape, start, replicated=False))
        return found

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Tensor, int, int, int]:
        """(flat buffer of this process, where the parameter's run begins in it, its length, its first element)."""
        raise TypeError("a role of stage 2 or 3")

    def restored(self) -> None:
        self.engine.optimizer.refresh_fp32_params()


class Zero2Role(ZeroRole):
    """Weights whole on every process, gradients and optimiser states in ranges of one flat buffer."""

    def _norms(self) -> list[Any]:
        return [self.engine.optimizer.scaled_global_norm()]

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Tensor, int, int, int]:
        flat = self.engine.optimizer.single_partition_of_fp32_groups[0]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # all of it lies in other processes' ranges
            return flat, 0, 0, 0
        return (
            flat,
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
            mapping.lp_fragment_address.start,
        )


class Zero3Role(ZeroRole):
    """Weights too in ranges, one of every flattened parameter."""

    @property
    def needs_all_ranks(self) -> bool:
        return True

    def _norms(self) -> list[Any]:
        return self.engine.optimizer._get_norm_groups()

    def _step_engine(self) -> None:
        if self.engine.device.type == "cpu":
            # The gradients are in the shards by now; the engine's own way to drop the rest asks for a stream of a GPU.
            self.network.zero_grad(set_to_none=True)
        super()._step_engine()

    def held(self) -> dict[str, Piece]:
        found = {}
        for name, parameter in self.parameters.items():
            start, length = self._range(parameter)
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            shard = parameter.ds_tensor.data[:length]  # type: ignore[attr-defined]
            found[name] = Piece(name, shard, shape, start, replicated=False)
        return found

    def _range(self, parameter: Any) -> tuple[int, int]:
        """First element and length of this process's part; the last parts of a parameter are padding."""
        size = parameter.ds_tensor.numel()
        start = min(torch.distributed.get_rank() * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _place(self, parameter: torch.nn.Parameter) -> tuple[Tensor, int, int, int]:
        optimizer = self.engine.optimizer
        group, begin, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, length = self._range(parameter)
        return optimizer.fp32_partitioned_groups_flat[group], begin, length, start

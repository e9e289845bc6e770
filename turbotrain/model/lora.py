"""Turbo-LoRA: a network that trains low-rank changes of its linears and SLA's P, over weights that other networks read too.

y = W x + b + (alpha / rank) B A x, with W and b frozen, A and B in float32 and B zero at first (LoRA: arXiv 2106.09685).
Student and critic are networks of their own over one set of frozen tensors, and the teacher is those tensors without any
change. So there is nothing to switch between passes, and a backward pass that computes blocks again finds what the forward
pass had. PEFT's layers are not used: they switch adapters inside one network, and know no tangents.

Shape suffixes: R rank, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbotrain.model.tangent import Linear, WideLinear
from turbotrain.model.wan import WanTransformer

FACTORS = ("lora_A", "lora_B")
P_OF_SLA = ".proj_l."


class LoraLinear(Linear):
    """A frozen linear with a trained change of rank R; takes a tangent along, as `Linear` does."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate another weight
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, scale
        self.weight, self.bias = linear.weight, linear.bias
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        place = {"dtype": dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **place))

    def forward(self, input: Tensor, tangent: Tensor | None = None) -> Any:
        out = self._product(input, self.bias)
        if tangent is None:
            return out
        with torch.no_grad():
            return out, self._product(tangent, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        low_RK, high_NR = self.lora_A.to(x.dtype), (self.scale * self.lora_B).to(x.dtype)
        # In place: a feed-forward's hidden values are the widest there are.
        return F.linear(x, self.weight, bias).add_(F.linear(F.linear(x, low_RK), high_NR))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, scale={self.scale:g}"


def over_same_weights(network: WanTransformer) -> WanTransformer:
    """Another network whose parameters are those of `network`, the very tensors, all frozen."""
    with torch.device("meta"):
        twin = WanTransformer(network.config, network.attention_config).requires_grad_(False)
    twin.load_state_dict(network.requires_grad_(False).state_dict(keep_vars=True), assign=True)
    return twin


def add_lora(
    network: WanTransformer, rank: int, alpha: float, targets: Sequence[str], seed: int, where: str = "lora"
) -> WanTransformer:
    """Freeze `network` and give its linears factors to train, in place; SLA's P becomes its own and is trained whole.

    targets: patterns of a block's linears (fnmatch), for example `self_attn.*`. A is drawn uniformly from seed, B is zero, so
    that the network computes what it computed. where: the configuration's section, for messages.
    Raises ValueError: a rank below 1 or above what a layer has, a pattern that fits no linear.
    """
    if rank < 1:
        raise ValueError(f"{where}.rank={rank}: must be at least 1")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in _targets(network, targets, where).items():
        smaller = min(linear.in_features, linear.out_features)
        if rank > smaller:
            raise ValueError(f"{where}.rank={rank}: {name} has only {smaller} dimensions; choose a rank up to that")
        layer = LoraLinear(linear, rank, alpha / rank).train(linear.training)
        with torch.no_grad():
            spread = linear.in_features**-0.5
            layer.lora_A.copy_(torch.empty(rank, linear.in_features).uniform_(-spread, spread, generator=generator))
        network.set_submodule(name, layer)
    for name, parameter in list(network.named_parameters()):
        if P_OF_SLA in name:
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, nn.Parameter(parameter.detach().clone()))
    return network


def _targets(network: WanTransformer, patterns: Sequence[str], where: str) -> dict[str, nn.Linear]:
    """The linears of all blocks whose names in their block fit a pattern. Those of float32 islands are none: P, the head."""
    linears = {
        name: module
        for name, module in network.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear) and not isinstance(module, WideLinear)
    }
    found = {}
    for pattern in patterns:
        fitting = {name: linear for name, linear in linears.items() if fnmatch(name.split(".", 2)[2], pattern)}
        if not fitting:
            known = sorted({name.split(".", 2)[2] for name in linears})
            raise ValueError(f"{where}.targets: {pattern!r} fits no linear of a block; there are {', '.join(known)}")
        found |= fitting
    if not found:
        raise ValueError(f"{where}.targets=[]: name at least one pattern, for example self_attn.*")
    return found


def has_lora(network: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear) for module in network.modules())


def lora_change(trained: Mapping[str, Tensor], network: WanTransformer) -> dict[str, Tensor]:
    """What files of adapters hold, from the trained tensors of `network` by their names: `X.lora_A.weight` (R, K),
    `X.lora_B.weight` (N, R) with the scale in it, and P as it is."""
    change = {}
    for name, tensor in trained.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "lora_B":
            layer = network.get_submodule(module)
            assert isinstance(layer, LoraLinear)
            tensor = layer.scale * tensor
        change[f"{name}.weight" if leaf in FACTORS else name] = tensor
    return change


@torch.no_grad()
def load_change(network: WanTransformer, change: Mapping[str, Tensor], source: str) -> WanTransformer:
    """The inverse of `lora_change`: fill the factors of `network` and its P, in place.

    Raises ValueError: of another rank, other layers or another network.
    """
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    named = {f"{name}.weight" if name.endswith(FACTORS) else name: name for name in own}
    strange, missing = sorted(change.keys() - named.keys()), sorted(named.keys() - change.keys())
    if strange or missing:
        raise ValueError(f"{source}: an adapter of other layers: missing {missing[:3]}, unexpected {strange[:3]}")
    for name, tensor in change.items():
        parameter = own[named[name]]
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}: it is of another rank "
                "or another network"
            )
        layer = network.get_submodule(named[name].rpartition(".")[0])
        divisor = layer.scale if isinstance(layer, LoraLinear) and named[name].endswith("lora_B") else 1.0
        parameter.copy_(tensor / divisor)
    return network


@torch.no_grad()
def merged_state(network: WanTransformer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, on the CPU, of the plain network that computes what `network` does with these trained tensors.

    In float32 or better whatever the frozen weights are: half precision would round most of a small change away.
    """
    merged = {}
    wide = torch.promote_types(network.dtype, torch.float32)
    for name, tensor in network.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if leaf in FACTORS:
            continue
        if leaf == "weight" and f"{module}.lora_A" in trained:
            layer = network.get_submodule(module)
            assert isinstance(layer, LoraLinear)
            low_RK, high_NR = (trained[f"{module}.{factor}"].to(tensor.device) for factor in FACTORS)
            tensor = add_change(tensor, low_RK, layer.scale * high_NR)
        merged[name] = trained.get(name, tensor).to("cpu", wide)
    return merged


def add_change(weight_NK: Tensor, low_RK: Tensor, high_NR: Tensor, weight: float = 1.0) -> Tensor:
    """W + weight B A, in float32 or better."""
    wide = torch.promote_types(weight_NK.dtype, torch.promote_types(low_RK.dtype, torch.float32))
    return torch.addmm(weight_NK.to(wide), high_NR.to(wide), low_RK.to(wide), alpha=weight)

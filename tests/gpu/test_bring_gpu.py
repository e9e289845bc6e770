"""Networks that are mapped from files and brought to GPUs: the files' values in the device's own memory, on one and on two."""

from __future__ import annotations

import copy
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from network_files import DEEP, SMALL, save
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from turbokernels.testing import assert_within_budget
from wan_networks import inputs

from turbotrain.checkpoint import load_transformer
from turbotrain.checkpoint.io import map_transformer
from turbotrain.config import LaunchSection, OptimSection
from turbotrain.model.quant_linear import quantize_block_linears
from turbotrain.model.wan import WanTransformer
from turbotrain.training.bring import bring
from turbotrain.training.parallel import make_frozen, make_role
from turbotrain.training.pieces import Piece, local_piece

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
CUDA = torch.device("cuda")
GRID = (2, 4, 4)
OPTIM = OptimSection(lr=1e-3)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> WanTransformer:
    """What the file holds, by the way that maps nothing."""
    return load_transformer(path, dtype=torch.float32).set_weight_dtype(dtype)


def assert_holds(network: nn.Module, expected: nn.Module) -> None:
    """The values of `expected`, all of them on the GPU."""
    found, wanted = network.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].is_cuda, name
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].cpu(), value), name


def assert_owns(network: nn.Module) -> None:
    """Every parameter its memory, and no more than it needs."""
    storages = {name: parameter.untyped_storage() for name, parameter in network.named_parameters()}
    assert len({storage.data_ptr() for storage in storages.values()}) == len(storages)
    for name, parameter in network.named_parameters():
        assert parameter.is_contiguous(), name
        assert storages[name].nbytes() == parameter.nbytes, name


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8", "pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_brought_is_what_the_file_holds(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, kind)
    network = map_transformer(path)
    bring(network, CUDA, dtype)
    assert_holds(network, loaded(path, dtype))
    assert_owns(network)


def test_buffers_come_as_they_are() -> None:
    block = WanTransformer(SMALL).blocks[0]
    quantize_block_linears(block, "int8_channel")
    block.register_buffer("smooth_attn", torch.rand(SMALL.dim))
    expected = copy.deepcopy(block)
    bring(block, CUDA, torch.bfloat16)  # its parameters left are float32 islands
    assert_holds(block, expected)


def test_the_device_holds_no_second_network_meanwhile(tmp_path: Path) -> None:
    path, whole = save(tmp_path, DEEP, "bf16")
    network = map_transformer(path)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bring(network, CUDA)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert whole <= held < 1.01 * whole  # each tensor takes whole units of 512 bytes
    assert peak <= held + 2 * max(parameter.nbytes for parameter in network.parameters())


@pytest.mark.parametrize("scheme", ["", "int8_channel"])
def test_a_teacher_comes_in_bf16_or_8_bits(accelerator: Accelerator, scheme: str, tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, "float32")
    network = make_frozen(accelerator, LaunchSection(mixed_precision="bf16"), "ddp", map_transformer(path), scheme)
    expected = loaded(path)
    for block in expected.blocks if scheme else ():
        quantize_block_linears(block, scheme)
    assert_holds(network, expected.set_weight_dtype(torch.bfloat16))
    assert_owns(network)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_training_on_the_device_leaves_the_file_alone(accelerator: Accelerator, tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, "float32")
    role = make_role(accelerator, LaunchSection(), "ddp", "student", map_transformer(path), OPTIM, 1)
    before = loaded(path)
    assert_holds(role.network, before)
    assert_owns(role.network)
    role.backward(loss(role.module, on(CUDA, inputs(SMALL, grid=GRID))))
    role.step(role.norm())
    moved = role.network.state_dict()
    assert all(not torch.equal(moved[name].cpu(), value) for name, value in before.state_dict().items())
    again = loaded(path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in before.state_dict().items())


# ---- two processes, a GPU each ---------------------------------------------------------------------------------------

ENGINES = {
    "ddp": ("ddp", LaunchSection()),
    "fsdp2": ("fsdp2", LaunchSection()),
    "fsdp2, offloaded": ("fsdp2", LaunchSection(offload=True)),
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_hold_and_differentiate_what_the_file_holds(tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, "bf16")
    for name, dtype in (("plain", torch.float32), ("exact", torch.float64)):
        network = loaded(path).set_weight_dtype(dtype)
        loss(network, {key: value.to(dtype) for key, value in inputs(SMALL, grid=GRID).items()}).backward()
        save_file({key: gradient_of(parameter) for key, parameter in network.named_parameters()}, tmp_path / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # This process has a CUDA context, which no fork may inherit.
    mp.start_processes(_one_of_two, args=(port, path, tmp_path), nprocs=2, start_method="spawn")


def _one_of_two(rank: int, port: int, path: Path, gradients: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()})
    accelerator = Accelerator()
    plain, exact = (load_file(gradients / name) for name in ("plain", "exact"))
    expected = loaded(path).state_dict()
    whole = sum(value.numel() for value in expected.values())
    mine = {name: value[rank : rank + 1] for name, value in inputs(SMALL, grid=GRID).items()}
    for case, (engine, launch) in ENGINES.items():
        role = make_role(accelerator, launch, engine, "student", map_transformer(path), OPTIM, 1)
        teacher = make_frozen(accelerator, launch, engine, map_transformer(path))
        asked = {name: local_piece(name, parameter) for name, parameter in teacher.named_parameters()}
        for held, resting in ((role.held(), launch.offload), (asked, False)):
            assert held.keys() == expected.keys()
            for name, piece in held.items():
                assert piece.tensor.is_cuda != resting, (case, name)
                assert torch.equal(piece.flat.cpu(), share(expected[name], piece)), (case, name)
            elements = sum(piece.tensor.numel() for piece in held.values())
            assert elements == pytest.approx(whole if engine == "ddp" else whole / 2, rel=0.05)
        role.backward(loss(role.module, on(accelerator.device, mine)))
        got = [local_piece(name, gradient_of(parameter)) for name, parameter in role.parameters.items()]
        of_one = [torch.cat([share(gradient[piece.name], piece) for piece in got]) for gradient in (plain, exact)]
        assert_within_budget(torch.cat([piece.flat.cpu() for piece in got]), *of_one, f"gradient, {case}")
    dist.destroy_process_group()


def share(whole: Tensor, piece: Piece) -> Tensor:
    return whole.flatten()[piece.start : piece.start + piece.tensor.numel()]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def on(device: torch.device, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in given.items()}


def loss(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """A mean over samples, so that the processes' mean is the whole's."""
    return network(**given).square().mean()

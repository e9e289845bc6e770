"""Networks go from their files to where they are trained a tensor at a time: the same values, no process holds a whole one."""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from host_memory import peak_bytes
from network_files import DEEP, SMALL, save

from turbotrain.checkpoint import load_transformer
from turbotrain.checkpoint.io import map_transformer
from turbotrain.model.quant_linear import quantize_block_linears
from turbotrain.model.wan import FLOAT32_ISLANDS, WanTransformer
from turbotrain.training.bring import bring
from turbotrain.training.fsdp import shard

CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8", "pth"])
def test_what_is_mapped_and_brought_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, kind)
    for dtype in (torch.float32, torch.bfloat16):
        network, expected = map_transformer(path), load_transformer(path, dtype=torch.float32).set_weight_dtype(dtype)
        bring(network, CPU, dtype)
        found = network.state_dict()
        for name, tensor in expected.state_dict().items():
            assert found[name].dtype == (torch.float32 if FLOAT32_ISLANDS.search(name) else dtype), name
            assert torch.equal(found[name], tensor), name
        assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in network.parameters())


def test_buffers_keep_their_dtypes() -> None:
    block = WanTransformer(SMALL).blocks[0]
    quantize_block_linears(block, "int8_channel")
    block.register_buffer("smooth_attn", torch.rand(SMALL.dim))
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    bring(block, CPU, torch.bfloat16)
    after = dict(block.named_buffers())
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_training_what_was_brought_leaves_the_file_alone(tmp_path: Path) -> None:
    path, _ = save(tmp_path, SMALL, "float32")
    network, other = map_transformer(path), map_transformer(path)
    bring(network, CPU)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    again = load_transformer(path).state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, again[name])
    assert other.patch_embedding.weight.abs().sum() > 0


@pytest.mark.parametrize("kind", ["float32", "bf16"])
def test_no_process_holds_a_whole_network_while_it_is_sharded(kind: str, tmp_path: Path) -> None:
    """Of two processes: its half, and one block. Cast whole before it is sharded, a bf16 file's network is 1.1 times itself."""
    path, whole = save(tmp_path, DEEP, kind)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_shard, args=(port, path, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        peak, held = map(int, (tmp_path / f"peak_{rank}").read_text().split())
        assert held == pytest.approx(whole / 2, rel=0.05)
        assert peak < 0.65 * whole, f"rank {rank}: {peak / whole:.2f} of the network"


def _shard(rank: int, port: int, path: Path, results: Path) -> None:
    torch.set_num_threads(1)
    # Freed tensors go back to the system at once, so that what is counted is what is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist.all_reduce(torch.zeros(1))
    with peak_bytes() as peak:
        network = shard(map_transformer(path), CPU)
    held = sum(parameter.to_local().nbytes for parameter in network.parameters())  # type: ignore[operator]
    (results / f"peak_{rank}").write_text(f"{peak()} {held}")
    dist.destroy_process_group()

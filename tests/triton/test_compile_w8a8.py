"""The W8A8 kernels compile for GPUs that are not here: tensor cores, no spills, two programs per processor."""

from __future__ import annotations

import pytest
import triton
from compile_tools import SHARED_LIMIT, Build, compile_all, tile_type
from turbokernels.tuning import GLUON_VERSIONS, Launch
from turbokernels.w8a8 import kernel

MODULE = "turbokernels.w8a8.kernel"


def rows_build(launch: Launch, gelu: bool) -> Build:
    blocks = dict(launch.blocks)
    m, n, k = (blocks[f"BLOCK_{name}"] for name in "MNK")
    types = {"x": "*i8", "w": "*i8", "y": "*bf16"}
    if blocks["TMA"]:
        types = {"x": f"tensordesc<i8[{m},{k}]>", "w": f"tensordesc<i8[{n},{k}]>", "y": f"tensordesc<bf16[{m},{n}]>"}
    types |= {"p_x_scale": "*fp32", "p_w_scale": "*fp32", "p_bias": "*bf16"}
    types |= dict.fromkeys(("n_rows", "n_out", "n_in", "stride_x", "stride_w"), "i32")
    constants = {**blocks, "RAGGED_K": False, "GELU": gelu}
    return Build(f"{MODULE}:_rows_kernel", types, constants, launch.num_warps, launch.num_stages, ("n_out", "n_in"))


def tiles_build(launch: Launch) -> Build:
    types = dict.fromkeys(("length", "n_out", "n_in", "n_samples"), "i32")
    types |= {"p_x": "*i8", "p_w": "*i8", "p_x_scale": "*fp32", "p_w_scale": "*fp32", "p_bias": "*bf16", "p_y": "*bf16"}
    constants = {**dict(launch.blocks), "BLOCK": 128, "RAGGED_K": False, "GELU": False}
    return Build(f"{MODULE}:_tiles_kernel", types, constants, launch.num_warps, launch.num_stages, ("n_out", "n_in"))


def test_hopper() -> None:
    pointers, described, persistent = kernel.HOPPER_POINTERS[0], *kernel.HOPPER_TMA[:2]
    in_pairs = [rows_build(pointers, False), rows_build(described, True), rows_build(persistent, False)]
    compiled = compile_all([*in_pairs, rows_build(kernel.HOPPER_TMA[-1], False), tiles_build(kernel.TILES[0])], 90)
    for result in compiled:
        assert result.matrix_instructions == ["wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"]
        assert result.spills == 0
        assert result.shared <= SHARED_LIMIT[90]
    for result in compiled[: len(in_pairs)]:  # two of 256 threads share 65,536 registers and the memory
        assert result.registers <= 128
        assert 2 * (result.shared + 1024) <= SHARED_LIMIT[90]


def hopper_build(launch: Launch, gelu: bool) -> Build:
    blocks = dict(launch.blocks)
    m, n, k = (blocks.pop(f"BLOCK_{name}") for name in "MNK")
    types = {"x": tile_type("i8", m, k), "w": tile_type("i8", n, k), "y": tile_type("bf16", m, n), "p_bias": "*bf16"}
    types |= {"p_x_scale": "*fp32", "p_w_scale": "*fp32", "n_rows": "i32", "n_out": "i32", "n_in": "i32"}
    constants = {**blocks, "BIAS": True, "GELU": gelu}
    return Build(f"{MODULE}_hopper:rows_kernel", types, constants, launch.num_warps, 1, ("n_out", "n_in"))


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) not in GLUON_VERSIONS, reason="another Gluon")
def test_hopper_in_gluon() -> None:
    builds = [hopper_build(launch, gelu) for launch in kernel.HOPPER_GLUON for gelu in (False, True)]
    for build, result in zip(builds, compile_all(builds, 90)):
        assert result.matrix_instructions == ["wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"]
        assert (
            result.ptx.count("wgmma.wait_group.sync.aligned 1") == build.constants["CONSUMERS"]
        )  # one stays in flight
        assert result.spills == 0
        assert result.shared <= SHARED_LIMIT[90]


def test_ampere() -> None:
    for result in compile_all([rows_build(kernel.OTHERS[0], True), tiles_build(kernel.TILES[0])], 80):
        assert all("s32.s8.s8.s32" in instruction for instruction in result.matrix_instructions)
        assert result.spills == 0
        assert result.shared <= SHARED_LIMIT[86]  # which has less than sm80

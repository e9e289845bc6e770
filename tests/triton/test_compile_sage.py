"""Quantised attention's kernels compile for GPUs that are not here: 8-bit matrix instructions, no spills on sm90."""

from __future__ import annotations

import pytest
import triton
from compile_tools import SHARED_LIMIT, Build, compile_all, tile_type
from turbokernels.attention_sage.launch import hopper_candidates
from turbokernels.tuning import GLUON_VERSIONS, Launch

MODULE = "turbokernels.attention_sage.kernel:"
HOPPER_MODULE = "turbokernels.attention_sage.kernel_hopper:"


def strides(*names: str) -> dict[str, str]:
    return {f"stride_{name}{axis}": "i32" for name in names for axis in "bln"}


def attend(block_q: int, block_k: int, dim: int, pv: str, warps: int, stages: int, maxnreg: int | None = None) -> Build:
    types = {
        "p_q": "*i8",
        "p_k": "*i8",
        "p_v": "*fp8e4nv" if pv == "fp8" else "*fp16",
        "p_kept": "*i32",
        "p_o": "*bf16",
    }
    types |= dict.fromkeys(("p_q_scale", "p_k_scale", "p_v_scale"), "*fp32") | strides("o")
    types |= dict.fromkeys(("heads", "length_q", "length_k", "n_q_blocks", "n_k_blocks", "n_kept"), "i32")
    constants = {"SPARSE": True, "FP8": pv == "fp8", "D": dim, "W": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    constants |= {"ROWS": block_q, "KEYS": block_k, "CHANNELS": 64}
    return Build(MODULE + "attend_kernel", types, constants, warps, stages, maxnreg=maxnreg)


def attend_hopper(block_q: int, block_k: int, dim: int, launch: Launch) -> Build:
    blocks = dict(launch.blocks)
    registers = blocks.pop("maxnreg", None)
    types = {"q": tile_type("i8", 64, dim), "k": tile_type("i8", 64, dim), "v": tile_type("fp8e4nv", dim, 64)}
    types |= dict.fromkeys(("p_q_scale", "p_k_scale", "p_v_scale"), "*fp32") | strides("o")
    types |= dict.fromkeys(("heads", "length_q", "length_k", "n_q_blocks", "n_k_blocks", "n_kept"), "i32")
    types |= {"p_kept": "*i32", "p_o": "*bf16"}
    constants = {"SPARSE": True, "BLOCK_Q": block_q, "BLOCK_K": block_k, **blocks}
    return Build(HOPPER_MODULE + "attend_kernel", types, constants, launch.num_warps, 1, maxnreg=registers)


def preparations(pv: str) -> list[Build]:
    lengths = {"heads": "i32", "length": "i32"}
    packed = {"stride_b": "i32", "stride_l": "i32", "stride_n": "i32", "p_scale": "*fp32", **lengths}
    rows = {"p_x": "*bf16", "p_mean": "*fp32", "p_values": "*i8", "p_block_mean": "*fp32", "factor": "fp32"}
    values = {"p_v": "*bf16", "p_values": "*fp8e4nv" if pv == "fp8" else "*fp16", **packed}
    partial = dict.fromkeys(("p_sums", "p_largest"), "*fp32")
    statistics = {"p_k": "*bf16", "p_v": "*bf16", "tiles_per_program": "i32", **partial, **lengths}
    combine = {**partial, "p_mean": "*fp32", "p_scale": "*fp32", "length": "i32", "programs": "i32"}
    return [
        Build(MODULE + "statistics_kernel", statistics | strides("k", "v"), {"D": 128, "BLOCK": 64, "ROWS": 16}, 8, 1),
        Build(MODULE + "combine_kernel", combine, {"MEAN": True, "D": 128, "PROGRAMS": 32}),
        *(
            Build(
                MODULE + "rows_kernel",
                rows | packed,
                {"SMOOTH": not means, "MEANS": means, "D": 128, "W": 128, "BLOCK": 128},
                4 if means else 8,
                1,
            )
            for means in (False, True)
        ),
        Build(MODULE + "values_kernel", values, {"FP8": pv == "fp8", "D": 128, "BLOCK": 64}, 8, 1),
    ]


@pytest.mark.parametrize(
    ("arch", "pv", "instructions"),
    [(80, "fp16", ("s32.s8.s8", "f32.f16.f16")), (90, "fp8", ("s32.s8.s8", "f32.e4m3.e4m3"))],
)
def test_kernels_compile(arch: int, pv: str, instructions: tuple[str, ...]) -> None:
    attends = [attend(128, 64, 128, pv, 8, 3), attend(64, 64, 64, pv, 4, 3)]
    for build, compiled in zip(attends + preparations(pv), compile_all(attends + preparations(pv), arch)):
        assert compiled.shared <= SHARED_LIMIT[arch], (build, compiled.shared)
        if arch == 90:
            assert compiled.spills == 0, (build, compiled.spills)
        if build in attends:
            assert compiled.has_wgmma == (arch == 90)
            found = " ".join(compiled.matrix_instructions)
            assert all(wanted in found for wanted in instructions), found


def test_two_programs_share_a_processor_of_hopper() -> None:
    """The first choice for P V in fp8: 128 registers a thread, at the price of a few spilled values outside the loop."""
    (compiled,) = compile_all([attend(128, 64, 128, "fp8", 8, 3, maxnreg=128)], 90)
    assert compiled.registers <= 128
    assert compiled.spills <= 64
    assert 2 * compiled.shared <= SHARED_LIMIT[90]


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) not in GLUON_VERSIONS, reason="another Gluon")
def test_hopper_in_gluon() -> None:
    cases = [(128, 64, 128), (64, 128, 64)]
    builds = [attend_hopper(*case, launch) for case in cases for launch in hopper_candidates(case[2], *case[:2])]
    for compiled in compile_all(builds, 90):
        kinds = {instruction.split("k32.")[1] for instruction in compiled.matrix_instructions}
        assert kinds == {"s32.s8.s8", "f32.e4m3.e4m3"}
        assert compiled.spills == 0
        assert compiled.registers <= 128  # two programs share a processor
        assert 2 * (compiled.shared + 1024) <= SHARED_LIMIT[90]

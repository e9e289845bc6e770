"""The attention kernels compile for GPUs that are not here, and fit them, at Wan's head dim and block sizes.

The launch parameters are those that the library would try on that GPU: all of its candidates on sm90, the first one
elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_tools import SHARED_LIMIT, Build, Compiled, compile_all

pytest.importorskip("triton")

from turbokernels.attention_sparse.kernel import forward_candidates
from turbokernels.attention_sparse.kernel_backward import backward_kv_candidates, backward_q_candidates
from turbokernels.attention_sparse.kernel_jvp import jvp_candidates
from turbokernels.attention_tiles import Gpu
from turbokernels.tuning import Launch

FOLDER = "turbokernels.attention_sparse"
LENGTHS = {"length_q": "i32", "length_k": "i32"}
# Kernel, its candidates, operands read by pointer, operands read by descriptor: (name, "R" or "T", the tile's rows).
KERNELS: dict[str, tuple[str, Any, str, list[tuple[str, str]], dict[str, str]]] = {
    "forward": (
        "kernel:forward_kernel",
        forward_candidates,
        "p_q p_o",
        [("p_k", "T"), ("p_v", "T")],
        {"p_lse": "*fp32", "p_kept": "*i32", "n_kept": "i32", "score_scale": "fp32"},
    ),
    "backward_q": (
        "kernel_backward:backward_q_kernel",
        backward_q_candidates,
        "p_q p_o p_do p_dq",
        [("p_k", "T"), ("p_v", "T")],
        {
            "p_lse": "*fp32",
            "p_delta": "*fp32",
            "p_kept": "*i32",
            "n_kept": "i32",
            "scale": "fp32",
            "score_scale": "fp32",
        },
    ),
    "backward_kv": (
        "kernel_backward:backward_kv_kernel",
        backward_kv_candidates,
        "p_k p_v p_dk p_dv",
        [("p_q", "R"), ("p_do", "R")],
        {"p_lse": "*fp32", "p_delta": "*fp32", "p_q_blocks": "*i32", "p_offsets": "*i32", "n_pairs": "i32"}
        | {"scale": "fp32", "score_scale": "fp32"},
    ),
    "jvp": (
        "kernel_jvp:jvp_kernel",
        jvp_candidates,
        "p_q p_tq p_o p_to",
        [("p_k", "T"), ("p_v", "T"), ("p_tk", "T"), ("p_tv", "T")],
        {"p_lse": "*fp32", "p_kept": "*i32", "n_kept": "i32", "scale": "fp32", "score_scale": "fp32"},
    ),
}
STRIDES = {
    "forward": "q k v o",
    "backward_q": "q k v o g d",
    "backward_kv": "q k v g d",
    "jvp": "q k v tq tk tv o",
}


def build(
    name: str, launch: Launch, dim: int, block_q: int, block_k: int, tma: bool, dense: bool, dtype: str = "bf16"
) -> Build:
    kernel, _, pointers, tiles, others = KERNELS[name]
    types = dict.fromkeys(pointers.split(), f"*{dtype}") | others | LENGTHS
    for pointer, rows in tiles:
        types[pointer] = f"tensordesc<{dtype}[1, {launch[rows]}, 1, {dim}]>" if tma else f"*{dtype}"
    types |= {f"stride_{x}{axis}": "i32" for x in STRIDES[name].split() for axis in "bln"}
    constants: dict[str, Any] = {"D": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k, "TMA": tma, **dict(launch.blocks)}
    if name != "forward":
        constants["DENSE"] = dense
    if name == "jvp":
        constants |= {"TQ": True, "TK": True, "TV": True}
    if dense:
        for absent in ("p_kept", "p_q_blocks", "p_offsets"):
            if types.pop(absent, None):
                constants[absent] = None
    return Build(f"{FOLDER}.{kernel}", types, constants, launch.num_warps, launch.num_stages)


def check(builds: list[Build], arch: int, spills: int) -> list[Compiled]:
    compiled = compile_all(builds, arch)
    for asked, result in zip(builds, compiled):
        assert result.registers > 16, asked  # a program that cannot be placed is replaced by a trap
        assert result.shared <= SHARED_LIMIT[arch], asked
        assert result.spills <= spills, (asked, result.spills)
    return compiled


@pytest.mark.parametrize("name", KERNELS)
def test_hopper(name: str) -> None:
    candidates = KERNELS[name][1](torch.bfloat16, 128, 64, Gpu((9, 0), SHARED_LIMIT[90]))
    builds = [build(name, launch, 128, 128, 64, tma=True, dense=False) for launch in candidates]
    builds += [build(name, candidates[0], 128, 128, 64, tma=False, dense=False)]
    if name != "forward":
        builds += [build(name, candidates[0], 128, 128, 64, tma=True, dense=True)]
    for result in check(builds, 90, spills=128):
        assert result.has_wgmma
    assert all("cp.async.bulk.tensor" in result.ptx for result in check(builds[:1], 90, spills=128))


@pytest.mark.parametrize("arch", [80, 86, 100])
def test_other_gpus(arch: int) -> None:
    tma, gpu = arch >= 90, Gpu((arch // 10, arch % 10), SHARED_LIMIT[arch])
    builds = [
        build(name, kernel[1](torch.bfloat16, 128, 64, gpu)[0], 128, 128, 64, tma, dense=False)
        for name, kernel in KERNELS.items()
    ]
    check(builds, arch, spills=512)


@pytest.mark.parametrize("arch", [80, 90])
def test_single_precision(arch: int) -> None:
    """Exact exponentials, quotients and piecewise products."""
    gpu = Gpu((arch // 10, arch % 10), SHARED_LIMIT[arch])
    builds = [
        build(name, kernel[1](torch.float32, 128, 64, gpu)[0], dim, 128, 64, tma=False, dense=False, dtype="fp32")
        for name, kernel in KERNELS.items()
        for dim in (16, 128)
    ]
    for result in check(builds, arch, spills=1024):
        assert "ex2.approx" not in result.ptx
        assert "div.full" not in result.ptx


@pytest.mark.parametrize("arch", [80, 90])
def test_block_selection(arch: int) -> None:
    operand = {"p_x": "*bf16", "p_mean": "*fp32"} | {f"stride_{axis}": "i32" for axis in "bln"}
    heads = operand | {"heads": "i32", "length": "i32"}
    lists = {"n_q_blocks": "i32", "n_k_blocks": "i32", "p_marks": "*i8"}
    asked = [
        ("mean_kernel", heads, {"BLOCK": 128, "D": 128}, 4),
        (
            "centre_kernel",
            {"p_mean": "*fp32", "p_total": "*fp32", "length": "i32", "n_blocks": "i32"},
            {"BLOCK": 64, "D": 128},
            4,
        ),
        (
            "select_kernel",
            {"p_score": "*fp32", "p_kept": "*i32", "n_blocks": "i32", "n_kept": "i32"},
            {"CHUNK": 512, "SINGLE": True},
            1,
        ),
        ("mark_kernel", lists | {"p_kept": "*i32", "n_kept": "i32"}, {"CHUNK": 128}, 1),
        ("transpose_kernel", lists | {"p_offsets": "*i32", "p_q_blocks": "*i32", "n_pairs": "i32"}, {"CHUNK": 512}, 4),
    ]
    asked[1][2].update(ROWS=128, COLUMNS=16)
    builds = [Build(f"turbokernels.block_selection.kernel:{name}", *rest) for name, *rest in asked]
    check(builds, arch, spills=0)

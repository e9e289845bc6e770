"""The element-wise kernels compile for GPUs that are not here, without spilling, at the widths of Wan's networks."""

from __future__ import annotations

import pytest
from compile_tools import SHARED_LIMIT, Build, Compiled, compile_all

# Width, warps, features of a piece: what row_launches puts first for 1.3B and 14B.
ROWS = [(1536, 1, 256), (8960, 8, 2048), (5120, 4, 1024), (13824, 8, 2048)]


def check(builds: list[Build], arch: int) -> list[Compiled]:
    compiled = compile_all(builds, arch)
    for build, result in zip(builds, compiled):
        assert result.spills == 0, build
        assert result.registers <= 168, build
        assert result.shared <= SHARED_LIMIT[arch], build
    return compiled


def quantize_build(width: int, warps: int, chunk: int, target: str, gelu: bool) -> Build:
    types = {"p_x": "*bf16", "p_q": target, "p_scale": "*fp32", "p_smooth": "*fp32", "length": "i32"}
    types |= {"stride_xb": "i32", "stride_xl": "i32"}
    constants = {"WIDTH": width, "CHUNK": chunk, "GELU": gelu}
    if not gelu:
        del types["p_smooth"]
        constants["p_smooth"] = None
    return Build("turbokernels.quantize.kernel:_rows_kernel", types, constants, num_warps=warps, num_stages=1)


@pytest.mark.parametrize("arch", [80, 90])
def test_quantisation(arch: int) -> None:
    builds = [quantize_build(*rows, "*i8", gelu) for rows in ROWS for gelu in (False, True)]
    types = {"p_x": "*bf16", "p_q": "*i8", "p_scale": "*fp32", "length": "i32", "width": "i32"}
    types |= {"stride_xb": "i32", "stride_xl": "i32"}
    builds.append(Build("turbokernels.quantize.kernel:_tiles_kernel", types, {"BLOCK": 128}, 8, 1, ("width",)))
    check(builds, arch)


def test_fp8_rounds_in_hardware() -> None:
    (compiled,) = check([quantize_build(*ROWS[0], "*fp8e4nv", False)], 90)
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.ptx

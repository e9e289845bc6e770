"""The element-wise kernels compile for GPUs that are not here, without spilling to speak of, at the widths of Wan's networks."""

from __future__ import annotations

import pytest
from compile_tools import SHARED_LIMIT, Build, Compiled, compile_all
from turbokernels.fused_norm_modulate.kernel import PREFERRED
from turbokernels.rows import MAX_PER_THREAD, row_launches

WIDTHS = [1536, 8960, 5120, 13824]  # of 1.3B and 14B


def launch(width: int, preferred: int = MAX_PER_THREAD) -> tuple[int, int, int]:
    """Width, warps and features of a piece, as launched by default."""
    first = row_launches(width, preferred)[0]
    return width, first.num_warps, first["CHUNK"]


ROWS = [launch(width) for width in WIDTHS]
NORM_ROWS = [launch(width, PREFERRED) for width in (1536, 5120)]


def check(builds: list[Build], arch: int) -> list[Compiled]:
    compiled = compile_all(builds, arch)
    for build, result in zip(builds, compiled):
        assert result.spills <= 32, build  # of a few values, where ptxas aims for one more resident warp
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
    builds = [quantize_build(*rows, "*i8", gelu) for rows, gelu in zip(ROWS, (False, True, False, True))]
    types = {"p_x": "*bf16", "p_q": "*i8", "p_scale": "*fp32", "length": "i32", "width": "i32"}
    types |= {"stride_xb": "i32", "stride_xl": "i32"}
    for gelu, smooth in ((False, {}), (True, {"p_smooth": "*fp32"})):
        constants = {"BLOCK": 128, "GELU": gelu} | ({} if smooth else {"p_smooth": None})
        tiles = "turbokernels.quantize.kernel:_tiles_kernel"
        builds.append(Build(tiles, types | smooth, constants, 8, 1, ("width",)))
    check(builds, arch)


def test_fp8_rounds_in_hardware() -> None:
    (compiled,) = check([quantize_build(*ROWS[0], "*fp8e4nv", False)], 90)
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.ptx


def residual_norm_build(
    width: int,
    warps: int,
    chunk: int,
    *,
    stream: str = "*bf16",
    branch: bool = True,
    gate: bool = True,
    norm: bool = True,
    target: str = "*bf16",
) -> Build:
    types = {"p_x": stream, "length": "i32", "eps": "fp32", "offset": "fp32", "stride_xb": "i32", "stride_xl": "i32"}
    constants: dict = {"WIDTH": width, "CHUNK": chunk}
    names = {"p_y": "*bf16", "p_out": stream} if branch else {}
    names |= {"p_gate": "*fp32"} if branch and gate else {}
    names |= {"p_scale": "*fp32", "p_shift": "*fp32", "p_h": target} if norm else {}
    names |= {"p_h_scale": "*fp32"} if target == "*i8" else {}
    for name in ("p_y", "p_gate", "p_out", "p_scale", "p_shift", "p_h", "p_h_scale"):
        (types if name in names else constants)[name] = names.get(name)
    for name in (
        "stride_yb",
        "stride_yl",
        *(f"stride_{kind}_{axis}" for kind in ("gate", "scale", "shift") for axis in "bl"),
    ):
        types[name] = "i32"
    return Build("turbokernels.fused_norm_modulate.kernel:_residual_norm_kernel", types, constants, warps, 1)


def rope_build(heads: int, warps: int, chunk: int, packed: bool = True, turned: bool = True) -> Build:
    types = {"p_x": "*bf16", "p_weight": "*fp32", "p_cos": "*fp32", "p_sin": "*fp32", "p_out": "*bf16", "length": "i32"}
    strides = ("stride_xb", "stride_xl", "stride_xn", "stride_out_b", "stride_out_l", "stride_cos", "stride_sin")
    types |= {"eps": "fp32"} | dict.fromkeys(strides, "i32")
    constants: dict = {"PACKED": packed, "HEAD_DIM": 128, "WIDTH": heads * 128, "CHUNK": chunk}
    if not turned:
        constants |= dict.fromkeys(("p_cos", "p_sin"))
        types = {name: kind for name, kind in types.items() if name not in constants}
    return Build("turbokernels.fused_rms_rope.kernel:_rms_rope_kernel", types, constants, warps, 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_norms_and_gates(arch: int) -> None:
    builds = [residual_norm_build(*rows, branch=False, target="*i8") for rows in NORM_ROWS]
    builds += [residual_norm_build(*rows, stream="*fp32", target="*i8") for rows in NORM_ROWS]
    builds += [residual_norm_build(*NORM_ROWS[0], norm=False), residual_norm_build(*NORM_ROWS[0])]
    builds.append(residual_norm_build(*NORM_ROWS[0], gate=False))
    check(builds, arch)


@pytest.mark.parametrize("arch", [80, 90])
def test_rope(arch: int) -> None:
    builds = [rope_build(12, 1, 256), rope_build(40, 4, 1024), rope_build(12, 1, 256, packed=False)]
    check([*builds, rope_build(12, 1, 256, turned=False)], arch)

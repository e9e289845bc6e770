"""Linear attention's kernels compile for GPUs that are not here, within their shared memory; on sm90 without spills."""

from __future__ import annotations

import pytest
from compile_tools import SHARED_LIMIT, Build, compile_all

MODULE = "turbokernels.attention_linear.kernel:"
COUNTS = dict.fromkeys(("heads", "length", "tiles_per_program"), "i32")
# kernel -> (16-bit operands, their stride prefixes, float32 operands)
KERNELS = {
    "state_kernel": (("p_k", "p_v"), ("k", "v"), ("p_partial", "p_largest")),
    "apply_kernel": (("p_q", "p_base", "p_o"), ("q", "base", "o"), ("p_state", "p_bias")),
    "query_gradient_kernel": (("p_q", "p_do", "p_dq"), ("q", "do", "dq"), ("p_state", "p_rows")),
    "state_gradient_kernel": (("p_q", "p_do"), ("q", "do"), ("p_state", "p_rows", "p_partial")),
    "key_gradient_kernel": (("p_k", "p_v", "p_dk", "p_dv"), ("k", "v", "d"), ("p_dstate",)),
}
TANGENTS = {
    "state_kernel": (("p_tk", "p_tv"), ("tk", "tv")),
    "apply_kernel": (("p_tq", "p_tbase", "p_to"), ("tq", "tbase")),
}


def build(kernel: str, dim: int, block: int, warps: int, stages: int, tangent: bool, dtype: str = "bf16") -> Build:
    operands, strided, floats = KERNELS[kernel]
    constants: dict[str, int | float | bool | str | None] = {"FEATURE_MAP": "softmax", "D": dim, "BLOCK": block}
    more_operands, more_strided = TANGENTS.get(kernel, ((), ()))
    if kernel in TANGENTS:
        constants["TANGENT"] = tangent
    if kernel == "state_kernel":
        constants |= {"LARGEST": not tangent}
    if kernel == "apply_kernel":
        constants |= {"HAS_BASE": True, "HAS_BIAS": True}
    if tangent:
        operands, strided = operands + more_operands, strided + more_strided
    else:
        constants |= dict.fromkeys(more_operands)
        constants |= {f"stride_{name}{axis}": 0 for name in more_strided for axis in "bln"}
    types = dict.fromkeys(operands, f"*{dtype}") | dict.fromkeys(floats, "*fp32") | COUNTS
    types |= {f"stride_{name}{axis}": "i32" for name in strided for axis in "bln"}
    return Build(MODULE + kernel, types, constants, warps, stages)


@pytest.mark.parametrize(("arch", "stages"), [(89, 2), (90, 3)])
def test_kernels_compile(arch: int, stages: int) -> None:
    cases = [(kernel, False) for kernel in KERNELS] + [(kernel, True) for kernel in TANGENTS]
    builds = [build(kernel, 128, 32, 8, stages, tangent) for kernel, tangent in cases]
    for (kernel, tangent), compiled in zip(cases, compile_all(builds, arch)):
        assert compiled.shared <= SHARED_LIMIT[arch], (kernel, tangent, compiled.shared)
        if arch == 90:
            assert compiled.spills == 0, (kernel, tangent, compiled.spills)
        assert compiled.matrix_instructions, kernel


@pytest.mark.parametrize("dim", [16, 128])
def test_single_precision(dim: int) -> None:
    """Exact exponentials and quotients, float64 row sums, piecewise products; its one launch."""
    cases = [(kernel, kernel in TANGENTS) for kernel in KERNELS]
    builds = [build(kernel, dim, 32, 8, 1, tangent, dtype="fp32") for kernel, tangent in cases]
    for case, compiled in zip(cases, compile_all(builds, 90)):
        assert compiled.shared <= SHARED_LIMIT[90], (case, compiled.shared)
        assert "ex2.approx" not in compiled.ptx, case
        assert "div.full" not in compiled.ptx, case

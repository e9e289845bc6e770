"""The tools that read what a compiler says about a kernel."""

from __future__ import annotations

import pytest
from compile_tools import SHARED_LIMIT, Build, compile_all

TYPES = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "stride_a": "i32", "length": "i32"}
BUILD = Build("sample_kernel:product_kernel", TYPES, {"BLOCK": 64})


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_a_product_uses_the_matrix_units(arch: int, instruction: str) -> None:
    (compiled,) = compile_all([BUILD], arch)
    assert 0 < compiled.shared <= SHARED_LIMIT[arch]
    assert 0 < compiled.registers <= 255
    assert compiled.spills == 0
    assert compiled.has_wgmma == (arch == 90)
    assert all(found.startswith(instruction) for found in compiled.matrix_instructions)


def test_arguments_are_checked() -> None:
    with pytest.raises(RuntimeError, match=r"missing or unknown arguments \['BLOCK'\]"):
        compile_all([Build("sample_kernel:product_kernel", TYPES)], 80)

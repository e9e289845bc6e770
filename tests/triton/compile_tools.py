"""Compile Triton kernels for GPUs that are not here, and read what the compiler says about them.

Compilation runs in a process of its own, without TRITON_INTERPRET: there, kernels are the compiler's.

    build = Build("turbokernels.some_op.kernel:_kernel", {"q": "*bf16", "length": "i32"}, {"BLOCK_Q": 128})
    compiled, = compile_all([build], arch=90)
    assert compiled.shared <= SHARED_LIMIT[90] and compiled.spills == 0 and compiled.has_wgmma
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Bytes of shared memory that one program may use, by 10 * major + minor of the compute capability.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
KERNELS = Path(__file__).parents[2] / "kernels"


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants. kernel: "module:function"; types: argument -> Triton type, such as "*bf16",
    "*i8", "*fp8e4nv", "i32", "fp32" (`tile_type` for Gluon's descriptors); constants: every other argument (constexprs,
    and None for absent pointers).

    Pointers count as 16-byte aligned, and integers as divisible by 16 if their name starts with "stride" or stands in
    `divisible`, as they are at run time for packed operands.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    maxnreg: int | None = None  # registers of a thread


def tile_type(element: str, *tile: int) -> str:
    """Type of Gluon's descriptor of tiles of a Triton element type: as wide a swizzle as fits, as kernels choose it."""
    bits = {"i8": 8, "fp8e4nv": 8, "bf16": 16}[element]
    swizzle = min(128, tile[-1] * bits // 8)
    layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={len(tile)})"
    return f"tensordesc<{element}[{','.join(map(str, tile))}],{layout}>"


@dataclass(frozen=True)
class Compiled:
    """What a program costs: bytes of shared memory, registers of a thread, bytes that ptxas spilled to local memory;
    the PTX, and which matrix instructions are in it."""

    shared: int
    registers: int
    spills: int
    ptx: str

    @property
    def has_wgmma(self) -> bool:
        """Hopper's asynchronous matrix instructions."""
        return "wgmma.mma_async" in self.ptx

    @property
    def matrix_instructions(self) -> list[str]:
        """The distinct matrix instructions, sorted: wgmma (sm90), tcgen05 (sm100), mma.sync (before)."""
        return sorted(set(re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", self.ptx)))


def compile_all(builds: Sequence[Build], arch: int) -> list[Compiled]:
    """Compile every build for `arch` (80, 86, 89, 90, 100, 120). Errors: RuntimeError with the compiler's message."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KERNELS), environment.get("PYTHONPATH")]))
    request = json.dumps({"arch": arch, "builds": [asdict(build) for build in builds]})
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment, timeout=280)
    if done.returncode:
        raise RuntimeError(f"compiling for sm{arch} failed:\n{done.stderr[-4000:]}")
    return [Compiled(**result) for result in json.loads(done.stdout.splitlines()[-1])]


def _compile(build: Build, arch: int) -> Compiled:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    unknown = (build.types.keys() | build.constants.keys()) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{build.kernel}: missing or unknown arguments {sorted(unknown)}")
    signature = {argument: build.types.get(argument, "constexpr") for argument in kernel.arg_names}
    constants = {(kernel.arg_names.index(argument),): value for argument, value in build.constants.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument.startswith("stride") or argument in build.divisible
        if kind != "constexpr"
    }
    compiled = triton.compile(
        (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages, "maxnreg": build.maxnreg},
    )
    ptx = compiled.asm["ptx"]
    return Compiled(compiled.metadata.shared, *_registers_and_spills(ptx), ptx)


def _registers_and_spills(ptx: str) -> tuple[int, int]:
    """What the ptxas that Triton ships reports for a PTX file with one kernel."""
    import tempfile

    from triton.backends import nvidia

    match = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    if match is None:
        raise ValueError("the PTX names no target")
    target, number = match.group(1), int(match.group(2))
    assembler = Path(nvidia.__file__ or nvidia.__path__[0])
    folder = (assembler if assembler.is_dir() else assembler.parent) / "bin"
    blackwell = folder / "ptxas-blackwell"
    program = blackwell if number >= 100 and blackwell.exists() else folder / "ptxas"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(program), "-v", f"-arch={target}", str(source), "-o", str(Path(scratch) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return max(registers), max(spills, default=0)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([asdict(_compile(Build(**build), asked["arch"])) for build in asked["builds"]]))

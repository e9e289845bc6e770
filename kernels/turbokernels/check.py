"""`python -m turbokernels.check`: every kernel against its reference on this machine's GPU, in a minute or two.

A kernel that a compiler or a driver breaks on some GPU should be found before a training run and not after it. So the
limits here are those of gross errors; the exact error budgets are what tests/gpu holds the kernels to. Prints a table;
exit status 1 if a row is red. Without a GPU there is nothing to check, and it says so.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import turbokernels as tk
from turbokernels import tuning
from turbokernels.conv3d.api import has_kernel
from turbokernels.tuning import interpreted
from turbokernels.w8a8.api import quantize_weight

# Largest relative error (Euclidean norm) against the reference, whose arithmetic is float32 on the same operands.
ROUNDED = 0.005  # one rounding at the end
PRODUCTS = 0.01  # intermediate results enter matrix products in 16 bits
GRADIENTS = 0.02  # of which there are several in a row
QUANTISED = 0.03  # 8-bit roundings fall otherwise where sums have another order
# e4m3 probabilities are rounded relative to the largest score so far, in the reference relative to the row's largest: two
# roundings of 2.5% each that have little in common.
QUANTISED_ATTENTION = 0.03


@dataclass(frozen=True)
class Case:
    """Sizes and place of the operands; ragged on purpose."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    length: int = 1000
    heads: int = 3
    dim: int = 128
    block_q: int = 128
    block_k: int = 64
    features: int = 1536

    def operands(self, count: int) -> tuple[Tensor, ...]:
        """`count` tensors (1, L, N, D), standard normal."""
        shape = (count, 1, self.length, self.heads, self.dim)
        return torch.randn(shape, device=self.device).to(self.dtype).unbind(0)

    def stream(self, count: int) -> tuple[Tensor, ...]:
        """`count` tensors (1, L, features)."""
        return torch.randn(count, 1, self.length, self.features, device=self.device).to(self.dtype).unbind(0)

    def modulation(self, count: int) -> tuple[Tensor, ...]:
        """`count` float32 tensors (1, 1, features)."""
        return torch.randn(count, 1, 1, self.features, device=self.device).unbind(0)

    def mask(self) -> tk.BlockMask:
        """Block lists by the reference."""
        q, k = self.operands(2)
        return tk.select_blocks(q, k, 0.3, self.block_q, self.block_k, impl="reference")


@dataclass(frozen=True)
class Part:
    """One result of an op. Not ok when the error is NaN."""

    name: str
    error: float
    limit: float

    @property
    def is_ok(self) -> bool:
        return self.error <= self.limit


@dataclass
class Result:
    """What a check found. message: the exception, if one was raised."""

    op: str
    parts: list[Part] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.message and all(part.is_ok for part in self.parts)


def small_case(device: torch.device) -> Case:
    """The smallest sizes that have a whole and a ragged block."""
    return Case(device, length=70, heads=1, dim=64, block_q=64, block_k=64, features=128)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Euclidean distance over the norm of `expected`; NaN if either has one, also where both have."""
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _compare(run: Callable[[str], dict[str, Tensor]], **limits: float) -> list[Part]:
    """Run both implementations and compare what they return under each name."""
    got, expected = run("triton"), run("reference")
    return [Part(name, relative_error(got[name], expected[name]), limit) for name, limit in limits.items()]


def _with_gradients(
    attend: Callable[..., Tensor], names: str, leaves: Sequence[Tensor], do: Tensor
) -> dict[str, Tensor]:
    """o of attend(*leaves), and the gradients of sum(do * o) under the names d<name>."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    o = attend(*leaves)
    gradients = torch.autograd.grad(o, leaves, do)
    return {"o": o, **{f"d{name}": gradient for name, gradient in zip(names.split(), gradients)}}


def _select_blocks(case: Case) -> list[Part]:
    q, k = case.operands(2)
    masks = [tk.select_blocks(q, k, 0.3, case.block_q, case.block_k, impl=impl) for impl in ("triton", "reference")]
    # Scores that tie to the last bit may be taken in another order.
    return [Part("lists that differ", (masks[0].kept != masks[1].kept).double().mean().item(), 0.02)]


def _sparse_attention(case: Case) -> list[Part]:
    *leaves, do = case.operands(4)
    mask = case.mask()

    def run(impl: str) -> dict[str, Tensor]:
        return _with_gradients(lambda q, k, v: tk.sparse_attention(q, k, v, mask, impl=impl), "q k v", leaves, do)

    return _compare(run, o=PRODUCTS, dq=GRADIENTS, dk=GRADIENTS, dv=GRADIENTS)


def _sparse_attention_jvp(case: Case) -> list[Part]:
    (q, k, v, tq, tk_, tv), mask = case.operands(6), case.mask()

    def run(impl: str) -> dict[str, Tensor]:
        return dict(zip(("o", "to"), tk.sparse_attention_jvp(q, k, v, tq, tk_, tv, mask, impl=impl)))

    return _compare(run, o=PRODUCTS, to=GRADIENTS)


def _attention_jvp(case: Case) -> list[Part]:
    *leaves, tq, tk_, tv, do = case.operands(7)

    def run(impl: str) -> dict[str, Tensor]:
        tangents: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, to = tk.attention_jvp(q, k, v, tq, tk_, tv, impl=impl)
            tangents.append(to)
            return o

        return {**_with_gradients(attend, "q k v", leaves, do), "to": tangents[0]}

    return _compare(run, o=PRODUCTS, to=GRADIENTS, dq=GRADIENTS, dk=GRADIENTS, dv=GRADIENTS)


def _linear_attention(case: Case) -> list[Part]:
    *leaves, do = case.operands(4)

    def run(impl: str) -> dict[str, Tensor]:
        return _with_gradients(lambda *x: tk.linear_attention(*x, impl=impl), "q k v", leaves, do)

    return _compare(run, o=PRODUCTS, dq=GRADIENTS, dk=GRADIENTS, dv=GRADIENTS)


def _linear_attention_jvp(case: Case) -> list[Part]:
    q, k, v, tq, tk_, tv = case.operands(6)

    def run(impl: str) -> dict[str, Tensor]:
        return dict(zip(("o", "to"), tk.linear_attention_jvp(q, k, v, tq, tk_, tv, impl=impl)))

    return _compare(run, o=PRODUCTS, to=GRADIENTS)


def _add_linear_attention(case: Case) -> list[Part]:
    *leaves, do = case.operands(5)
    weight = torch.randn(case.dim, case.dim, device=case.device) / case.dim**0.5
    leaves += [weight, torch.randn(case.dim, device=case.device)]

    def run(impl: str) -> dict[str, Tensor]:
        names = "base q k v weight bias"
        return _with_gradients(lambda *x: tk.add_linear_attention(*x, impl=impl), names, leaves, do)

    return _compare(run, o=PRODUCTS, dq=GRADIENTS, dk=GRADIENTS, dv=GRADIENTS, dweight=GRADIENTS, dbias=GRADIENTS)


def _sage_attention(case: Case) -> list[Part]:
    q, k, v = case.operands(3)
    return _compare(lambda impl: {"o": tk.sage_attention(q, k, v, impl=impl)}, o=QUANTISED_ATTENTION)


def _sage_sparse_attention(case: Case) -> list[Part]:
    (q, k, v), mask = case.operands(3), case.mask()
    return _compare(lambda impl: {"o": tk.sage_sparse_attention(q, k, v, mask, impl=impl)}, o=QUANTISED_ATTENTION)


def _sage_sla(case: Case) -> list[Part]:
    q, k, v = case.operands(3)
    weight, bias = torch.randn(case.dim + 1, case.dim, device=case.device).split([case.dim, 1])
    rest = (weight / case.dim**0.5, bias[0], 0.3, case.block_q, case.block_k)
    return _compare(lambda impl: {"o": tk.sage_sla(q, k, v, *rest, impl=impl)[0]}, o=QUANTISED_ATTENTION)


def _rms_norm_rope(case: Case) -> list[Part]:
    (x,) = case.operands(1)
    angle = torch.rand(case.length, case.dim // 2, device=case.device)
    weight = torch.rand(case.heads * case.dim, device=case.device)
    return _compare(
        lambda impl: {"y": tk.rms_norm_rope(x, weight, angle.cos(), angle.sin(), impl=impl)},
        y=ROUNDED,
    )


def _layer_norm_modulate(case: Case) -> list[Part]:
    (x,), (scale, shift) = case.stream(1), case.modulation(2)

    def run(impl: str) -> dict[str, Tensor]:
        values, token_scale = tk.layer_norm_modulate_quantize(x, scale, shift, impl=impl)
        y = tk.layer_norm_modulate(x, scale, shift, impl=impl)
        return {"y": y, "quantised": values.float() * token_scale[..., None]}

    return _compare(run, y=ROUNDED, quantised=ROUNDED)


def _gate_residual(case: Case) -> list[Part]:
    (x, y), (gate, scale, shift) = case.stream(2), case.modulation(3)

    def run(impl: str) -> dict[str, Tensor]:
        out, h = tk.gate_residual_norm(x, y, gate, scale, shift, impl=impl)
        _, values, token_scale = tk.gate_residual_norm_quantize(x, y, gate, scale, shift, impl=impl)
        plain = tk.gate_residual(x, y, gate, impl=impl)
        return {"plain": plain, "out": out, "h": h, "quantised": values.float() * token_scale[..., None]}

    return _compare(run, plain=ROUNDED, out=ROUNDED, h=ROUNDED, quantised=QUANTISED)


def _rms_norm_silu(case: Case) -> list[Part]:
    x, residual = case.stream(2)
    weight = torch.rand(case.features, device=case.device)

    def run(impl: str) -> dict[str, Tensor]:
        total = x.clone()
        return {"h": tk.rms_norm_silu(total, weight, residual, impl=impl), "total": total}

    return _compare(run, h=ROUNDED, total=ROUNDED)


def _conv3d(case: Case) -> list[Part]:
    x = torch.randn(1, 5, 9, 70, 96, device=case.device).to(case.dtype)
    weight = (torch.randn(3, 3, 3, 96, 96, device=case.device) / 50).to(case.dtype)
    bias = torch.randn(96, device=case.device).to(case.dtype)
    return _compare(lambda impl: {"y": tk.conv3d(x, weight, bias, impl=impl)}, y=ROUNDED)


def _quantize(case: Case) -> list[Part]:
    (x,) = case.stream(1)

    def run(impl: str) -> dict[str, Tensor]:
        values, scale = tk.quantize_token(x, impl=impl)
        tiles, tile_scale = tk.quantize_block(x, impl=impl)
        return {"token": values.float() * scale[..., None], "block": tiles.float(), "block_scale": tile_scale}

    return _compare(run, token=1e-4, block=1e-4, block_scale=1e-6)


def _w8a8_linear(case: Case, scheme: str) -> list[Part]:
    (x,) = case.stream(1)
    weight = torch.randn(2 * case.features, case.features, device=case.device) / case.features**0.5
    w_q, w_scale = quantize_weight(weight, scheme)
    bias = torch.randn(2 * case.features, device=case.device)

    def run(impl: str) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": tk.w8a8_linear(x, w_q, w_scale, bias, scheme, impl=impl)}

    return _compare(run, y=PRODUCTS)


CHECKS: dict[str, Callable[[Case], list[Part]]] = {
    "select_blocks": _select_blocks,
    "sparse_attention": _sparse_attention,
    "sparse_attention_jvp": _sparse_attention_jvp,
    "attention_jvp": _attention_jvp,
    "linear_attention": _linear_attention,
    "linear_attention_jvp": _linear_attention_jvp,
    "add_linear_attention": _add_linear_attention,
    "sage_attention": _sage_attention,
    "sage_sparse_attention": _sage_sparse_attention,
    "sage_sla": _sage_sla,
    "rms_norm_rope": _rms_norm_rope,
    "layer_norm_modulate": _layer_norm_modulate,
    "gate_residual": _gate_residual,
    "rms_norm_silu": _rms_norm_silu,
    "conv3d": _conv3d,
    "quantize": _quantize,
    "w8a8_linear": functools.partial(_w8a8_linear, scheme="int8_channel"),
    "w8a8_linear int8_block128": functools.partial(_w8a8_linear, scheme="int8_block128"),
    "w8a8_linear fp8_channel": functools.partial(_w8a8_linear, scheme="fp8_channel"),
}


def ops_for(device: torch.device) -> list[str]:
    """The checks that this device can run: fp8 needs compute capability 8.9, convolutions have a kernel on 9.0 only."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    has_conv3d = has_kernel(torch.empty(0, dtype=torch.bfloat16, device=device))
    return [op for op in CHECKS if (has_fp8 or "fp8" not in op) and (has_conv3d or op != "conv3d")]


def run_check(op: str, case: Case) -> Result:
    """Run one check. An exception makes the row red; the others still run."""
    torch.manual_seed(0)
    start, result = time.perf_counter(), Result(op)
    try:
        with tuning.without_search():  # these operands are too small to decide for others
            result.parts = CHECKS[op](case)
    except Exception as error:
        result.message = f"{type(error).__name__}: {error}".splitlines()[0]
    result.seconds = time.perf_counter() - start
    return result


def worst(result: Result) -> str:
    """The part that is worst against its limit, of a check that ran."""
    # A NaN is worse than any number.
    part = max(result.parts, key=lambda part: (part.error != part.error, part.error / part.limit))
    return f"{part.name} {part.error:.1e}, limit {part.limit:.0e}"


def describe(result: Result) -> str:
    """A row of the table."""
    found = result.message or worst(result)
    return f"{'ok ' if result.is_ok else 'RED'}  {result.op:26} {result.seconds:6.1f} s  {found}"


def main(arguments: Sequence[str] | None = None, case: Case | None = None) -> int:
    """Check, print, and return the exit status. case: other sizes or another device than the current GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m turbokernels.check", description="Check every kernel against its reference."
    )
    parser.add_argument("--ops", nargs="+", choices=list(CHECKS), metavar="OP", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, for tools under which kernels crawl")
    options = parser.parse_args(arguments)
    if case is None:
        if not torch.cuda.is_available():
            print("torch sees no CUDA device: there are no kernels to check here; every op runs its reference")
            return 0
        device = torch.device("cuda", torch.cuda.current_device())
        case = small_case(device) if options.small else Case(device)
    name = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else f"{case.device}, interpreted"
    print(f"{name}, torch {torch.__version__}: kernel against reference, worst result of each op")
    results = []
    for op in options.ops or ops_for(case.device):
        results.append(run_check(op, case))
        print(describe(results[-1]), flush=True)
    red = [result.op for result in results if not result.is_ok]
    print(f"{len(red)} of {len(results)} red: {', '.join(red)}" if red else f"all {len(results)} ok")
    return 1 if red else 0


if __name__ == "__main__":
    if interpreted():
        sys.exit("turbokernels.check: unset TRITON_INTERPRET, which replaces the kernels that this is to check")
    sys.exit(main())

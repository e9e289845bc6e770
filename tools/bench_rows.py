"""What `tools/bench.py` times: each op at the shapes of Wan, its work, its target, and what it stands beside.

Operands are bf16, standard normal, in the layouts that the model has. Work counts what the result needs, not what a
kernel happens to do: 4 D per query-key pair of attention, each operand once for what is limited by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import turbokernels as tk
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbokernels.timing import Call
from turbokernels.w8a8.api import quantize_weight

TOPK = 0.1
BANDWIDTH_TARGET = 2.5e12  # bytes per second, of everything that is limited by memory


@dataclass(frozen=True)
class Shape:
    """A model at one video size: tokens, heads, head dim, hidden features of the feed-forward part."""

    name: str
    length: int
    heads: int
    dim: int
    hidden: int

    @property
    def features(self) -> int:
        return self.heads * self.dim


SHAPES = {
    "s1": Shape("s1", 32760, 12, 128, 8960),  # Wan2.1 1.3B, 480p, 81 frames
    "s2": Shape("s2", 75600, 40, 128, 13824),  # Wan2.1 14B, 720p, 81 frames
}
# Milliseconds on one H200, from the project's targets; what is limited by memory has BANDWIDTH_TARGET instead.
TARGETS = {
    "s1": {
        "SLA forward 128x64": 1.6,
        "SLA forward 64x64": 1.8,
        "SLA forward + backward": 7.5,
        "SageSLA forward": 1.25,
        "sparse backward": 4.0,
        "sparse JVP": 5.5,
        "dense JVP": 37.0,
        "linear forward": 0.25,
        "linear backward": 0.8,
        "W8A8 int8 in -> hidden": 0.95,
    },
    "s2": {
        "SLA forward 128x64": 24.0,
        "SLA forward 64x64": 27.0,
        "SLA forward + backward": 110.0,
        "SageSLA forward": 18.0,
        "sparse backward": 66.0,
        "W8A8 int8 in -> hidden": 9.5,
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    make: builds operands and returns the call to time; called once per set of rotating operands. checks: the entries of
    `turbokernels.check` that must be green before a speed is shown. reference: the same by the reference, where that is
    feasible. beside: the row that the time is compared with. graphed: whether a CUDA graph may hold the call.
    """

    name: str
    op: str
    make: Callable[[], Call]
    checks: tuple[str, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    target_ms: float | None = None
    reference: Callable[[], Call] | None = None
    beside: str | None = None
    graphed: bool = True


class Rows:
    """Builds the rows of one shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.pairs = shape.length**2 * shape.heads
        self.targets = TARGETS.get(shape.name, {})

    def all(self) -> list[Row]:
        """Every row, what others stand beside first."""
        return [*self._peers(), *self._sla(), *self._attention_parts(), *self._linears(), *self._element_wise()]

    def operands(self, count: int, grad: bool = False) -> tuple[Tensor, ...]:
        """`count` tensors (1, L, N, D)."""
        shape = (1, self.shape.length, self.shape.heads, self.shape.dim)
        return tuple(self._normal(*shape).requires_grad_(grad) for _ in range(count))

    def _normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype)

    def _projection(self, grad: bool = False) -> tuple[Tensor, Tensor]:
        dim = self.shape.dim
        weight, bias = self._normal(dim, dim, dtype=torch.float32) / dim, self._normal(dim, dtype=torch.float32)
        return weight.requires_grad_(grad), bias.requires_grad_(grad)

    def _sparse_pairs(self, block_k: int = 64) -> float:
        n_blocks = -(-self.shape.length // block_k)
        return self.pairs * max(1, int(TOPK * n_blocks)) / n_blocks

    def _row(self, name: str, op: str, make: Callable[[], Call], *checks: str, **more: object) -> Row:
        return Row(name, op, make, checks, target_ms=self.targets.get(name), **more)  # type: ignore[arg-type]

    # What the kernels stand beside ------------------------------------------------------------------------------------

    def _peers(self) -> list[Row]:
        rows = []
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            for backward in (False, True):
                label = f"SDPA {name}" + (" forward + backward" if backward else "")
                make = functools.partial(self._sdpa, backend, backward)
                flops = 4 * self.shape.dim * self.pairs * (3.5 if backward else 1.0)
                rows.append(self._row(label, "sdpa", make, flops=flops, graphed=not backward))
        for name, n_in, n_out in self._linear_sizes():
            flops = 2 * self.shape.length * n_in * n_out
            rows.append(
                self._row(f"Linear bf16 {name}", "linear", functools.partial(self._linear, n_in, n_out), flops=flops)
            )
        return rows

    def _sdpa(self, backend: SDPBackend, backward: bool) -> Call:
        leaves = self.operands(3, grad=backward)
        (do,) = self.operands(1)

        def call() -> object:
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
            return torch.autograd.grad(o, leaves, do) if backward else o

        return call

    def _linear_sizes(self) -> list[tuple[str, int, int]]:
        features, hidden = self.shape.features, self.shape.hidden
        return [
            ("in -> in", features, features),
            ("in -> hidden", features, hidden),
            ("hidden -> in", hidden, features),
        ]

    def _linear(self, n_in: int, n_out: int) -> Call:
        x, weight, bias = self._normal(self.shape.length, n_in), self._normal(n_out, n_in), self._normal(n_out)
        return lambda: F.linear(x, weight, bias)

    # SLA as the model calls it ----------------------------------------------------------------------------------------

    def _sla(self) -> list[Row]:
        flops = 4 * self.shape.dim * self._sparse_pairs()
        checks = ("select_blocks", "sparse_attention", "add_linear_attention")
        module, beside = functools.partial(self._module, tk.sparse_attention), "SDPA cuDNN"
        both = functools.partial(module, 128, 64, grad=True)
        return [
            self._row(
                "SLA forward 128x64", "sla", functools.partial(module, 128, 64), *checks, flops=flops, beside=beside
            ),
            self._row(
                "SLA forward 64x64", "sla", functools.partial(module, 64, 64), *checks, flops=flops, beside=beside
            ),
            self._row("SageSLA forward", "sla", self._sage_sla, "sage_sla", flops=flops, beside=beside),
            self._row(
                *("SLA forward + backward", "sla", both, *checks),
                **{"flops": 3.5 * flops, "beside": beside + " forward + backward", "graphed": False},
            ),
        ]

    def _module(self, attend: Callable[..., Tensor], block_q: int, block_k: int, grad: bool = False) -> Call:
        leaves, (do,) = (*self.operands(3, grad), *self._projection(grad)), self.operands(1)

        def call() -> object:
            q, k, v, weight, bias = leaves
            with torch.no_grad():
                mask = tk.select_blocks(q, k, TOPK, block_q, block_k)
            o = tk.add_linear_attention(attend(q, k, v, mask), q, k, v, weight, bias)
            return torch.autograd.grad(o, leaves, do) if grad else o

        return call

    def _sage_sla(self) -> Call:
        (q, k, v), (weight, bias) = self.operands(3), self._projection()
        return lambda: tk.sage_sla(q, k, v, weight, bias, TOPK, 128, 64)

    # Its parts, and tangents ------------------------------------------------------------------------------------------

    def _attention_parts(self) -> list[Row]:
        dim, tokens = self.shape.dim, self.shape.length * self.shape.features
        sparse, linear = 4 * dim * self._sparse_pairs(), 4 * dim * tokens
        dense = 4 * dim * self.pairs
        rows = [
            ("select blocks 128x64", "select_blocks", self._select, "select_blocks", {"bytes": 4 * tokens}),
            ("sparse forward 128x64", "sparse", self._sparse(128), "sparse_attention", {"flops": sparse}),
            ("sparse forward 64x64", "sparse", self._sparse(64), "sparse_attention", {"flops": sparse}),
            (
                "sparse backward",
                "sparse",
                self._sparse_backward,
                "sparse_attention",
                {"flops": 2.5 * sparse, "graphed": False},
            ),
            ("sparse JVP", "jvp", self._sparse_jvp, "sparse_attention_jvp", {"flops": 3 * sparse}),
            ("dense JVP", "jvp", self._dense_jvp, "attention_jvp", {"flops": 3 * dense}),
            ("sage sparse, P V auto", "sage", self._sage("auto"), "sage_sparse_attention", {"flops": sparse}),
            ("sage sparse, P V fp16", "sage", self._sage("fp16"), "sage_sparse_attention", {"flops": sparse}),
            ("sage dense", "sage", self._sage_dense, "sage_attention", {"flops": dense, "beside": "SDPA cuDNN"}),
            (
                "linear forward",
                "linear_attention",
                self._linear_attention("auto"),
                "linear_attention",
                {"flops": linear},
            ),
            (
                *("linear backward", "linear_attention", self._linear_backward, "linear_attention"),
                {"flops": 2 * linear, "graphed": False},
            ),
            ("add linear", "linear_attention", self._add_linear, "add_linear_attention", {"flops": linear}),
        ]
        references = {"linear forward": self._linear_attention("reference")}
        return [
            self._row(name, op, make, check, reference=references.get(name), **more)
            for name, op, make, check, more in rows
        ]

    def _select(self) -> Call:
        q, k = self.operands(2)
        return lambda: tk.select_blocks(q, k, TOPK, 128, 64)

    def _sparse(self, block_q: int) -> Callable[[], Call]:
        def make() -> Call:
            q, k, v = self.operands(3)
            mask = tk.select_blocks(q, k, TOPK, block_q, 64)
            return lambda: tk.sparse_attention(q, k, v, mask)

        return make

    def _sparse_backward(self) -> Call:
        leaves, (do,) = self.operands(3, grad=True), self.operands(1)
        mask = tk.select_blocks(leaves[0].detach(), leaves[1].detach(), TOPK, 128, 64)
        o = tk.sparse_attention(leaves[0], leaves[1], leaves[2], mask)
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    def _sparse_jvp(self) -> Call:
        q, k, v, tq, tk_, tv = self.operands(6)
        mask = tk.select_blocks(q, k, TOPK, 128, 64)
        return lambda: tk.sparse_attention_jvp(q, k, v, tq, tk_, tv, mask)

    def _dense_jvp(self) -> Call:
        q, k, v, tq, tk_, tv = self.operands(6)
        return lambda: tk.attention_jvp(q, k, v, tq, tk_, tv)

    def _sage(self, pv: str) -> Callable[[], Call]:
        def make() -> Call:
            q, k, v = self.operands(3)
            mask = tk.select_blocks(q, k, TOPK, 128, 64)
            return lambda: tk.sage_sparse_attention(q, k, v, mask, pv)

        return make

    def _sage_dense(self) -> Call:
        q, k, v = self.operands(3)
        return lambda: tk.sage_attention(q, k, v)

    def _linear_attention(self, impl: str) -> Callable[[], Call]:
        def make() -> Call:
            q, k, v = self.operands(3)
            return lambda: tk.linear_attention(q, k, v, impl=impl)

        return make

    def _linear_backward(self) -> Call:
        leaves, (do,) = self.operands(3, grad=True), self.operands(1)
        o = tk.linear_attention(leaves[0], leaves[1], leaves[2])
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    def _add_linear(self) -> Call:
        (base, q, k, v), (weight, bias) = self.operands(4), self._projection()
        return lambda: tk.add_linear_attention(base, q, k, v, weight, bias)

    # 8-bit linears, and what is limited by memory ---------------------------------------------------------------------

    def _linears(self) -> list[Row]:
        rows = []
        for name, n_in, n_out in self._linear_sizes():
            for scheme in ("int8_channel", "fp8_channel"):
                label, check = f"W8A8 {scheme.split('_')[0]} {name}", "w8a8_linear"
                make = functools.partial(self._w8a8, n_in, n_out, scheme)
                more = {"flops": 2 * self.shape.length * n_in * n_out, "beside": f"Linear bf16 {name}"}
                rows.append(self._row(label, "w8a8", make, check if scheme[0] == "i" else f"{check} {scheme}", **more))
        return rows

    def _w8a8(self, n_in: int, n_out: int, scheme: str) -> Call:
        x, bias = self._normal(1, self.shape.length, n_in), self._normal(n_out)
        w_q, w_scale = quantize_weight(self._normal(n_out, n_in), scheme)
        return lambda: tk.w8a8_linear(x, w_q, w_scale, bias, scheme)

    def _element_wise(self) -> list[Row]:
        """Names, the call on (x, y, gate, scale, shift), its check, and bytes per element that must move."""
        calls: list[tuple[str, Callable[..., object], str, int]] = [
            ("RMSNorm + RoPE", self._rms_rope, "rms_norm_rope", 4),
            (
                "norm + modulate",
                lambda x, y, g, a, b, i: tk.layer_norm_modulate(x, a, b, impl=i),
                "layer_norm_modulate",
                4,
            ),
            (
                "norm + modulate + int8",
                lambda x, y, g, a, b, i: tk.layer_norm_modulate_quantize(x, a, b, impl=i),
                "layer_norm_modulate",
                3,
            ),
            ("gate + residual", lambda x, y, g, a, b, i: tk.gate_residual(x, y, g, impl=i), "gate_residual", 6),
            (
                "gate + residual + norm",
                lambda x, y, g, a, b, i: tk.gate_residual_norm(x, y, g, a, b, impl=i),
                "gate_residual",
                8,
            ),
            (
                "gate + residual + norm + int8",
                lambda x, y, g, a, b, i: tk.gate_residual_norm_quantize(x, y, g, a, b, impl=i),
                "gate_residual",
                7,
            ),
            ("quantize per token", lambda x, y, g, a, b, i: tk.quantize_token(x, impl=i), "quantize", 3),
        ]
        rows = []
        for name, call, check, bytes_per_element in calls:
            moved = float(bytes_per_element * self.shape.length * self.shape.features)
            make, reference = (functools.partial(self._streams, call, impl) for impl in ("auto", "reference"))
            target = moved / BANDWIDTH_TARGET * 1e3
            rows.append(Row(name, "element_wise", make, (check,), bytes=moved, target_ms=target, reference=reference))
        return rows

    def _streams(self, call: Callable[..., object], impl: str) -> Call:
        shape = self.shape
        x, y = (self._normal(1, shape.length, shape.features) for _ in range(2))
        modulation = [self._normal(1, 1, shape.features, dtype=torch.float32) for _ in range(3)]
        return lambda: call(x, y, *modulation, impl)

    def _rms_rope(self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, impl: str) -> Tensor:
        shape, angles = self.shape, self._angles()
        return tk.rms_norm_rope(x.view(1, -1, shape.heads, shape.dim), scale[0, 0], *angles, impl=impl)

    @functools.cache  # noqa: B019 (one object per shape and process)
    def _angles(self) -> tuple[Tensor, Tensor]:
        angle = self._normal(self.shape.length, self.shape.dim // 2, dtype=torch.float32)
        return angle.cos(), angle.sin()

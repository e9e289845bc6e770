"""One step of a network with random weights: how fast a variant runs on this machine, before any checkpoint is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from turbotrain.evaluation.benchmark import environment
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import Variant, WanConfig
from turbotrain.model.wan import WanTransformer

CLIP_TOKENS = 257
# Query and key blocks that SLA's kernels run fastest with.
BLOCKS = (128, 64)


@torch.no_grad()
def benchmark_forward(
    variant: Variant,
    latent_shape: tuple[int, int, int, int],
    *,
    attention_kind: str = "dense",
    scheme: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Times one call of the network, dense and as asked, each as it is and (on CUDA) from a CUDA graph and with compiled
    blocks.

    Args:
        latent_shape: (C, T, H, W), as `Variant.latent_shape` gives it.
        attention_kind: `dense`, `sla` or `sage_sla`; scheme: of 8-bit linears in every block, or None.
        dtype: of the weights; None: bfloat16 on CUDA, float32 elsewhere.

    Returns:
        {"rows": {name: {"median_s", "min_s", "max_s", "speedup": {other row: ratio of medians}}}, "settings", "environment"}.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(seed)
    with torch.device(device):
        model = WanTransformer(variant.config).set_weight_dtype(dtype).eval()
        given = random_inputs(variant.config, latent_shape, batch_size)
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str) -> None:
        rows[name] = timed(lambda: model(**given), device, repeats, warmup)
        if device.type == "cuda":
            rows[f"{name}, CUDA graph"] = timed(captured(lambda: model(**given)), device, repeats, warmup)
            with compiled_blocks(model):
                rows[f"{name}, compiled"] = timed(lambda: model(**given), device, repeats, warmup)

    measure("dense")
    if attention_kind != "dense" or scheme is not None:
        if attention_kind != "dense":
            small = variant.config.head_dim < 64
            block_q, block_k = (16, 16) if small else BLOCKS
            model.set_attention(AttentionConfig(attention_kind, block_q=block_q, block_k=block_k))
        if scheme is not None:
            quantize_blocks(model, scheme)
        torch._dynamo.reset()
        measure(" ".join(filter(None, (attention_kind, scheme))))
    for row in rows.values():
        row["speedup"] = {
            other: rows[other]["median_s"] / row["median_s"] for other in rows if other.startswith("dense")
        }
    settings = {
        "variant": variant.name,
        "latent_shape": list(latent_shape),
        "attention_kind": attention_kind,
        "scheme": scheme,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "repeats": repeats,
        "warmup": warmup,
    }
    return {"rows": rows, "settings": settings, "environment": environment(device)}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A replay of the call from a CUDA graph: what the GPU takes when no Python stands between its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # whatever runs only once must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def compiled_blocks(model: WanTransformer) -> Iterator[None]:
    """The network with compiled blocks: they share one graph, so compiling takes a block's time and not the network's."""
    blocks = model.blocks
    model.blocks = nn.ModuleList(cast(nn.Module, torch.compile(block)) for block in blocks)
    try:
        yield
    finally:
        model.blocks = blocks


def random_inputs(config: WanConfig, latent_shape: tuple[int, int, int, int], batch_size: int) -> dict[str, Tensor]:
    """Keyword arguments of a call, on the current default device."""
    sizes = latent_shape[1:]
    given = {
        "x_BCTHW": torch.randn(batch_size, config.out_channels, *sizes),
        "timestep": torch.full((batch_size,), 500.0),
        "context_BLD": torch.randn(batch_size, config.text_len, config.text_dim),
    }
    if config.condition_channels:
        given["y_BCTHW"] = torch.randn(batch_size, config.condition_channels, *sizes)
    if config.image_dim is not None:
        given["clip_BLD"] = torch.randn(batch_size, CLIP_TOKENS, config.image_dim)
    return given


def quantize_blocks(model: WanTransformer, scheme: str) -> None:
    """Every linear of the blocks but P in 8 bits, in place, without calibration: enough for a clock."""
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not name.endswith("proj_l"):
                block.set_submodule(name, QuantLinear.from_linear(layer, scheme))


def timed(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> dict[str, Any]:
    """{"median_s", "min_s", "max_s"} of a call; it runs once more than `warmup` says, which compiles and tunes."""
    seconds: list[float] = []
    for _ in range(1 + warmup + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    kept = seconds[-repeats:]
    return {"median_s": statistics.median(kept), "min_s": min(kept), "max_s": max(kept)}


def print_forward(result: dict[str, Any], console: Console | None = None) -> None:
    """The result of `benchmark_forward` as a table."""
    settings = result["settings"]
    shape = "x".join(map(str, settings["latent_shape"]))
    table = Table(title=f"one step of {settings['variant']}, latent {shape}, {settings['dtype']}, random weights")
    bases = [name for name in result["rows"] if name.startswith("dense")]
    table.add_column("network")
    compared = [f"{base} / this" for base in bases] + [f"100 {base} / 4 this" for base in bases]
    for name in ("median", "min", *compared):
        table.add_column(name, justify="right")
    for name, row in result["rows"].items():
        times = (f"{row[key] * 1e3:.1f} ms" for key in ("median_s", "min_s"))
        # A guided teacher of 50 steps calls the network a hundred times, a Turbo model of 4 steps four times.
        ratios = (
            f"{row['speedup'][base] * factor:.{digits}f}" for factor, digits in ((1, 2), (25, 0)) for base in bases
        )
        table.add_row(name, *times, *ratios)
    (console or Console()).print(table)

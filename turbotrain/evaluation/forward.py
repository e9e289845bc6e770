"""One step of a network with random weights: how fast a variant runs on this machine, before any checkpoint is there.

Beside it the dense teacher, twice: this project's own network, and diffusers' class as most people run it.
"""

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
from turbotrain.evaluation.random_weights import BLOCKS, random_diffusers_network, random_inputs, random_network
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.graphs import GraphCache
from turbotrain.model.variants import Variant, WanConfig
from turbotrain.model.wan import WanTransformer

DENSE, COMPILED, FIELD = "dense", "dense, compiled", "diffusers, eager"
TEACHERS = {
    DENSE: "this project's network, dense, every kernel launched by the CPU",
    COMPILED: "the same with compiled blocks",
    FIELD: "diffusers' WanTransformer3DModel, dense, as it comes: what published speed-ups are against",
}
# A guided teacher of 50 steps calls the network a hundred times.
TEACHER_CALLS = 100
# A row is timed no longer than this once it has a result: a dense step of 14B at 720p takes 12 s.
PATIENCE_S = 20.0


@torch.no_grad()
def benchmark_forward(
    variant: Variant,
    latent_shape: tuple[int, int, int, int],
    *,
    attention_kind: str = "dense",
    scheme: str | None = None,
    network: WanTransformer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Times one call of the network as asked and of the dense teachers (`TEACHERS`), all in one run.

    Args:
        latent_shape: (C, T, H, W), as `Variant.latent_shape` gives it.
        attention_kind: `dense`, `sla` or `sage_sla`; scheme: of 8-bit linears in every block, or None.
        network: one of that attention and scheme that is there already; None makes one.
        dtype: of the weights; None: bfloat16 on CUDA, float32 elsewhere.

    Returns:
        {"rows": {name: {"median_s", "min_s", "max_s", "repeats", "speedup": {teacher: ratio of medians}}}, "teachers": {name:
        what it is}, "settings", "environment"}. A network that pipelines record has a second row, ", CUDA graph".
    """
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    torch.manual_seed(seed)
    config = variant.config
    with torch.device(device):
        given = random_inputs(config, latent_shape, batch_size)
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        rows[name] = timed(call, device, repeats, warmup)

    dense = random_network(config, AttentionConfig(), None, device, dtype)
    call = network_call(dense, given)
    measure(DENSE, call)
    if device.type == "cuda":
        with compiled_blocks(dense):
            measure(COMPILED, call)
    del dense, call  # the next network takes its memory
    measure(FIELD, diffusers_call(config, given, device, dtype))
    if attention_kind != "dense" or scheme is not None:
        attention = attention_of(variant, attention_kind)
        network = network or random_network(config, attention, scheme, device, dtype)
        name = " ".join(filter(None, (attention_kind, scheme)))
        measure(name, network_call(network, given))
        if device.type == "cuda":
            graphs = GraphCache()
            call = network_call(graphs.network(network), given)
            for _ in range(2):  # the second is recorded, if that pays
                call()
            if len(graphs):
                measure(f"{name}, CUDA graph", call)
    for row in rows.values():
        row["speedup"] = {name: rows[name]["median_s"] / row["median_s"] for name in TEACHERS if name in rows}
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
    teachers = {name: TEACHERS[name] for name in TEACHERS if name in rows}
    return {"rows": rows, "teachers": teachers, "settings": settings, "environment": environment(device)}


def default_dtype(device: torch.device) -> torch.dtype:
    """In which networks are timed."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def attention_of(variant: Variant, kind: str) -> AttentionConfig:
    """The attention that is timed: small heads have small blocks."""
    block_q, block_k = (16, 16) if variant.config.head_dim < 64 else BLOCKS
    return AttentionConfig(kind, block_q=block_q, block_k=block_k)


def network_call(network: nn.Module, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A step as a sampler takes it: text (and CLIP tokens) are encoded once, before, by networks that can."""
    rest = dict(given)
    x_BCTHW, timestep, context = (rest.pop(name) for name in ("x_BCTHW", "timestep", "context_BLD"))
    encode = getattr(network, "encode_context", None)
    if encode is not None:
        context = encode(context, rest.pop("clip_BLD", None))
    return lambda: network(x_BCTHW, timestep, context, **rest)


def diffusers_call(
    config: WanConfig, given: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A step of diffusers' network with the same inputs, as its pipelines take it."""
    network: Any = random_diffusers_network(config, device, dtype)
    latents = [given[name] for name in ("x_BCTHW", "y_BCTHW") if name in given]
    x_BCTHW, context_BLD = torch.cat(latents, dim=1).to(dtype), given["context_BLD"].to(dtype)
    clip_BLD = given["clip_BLD"].to(dtype) if "clip_BLD" in given else None
    return lambda: network(x_BCTHW, given["timestep"], context_BLD, clip_BLD, return_dict=False)[0]


@contextmanager
def compiled_blocks(model: WanTransformer) -> Iterator[None]:
    """The network with compiled blocks: they share one graph, so compiling takes a block's time and not the network's."""
    blocks = model.blocks
    torch._dynamo.reset()
    model.blocks = nn.ModuleList(cast(nn.Module, torch.compile(block)) for block in blocks)
    try:
        yield
    finally:
        model.blocks = blocks


def timed(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> dict[str, Any]:
    """{"median_s", "min_s", "max_s", "repeats"} of a call, after `warmup` and one that compiles and tunes; fewer repeats than
    asked where they take longer than PATIENCE_S."""
    kept: list[float] = []
    began = 0.0
    for turn in range(1 + warmup + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        if turn > warmup:
            kept.append(end - start)
            began = began or start
            if end - began > PATIENCE_S:
                break
    return {"median_s": statistics.median(kept), "min_s": min(kept), "max_s": max(kept), "repeats": len(kept)}


def print_forward(result: dict[str, Any], console: Console | None = None) -> None:
    """The result of `benchmark_forward` as a table."""
    settings = result["settings"]
    shape = "x".join(map(str, settings["latent_shape"]))
    table = Table(title=f"one step of {settings['variant']}, latent {shape}, {settings['dtype']}, random weights")
    table.add_column("network")
    for name in ("median", "min", *(f"{TEACHER_CALLS} {teacher} / 4 this" for teacher in result["teachers"])):
        table.add_column(name, justify="right")
    for name, row in result["rows"].items():
        times = (f"{row[key] * 1e3:.1f} ms" for key in ("median_s", "min_s"))
        ratios = (f"{row['speedup'][teacher] * TEACHER_CALLS / 4:.0f}" for teacher in result["teachers"])
        table.add_row(name, *times, *ratios)
    console = console or Console()
    console.print(table)
    for name, meaning in result["teachers"].items():
        console.print(f"{name}: {meaning}")

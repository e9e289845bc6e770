"""How long a run takes: rates measured on an H200, scaled by datasheets for other GPUs.

The rates are those of docs/measurements (h200_kernels_s1.json, h200_kernels_s2.json), at the widths of Wan 1.3B and 14B; between
them they are interpolated. Everything for another GPU than the measured one is computed, not measured. No torch here.

Legend of the arithmetic: D width, F hidden width, L video tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotrain.model.variants import WanConfig
from turbotrain.placement import footprint
from turbotrain.placement.budget import Job, Setting, is_recorded, places, swapped_blocks
from turbotrain.placement.gpus import MEASURED, Gpu
from turbotrain.placement.tiles import tiled_pixels

WIDTHS = (1536, 5120)
# Operations/s of the linears of a block, weighted as a block has them, quantisation included.
LINEAR_RATES = {
    None: (726e12, 716e12),
    "int8_channel": (1058e12, 1384e12),
    "fp8_channel": (891e12, 1189e12),
    "int8_block128": (705e12, 923e12),  # two thirds of int8_channel: what its scales inside the sum cost a plain kernel
}
ATTENTION_RATES = {"dense": (574e12, 573e12), "sla": (506e12, 532e12), "sage_sla": (615e12, 729e12)}
SLA_BANDWIDTH = 1.9e12  # of choosing blocks and adding the linear branch: q, k twice, v and two results
SLA_BYTES = 14
ELEMENTWISE_BANDWIDTH = 3.7e12
HOST_SECONDS_A_BLOCK = 6.7e-3  # that Python needs to launch a block's kernels: a floor for small videos
VAE_RATE, VAE_PLAIN_RATE = 540e12, 300e12  # of turbokernels' convolutions and of PyTorch's, with everything around them
TEXT_SECONDS = 0.048  # one prompt
PAGEABLE = 6e9  # bytes/s from host memory that is not page-locked


@dataclass(frozen=True)
class Durations:
    """Seconds of one batch of videos. step: a call of the network once everything is where it belongs; copies: what waiting for
    weights adds to all of them."""

    text: float
    step: float
    copies: float
    dit: float
    vae: float

    @property
    def total(self) -> float:
        return self.text + self.dit + self.vae


def durations(job: Job, setting: Setting, gpu: Gpu = MEASURED) -> Durations:
    """Without loading from disk and without writing the mp4."""
    step = forward_seconds(job, gpu, recorded=is_recorded(job, setting))
    block = footprint.block_bytes(job.variant.config, job.attention, job.scheme)
    every, first = swapped_blocks(job, setting) * block / gpu.link, 0.0
    if setting.offload != "none":  # the networks come anew for every batch, hidden behind their first steps
        first = places(job, setting) * block / gpu.link
    waits = job.calls * max(0.0, every - step) + len(job.variant.experts) * max(0.0, first - step)
    return Durations(
        _text_seconds(job, setting, gpu), step, waits, job.calls * step + waits, _vae_seconds(job, setting, gpu)
    )


def forward_seconds(job: Job, gpu: Gpu = MEASURED, *, recorded: bool = False) -> float:
    """One call of the network; `recorded`: from a CUDA graph."""
    config = job.variant.config
    kind = "bf16" if job.scheme is None else "fp8" if job.scheme == "fp8_channel" else "int8"
    tokens = job.batch * job.tokens
    linear = (
        2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim) / _rate(LINEAR_RATES[job.scheme], config)
    )
    elementwise = tokens * (35 * config.dim + (4 * config.ffn_dim if job.scheme is None else 0)) / ELEMENTWISE_BANDWIDTH
    block = linear * gpu.scaled_from(MEASURED, kind) + _attention_seconds(job, gpu)
    block += elementwise * gpu.scaled_from(MEASURED, "bandwidth")
    return config.num_layers * (block if recorded else max(block, HOST_SECONDS_A_BLOCK))


def _attention_seconds(job: Job, gpu: Gpu) -> float:
    """Self-attention and cross-attention of one block."""
    config, attention = job.variant.config, job.attention
    pairs = 4 * job.batch * job.tokens * config.dim
    fraction = attention.topk if attention.is_sparse else 1.0
    kind = "int8" if attention.kind == "sage_sla" else "bf16"
    self_attention = pairs * job.tokens * fraction / _rate(ATTENTION_RATES[attention.kind], config)
    cross = pairs * config.text_len / _rate(ATTENTION_RATES["dense"], config)
    around = SLA_BYTES * job.batch * job.tokens * config.dim / SLA_BANDWIDTH if attention.is_sparse else 0.0
    return (
        self_attention * gpu.scaled_from(MEASURED, kind)
        + cross * gpu.scaled_from(MEASURED, "bf16")
        + around * gpu.scaled_from(MEASURED, "bandwidth")
    )


def _rate(pair: tuple[float, float], config: WanConfig) -> float:
    """Between the two widths on a line, beyond them constant."""
    narrow, wide = WIDTHS
    share = min(1.0, max(0.0, (config.dim - narrow) / (wide - narrow)))
    return pair[0] + share * (pair[1] - pair[0])


def _text_seconds(job: Job, setting: Setting, gpu: Gpu) -> float:
    text = footprint.UMT5_XXL
    if job.variant.vae == "shapes":
        return 0.0
    if setting.text == "cpu":
        return job.prompts * text.flops / 0.5e12  # a desktop CPU in bf16
    compute = job.prompts * TEXT_SECONDS * gpu.scaled_from(MEASURED, "bf16")
    return max(
        compute, text.layers * text.layer_weights(job.text_int8) / PAGEABLE
    )  # for the first prompts of a process


def _vae_seconds(job: Job, setting: Setting, gpu: Gpu) -> float:
    vae = footprint.VAES[job.variant.vae]
    pixels = job.height * job.width
    if setting.vae_tile is not None:
        _, pixels = tiled_pixels(job.height, job.width, setting.vae_tile)
    flops = vae.decode_flops * job.batch
    if job.image and job.variant.config.model_type == "i2v":
        flops += vae.encode_flops
    rate = VAE_RATE if job.conv_kernel else VAE_PLAIN_RATE
    small = 1 + 0.09 / setting.vae_chunk**2  # few frames keep a GPU less busy
    return flops * job.frames * pixels / rate * small * gpu.scaled_from(MEASURED, "bf16")

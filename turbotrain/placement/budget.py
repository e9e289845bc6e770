"""What is on the GPU in every phase of a run, under every way of placing the parts. No torch here: a plan comes first."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import Variant
from turbotrain.placement import footprint
from turbotrain.placement.tiles import tiled_pixels

RING = 2  # blocks that come and go share so many places on the device
TEXT_TOGETHER = 4  # prompts that a large text encoder takes at once
LIBRARIES = 96 * 2**20  # workspaces of cuBLAS and cuDNN, allocated through torch
LARGEST_GRAPH = 100_000_000  # tokens times width: that of `model.graphs`
CONTEXT = 830 * 10**6  # what CUDA and the loaded kernels take outside torch's count: 730 to 830 MB on an H200


@dataclass(frozen=True)
class Job:
    """What is to be computed.

    Attributes:
        frames, height, width: of the video, in pixels. batch: videos at once.
        scheme: of the 8-bit linears; None: 16-bit floats.
        steps: of the sampler. guided: each is two calls of the network.
        image: whether a first frame is given. text_int8: whether the text encoder's linears are in 8 bits.
        conv_kernel: whether the VAE convolves with turbokernels, which have that kernel for Hopper alone.
    """

    variant: Variant
    frames: int
    height: int
    width: int
    attention: AttentionConfig
    scheme: str | None = None
    steps: int = 4
    guided: bool = False
    batch: int = 1
    image: bool = False
    text_int8: bool = False
    conv_kernel: bool = True

    @functools.cached_property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W). Raises ValueError for sizes that the variant does not have."""
        return self.variant.latent_shape(self.frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        """Of one video."""
        return math.prod(self.latent_shape[1:]) // math.prod(self.variant.config.patch_size)

    @property
    def calls(self) -> int:
        """Of the network, for one batch."""
        return self.steps * (1 + self.guided)

    @property
    def prompts(self) -> int:
        """That are encoded together."""
        return min(TEXT_TOGETHER, self.batch + self.guided)


@dataclass(frozen=True)
class Setting:
    """How the parts are placed: what a plan chooses and the pipeline does.

    Attributes:
        offload: `none`: networks and VAE stay on the GPU. `model`: whatever computes is there, nothing else: text encoder, then a
            network (of two experts one after the other), then the VAE. `blocks`: the same, and of a network's blocks those that
            fit; the others come and go while their neighbours compute.
        kept_blocks: how many fit, for `blocks`.
        text: how the text encoder computes: `stay` on the GPU, `visit` it while prompts are encoded, `stream` through it layer by
            layer, or on the `cpu`.
        vae_chunk: latent frames that go through the VAE together.
        vae_tile: side, in pixels, of squares that it decodes one after the other; None: whole frames.
        ffn_rows: tokens of a video that pass a feed-forward together; None: all.
        graphs: whether small networks are recorded as CUDA graphs, which keep their activations' memory.
    """

    offload: str = "none"
    kept_blocks: int = 0
    text: str = "visit"
    vae_chunk: int = 2
    vae_tile: int | None = None
    ffn_rows: int | None = None
    graphs: bool = True


@dataclass(frozen=True)
class Phase:
    """Bytes on the GPU in one phase: weights, and everything else at its largest moment."""

    weights: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.work


def phases(job: Job, setting: Setting) -> dict[str, Phase]:
    """`text`, `image` (with a first frame), `dit`, `vae`, in the order of a run."""
    vae = footprint.VAES[job.variant.vae]
    always = vae.weights + (_text_weights(job) if setting.text == "stay" else 0)
    resident = always + (_networks(job) if setting.offload == "none" else 0)
    found = {"text": _text(job, setting, resident)}
    if job.image:
        found["image"] = _image(job, setting, resident)
    forward = _forward(job, setting)
    recorded = forward if is_recorded(job, setting) else 0
    found["dit"] = Phase(always + network_weights(job, setting), forward + _state(job, setting) + LIBRARIES)
    found["vae"] = Phase(resident, decode_bytes(job, setting) + recorded + LIBRARIES)
    return found


def peak(job: Job, setting: Setting) -> int:
    """Bytes that torch allocates at the run's largest moment; CONTEXT comes on top of it."""
    return max(phase.total for phase in phases(job, setting).values())


def network_weights(job: Job, setting: Setting) -> int:
    """Weights of the networks on the GPU while one computes."""
    if setting.offload == "none":
        return _networks(job)
    config = job.variant.config
    block = footprint.block_bytes(config, job.attention, job.scheme)
    return footprint.rest_bytes(config) + block * places(job, setting)


def is_recorded(job: Job, setting: Setting) -> bool:
    """Whether the network runs from a CUDA graph: one that stays, and that a CPU launches more slowly than a GPU computes."""
    stays = setting.offload == "none" and setting.ffn_rows is None
    return setting.graphs and stays and job.batch * job.tokens * job.variant.config.dim <= LARGEST_GRAPH


def places(job: Job, setting: Setting) -> int:
    """Blocks that the device has room for."""
    layers = job.variant.config.num_layers
    return layers if setting.offload != "blocks" else min(layers, setting.kept_blocks + RING)


def swapped_blocks(job: Job, setting: Setting) -> int:
    """Blocks that are copied to the GPU in every call of the network."""
    layers = job.variant.config.num_layers
    return 0 if places(job, setting) == layers else layers - setting.kept_blocks


def host_bytes(job: Job, setting: Setting) -> int:
    """Page-locked host memory."""
    return 0 if setting.offload == "none" else _networks(job)


def decode_bytes(job: Job, setting: Setting) -> int:
    """Activations of the VAE while it decodes; frames that are done are on the host."""
    size = footprint.VAES[job.variant.vae]
    pixels = job.height * job.width
    if setting.vae_tile is not None:
        pixels, _ = tiled_pixels(job.height, job.width, setting.vae_tile)
    return round(pixels * (size.decode_fixed + size.decode_chunk * _chunk(job, setting.vae_chunk)))


def _chunk(job: Job, frames: int) -> float:
    return frames if job.conv_kernel else frames * footprint.VaeSize.PLAIN


def _networks(job: Job) -> int:
    """Every network of the variant."""
    return len(job.variant.experts) * footprint.network_bytes(job.variant.config, job.attention, job.scheme)


def _text(job: Job, setting: Setting, resident: int) -> Phase:
    if setting.text == "cpu":
        return Phase(resident, 0)
    text = footprint.UMT5_XXL
    comes = {"stay": 0, "visit": _text_weights(job), "stream": RING * text.layer_weights(job.text_int8)}[setting.text]
    return Phase(resident + comes, text.work * job.prompts + LIBRARIES)


def _text_weights(job: Job) -> int:
    return 0 if job.variant.vae == "shapes" else footprint.UMT5_XXL.weights(job.text_int8)


def _image(job: Job, setting: Setting, resident: int) -> Phase:
    """The first frame's latent; Wan 2.1 I2V's CLIP comes after it, alone."""
    vae = footprint.VAES[job.variant.vae]
    clip = footprint.CLIP_BYTES if job.variant.config.image_dim is not None else 0
    chunk = 1 if job.variant.config.model_type == "ti2v" else setting.vae_chunk
    work = job.height * job.width * (vae.encode_fixed + vae.encode_chunk * _chunk(job, chunk))
    return Phase(resident, max(round(work) + LIBRARIES, clip))


def _forward(job: Job, setting: Setting) -> int:
    config = job.variant.config
    per_token = job.image and config.model_type == "ti2v"
    return footprint.forward_bytes(
        config,
        job.attention,
        job.scheme,
        job.tokens,
        batch=job.batch,
        timed_tokens=job.tokens if per_token else 1,
        ffn_rows=setting.ffn_rows,
    )


def _state(job: Job, setting: Setting) -> int:
    """What a sampler keeps: noise in float32, its state in float64, what the network reads and returns, its conditioning; and
    the text's keys and values in every layer, where the weights that make them are there before the first call."""
    config = job.variant.config
    cells = job.batch * math.prod(job.latent_shape[1:])
    latents = cells * (config.out_channels * (4 + 8 + 2 + 4) + config.condition_channels * (4 + 2))
    if setting.offload != "none":
        return latents
    texts = job.batch * (1 + job.guided) * len(job.variant.experts) * config.text_len
    return latents + texts * config.num_layers * 2 * footprint.HALF * config.dim

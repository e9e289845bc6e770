"""Bytes of weights, exact, and of activations at their largest moments, of everything that a run puts on a GPU.

Activations are what the code keeps alive; the tests trace the real networks to hold these formulas to them.

Legend of the arithmetic: D width, F hidden width of the feed-forward; weights and activations are 16-bit floats but for the
float32 islands of the network (`model.wan.FLOAT32_ISLANDS`) and 8-bit linears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig

HALF, ISLAND = 2, 4  # bytes of a 16-bit float, of a float of the islands
TILE = 128  # of `int8_block128`, in both directions


def linear_bytes(n_in: int, n_out: int, scheme: str | None = None, itemsize: int = HALF) -> int:
    """A linear layer with its bias; in 8 bits (`scheme`) with its scales."""
    if scheme is None:
        return itemsize * (n_in * n_out + n_out)
    scales = -(-n_in // TILE) * -(-n_out // TILE) if scheme == "int8_block128" else n_out
    return n_in * n_out + ISLAND * scales + itemsize * n_out


def block_bytes(config: WanConfig, attention: AttentionConfig, scheme: str | None = None) -> int:
    """One block of a network, without SmoothQuant vectors (at most a few widths)."""
    dim, ffn = config.dim, config.ffn_dim
    image = config.image_dim is not None
    squares = 8 + 2 * image  # q, k, v, o twice; k and v of the image
    vectors = 4 + image + 2 + 6  # norms of q and k, norm3, modulation
    linears = squares * linear_bytes(dim, dim, scheme) + linear_bytes(dim, ffn, scheme) + linear_bytes(ffn, dim, scheme)
    projection = linear_bytes(config.head_dim, config.head_dim, itemsize=ISLAND) if attention.is_sparse else 0
    return linears + ISLAND * vectors * dim + projection


def rest_bytes(config: WanConfig) -> int:
    """A network without its blocks: embeddings, time, head."""
    dim, patch = config.dim, math.prod(config.patch_size)
    embeddings = linear_bytes(config.in_channels * patch, dim)
    embeddings += linear_bytes(config.text_dim, dim) + linear_bytes(dim, dim)
    if config.image_dim is not None:
        embeddings += linear_bytes(config.image_dim, config.image_dim) + linear_bytes(config.image_dim, dim)
        embeddings += HALF * 2 * (config.image_dim + dim)
    islands = ((config.freq_dim, dim), (dim, dim), (dim, 6 * dim), (dim, config.out_channels * patch))
    return embeddings + sum(linear_bytes(*sizes, itemsize=ISLAND) for sizes in islands) + ISLAND * 2 * dim


def network_bytes(config: WanConfig, attention: AttentionConfig, scheme: str | None = None) -> int:
    """One network (expert)."""
    return rest_bytes(config) + config.num_layers * block_bytes(config, attention, scheme)


def forward_bytes(
    config: WanConfig,
    attention: AttentionConfig,
    scheme: str | None,
    tokens: int,
    *,
    batch: int = 1,
    timed_tokens: int = 1,
    ffn_rows: int | None = None,
) -> int:
    """What a call of the network keeps alive in a block at its largest moment, beside weights and latents.

    Args:
        tokens: of one video.
        timed_tokens: how many of them have a timestep of their own: all, or one for them together.
        ffn_rows: tokens of each video that pass a feed-forward together; None: all.
    """
    operand = HALF if scheme is None else 1  # what a linear reads
    stream_and_norm = (HALF + operand) * config.dim
    attended = tokens * (stream_and_norm + _attention_bytes(config, attention, scheme)) + _list_bytes(
        config, attention, tokens
    )
    # Of a block's input and the stream after attention, the caller holds the first; the feed-forward's result comes last.
    fed = tokens * (stream_and_norm + 2 * HALF * config.dim) + _hidden_bytes(config, scheme) * min(
        tokens, ffn_rows or tokens
    )
    modulation = timed_tokens * ISLAND * (1 + 6 + 6) * config.dim  # of the head, of every block, of this one
    rope = tokens * config.head_dim * ISLAND
    return batch * (max(attended, fed) + modulation) + rope


def _attention_bytes(config: WanConfig, attention: AttentionConfig, scheme: str | None) -> int:
    """Bytes a token: q, k, v, then what the operator makes of them, or its result between it and the next linear's."""
    operator = {"dense": HALF, "sla": 2 * HALF, "sage_sla": 3 + HALF}[
        attention.kind
    ]  # sage: q, k, v once more, in 8 bits
    projection = HALF + HALF + (scheme is not None)
    return (3 * HALF + max(operator, projection)) * config.dim


def _list_bytes(config: WanConfig, attention: AttentionConfig, tokens: int) -> int:
    """The lists of kept blocks, of the layer that keeps most."""
    if not attention.is_sparse:
        return 0
    n_q, n_k = -(-tokens // attention.block_q), -(-tokens // attention.block_k)
    topk = max(attention.layer_topk, default=attention.topk)
    return config.num_heads * n_q * max(1, math.floor(topk * n_k)) * 4


def _hidden_bytes(config: WanConfig, scheme: str | None) -> int:
    """Bytes a token between the linears of a feed-forward: the first one's result, and what the second one reads."""
    return (HALF + (HALF if scheme is None else 1)) * config.ffn_dim


@dataclass(frozen=True)
class TextSize:
    """A umT5 encoder in bfloat16, and one prompt of full length through it.

    table, layer: bytes of the embeddings and of one layer. work: bytes of activations. flops: multiplications and additions.
    """

    dim: int
    ffn: int
    layers: int
    table: int
    layer: int
    work: int
    flops: float

    def weights(self, int8: bool = False) -> int:
        return self.table + self.layers * self.layer_weights(int8)

    def layer_weights(self, int8: bool = False) -> int:
        """int8: linears in 8 bits with a scale a row."""
        if not int8:
            return self.layer
        matrices = 4 * self.dim**2 + 3 * self.dim * self.ffn
        return self.layer - matrices + ISLAND * (5 * self.dim + 2 * self.ffn)


UMT5_XXL = TextSize(4096, 10240, 24, 2_100_305_920, 385_896_448, 130 * 10**6, 4.74e12)


@dataclass(frozen=True)
class VaeSize:
    """A VAE in 16 bits.

    weights: bytes. decode_fixed, encode_fixed: bytes of activations for one pixel of the frame; decode_chunk, encode_chunk: for
    each latent frame that goes through together. decode_flops, encode_flops: of one pixel of one frame.
    """

    # What PyTorch's convolutions take in place of turbokernels', relative to decode_chunk and encode_chunk.
    PLAIN = 1.25

    weights: int
    decode_fixed: float
    decode_chunk: float
    encode_fixed: float
    encode_chunk: float
    decode_flops: float
    encode_flops: float


# Of the published VAEs: traced (tests/placement), not measured.
VAES = {
    "wan2.1": VaeSize(253_785_062, 5_482, 3_097, 3_446, 2_354, 8.6e6, 5.1e6),
    "wan2.2": VaeSize(1_409_377_336, 6_407, 3_633, 2_045, 1_330, 18.6e6, 3.5e6),
    "shapes": VaeSize(2_000_000, 4_000, 1_000, 4_000, 1_000, 1e6, 1e6),
}
CLIP_BYTES = 2_530_000_000  # ViT-H/14 in float32, there for one image

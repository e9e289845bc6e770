"""The Wan video diffusion transformer (arXiv 2503.20314): one implementation for every published variant.

Parameter names are those of the official checkpoints (formats.md 2). Time embedding and projection, modulation, norms,
rotary embedding and head compute in float32 whatever the weights' dtype, as published; the rest in the weights' dtype.

Shape suffixes: B batch, C channels, T H W latent frames, height, width, L video tokens, S context tokens, M 1 or L (one
time for the sample, or one per token), D model width, N heads, P rotary pairs.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint, noop_context_fn
from turbokernels import BlockMask

from turbotrain.model import functional as fn
from turbotrain.model.attention import SparseLinearAttention, build_attention
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.attention_layers import CrossAttention, SelfAttention
from turbotrain.model.compiled import element_wise_compiled
from turbotrain.model.elementwise import (
    Norm,
    feed_forward,
    norm,
    residual,
    residual_norm,
    split_heads,
)
from turbotrain.model.inputs import EncodedContext, Selection, Source, check_context, check_inputs
from turbotrain.model.rope import Grid, inverse_order, rope_table, token_order
from turbotrain.model.tangent import Dual, Linear, WideLinear, cast, lift, linear, unbind, wide, without_tangents
from turbotrain.model.token_share import TokenShare
from turbotrain.model.variants import WanConfig

# Parameters that stay float32 when the network is cast; P of SLA is one of them.
FLOAT32_ISLANDS = re.compile(
    r"(^|\.)(time_embedding|time_projection|modulation|norm3|norm_[qk](_img)?|head|proj_l)(\.|$)"
)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated and gated by the time.

    smooth_attn, smooth_ffn: optional SmoothQuant vectors (D,) that divide the inputs of q, k, v and of ffn.0; the
    quantizer sets them and multiplies the weights. norm3 stands before cross-attention and is affine, as published.
    ffn_rows: tokens (a multiple of 128) that pass the feed-forward at once in inference, to save memory; None: all.
    """

    smooth_attn: Tensor | None
    smooth_ffn: Tensor | None

    def __init__(self, config: WanConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.checkpointed, self.compiled = False, False
        self.ffn_rows: int | None = None
        self.self_attn = SelfAttention(config, attention)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.register_buffer("smooth_attn", None)
        self.register_buffer("smooth_ffn", None)

    def forward(
        self,
        x: Dual,
        time: Dual,
        text: Source,
        clip: Source | None,
        rope_2LP: Tensor,
        selection: BlockMask | None = None,
        share: TokenShare | None = None,
    ) -> tuple[Dual, BlockMask | None]:
        """x (B, L, D) and the block lists of its self-attention.

        time (B, M, 6, D): shift, scale, gate of self-attention, then of the feed-forward. share: of which tokens are here.
        """
        if not torch.is_grad_enabled():
            return self._compute(x, time, text, clip, rope_2LP, selection, share)
        if not self.checkpointed:
            with element_wise_compiled(self.compiled):
                return self._compute(x, time, text, clip, rope_2LP, selection, share)

        tangents = x.t, time.t

        def compute(x: Tensor, time: Tensor, text: Source, clip: Source | None) -> Dual:
            # The recomputation reuses the first pass's block lists, and has no use for tangents: they have no gradient.
            nonlocal selection, tangents
            (tx, ttime), tangents = tangents, (None, None)
            with element_wise_compiled(self.compiled):
                out, selection = self._compute(Dual(x, tx), Dual(time, ttime), text, clip, rope_2LP, selection, share)
            return out

        # Inside forward, so that the wrappers of parallel training sit outside. No dropout, so no RNG state to restore.
        contexts = without_tangents if x.t is not None else noop_context_fn
        out = checkpoint(
            compute, x.x, time.x, text, clip, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
        assert out is not None
        return out, selection

    def _compute(
        self,
        x: Dual,
        time: Dual,
        text: Source,
        clip: Source | None,
        rope_2LP: Tensor,
        selection: BlockMask | None,
        share: TokenShare | None,
    ) -> tuple[Dual, BlockMask | None]:
        attn, cross, ffn = self.self_attn, self.cross_attn, self.ffn
        vectors = Dual(wide(self.modulation)[:, None] + time.x, time.t)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = unbind(vectors, 2)
        norm1 = Norm(shift, scale, self.eps, self.smooth_attn)
        norm2 = Norm(ffn_shift, ffn_scale, self.eps, self.smooth_ffn)
        norm3 = Norm(Dual(self.norm3.bias), Dual(self.norm3.weight), self.eps, affine=True)

        h = norm(x, norm1, readers=(attn.q, attn.k, attn.v))
        h, selection = attn(h, rope_2LP, selection, share)
        x, h = residual_norm(x, h, gate, norm3, readers=(cross.q,))
        h = cross(h, text, clip)
        x, h = residual_norm(x, h, None, norm2, readers=(ffn[0],))
        h = feed_forward(ffn[0], ffn[2], h, self.ffn_rows)
        return residual(x, h, ffn_gate), selection


class PatchEmbedding(nn.Conv3d):
    """The published Conv3d over non-overlapping patches, computed as the linear map it is."""

    has_tangent = True

    def forward(self, input: Tensor, tangent: Tensor | None = None) -> Any:
        """Patches (B, L, C * patch) -> (B, L, D), with the tangent's image when there is one."""
        weight = self.weight.flatten(1)
        out = nn.functional.linear(input, weight, self.bias)
        if tangent is None:
            return out
        with torch.no_grad():
            return out, nn.functional.linear(tangent, weight)


class Head(nn.Module):
    """Modulated norm and projection to patches, all in float32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        p_t, p_h, p_w = config.patch_size
        self.eps = config.eps
        self.head = WideLinear(config.dim, config.out_channels * p_t * p_h * p_w)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Dual, time: Dual) -> Dual:
        """x (B, L, D), time embedding (B, M, D) -> patches (B, L, patch * C)."""
        shift, scale = (Dual(m + time.x, time.t) for m in wide(self.modulation).unbind(1))
        return linear(self.head, norm(lift(wide, x), Norm(shift, scale, self.eps), readers=(self.head,)))


class WanTransformer(nn.Module):
    """RF velocity of a noisy latent. `config`: dimensions; `attention_config`: the operator of every self-attention."""

    def __init__(self, config: WanConfig, attention: AttentionConfig | None = None) -> None:
        super().__init__()
        self.config, self.attention_config = config, attention or AttentionConfig()
        self.context_group: ProcessGroup | None = None
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(WideLinear(config.freq_dim, dim), nn.SiLU(), WideLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))
        layers = self.attention_config.by_layer(config.num_layers)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in layers)
        self.head = Head(config)
        if config.image_dim is not None:
            # PyTorch's own norms (eps 1e-5), as published.
            clip, wide_clip = nn.LayerNorm(config.image_dim), Linear(config.image_dim, config.image_dim)
            tokens = nn.Sequential(clip, wide_clip, nn.GELU(), Linear(config.image_dim, dim), nn.LayerNorm(dim))
            self.img_emb = nn.ModuleDict({"proj": tokens})
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Xavier linears, small embeddings, a head that outputs zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, PatchEmbedding)) and not name.endswith("proj_l"):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("0", "2"):
            nn.init.normal_(self.text_embedding.get_submodule(name).get_parameter("weight"), std=0.02)
            nn.init.normal_(self.time_embedding.get_submodule(name).get_parameter("weight"), std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.get_parameter("modulation"), std=self.config.dim**-0.5)
        nn.init.normal_(self.head.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)

    def compile_element_wise(self, enabled: bool = True) -> WanTransformer:
        """Compile what stands between the linears of the blocks, in training passes (compiled.py)."""
        for block in self.blocks:
            setattr(block, "compiled", enabled)  # noqa: B010
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def set_weight_dtype(self, dtype: torch.dtype) -> WanTransformer:
        """Cast the weights to `dtype`, except the float32 islands (which follow only to float64)."""
        for name, parameter in self.named_parameters():
            island = FLOAT32_ISLANDS.search(name) is not None and dtype != torch.float64
            parameter.data = parameter.data.to(torch.float32 if island else dtype)
        return self

    def set_attention(self, attention: AttentionConfig) -> WanTransformer:
        """Swap every self-attention operator in place. SLA kinds keep a P that exists; a new one starts at zero.

        Raises ValueError for a top-k by layer of another number of layers.
        """
        for block, layer in zip(self.blocks, attention.by_layer(len(self.blocks))):
            attn = block.get_submodule("self_attn")
            if layer.is_sparse and isinstance(attn.attn_op, SparseLinearAttention):
                attn.attn_op.config = layer
            else:
                attn.attn_op = build_attention(self.config.head_dim, layer, self.device)
        self.attention_config = attention
        return self

    def share_tokens(self, group: ProcessGroup | None) -> WanTransformer:
        """Deal the tokens of every sample to the processes of `group`, which then call forward together, on equal inputs: each
        gets the whole result. How gradients come out: token_share.py. None: each process works alone.

        Raises ValueError where the heads cannot be dealt.
        """
        if group is not None and self.config.num_heads % group.size():
            raise ValueError(
                f"{self.config.num_heads} heads cannot be dealt to a context group of {group.size()} processes: take a number "
                "that divides the heads"
            )
        self.context_group = group
        return self

    def enable_activation_checkpointing(self, enabled: bool = True, every: int = 1) -> WanTransformer:
        """Recompute each block, or every n-th, in the backward pass instead of storing its activations."""
        for index, block in enumerate(self.blocks):
            checkpointed = enabled and index % every == 0
            setattr(block, "checkpointed", checkpointed)  # noqa: B010 (typed access fails on ModuleList items)
        return self

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep: Tensor,
        context_BLD: Tensor | EncodedContext,
        y_BCTHW: Tensor | None = None,
        clip_BLD: Tensor | None = None,
        *,
        tangents: tuple[Tensor, Tensor] | None = None,
        selection: Selection | None = None,
        return_selection: bool = False,
    ) -> Any:
        """v (B, C, T, H, W), float32 or better; its tangent if `tangents`; the block lists if `return_selection`.

        timestep: 1000 s, (B,) or one per token in raster order (B, L). context_BLD: text embedding, zero rows as padding;
        or what `encode_context` made of it and of the CLIP tokens.
        y_BCTHW: channels concatenated to x (I2V: mask, image latent). clip_BLD: CLIP tokens (Wan 2.1 I2V).
        tangents: (tx like x, ttimestep like timestep); v keeps its graph, the tangent has none.
        selection: block lists per layer (None entries are chosen anew), as an earlier call returned them.
        Raises ValueError for inputs that do not fit `config`.
        """
        grid = check_inputs(self.config, x_BCTHW, timestep, context_BLD, y_BCTHW, clip_BLD, tangents, selection)
        tx, ttimestep = tangents if tangents is not None else (None, None)
        attention = self.attention_config
        block = min(attention.block_q, attention.block_k) if attention.order == "cube" else None
        order_L = token_order(grid, block, x_BCTHW.device)

        share = None if self.context_group is None else TokenShare(math.prod(grid), self.context_group)

        patches = lift(self._patches, cast(Dual(x_BCTHW, tx), self.dtype), y_BCTHW, order_L)
        x = linear(self.patch_embedding, patches if share is None else share.split(patches))
        dtype = torch.promote_types(self.dtype, torch.float32)
        rope_2LP = rope_table(grid, self.config.head_dim, block, x_BCTHW.device, dtype)
        rope_2LP = rope_2LP if share is None else share.own(rope_2LP)

        time, modulation = self._time(timestep, ttimestep, order_L, dtype, share)
        sources = self._sources(context_BLD, clip_BLD)

        chosen: list[BlockMask | None] = []
        for layer, (text, clip), given in zip(self.blocks, sources, selection or [None] * len(self.blocks)):
            x, mask = layer(x, modulation, text, clip, rope_2LP, given, share)
            if return_selection:
                chosen.append(mask)  # at 720p the lists of 40 layers are 450 MB

        v = self.head(x, time)
        v = lift(self._unpatch, v if share is None else share.join(v), grid, block)
        out = (v.x,) if tangents is None else (v.x, v.t)
        out = (*out, chosen) if return_selection else out
        return out if len(out) > 1 else out[0]

    @torch.no_grad()
    def encode_context(self, context_BLD: Tensor, clip_BLD: Tensor | None = None) -> EncodedContext:
        """What every step of a video reads of its text (and CLIP tokens): pass it to `forward` in place of both.

        2 * layers * tokens * dim numbers: 94 MB a prompt for Wan 1.3B, 420 MB for 14B, in bf16. For sampling, not for
        networks with sharded parameters. Raises ValueError for inputs that do not fit `config`.
        """
        check_context(self.config, context_BLD.shape[0], context_BLD, clip_BLD)
        encoded: list[Tensor] = []
        block: Any
        for i, (block, source) in enumerate(zip(self.blocks, self._sources(context_BLD, clip_BLD))):
            pairs = block.cross_attn.keys_values(*source)
            if not encoded:
                encoded = [pair.k.new_empty(len(self.blocks), 2, *pair.k.shape) for pair in pairs]
            for pair, stacked_X2BSNH in zip(pairs, encoded):
                torch.stack(pair, out=stacked_X2BSNH[i])
        return EncodedContext(*encoded)

    def _sources(self, context: Tensor | EncodedContext, clip_BLD: Tensor | None) -> list[tuple[Source, Source | None]]:
        """What each layer's cross-attention reads."""
        if isinstance(context, EncodedContext):
            return [context.layer(i) for i in range(len(self.blocks))]
        text_BSD = self.text_embedding[2](fn.gelu_tanh(self.text_embedding[0](context.to(self.dtype))))
        clip_BSD = None if clip_BLD is None else self.img_emb["proj"](clip_BLD.to(self.dtype))
        return [(text_BSD, clip_BSD)] * len(self.blocks)

    def _patches(self, x_BCTHW: Tensor, y_BCTHW: Tensor | None, order_L: Tensor | None) -> Tensor:
        """Tokens in the order of the blocks, (B, L, C * patch); `y` is constant, so its tangent is zero."""
        if y_BCTHW is not None:
            x_BCTHW = torch.cat([x_BCTHW, y_BCTHW.to(x_BCTHW.dtype)], dim=1)
        p, q, r = self.config.patch_size
        x_BLD = rearrange(x_BCTHW, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)
        return x_BLD if order_L is None else x_BLD.index_select(1, order_L)

    def _unpatch(self, x_BLD: Tensor, grid: Grid, block: int | None) -> Tensor:
        """The inverse of `_patches`, for the head's channel-last patches."""
        if block is not None:
            x_BLD = x_BLD.index_select(1, inverse_order(grid, block, x_BLD.device))
        (t, h, w), (p, q, r) = grid, self.config.patch_size
        pattern = "b (t h w) (p q r c) -> b c (t p) (h q) (w r)"
        return rearrange(x_BLD, pattern, t=t, h=h, w=w, p=p, q=q, r=r).contiguous()

    def _time(
        self,
        timestep: Tensor,
        ttimestep: Tensor | None,
        order_L: Tensor | None,
        dtype: torch.dtype,
        share: TokenShare | None,
    ) -> tuple[Dual, Dual]:
        """Time embedding (B, M, D) for the head, and the blocks' six modulation vectors (B, M, 6, D) of it."""

        def code(timestep_BM: Tensor) -> Tensor:
            return fn.time_code(timestep_BM, self.config.freq_dim).to(dtype)

        def per_token(times: Tensor) -> Tensor:
            times_BM = times[:, None] if times.ndim == 1 else times
            if times_BM.shape[1] == 1:
                return times_BM
            ordered_BL = times_BM if order_L is None else times_BM.index_select(1, order_L)
            return ordered_BL if share is None else share.own(ordered_BL)

        times = Dual(per_token(timestep.double()), None if ttimestep is None else per_token(ttimestep.double()))
        hidden = lift(nn.functional.silu, linear(self.time_embedding[0], lift(code, times)))
        time = linear(self.time_embedding[2], hidden)
        projected = linear(self.time_projection[1], lift(nn.functional.silu, time))
        return time, split_heads(projected, 6)

"""The two attentions of a Wan block: linears and norms around an attention operator.

Shape suffixes: B batch, L video tokens, S context tokens, D model width, N heads, H head dim, P rotary pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from turbokernels import BlockMask

from turbotrain.model.attention import build_attention, dense_attention
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.elementwise import for_readers, linears, merge_heads, norm_heads, split_heads
from turbotrain.model.inputs import KeyValue, Source
from turbotrain.model.tangent import Dual, Linear, Quantized, add, linear
from turbotrain.model.token_share import TokenShare
from turbotrain.model.variants import WanConfig


class RMSNorm(nn.Module):
    """Holds the weight (D,) of a norm over all heads; functional.py computes with it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    """q, k (normed, rotated) and v of all tokens through the model's attention operator."""

    def __init__(self, config: WanConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attn_op = build_attention(config.head_dim, attention)

    def forward(
        self, x: Dual | Quantized, rope_2LP: Tensor, selection: BlockMask | None, share: TokenShare | None = None
    ) -> tuple[Dual, BlockMask | None]:
        """share: x and rope are this process's tokens; the selection is of the heads that it attends with."""
        q, k, v = linears((self.q, self.k, self.v), x)
        q = norm_heads(q, self.norm_q.weight, rope_2LP, self.num_heads, self.eps)
        k = norm_heads(k, self.norm_k.weight, rope_2LP, self.num_heads, self.eps)
        v = split_heads(v, self.num_heads)
        if share is not None:
            q, k, v = share.to_heads(q, k, v)
        out, selection = self.attn_op(q, k, v, selection)
        if share is not None:
            out = share.to_tokens(out)
        return linear(self.o, merge_heads(out)), selection


class CrossAttention(nn.Module):
    """Video tokens attend to the text and, in networks with CLIP tokens (Wan 2.1 I2V), to the image; the two add up."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim), RMSNorm(config.dim)
        if config.image_dim is not None:
            self.k_img, self.v_img = Linear(config.dim, config.dim), Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim)

    def forward(self, x: Dual | Quantized, text: Source, clip: Source | None) -> Dual:
        q = norm_heads(linear(self.q, x), self.norm_q.weight, None, self.num_heads, self.eps)
        keys_values = self.keys_values(text, clip)
        out, *others = (dense_attention(q, Dual(k), Dual(v)) for k, v in keys_values)
        for other in others:
            out = add(out, other)
        return linear(self.o, merge_heads(out))

    def keys_values(self, text: Source, clip: Source | None) -> list[KeyValue]:
        """Of the text, and of the CLIP tokens if there are any; they do not depend on the time."""
        found = [self._keys_values(text, self.k, self.v, self.norm_k)]
        if clip is not None:
            found.append(self._keys_values(clip, self.k_img, self.v_img, self.norm_k_img))
        return found

    def _keys_values(self, source: Source, to_k: nn.Module, to_v: nn.Module, norm_k: RMSNorm) -> KeyValue:
        if isinstance(source, KeyValue):
            return source
        context = for_readers(source, (to_k, to_v))
        k = norm_heads(linear(to_k, context), norm_k.weight, None, self.num_heads, self.eps)
        return KeyValue(k.x, split_heads(linear(to_v, context), self.num_heads).x)

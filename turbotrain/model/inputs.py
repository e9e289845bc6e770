"""What a call of the network must look like; errors say the value and what was expected.

Shape suffixes: B batch, C channels, T H W latent frames, height, width, L tokens, D features; X layers, S context tokens,
N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from turbokernels import BlockMask

from turbotrain.model.rope import Grid
from turbotrain.model.variants import WanConfig

Selection = Sequence[BlockMask | None]


class KeyValue(NamedTuple):
    """What queries of one cross-attention meet: k, normed, and v, each (B, S, N, H)."""

    k: Tensor
    v: Tensor


Source = Tensor | KeyValue  # context tokens (B, S, D), or what a cross-attention makes of them


class EncodedContext(NamedTuple):
    """Text and CLIP tokens as the blocks' cross-attentions read them: every layer's keys, then its values.

    `WanTransformer.encode_context` makes it; nothing of it depends on the latent or the time.
    """

    text_X2BSNH: Tensor
    clip_X2BSNH: Tensor | None = None

    def layer(self, index: int) -> tuple[KeyValue, KeyValue | None]:
        """Of the text, and of the CLIP tokens if there are any."""
        clip = None if self.clip_X2BSNH is None else KeyValue(*self.clip_X2BSNH[index].unbind())
        return KeyValue(*self.text_X2BSNH[index].unbind()), clip


def check_context(config: WanConfig, batch: int, context: Tensor | EncodedContext, clip_BLD: Tensor | None) -> None:
    """ValueError where text or CLIP tokens, as they come or encoded, do not fit the network."""
    if isinstance(context, EncodedContext):
        if clip_BLD is not None:
            raise ValueError("clip is given beside an encoded context, which holds it: leave it out")
        tokens, expected = context.text_X2BSNH.shape[3:4], (config.num_heads, config.head_dim)
        if context.text_X2BSNH.shape != (config.num_layers, 2, batch, *tokens, *expected):
            raise ValueError(
                f"context is encoded as {tuple(context.text_X2BSNH.shape)}: expected ({config.num_layers}, 2, {batch}, "
                f"tokens, {config.num_heads}, {config.head_dim}), as encode_context of this network gives it"
            )
        has_clip = context.clip_X2BSNH is not None
        if has_clip != (config.image_dim is not None):
            needs = "without" if config.image_dim is None else "with"
            raise ValueError(f"context is encoded for another network: this one takes it {needs} CLIP tokens")
        return
    if (clip_BLD is None) != (config.image_dim is None):
        needs = "none" if config.image_dim is None else f"(B, tokens, {config.image_dim})"
        raise ValueError(
            f"clip is {'missing' if clip_BLD is None else tuple(clip_BLD.shape)}: this network takes {needs}"
        )
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != config.text_dim:
        raise ValueError(f"context has shape {tuple(context.shape)}: expected ({batch}, tokens, {config.text_dim})")


def check_inputs(
    config: WanConfig,
    x_BCTHW: Tensor,
    timestep: Tensor,
    context_BLD: Tensor | EncodedContext,
    y_BCTHW: Tensor | None,
    clip_BLD: Tensor | None,
    tangents: tuple[Tensor, Tensor] | None,
    selection: Selection | None,
) -> Grid:
    """The token grid (t, h, w); ValueError where an input does not fit the network."""
    if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != config.out_channels:
        raise ValueError(f"x has shape {tuple(x_BCTHW.shape)}: expected (B, {config.out_channels}, T, H, W)")
    batch, _, *sizes = x_BCTHW.shape
    if any(size < 1 or size % p for size, p in zip(sizes, config.patch_size)):
        raise ValueError(f"x has (T, H, W) = {tuple(sizes)}: each must be a multiple of the patch {config.patch_size}")
    t, h, w = (size // p for size, p in zip(sizes, config.patch_size))
    y_channels = 0 if y_BCTHW is None else y_BCTHW.shape[1]
    if y_channels != config.condition_channels or (y_BCTHW is not None and [*y_BCTHW.shape[2:]] != sizes):
        given = "none" if y_BCTHW is None else str(tuple(y_BCTHW.shape))
        raise ValueError(
            f"y is {given}: this network takes {config.condition_channels} channels of (T, H, W) = {tuple(sizes)}"
        )
    check_context(config, batch, context_BLD, clip_BLD)
    if tuple(timestep.shape) not in ((batch,), (batch, 1), (batch, t * h * w)):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}: expected ({batch},) or ({batch}, {t * h * w})")
    if tangents is not None:
        if torch.is_inference_mode_enabled():
            raise ValueError("tangents are lost under torch.inference_mode: use torch.no_grad")
        if tangents[0].shape != x_BCTHW.shape or tangents[1].shape != timestep.shape:
            shapes = f"{tuple(tangents[0].shape)}, {tuple(tangents[1].shape)}"
            raise ValueError(f"tangents have shapes {shapes}: expected those of x and timestep")
    if selection is not None and len(selection) != config.num_layers:
        raise ValueError(f"selection lists {len(selection)} layers: this network has {config.num_layers}")
    return (t, h, w)

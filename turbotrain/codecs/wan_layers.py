"""The layers of Wan's VAE (2.1 and 2.2) for inference on a stretch of frames: diffusers' weights, our own order of work.

diffusers decodes one latent frame at a time, in NCTHW, and copies at every layer: cached frames are put before new ones, edges
are padded, norms go through float32 in memory. Here activations are (B, T, H, W, C) throughout, as tensor cores want them;
a norm writes straight behind the two cached frames of the buffer that the next convolution reads; residual sums wait
for that norm (`Pending`); a chunk has as many frames as memory allows. Every convolution is causal, so chunks of any
length give the same frames.

Legend: B batch, T frames, H, W positions, C channels; I, O channels in and out. Activations are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turbokernels import conv3d, rms_norm_silu

if TYPE_CHECKING:
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

Block = Any  # a module of diffusers': its lists and sequences hide from type checkers what they hold
CONTEXT = 2  # frames that a causal convolution of width 3 looks back
# Which of a 3-wide kernel's taps fall on the same one of two pixels after nearest doubling: [phase, pixel, tap].
PHASE_TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


@dataclass
class Pending:
    """value + residual, not added yet: the next norm adds while it reads. The sum overwrites `value`, which nobody else reads
    before."""

    value_BTHWC: Tensor
    residual_BTHWC: Tensor | None = None

    def settle(self) -> Tensor:
        """The sum, now."""
        if self.residual_BTHWC is not None:
            self.value_BTHWC.add_(self.residual_BTHWC)
            self.residual_BTHWC = None
        return self.value_BTHWC


@dataclass
class Stream:
    """One batch of clips on its way through the encoder or the decoder, chunk by chunk.

    Attributes:
        first: whether the chunk that is being computed is the first of its clips.
        contexts: the last frames that each layer has seen.
        weights: the matrices of each layer's taps, laid out once a stream.
    """

    first: bool = True
    contexts: dict[nn.Module, Tensor] = field(default_factory=dict)
    weights: dict[nn.Module, Tensor] = field(default_factory=dict)

    def taps(self, layer: nn.Conv2d | nn.Conv3d, lay_out: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's weight as `lay_out` makes it, contiguous."""
        if layer not in self.weights:
            self.weights[layer] = lay_out(layer.weight).contiguous()
        return self.weights[layer]

    def buffer(self, layer: nn.Module, like_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """(whole, rest): memory for the frames that `layer` reads, its context written, and the part to be filled."""
        batch, frames, *place = like_BTHWC.shape
        whole_BTHWC = like_BTHWC.new_empty(batch, CONTEXT + frames, *place)
        context_BTHWC = self.contexts.get(layer)
        if context_BTHWC is None:
            whole_BTHWC[:, :CONTEXT].zero_()
        else:
            whole_BTHWC[:, :CONTEXT].copy_(context_BTHWC)
        return whole_BTHWC, whole_BTHWC[:, CONTEXT:]

    def keep(self, layer: nn.Module, whole_BTHWC: Tensor) -> None:
        """Remember the filled buffer's last frames as the layer's context."""
        self.contexts[layer] = whole_BTHWC[:, -CONTEXT:].clone()

    def convolve(self, layer: wan.WanCausalConv3d, whole_BTHWC: Tensor) -> Tensor:
        """A causal convolution over its filled buffer; keeps the context of the next chunk."""
        self.keep(layer, whole_BTHWC)
        # diffusers pads by hand: (left, right, above, below, before, after).
        left, above = int(layer._padding[0]), int(layer._padding[2])
        return conv3d(whole_BTHWC, self.taps(layer, by_taps), layer.bias, shift=(-above, -left))


def by_taps(weight_OIUVZ: Tensor) -> Tensor:
    """(O, I, taps in time, height, width) with the taps first, as `turbokernels.conv3d` reads it."""
    return weight_OIUVZ.permute(2, 3, 4, 0, 1)


def pointwise(layer: nn.Conv2d | nn.Conv3d, x_BTHWC: Tensor) -> Tensor:
    """A 1x1 convolution."""
    return F.linear(x_BTHWC, layer.weight.flatten(1), layer.bias)


def causal(stream: Stream, layer: wan.WanCausalConv3d, x_BTHWC: Tensor) -> Pending:
    """A causal convolution of frames as they are."""
    whole_BTHWC, rest_BTHWC = stream.buffer(layer, x_BTHWC)
    rest_BTHWC.copy_(x_BTHWC)
    return Pending(stream.convolve(layer, whole_BTHWC))


def normed(stream: Stream, norm: wan.WanRMS_norm, layer: wan.WanCausalConv3d, x: Pending) -> Tensor:
    """Norm and SiLU, behind the context of the convolution that follows: its filled buffer. Settles x."""
    whole_BTHWC, rest_BTHWC = stream.buffer(layer, x.value_BTHWC)
    rms_norm_silu(x.value_BTHWC, norm.gamma.flatten(), x.residual_BTHWC, rest_BTHWC)
    x.residual_BTHWC = None
    return whole_BTHWC


def residual_block(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanResidualBlock`: x + conv(norm(conv(norm(x)))), with a 1x1 convolution on the way around where channels change."""
    hidden_BTHWC = stream.convolve(block.conv1, normed(stream, block.norm1, block.conv1, x))
    around_BTHWC = x.value_BTHWC
    if not isinstance(block.conv_shortcut, nn.Identity):
        around_BTHWC = pointwise(block.conv_shortcut, around_BTHWC)
    whole_BTHWC = normed(stream, block.norm2, block.conv2, Pending(hidden_BTHWC))
    del hidden_BTHWC  # its memory is as large as the output's
    return Pending(stream.convolve(block.conv2, whole_BTHWC), around_BTHWC)


def attention_block(block: Block, x: Pending) -> Pending:
    """`WanAttentionBlock`: self-attention of one head over the positions of each frame."""
    x_BTHWC = x.settle()
    batch, frames, height, width, channels = x_BTHWC.shape
    # WanRMS_norm has no eps but a smallest norm of 1e-12: the same for zeros, and below rounding for everything else.
    normed_BTHWC = F.rms_norm(x_BTHWC, (channels,), block.norm.gamma.flatten(), eps=1e-24 / channels)
    packed = pointwise(block.to_qkv, normed_BTHWC).view(batch * frames, 1, height * width, 3 * channels)
    q, k, v = packed.chunk(3, dim=-1)
    return Pending(pointwise(block.proj, F.scaled_dot_product_attention(q, k, v).view_as(x_BTHWC)), x_BTHWC)


def middle(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanMidBlock`: residual blocks with attention between them."""
    x = residual_block(stream, block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:]):
        x = residual_block(stream, resnet, attention_block(attention, x))
    return x


def upsample(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanResample`: frames doubled by a causal convolution (all but the clip's first; `upsample3d` only), then height and
    width."""
    x_BTHWC = x.settle()
    if block.mode == "upsample3d":
        x_BTHWC = _double_frames(stream, block.time_conv, x_BTHWC)
    return Pending(_double_positions(stream, block.resample[1], x_BTHWC))


def _double_frames(stream: Stream, layer: wan.WanCausalConv3d, x_BTHWC: Tensor) -> Tensor:
    """Two frames of each, a half of the channels for either; the clip's first frame stays one, and nobody looks back at it."""
    alone = int(stream.first)
    batch, frames, height, width, channels = x_BTHWC.shape
    frames -= alone
    out_BTHWC = x_BTHWC.new_empty(batch, alone + 2 * frames, height, width, channels)
    out_BTHWC[:, :alone].copy_(x_BTHWC[:, :alone])
    if frames:
        whole_BTHWC, rest_BTHWC = stream.buffer(layer, x_BTHWC[:, alone:])
        rest_BTHWC.copy_(x_BTHWC[:, alone:])
        stream.keep(layer, whole_BTHWC)
        halves = stream.taps(layer, lambda weight: by_taps(weight).unflatten(3, (2, channels)).movedim(3, 0))
        pairs = out_BTHWC[:, alone:].unflatten(1, (frames, 2))
        for i, bias_C in enumerate(_bias(layer).chunk(2)):
            conv3d(whole_BTHWC, halves[i], bias_C, pairs[:, :, i], shift=(0, 0))
    return out_BTHWC


def _double_positions(stream: Stream, layer: nn.Conv2d, x_BTHWC: Tensor) -> Tensor:
    """Nearest doubling and a 3x3 convolution, without the doubled image in between.

    Of the 3x3 pixels under the kernel at most 2x2 are different, so each of the four pixels that a pixel becomes is a 2x2
    convolution of the small image: 16 products instead of 36.
    """
    phases = stream.taps(layer, _phases)
    batch, frames, height, width, _ = x_BTHWC.shape
    out = x_BTHWC.new_empty(batch, frames, height, 2, width, 2, layer.out_channels)
    for i in range(2):
        for j in range(2):
            conv3d(x_BTHWC, phases[i, j], layer.bias, out[:, :, :, i, :, j], shift=(i - 1, j - 1))
    return out.view(batch, frames, 2 * height, 2 * width, layer.out_channels)


def _phases(weight_OIVZ: Tensor) -> Tensor:
    """[row phase, column phase] -> (1, 2, 2, O, I): sums of the taps that fall on the same pixel, rounded once."""
    dtype = torch.promote_types(weight_OIVZ.dtype, torch.float32)
    taps = torch.tensor(PHASE_TAPS, dtype=dtype, device=weight_OIVZ.device)
    summed = torch.einsum("iav,jbz,ocvz->ijaboc", taps, taps, weight_OIVZ.to(dtype))
    return summed.unsqueeze(2).to(weight_OIVZ.dtype)


def downsample(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanResample`: height and width halved by a convolution, then frames (all but the clip's first; `downsample3d` only)."""
    layer = block.resample[1]
    x_BTHWC = x.settle()
    batch, frames = x_BTHWC.shape[:2]
    padded_NCHW = F.pad(x_BTHWC.flatten(0, 1).movedim(-1, 1), (0, 1, 0, 1))
    halved_NCHW = F.conv2d(padded_NCHW, layer.weight, layer.bias, stride=2)
    halved_BTHWC = halved_NCHW.movedim(1, -1).contiguous().unflatten(0, (batch, frames))
    if block.mode != "downsample3d":
        return Pending(halved_BTHWC)
    context_BTHWC = stream.contexts.get(block)
    stream.contexts[block] = halved_BTHWC[:, -1:].clone()
    alone = int(context_BTHWC is None)
    read_BTHWC = halved_BTHWC if context_BTHWC is None else torch.cat([context_BTHWC, halved_BTHWC], 1)
    if read_BTHWC.shape[1] < 3:
        return Pending(halved_BTHWC)
    time = block.time_conv
    rest_BCTHW = F.conv3d(read_BTHWC.movedim(-1, 1), time.weight, time.bias, stride=(2, 1, 1))
    return Pending(torch.cat([halved_BTHWC[:, :alone], rest_BCTHW.movedim(1, -1)], 1))


def up_block(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanUpBlock`: residual blocks and, in all levels but the last, a doubling."""
    for resnet in block.resnets:
        x = residual_block(stream, resnet, x)
    return x if block.upsamplers is None else upsample(stream, block.upsamplers[0], x)


def residual_up_block(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanResidualUpBlock` of Wan 2.2: where it doubles it adds its input, each channel copied over the new positions."""
    x = inner = Pending(x.settle())
    for resnet in block.resnets:
        inner = residual_block(stream, resnet, inner)
    if block.upsampler is None:
        return inner
    inner = upsample(stream, block.upsampler, inner)
    return Pending(inner.settle(), _copied(block.avg_shortcut, x.value_BTHWC, stream.first))


def _copied(shortcut: wan.DupUp3D, x_BTHWC: Tensor, first: bool) -> Tensor:
    """Every position becomes factor_t x factor_s x factor_s positions, over which the channels are dealt out in order."""
    times, side = shortcut.factor_t, shortcut.factor_s
    dealt = x_BTHWC.repeat_interleave(shortcut.repeats, -1).unflatten(-1, (shortcut.out_channels, times, side, side))
    dealt = dealt.permute(0, 1, 5, 2, 6, 3, 7, 4)  # B T times H side W side C
    copied_BTHWC = dealt.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return copied_BTHWC[:, times - 1 :].contiguous() if first else copied_BTHWC


def residual_down_block(stream: Stream, block: Block, x: Pending) -> Pending:
    """`WanResidualDownBlock` of Wan 2.2: residual blocks and a halving, plus the input's mean over what is halved."""
    x = inner = Pending(x.settle())
    for resnet in block.resnets:
        inner = residual_block(stream, resnet, inner)
    if block.downsampler is not None:
        inner = downsample(stream, block.downsampler, inner)
    return Pending(inner.settle(), _averaged(block.avg_shortcut, x.value_BTHWC))


def _averaged(shortcut: wan.AvgDown3D, x_BTHWC: Tensor) -> Tensor:
    """Inverse of dealing out: groups of neighbouring (channel, time, row, column) are averaged. A lone first frame has a
    black one before it."""
    times, side = shortcut.factor_t, shortcut.factor_s
    x_BTHWC = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, -x_BTHWC.shape[1] % times, 0))
    parts = x_BTHWC.unflatten(3, (-1, side)).unflatten(2, (-1, side)).unflatten(1, (-1, times))
    gathered = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # B T H W (C times side side)
    return gathered.unflatten(-1, (shortcut.out_channels, -1)).mean(-1)


def _bias(layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert layer.bias is not None  # Wan's convolutions all have one
    return layer.bias

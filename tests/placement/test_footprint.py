"""Bytes by arithmetic against the real networks: weights exactly, activations as a run without data keeps them alive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from turbokernels import dispatch, tuning
from turbokernels.attention_linear import launch as _linear
from turbokernels.attention_sage import launch as _sage
from turbokernels.attention_sla import launch as _sla
from turbokernels.attention_sparse import kernel as _sparse
from turbokernels.block_selection import kernel as _selection
from turbokernels.fused_rms_rope import kernel as _rope
from turbokernels.w8a8 import kernel as _w8a8

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.vae import pixels_to_frames
from turbotrain.evaluation.random_weights import WAN_22_VAE, random_inputs
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import replace_linears
from turbotrain.model.variants import VARIANTS, WanConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.placement import footprint

# Imported before `interpreted` is replaced below: some of them remember what it says.
KERNELS = (_linear, _sage, _sla, _sparse, _selection, _rope, _w8a8)
SAGE = AttentionConfig("sage_sla", block_q=128)
LAYERS = 2  # all are alike


def network(config: WanConfig, attention: AttentionConfig, scheme: str | None) -> WanTransformer:
    model = WanTransformer(config, attention).set_weight_dtype(torch.bfloat16).eval()
    for block in model.blocks:
        linears = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        if scheme is not None:
            replace_linears(block, {name: scheme for name in linears if not name.endswith("proj_l")})
    return model


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "int8_channel", "int8_block128", "fp8_channel"])
@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3b", "wan2.1_i2v_14b", "wan2.2_i2v_a14b", "wan2.2_ti2v_5b"])
def test_weights_are_exact(name: str, scheme: str | None) -> None:
    attention = SAGE if scheme is None else AttentionConfig()
    config = dataclasses.replace(VARIANTS[name].config, num_layers=LAYERS)
    with torch.device("meta"):
        model = network(config, attention, scheme)
    assert footprint.network_bytes(config, attention, scheme) == sum(tensor.nbytes for tensor in tensors(model))


@pytest.mark.parametrize("int8", [False, True])
def test_the_text_encoders_weights_are_exact(int8: bool) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    from turbotrain.codecs.text import quantize_linears

    size = footprint.UMT5_XXL
    config = UMT5Config(
        vocab_size=256384, d_model=size.dim, d_kv=64, d_ff=size.ffn, num_layers=1, num_heads=64, dropout_rate=0.0
    )  # as published
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            encoder = UMT5EncoderModel(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if int8:
            quantize_linears(encoder)
        layer = sum(tensor.nbytes for tensor in tensors(encoder.encoder.block))
        whole = sum(tensor.nbytes for tensor in tensors(encoder))
    assert size.layer_weights(int8) == layer
    assert size.weights(int8) == whole + (size.layers - 1) * layer


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators are those of a GPU: on tensors without data they only say what they return."""

    def choose(op: str, impl: str, device: torch.device, table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
        return table.get("triton", table["reference"])

    assert KERNELS
    monkeypatch.undo()  # what is NaN until written would count twice
    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(tuning, "interpreted", lambda: True)


@pytest.fixture(scope="module")
def fake() -> FakeTensorMode:
    return FakeTensorMode()  # one for all: rotary tables are remembered


CASES = {
    # variant, attention, scheme, frames, height, width, batch, time for each token, ffn_rows, tolerance
    "1.3b": ("wan2.1_t2v_1.3b", SAGE, "int8_channel", 81, 480, 832, 1, False, None),
    "14b": ("wan2.1_t2v_14b", SAGE, "int8_channel", 81, 720, 1280, 1, False, None),
    "14b in pieces": ("wan2.1_t2v_14b", SAGE, "int8_channel", 81, 720, 1280, 1, False, 8192),
    "14b dense": ("wan2.1_t2v_14b", AttentionConfig(), None, 81, 720, 1280, 1, False, None),
    "tiles": ("wan2.1_t2v_14b", AttentionConfig("sla"), "int8_block128", 49, 480, 832, 1, False, None),
    "tiles in pieces": ("wan2.1_t2v_14b", AttentionConfig("sla"), "int8_block128", 49, 480, 832, 1, False, 8192),
    "5b": ("wan2.2_ti2v_5b", SAGE, "int8_channel", 121, 704, 1280, 1, False, None),
    "5b from an image": ("wan2.2_ti2v_5b", SAGE, "int8_channel", 121, 704, 1280, 1, True, None),
    "two at once": ("wan2.1_t2v_1.3b", AttentionConfig("sla"), None, 49, 480, 832, 2, False, None),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings(
    "ignore:Accessing the data pointer of FakeTensor"
)  # joined weights have addresses, these none
@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_of_the_code(case: str, fake: FakeTensorMode) -> None:
    name, attention, scheme, frames, height, width, batch, timed, rows = CASES[case]
    config = dataclasses.replace(VARIANTS[name].config, num_layers=LAYERS)
    shape = VARIANTS[name].latent_shape(frames, height, width)
    tokens = math.prod(shape[1:]) // math.prod(config.patch_size)
    with fake:
        model = network(config, attention, scheme)
        for block in model.blocks:
            block.ffn_rows = rows
        given = random_inputs(config, shape, batch)
        if timed:
            given["timestep"] = torch.zeros(batch, tokens)
        with LiveBytes([*tensors(model), *given.values()]) as live, torch.inference_mode():
            model(**given)
    predicted = footprint.forward_bytes(
        config, attention, scheme, tokens, batch=batch, timed_tokens=tokens if timed else 1, ffn_rows=rows
    )
    # What operators use inside is not seen here, and is smaller than the feed-forward's moment in these cases.
    assert predicted == pytest.approx(live.peak, rel=0.02 if scheme != "int8_block128" else 0.07)


def convolved(x: Tensor, weight: Tensor, _bias: Tensor | None, out: Tensor | None, _shift: tuple[int, int]) -> Tensor:
    """What turbokernels' convolution makes of memory."""
    return x.new_empty(len(x), x.shape[1] - weight.shape[0] + 1, *x.shape[2:4], weight.shape[3]) if out is None else out


@pytest.mark.parametrize(("which", "sizes"), [("wan2.1", {}), ("wan2.2", WAN_22_VAE)])
def test_the_vaes_activations_are_those_of_the_code(
    which: str, sizes: dict[str, Any], fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan

    from turbotrain.codecs.wan_forward import decode_chunks, encode_chunks

    in_place: dict[str, Callable[..., Any]] = {"rms_norm_silu": lambda *_: None, "conv3d": convolved}
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "choose", lambda op, _impl, _device, table: in_place.get(op, table["reference"]))
    size, frames, height, width = footprint.VAES[which], 13, 480, 832
    with fake:
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKLWan(**sizes).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert size.weights == sum(tensor.nbytes for tensor in tensors(vae))
        _, *cells = VideoCodec(vae).latent_shape(frames, height, width)
        latents = torch.zeros(1, vae.config.z_dim, *cells, dtype=torch.bfloat16)
        pixels = torch.zeros(1, frames, height, width, 3, dtype=torch.uint8)
        for chunk in (1, 2):
            with LiveBytes([*tensors(vae), latents]) as decoding, torch.inference_mode():
                for piece in decode_chunks(vae, latents, chunk):
                    pixels_to_frames(piece)
            with LiveBytes([*tensors(vae), pixels]) as encoding, torch.inference_mode():
                list(encode_chunks(vae, pixels, chunk))
            area = height * width
            assert area * (size.decode_fixed + size.decode_chunk * chunk) == pytest.approx(decoding.peak, rel=0.03)
            assert area * (size.encode_fixed + size.encode_chunk * chunk) == pytest.approx(encoding.peak, rel=0.03)

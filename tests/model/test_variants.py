"""The table of published networks: dimensions by what they imply (parameters, tensors), and no torch behind it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, WanConfig, variants_with
from turbotrain.model.wan import WanTransformer

# formats.md section 1: parameters in 1e9 and number of tensors of the official files.
PUBLISHED = {
    "wan2.1_t2v_1.3b": (1.419, 825),
    "wan2.1_t2v_14b": (14.288, 1095),
    "wan2.1_i2v_14b": (16.395, 1303),
    "wan2.2_t2v_a14b": (14.288, 1095),
    "wan2.2_i2v_a14b": (14.289, 1095),
    "wan2.2_ti2v_5b": (5.000, 825),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        state = WanTransformer(VARIANTS[name].config).state_dict()
    billions, tensors = PUBLISHED[name]
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_sla_adds_two_tensors_a_block() -> None:
    with torch.device("meta"):
        state = WanTransformer(VARIANTS["wan2.1_t2v_1.3b"].config, AttentionConfig("sla")).state_dict()
    assert len(state) == 885
    assert state["blocks.7.self_attn.attn_op.local_attn.proj_l.weight"].shape == (128, 128)


def test_latents_and_tokens_of_the_defaults() -> None:
    tokens = {}
    for name, variant in VARIANTS.items():
        _, t, h, w = variant.latent_shape(variant.frames, variant.height, variant.width)
        tokens[name] = t * h * w // math.prod(variant.config.patch_size)
    assert tokens["wan2.1_t2v_1.3b"] == 32_760
    assert tokens["wan2.2_i2v_a14b"] == 75_600
    assert tokens["wan2.2_ti2v_5b"] == 27_280
    assert tokens["shapes"] == 256


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [(12, 64, 64, "nearest are 9 and 13"), (13, 60, 64, "height=60"), (13, 64, 4, "width=4"), (0, 64, 64, "frames=0")],
)
def test_sizes_that_do_not_fit_name_the_nearest(frames: int, height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VARIANTS["shapes"].latent_shape(frames, height, width)


def test_dictionaries_go_there_and_back() -> None:
    for variant in VARIANTS.values():
        assert WanConfig.from_dict(variant.config.to_dict()) == variant.config
        assert variant.name in variants_with(variant.config)
    assert variants_with(VARIANTS["wan2.1_t2v_14b"].config) == ["wan2.1_t2v_14b", "wan2.2_t2v_a14b"]


@pytest.mark.parametrize(
    "fields", [{"topk": 0}, {"topk": 1.5}, {"topk": True}, {"kind": "dens"}, {"block_q": 48}, {"order": "hilbert"}]
)
def test_attention_values_out_of_range_name_the_field(fields: dict) -> None:
    with pytest.raises(ValueError, match=rf"attention\.{next(iter(fields))}="):
        AttentionConfig(**fields)


@pytest.mark.parametrize("fields", [{"num_heads": 5}, {"freq_dim": 33}, {"num_layers": 0}, {"model_type": "vace"}])
def test_dimensions_out_of_range_name_the_field(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        WanConfig(**{"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 1, **fields})


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match="blocks"):
        AttentionConfig.from_dict({"blocks": 64})


def test_configuration_does_not_import_torch() -> None:
    code = (
        "import sys, turbotrain, turbotrain.model.variants, turbotrain.model.attention_config\n"
        "import turbotrain.checkpoint.header, turbotrain.checkpoint.layouts, turbotrain.checkpoint.meta\n"
        "assert turbotrain.__version__ and 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

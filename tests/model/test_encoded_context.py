"""Text and CLIP tokens encoded once serve every step: the same results, and clear errors for those of another network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fused_cases import quantize
from wan_networks import STRUCTURES, build, inputs

from turbotrain.model.attention_config import AttentionConfig


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scheme", [None, "int8_channel"])
@torch.no_grad()
def test_an_encoded_context_gives_the_same_velocity(structure: str, scheme: str | None) -> None:
    model = build(structure, AttentionConfig("sla", 0.5, 16, 16))
    if scheme is not None:
        quantize(model, scheme)
    given = inputs(STRUCTURES[structure])
    expected = model(**given)
    encoded = model.encode_context(given["context_BLD"], given.get("clip_BLD"))
    given["clip_BLD"] = None
    for _ in range(2):  # nothing is used up
        assert torch.equal(model(**given | {"context_BLD": encoded}), expected)
    other = model.encode_context(
        given["context_BLD"] + 1, None if encoded.clip_X2BSNH is None else torch.ones(2, 5, 24)
    )
    assert not torch.equal(model(**given | {"context_BLD": other}), expected)


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    model, given = build("i2v_clip"), inputs(STRUCTURES["i2v_clip"])
    text_BLD, clip_BLD = given.pop("context_BLD"), given.pop("clip_BLD")
    with pytest.raises(ValueError, match="clip is missing"):
        model.encode_context(text_BLD)
    encoded = model.encode_context(text_BLD, clip_BLD)
    with pytest.raises(ValueError, match="clip is given beside an encoded context"):
        model(**given, context_BLD=encoded, clip_BLD=clip_BLD)
    with pytest.raises(ValueError, match="this one takes it with CLIP tokens"):
        model(**given, context_BLD=encoded._replace(clip_X2BSNH=None))
    with pytest.raises(ValueError, match=r"encoded as \(2, 2, 1, 9, 3, 16\): expected \(2, 2, 2, tokens, 3, 16\)"):
        model(**given, context_BLD=encoded._replace(text_X2BSNH=encoded.text_X2BSNH[:, :, :1]))
    deeper = dataclasses.replace(STRUCTURES["i2v_clip"], num_layers=1)
    with pytest.raises(ValueError, match=r"expected \(1, 2, 2, tokens"):
        type(model)(deeper)(**given, context_BLD=encoded)

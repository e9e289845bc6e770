"""The text encoder visits the GPU while it encodes, and its weights are on the CPU again afterwards."""

from __future__ import annotations

import pytest
import torch

from turbotrain.codecs import PromptEncoder
from turbotrain.stages.codec import tiny_text_encoder

pytestmark = pytest.mark.gpu
PROMPTS = ["a small red circle moves left slowly", "a large blue cross"]


@pytest.mark.parametrize("wanted", ["stay", "visit", "stream"])
def test_the_encoder_comes_and_goes(wanted: str) -> None:
    text = tiny_text_encoder()
    expected_BLD = text.encode(PROMPTS)
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        embeds_BLD = PromptEncoder(lambda: text, torch.device("cuda"), wanted)(PROMPTS)
    assert embeds_BLD.device.type == "cuda"
    assert torch.allclose(embeds_BLD.cpu(), expected_BLD, atol=1e-4)
    assert text.device.type == ("cuda" if wanted == "stay" else "cpu")
    if wanted != "stay":
        assert torch.equal(text.encode(PROMPTS), expected_BLD)
        assert torch.cuda.memory_allocated() - before <= embeds_BLD.nbytes + 2**20

"""The network's inference on a GPU: fused operators against the plain path, and one compiled graph."""

from __future__ import annotations

import fused_cases as cases
import pytest
import torch
from wan_networks import build, inputs, relative

pytestmark = pytest.mark.gpu
SCHEMES = (None, "int8_channel", "fp8_channel", "int8_block128")


def require(scheme: str | None) -> None:
    if scheme == "fp8_channel" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("attention", cases.ATTENTIONS)
@pytest.mark.parametrize("structure", ["i2v_clip", "ti2v_per_token"])
def test_fused_is_as_accurate_as_plain(structure: str, attention: str, scheme: str | None) -> None:
    require(scheme)
    cases.check(structure, attention, scheme, torch.bfloat16, "cuda")
    cases.check(structure, attention, scheme, torch.bfloat16, "cuda", smoothed=True)


@pytest.mark.parametrize("scheme", [None, "int8_channel"])
@pytest.mark.parametrize("attention", ["dense", "cube", "sage_sla"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str, attention: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break, CUDA graphs included; three calls, of which the third replays."""
    monkeypatch.undo()  # the compiler must see the real torch.empty
    model = build("i2v_clip", cases.ATTENTIONS[attention], torch.bfloat16)
    if scheme is not None:
        cases.quantize(model, scheme)
    model.to("cuda")
    given = {name: value.cuda() for name, value in inputs(model.config, grid=cases.GRID).items()}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, mode=mode, fullgraph=True)
        for _ in range(3):
            result = compiled(**given).clone()
        assert relative(result, model(**given)) < 0.05

"""The whole network's inference with every operator as its kernel, against the references."""

from __future__ import annotations

import dataclasses

import fused_cases as cases
import pytest
import torch
from turbokernels import dispatch
from wan_networks import STRUCTURES, inputs, randomise, relative

from turbotrain.model.wan import WanTransformer


@pytest.mark.parametrize(("attention", "scheme"), [("sla", None), ("sage_sla", "int8_channel")])
def test_network_of_kernels(attention: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(STRUCTURES["i2v_clip"], num_layers=1)
    model = cases.smooth(randomise(WanTransformer(config, cases.ATTENTIONS[attention])))
    if scheme is not None:
        cases.quantize(model, scheme, smooth_ffn2=True)
    given = inputs(config, batch=1)
    run = set()

    def choose(op: str, impl: str, device: torch.device, table: dict) -> object:
        run.add(op)
        return table["triton"]

    with torch.no_grad():
        expected, selection = model(**given, return_selection=True)
        monkeypatch.setattr(dispatch, "choose", choose)
        got = model(**given, selection=selection)
    assert {"rms_norm_rope", "add_linear_attention", "gate_residual"} < run
    # An 8-bit rounding may fall otherwise where sums have another order.
    assert relative(got, expected) < (1e-6 if scheme is None else 5e-3)

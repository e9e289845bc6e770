"""The form of a row, the time of a form, and the latencies that a page shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from invented import SHIPPED, SLA, latencies, results

from turbotrain.evidence.forms import Form, form_of, matrix_forms, read_latencies
from turbotrain.evidence.latency import measure_forms
from turbotrain.evidence.matrix import load_matrix
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer

WAN_SLA = AttentionConfig("sla", 0.1, 128, 64, "cube")
SHAPE = (24, 2, 8, 8)


@pytest.mark.parametrize(
    ("attention", "quantize", "name"),
    [
        (AttentionConfig(), {}, "dense"),
        (AttentionConfig(topk=0.5, order="cube"), {}, "dense"),  # what dense attention does not read
        (SLA, {}, "sla 0.1 cube"),
        (AttentionConfig("sla", 0.1, 64, 64), {}, "sla 0.1 raster 64x64"),
        (AttentionConfig("sage_sla", 0.05, 128, 64), {"scheme": "int8_channel"}, "sage_sla 0.05 raster, int8_channel smoothed"),
        (SLA, {"scheme": "fp8_channel", "smooth": False}, "sla 0.1 cube, fp8_channel"),
        (SLA, {"scheme": "int8_block128"}, "sla 0.1 cube, int8_block128"),
        (SLA, {"scheme": "int8_channel", "weights_only": True}, "sla 0.1 cube"),
    ],
)  # fmt: skip
def test_rows_that_run_alike_have_one_form(attention: AttentionConfig, quantize: dict[str, Any], name: str) -> None:
    form = form_of(attention, quantize)
    assert form is not None
    assert form.name == name


def test_a_target_error_has_no_form() -> None:
    assert form_of(SLA, {"scheme": "int8_channel", "target_error": 0.03}) is None


def test_forms_of_a_matrix_are_those_of_its_results() -> None:
    """What is timed before any network is trained is what a row says of its network afterwards."""
    timed = matrix_forms(load_matrix(SHIPPED))
    assert timed[:3] == [Form(AttentionConfig()), Form(WAN_SLA), Form(dataclasses.replace(WAN_SLA, kind="sage_sla"))]
    assert len(timed) == len({form.name for form in timed})
    by_row = {
        (row["cell"], row["row"]): form_of(AttentionConfig.from_dict(row["attention"]), row["quantize"])
        for row in results()["rows"]
        if not row["attention"].get("layer_topk")  # those take the time of the next form that was timed
    }
    # The invented results know no training but dense and top-k: the other two are told apart by their own overrides.
    others = {"sla 0.1 raster", "sla 0.1 cube 64x64"}
    assert {form.name for form in by_row.values() if form} == {form.name for form in timed} - others
    assert by_row["merge", "s4"] == Form(WAN_SLA)
    assert by_row["rcm_staged", "s1"] == Form(AttentionConfig())


def test_a_row_takes_its_passes_times_its_form(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    wide = dataclasses.replace(WAN_SLA, topk=0.3)
    path.write_text(json.dumps(latencies({Form(AttentionConfig()): 0.5, Form(WAN_SLA): 0.2, Form(wide): 0.3}, 0.9)))
    found = read_latencies(path)
    assert found.worst_ratio == 0.9
    row: dict[str, Any] = {"evaluations": 4, "attention": AttentionConfig().to_dict(), "quantize": {}}
    assert found.of(row) == pytest.approx(2.0)
    row["attention"] = SLA.to_dict()
    assert found.of(row) == pytest.approx(0.8)
    row["attention"] = {**SLA.to_dict(), "layer_topk": [0.05, 0.05, 0.1, 0.15]}  # mean 0.0875: at most what 0.1 takes
    assert found.of(row) == pytest.approx(0.8)
    row["attention"] = {**SLA.to_dict(), "layer_topk": [0.05, 0.05, 0.1, 0.3]}
    assert found.of(row) == pytest.approx(1.2)
    row["quantize"] = {"scheme": "int8_channel"}
    assert found.of(row) is None
    assert read_latencies(tmp_path / "absent.json").of(row) is None
    path.write_text("{}")
    with pytest.raises(ValueError, match="not what"):
        read_latencies(path)


def test_every_form_is_timed_and_a_failure_costs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[AttentionConfig, int]] = []
    forward = WanTransformer.forward

    def watched(network: WanTransformer, *given: Any, **options: Any) -> Any:
        layers = [layer for layer in network.modules() if isinstance(layer, QuantLinear)]
        asked.append((network.attention_config, len(layers)))
        if asked[-1][0].topk == 0.5:
            raise RuntimeError("no such kernel")
        return forward(network, *given, **options)

    monkeypatch.setattr(WanTransformer, "forward", watched)
    broken = Form(dataclasses.replace(WAN_SLA, topk=0.5))
    int8 = Form(WAN_SLA, "int8_channel", True)
    forms = [Form(AttentionConfig()), broken, Form(WAN_SLA), int8]
    written: list[int] = []
    found = measure_forms(
        forms,
        VARIANTS["shapes"],
        SHAPE,
        torch.device("cpu"),
        lambda document: written.append(len(document["left"])),
        repeats=2,
        say=lambda _: None,
    )
    assert written == [3, 2, 1, 0]
    assert list(found["forms"]) == [form.name for form in forms]
    assert "no such kernel" in found["forms"][broken.name].pop("error")
    timed = [form for form in found["forms"].values() if "median_s" in form]
    assert len(timed) == 3
    assert all(0 < form["min_s"] <= form["median_s"] <= form["max_s"] for form in timed)
    assert [(one["form"], one["mode"], one["passes"]) for one in found["samplings"]] == [
        ("dense", "teacher", 8), (int8.name, "turbo", 4)
    ]  # fmt: skip
    assert all(one["ratio"] == pytest.approx(one["median_s"] / one["arithmetic_s"]) for one in found["samplings"])
    networks = list(dict.fromkeys(asked))
    assert [attention for attention, _ in networks] == [form.attention for form in forms]
    assert [count > 0 for _, count in networks] == [False, False, False, True]


def test_no_form_begins_when_time_is_up() -> None:
    found = measure_forms(
        [Form(AttentionConfig()), Form(WAN_SLA)],
        VARIANTS["shapes"],
        SHAPE,
        torch.device("cpu"),
        lambda _: None,
        repeats=1,
        minutes=1e-6,
        say=lambda _: None,
    )
    assert (found["forms"], found["left"]) == ({}, ["dense", "sla 0.1 cube"])


def test_networks_that_read_images_are_refused() -> None:
    with pytest.raises(ValueError, match="reads an image"):
        measure_forms([], VARIANTS["wan2.1_i2v_14b"], (16, 1, 2, 2), torch.device("cpu"), lambda _: None)


def test_the_command_writes_what_the_page_reads(
    tool: ModuleType,
    matrix_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "made" / "latency.json"
    call = ["latency", str(matrix_file), "--frames", "5", "--json", str(path)]
    assert tool.main([*call, "--model", "shapes"]) == 0
    document = json.loads(path.read_text())
    assert list(document["forms"]) == ["dense", "sla 0.1 cube", "sla 0.1 cube, int8_channel smoothed"]
    assert (document["video"], document["left"]) == ("5 frames of 64x64", [])
    assert str(path) not in document["command"]
    assert set(read_latencies(path).seconds) == set(document["forms"])
    assert tool.main([*call, "--model", "shapes", "--minutes", "1e-6"]) == 1
    assert "not timed: dense" in capsys.readouterr().err
    assert tool.main([*call, "--model", "wan9"]) == 2
    assert "usage: --model wan9: choose one of" in capsys.readouterr().err
    assert tool.main([*call[:2], "--frames", "0", *call[4:], "--model", "shapes"]) != 0
    assert "frames" in capsys.readouterr().err

"""report.html: everything in one file, nothing from outside, every row there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import ROWS, evaluation, make_run

from turbotrain.evaluation.report import write_report
from turbotrain.evaluation.report_details import quantization_summary, quantized_layers
from turbotrain.evaluation.run_data import read_run


class Checker(HTMLParser):
    """Balanced tags, and every address and text that the document contains."""

    VOID = ("meta", "img", "br", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("outputs") / "demo", prompts=2, steps=80)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def document(run_folder: Path) -> tuple[str, Checker]:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return text, checker


def test_nothing_comes_from_outside(document: tuple[str, Checker]) -> None:
    text, checker = document
    assert checker.addresses
    assert all(address.startswith("data:image/") for address in checker.addresses)
    assert not re.search(r"https?://|//cdn|@import|<script|url\((?!#)", text)


def test_every_row_is_in_the_table(document: tuple[str, Checker]) -> None:
    text, _ = document
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    rows = body.split("</tr>")[:-1]
    assert len(rows) == len(ROWS)
    for row, (_, _, steps, accuracy, _) in zip(rows, ROWS):
        assert f"<td>{steps}</td>" in row
        assert f"{accuracy:.3f}" in row


def test_prompts_curves_layers_and_stages_are_there(run_folder: Path, document: tuple[str, Checker]) -> None:
    text, checker = document
    words = " ".join(checker.text)
    shown = json.loads((run_folder / "evaluate" / "report.json").read_text())["clips"]
    for prompt in shown["prompts"]:
        assert prompt[1:] in words
    for title in ("rcm: consistency (scm)", "rcm: critic", "rcm: score (dmd)", "blocks.3.self_attn.q"):
        assert title in words
    for stage in ("data", "sla", "rcm", "quantize", "evaluate"):
        assert f"<b>{stage}</b>" in text
    assert "0123abcd4567" in words
    assert text.count("<svg") >= 6


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", prompts=1, steps=10)
    path = folder / "evaluate" / "report.json"
    report = json.loads(path.read_text())
    report["clips"]["prompts"] = ["<script>alert(1)</script>"]
    path.write_text(json.dumps(report))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text.lower()
    assert "&lt;script&gt;" in text


def test_a_run_without_evaluation_has_a_report_too(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "sla"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(json.dumps({"status": "running", "started": "2026"}))
    (stage / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(9)))
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h3>sla</h3>" in text
    assert "Quality and speed" not in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no stage\.json below it"):
        write_report(tmp_path)


def test_a_torn_line_and_stale_stages_are_skipped(run_folder: Path) -> None:
    stale = run_folder / "sla.stale-1"
    stale.mkdir()
    (stale / "stage.json").write_text("{}")
    run = read_run(run_folder)
    assert [stage.name for stage in run.stages] == ["data", "sla", "rcm", "quantize", "evaluate"]
    sla = run.stage("sla")
    assert sla is not None
    assert len(sla.metrics) == 80  # the 81st line was torn by a kill


def test_evaluation_json_has_no_nan(tmp_path: Path) -> None:
    result = evaluation(prompts=1)
    result.rows[0]["gap_closed"] = float("nan")
    result.rows[0]["psnr"] = float("inf")
    text = result.save(tmp_path).read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"][0]
    assert row["gap_closed"] is None
    assert row["psnr"] is None


def test_both_experts_of_a_pair_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "pair", prompts=1, steps=4)
    path = folder / "quantize" / "report.json"
    one = json.loads(path.read_text())
    low = {
        "layers": [{**layer, "scheme": "float", "kept_float": "asked"} for layer in one["layers"]],
        "latent_error": 0.5,
    }
    path.write_text(json.dumps({"high": one, "low": low, "latent_errors": [0.04], "latent_error": 0.04}))
    text = write_report(folder).read_text()
    section = text.partition("<h2>Quantization</h2>")[2].partition("<h2>")[0]
    high, _, low_part = section.partition("<h3>low-noise expert</h3>")
    assert "<h3>high-noise expert</h3>" in high
    assert "40 linears" in high
    assert "left unquantized" not in high
    assert "40 left unquantized" in low_part
    assert "both together: latents on held-out prompts differ from the unquantized ones by 4.00%" in section
    assert "2.10%" in high
    assert "50.00%" in low_part


def test_a_quantisation_for_a_time_says_what_was_foretold_and_where() -> None:
    entry = {"scheme": "int8_channel", "sqnr_db": 30.0}
    latency = {"target": 0.7, "predicted": 0.6936, "device": "a <fast> one", "dtype": "bfloat16"}
    report = {"layers": [{"name": "blocks.2.ffn.0", **entry}], "latency": latency}
    said = quantization_summary(report, quantized_layers(report))
    assert "0.694 of their time in bfloat16 (wanted 0.7) on a &lt;fast&gt; one" in said
    without = {**report, "latency": None}
    assert "foretold" not in quantization_summary(without, quantized_layers(without))

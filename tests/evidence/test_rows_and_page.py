"""A cell measured from the shipped teacher, continued, and the page that comes of the results' JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import weakref
from pathlib import Path
from xml.etree import ElementTree

import invented
import pytest
import torch
from safetensors.torch import save_file

from turbotrain.config import load_config, resolve
from turbotrain.evidence import rows
from turbotrain.evidence.claims import CLAIMS, Claim, judge_claim
from turbotrain.evidence.collect import collect, write_results
from turbotrain.evidence.figures import CAPTIONS, figures, pareto_front
from turbotrain.evidence.folders import Folders
from turbotrain.evidence.forms import Form, Latencies, read_latencies
from turbotrain.evidence.matrix import Row, load_matrix
from turbotrain.evidence.page import LATENCIES, between_marks, readme_block, write_page
from turbotrain.evidence.rows import Bench, build, measure_cell
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.pipeline import TurboPipeline
from turbotrain.quant import predicted_error
from turbotrain.records import write_json

METRICS = {"accuracy", "shuffled", "shape", "colour", "size", "direction", "speed", "background", "motion", "steady", "coverage",
           "entropy", "spread", "frechet"}  # fmt: skip
WAN_SLA = AttentionConfig("sla", 0.1, 128, 64, "cube")


@pytest.fixture
def bench(matrix_file: Path, tmp_path: Path) -> Bench:
    matrix = load_matrix(matrix_file)
    folders = Folders(tmp_path / "run", matrix)
    folders.root.mkdir()
    teacher = str(resolve("asset:shapes_teacher"))
    write_json(folders.root / "given.json", {"teacher": teacher, "codec": teacher})
    return Bench(folders, load_config([f"recipe={matrix.recipe}", *matrix.common]), torch.device("cpu"))


def test_rows_are_measured_once_collected_and_shown(bench: Bench, tmp_path: Path) -> None:
    folders, matrix = bench.folders, bench.folders.matrix
    said: list[str] = []
    measure_cell(bench, matrix.cells[0], say=said.append)
    assert len(said) == 1
    measure_cell(bench, matrix.cells[0], say=said.append)  # all there
    assert len(said) == 1
    untuned = dataclasses.replace(
        matrix.cell("copy"),
        network="teacher",
        rows=(
            Row("sparse", 1, attention={"kind": "sla", "topk": 0.25, "block_q": 16, "block_k": 16}, layer_budget=0.25),
            Row("int8", 1, quantize={"scheme": "int8_channel", "weights_only": True}),
        ),
    )
    measure_cell(bench, untuned, say=said.append)
    assert len(said) == 3
    broken = dataclasses.replace(untuned, rows=(Row("x", 1, quantize={"scheme": "int3"}), Row("y", 1), Row("z", 1)))
    with pytest.raises(ValueError, match="rows x failed"):
        measure_cell(bench, dataclasses.replace(broken, rows=broken.rows[:2]), say=said.append)
    measure_cell(bench, broken, "z", said.append)
    with pytest.raises(ValueError, match="--row w: copy has x, y, z"):
        measure_cell(bench, broken, "w", said.append)
    assert [folders.result(broken, row).is_file() for row in broken.rows] == [False, True, True]
    found = {path.stem: json.loads(path.read_text()) for path in (folders.root / "results").rglob("*.json")}
    assert set(found["s2"]["metrics"]) == METRICS
    assert set(found["sparse"]["metrics"]) == METRICS | {"psnr", "ssim"}
    assert found["sparse"]["clips"] == 4
    assert sum(found["sparse"]["attention"]["layer_topk"]) / 4 <= 0.25
    document = collect(folders)
    assert [row["row"] for row in document["rows"]] == ["s2"]
    assert document["environment"]["torch"] == torch.__version__
    write_results(tmp_path / "made" / "results.json", document)
    assert json.loads((tmp_path / "made" / "results.json").read_text()) == document
    page, *_ = sorted(write_page(tmp_path / "made" / "results.json", tmp_path / "docs" / "evidence.md"))
    text = page.read_text()
    value = found["s2"]["metrics"]["accuracy"][0]
    assert f"| the teacher | 2 | {value:.3f} [" in text
    assert "1 of the\n5 rows" in text
    assert found["s2"]["film_prompt"] == bench.trial.captions[0]


def test_a_row_that_failed_leaves_its_memory_to_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.nn.Module]] = []
    said: list[str] = []
    cell = bench.folders.matrix.cells[0]
    cell = dataclasses.replace(cell, rows=(Row("a", 1), Row("b", 1)))

    def out_of_memory(pipe: TurboPipeline, *_: object) -> None:
        assert all(network() is None for network in held)
        held.append(weakref.ref(pipe.experts[0]))
        raise RuntimeError("out of memory")

    bench.folders.real_features.parent.mkdir()
    save_file({"features": torch.zeros(4, 128)}, bench.folders.real_features)
    monkeypatch.setattr(rows, "sample_trial", out_of_memory)
    with pytest.raises(ValueError, match="rows a, b failed"):
        measure_cell(bench, cell, say=said.append)
    assert len(held) == 2
    assert all("out of memory" in line and "Traceback" in line for line in said)


def test_quantised_rows_say_what_it_cost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALIBRATION", "HELD_OUT", "FINETUNE"):
        monkeypatch.setattr(rows, name, 1)
    options = {"scheme": "int8_channel", "smooth": False, "target_error": 0.01, "finetune": 1}
    row = Row("mixed", 4, quantize=options)
    network, facts = build(bench, dataclasses.replace(bench.folders.matrix.cells[0], rows=(row,)), row)
    assert 0 < len(facts["kept_float"]) < len(facts["sensitivity"])
    (error,) = facts["latent_errors"]
    assert error < predicted_error(facts["sensitivity"])
    assert (facts["finetune"]["steps"], facts["finetune"]["passes"]) == (1, 4)
    assert error <= facts["finetune"]["latent_error_before"]
    assert set(facts["sqnr_db"]) == set(facts["sensitivity"])
    kept = facts["kept_float"][0]
    assert isinstance(network.get_submodule(kept), torch.nn.Linear)


def test_every_figure_is_drawn_from_its_rows() -> None:
    rows = {(row["cell"], row["row"]): row for row in invented.results()["rows"]}
    by_passes = figures(rows)
    by_latency = figures({key: {**row, "latency_s": 0.2 * row["evaluations"]} for key, row in rows.items()})
    assert set(by_passes) | set(by_latency) == set(CAPTIONS)
    assert not any("pareto" in name for name in by_passes)
    for name, svg in {**by_passes, **by_latency}.items():
        drawing = ElementTree.fromstring(svg)
        assert drawing.tag.endswith("svg"), name
        lines = [part for part in drawing.iter("{http://www.w3.org/2000/svg}line") if part.get("class") == "grid"]
        dots = [float(part.get("cx", 0)) for part in drawing.iter("{http://www.w3.org/2000/svg}circle")]
        if dots:  # none beside the axes
            ends = [float(part.get(end, 0)) for part in lines for end in ("x1", "x2")]
            assert min(ends) <= min(dots), name
            assert max(dots) <= max(ends), name
    # The front is a staircase over what it bounds, to the dearest point, and hides none of them.
    drawn = list(ElementTree.fromstring(by_latency["evidence_pareto_accuracy.svg"]).iter())
    lines = [part.get("points", "") for part in drawn if part.get("class", "").startswith("line s-front dashed")]
    stairs = [tuple(map(float, point.split(","))) for point in lines[0].split()]
    assert all((a[0] == b[0]) != (a[1] == b[1]) for a, b in itertools.pairwise(stairs[:-1]))
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(stairs))
    dots = [part for part in drawn if part.get("class", "").startswith("dot")]
    assert stairs[-1][0] == max(float(part.get("cx", 0)) for part in dots)
    assert not any("s-front" in part.get("class", "") for part in dots)
    sqnr = rows["turbo", "int8_4"]["facts"]["sqnr_db"]["blocks.1.ffn.0"]
    assert f"block 1 ffn.0: {sqnr[0]:.1f} dB" in by_passes["evidence_sqnr.svg"]
    # Layer 2 keeps 0.34, 0.54, ..., 1: the mean over its heads at every top-k.
    assert all(f"layer 2: {share:.3f}" in by_passes["evidence_mass.svg"] for share in (0.34, 0.54, 0.97, 1.0))
    assert figures({}) == {}


def test_the_front_is_what_nothing_as_fast_beats() -> None:
    points = [(4.0, 0.9), (1.0, 0.5), (2.0, 0.9), (1.0, 0.7), (3.0, 0.8), (8.0, 0.95)]
    assert pareto_front(points) == [(1.0, 0.7), (2.0, 0.9), (8.0, 0.95)]
    assert pareto_front([]) == []


def test_the_page_and_the_readme_say_what_the_files_say(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", invented.results())
    dense, turbo = Form(AttentionConfig()), Form(WAN_SLA, "int8_channel", True)
    write_json(tmp_path / LATENCIES, invented.latencies({dense: 0.5, turbo: 0.125}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- evidence -->\nnothing yet\n<!-- /evidence -->\nafter\n")
    page = tmp_path / "docs" / "evidence.md"
    written = write_page(tmp_path / "results.json", page)
    assert {page, readme} < set(written)
    found = {row["cell"]: row["metrics"]["accuracy"][0] for row in invented.results()["rows"] if row["row"] == "s20"}
    apart = abs(found["sla010"] - found["sla010_again"])
    for text in (page.read_text(), readme.read_text()):
        headline = {tuple(line.split(" | ")[:2]): line for line in text.splitlines() if line.endswith("` |")}
        assert headline["| teacher, UniPC, guidance 3", "50"].count(" | 50.00 s | ") == 1
        turbo_line = headline["| Turbo: SLA 0.1 + rCM + int8", "4"]
        assert turbo_line.endswith(" | 0.50 s | `--only turbo` |")
        given = "--teacher asset:shapes_h200 --codec asset:shapes_h200"
        assert f"`python tools/evidence.py run configs/evidence/shapes_h200.yaml {given}` with its options" in text
        assert headline["| SLA, top-k 0.1", "20"].count(" |  | ") == 1  # no such form was timed
        assert "took 1.02 of it" in text
        assert f"trained a second time with another seed, differs by {apart:.3f} in accuracy." in text
        assert "By other prompts' captions the teacher's videos have an accuracy of 0.350: chance." in text
    assert "| SLA 0.1, then rCM staged | 4 |" in page.read_text()
    assert readme.read_text().startswith("before\n<!-- evidence -->\n| method | steps | accuracy")
    assert readme.read_text().endswith("\n<!-- /evidence -->\nafter\n")
    assert "nothing yet" not in readme.read_text()
    total = len(load_matrix(invented.SHIPPED).rows)
    assert f"\n{total} of the matrix's {total} rows are in. Verdicts on {len(CLAIMS)} claims: " in readme.read_text()
    assert readme not in write_page(tmp_path / "results.json", page)  # as it is already


def test_a_claim_that_its_interval_leaves_open_is_not_counted_with_those_that_hold() -> None:
    document = {**invented.results(), "rows": []}
    found = {(row["cell"], row["row"]): row for row in invented.results()["rows"]}

    def readme(student: list[float]) -> str:
        kept = {key: found[key] for key in (("teacher", "s50"), ("rcm_staged", "s4"))}
        kept["teacher", "s50"] = {**kept["teacher", "s50"], "metrics": {"accuracy": [0.97, 0.96, 0.98]}}
        kept["rcm_staged", "s4"] = {**kept["rcm_staged", "s4"], "metrics": {"accuracy": student}}
        return readme_block(document, kept, Latencies({}, {}))

    waiting = f"waits for rows ({len(CLAIMS) - 1})"
    for student, word in ((0.99, "holds"), (0.955, "holds, not significantly"), (0.94, "fails, not significantly")):
        assert f"claims: {word} (1); {waiting}." in readme([student, student - 0.01, student + 0.01])


def test_rows_of_a_group_of_their_own_and_shared_out_top_ks_are_on_the_page(tmp_path: Path) -> None:
    document = invented.results()
    document["rows"] = [{**row, "group": "ours"} for row in document["rows"] if row["row"] == "layers"]
    write_json(tmp_path / "results.json", document)
    write_page(tmp_path / "results.json", tmp_path / "page.md")
    section = (tmp_path / "page.md").read_text().partition("## ours\n")[2].partition("## ")[0]
    assert "| the same, top-k 0.1 on average, by layer: 0.05, 0.05, 0.1, 0.15 | 20 |" in section


def test_what_quantisation_did_and_what_films_show_is_on_the_page(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {**invented.results(), "overrides": ["sla.steps=9"]})
    write_page(tmp_path / "results.json", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    found = {cells["method"]: cells for cells in _section(text, "Quantisation")}
    mixed = found["int8, as many linears in float as a latent error of 0.03 takes"]
    assert (mixed["latent error"], mixed["in float"]) == ("0.021", "3 of 40")
    tuned = "SmoothQuant, 200 steps of fine-tuning"
    assert f"int8 channel x token, {tuned}" in found
    assert f"int8 128x128 blocks, {tuned} (no lower error: the untuned weights)" in found
    assert "Overrides of every training: `sla.steps=9`." in text
    assert "*One prompt from the same noise, six of the frames. Prompt: a red circle on white.*" in text


def _section(page: str, title: str) -> list[dict[str, str]]:
    """The rows of a section's table."""
    lines = page.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    titles, _, *cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if line[:1] == "|"]
    return [dict(zip(titles, row, strict=True)) for row in cells]


def test_tables_begin_with_what_their_rows_are_measured_against(tmp_path: Path) -> None:
    document = invented.results()
    found = {(row["cell"], row["row"]): row for row in document["rows"]}
    base, int8 = found["turbo", "s4"], found["schemes", "int8_plain"]
    base["metrics"]["accuracy"], int8["metrics"]["accuracy"] = [0.95, 0.9, 1.0], [0.94, 0.9, 1.0]
    base["accuracy_by_prompt"], int8["accuracy_by_prompt"] = [0.9, 1.0] * 50, [0.89, 0.99] * 50
    write_json(tmp_path / "results.json", document)
    write_page(tmp_path / "results.json", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    first, second = _section(text, "Quantisation")[:2]
    assert (first["method"], first["against the first"]) == ("SLA 0.1, then rCM staged", "")
    assert second["against the first"] == "-0.010 [-0.010, -0.010]"
    assert [row["steps"] for row in _section(text, "Composition")[:4]] == ["4", "2", "1", "4"]
    teacher = _section(text, "The teacher")
    assert [row["steps"] for row in teacher[:2]] == ["50", "20"]  # its own first row, once
    assert teacher[1]["against the first"]
    write_json(tmp_path / "results.json", {**document, "rows": [int8]})
    write_page(tmp_path / "results.json", tmp_path / "page.md")
    (row,) = _section((tmp_path / "page.md").read_text(), "Quantisation")
    assert "against the first" not in row


def test_rows_of_sla_stand_by_kind_and_rising_top_k(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", invented.results())
    write_page(tmp_path / "results.json", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    found = [row["method"] for row in _section(text, "Sparse-linear attention")]
    by_layer = ": 0.05, 0.05, 0.1, 0.15"
    same = ["the same in 8 bits (SageSLA)", f"the same, top-k 0.1 on average, by layer{by_layer}"]
    tuned = [f"SLA, top-k {topk}" for topk in ("0.025", "0.05", "0.1", "0.15", "0.2", "0.3", "0.5", "1.0")]
    sparse = [f"sparse attention alone, top-k {topk}, fine-tuned" for topk in ("0.025", "0.05", "0.1")]
    untuned = [f"no fine-tuning, top-k {topk}" for topk in (f"0.1 on average, by layer{by_layer}", "0.1", "0.3", "1.0")]
    assert found[0] == "teacher, UniPC, guidance 3"
    assert found[1:11] == [*tuned[:3], *same, *tuned[3:]]
    assert found[11:14] == sparse
    assert found[found.index("SLA, top-k 0.1, blocks of 64x64") + 1] == "the same, inferred with 128x64"
    assert found[-4:] == untuned
    by_attribute = [row["method"] for row in _section(text, "By attribute")]
    start = by_attribute.index(tuned[0])
    assert by_attribute[start : start + len(found) - 1] == found[1:]
    assert len(by_attribute) == len(invented.results()["rows"])


@pytest.mark.parametrize("text", ["", "<!-- evidence -->", "<!-- /evidence --><!-- evidence -->", "no marks"])
def test_a_readme_without_its_marks_stays(text: str) -> None:
    assert between_marks(text, "block") == text


def test_the_readme_that_ships_has_its_marks_and_agrees_with_the_results_that_ship() -> None:
    repository = Path(__file__).resolve().parents[2]
    readme = (repository / "README.md").read_text()
    assert between_marks(readme, "block") != readme
    results = repository / "docs" / "measurements" / "h200_evidence.json"
    if results.is_file():
        document = json.loads(results.read_text())
        latencies = read_latencies(results.parent / LATENCIES)
        rows = {(row["cell"], row["row"]): {**row, "latency_s": latencies.of(row)} for row in document["rows"]}
        assert between_marks(readme, readme_block(document, rows, latencies)) == readme
    else:
        assert "has not been run yet" in readme


def test_claims_hold_fail_or_stay_open() -> None:
    def pair(left: list[float], right: list[float]):
        found: dict = {("a", "x"): {"metrics": {"accuracy": left}}, ("b", "x"): {"metrics": {"accuracy": right}}}
        return found

    claim = Claim("a within 2 points of b", ("a", "x"), ("b", "x"), margin=0.02)
    for left, word in (
        (0.95, "holds"),
        (0.925, "holds, not significantly"),
        (0.915, "fails, not significantly"),
        (0.8, "fails"),
    ):
        verdict = judge_claim(claim, pair([left, left - 0.01, left + 0.01], [0.94, 0.93, 0.95]))
        assert verdict is not None
        assert verdict.word == word
        assert verdict.difference == pytest.approx(left - 0.92)
        assert verdict.high - verdict.low == pytest.approx(2 * 0.01 * 2**0.5)
    assert judge_claim(claim, pair([0.9, None, None], [0.9, 0.9, 0.9])) is None
    # Rows that differ alike on every prompt differ for certain, however much prompts differ.
    rows = pair([0.93, 0.8, 1.0], [0.94, 0.8, 1.0])
    rows["b", "x"]["accuracy_by_prompt"] = [0.9, 0.96, 0.96] * 20
    rows["a", "x"]["accuracy_by_prompt"] = [value - 0.01 for value in rows["b", "x"]["accuracy_by_prompt"]]
    verdict = judge_claim(claim, rows)
    assert verdict is not None
    assert verdict.paired
    assert (verdict.low, verdict.high) == pytest.approx((0.01, 0.01))
    # Numbers by prompt whose mean is not the metric's (the jackknife's of coverage): around the difference all the same.
    rows["a", "x"]["accuracy_by_prompt"] = [value + 0.5 for value in rows["b", "x"]["accuracy_by_prompt"]]
    verdict = judge_claim(claim, rows)
    assert verdict is not None
    assert (verdict.low, verdict.high) == pytest.approx((0.01, 0.01))
    rows["a", "x"]["accuracy_by_prompt"][0] = None
    verdict = judge_claim(claim, rows)
    assert verdict is not None
    assert not verdict.paired
    assert judge_claim(claim, {}) is None


def test_rows_of_several_machines_are_said_to_be(matrix_file: Path, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run", load_matrix(matrix_file))
    for (cell, row), device in zip(folders.matrix.rows, ("NVIDIA H200", "NVIDIA A100", "NVIDIA H200")):
        path = folders.result(cell, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"row": row.name, "environment": {"device": device, "cores": 4, "torch": "2.11.0"}})
    document = collect(folders)
    assert document["environment"] == {"device": "NVIDIA H200, NVIDIA A100", "cores": 4, "torch": "2.11.0"}
    assert all("environment" not in row for row in document["rows"])


def test_results_without_rows_are_a_file_too(tmp_path: Path) -> None:
    document = {**invented.results(), "rows": []}
    write_results(tmp_path / "results.json", document)
    assert json.loads((tmp_path / "results.json").read_text()) == document


def test_the_shipped_matrix_has_every_row_that_a_claim_compares() -> None:
    matrix = load_matrix(Path(__file__).resolve().parents[2] / "configs" / "evidence" / "shapes_h200.yaml")
    keys = {(cell.name, row.name) for cell, row in matrix.rows}
    assert {key for claim in CLAIMS for key in (claim.left, claim.right)} <= keys


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not the results"):
        write_page(tmp_path / "x.json", tmp_path / "page.md")

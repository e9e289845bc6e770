"""Every kind of row that the shipped matrix has can be built and run: a row that cannot is found here, and not after an hour's
training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from invented import SHIPPED

from turbotrain.checkpoint import CheckpointMeta, load_transformer, save_checkpoint
from turbotrain.config import load_config, resolve
from turbotrain.evidence import rows
from turbotrain.evidence.folders import Folders
from turbotrain.evidence.matrix import Cell, Matrix, Row, load_matrix
from turbotrain.evidence.rows import Bench, build
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.records import write_json

SLA = AttentionConfig("sla", 0.1, 16, 16, "cube")


def kinds(matrix: Matrix) -> Iterator[tuple[Cell, Row]]:
    """The first row of every way to make a network, however many steps it then takes."""
    seen: set[str] = set()
    for cell, row in matrix.rows:
        kind = json.dumps([cell.network == "merge", row.attention, row.layer_budget, row.mass, row.quantize])
        if kind not in seen:
            seen.add(kind)
            yield cell, row


def save(network: WanTransformer, folder: Path) -> None:
    attention = network.attention_config.to_dict()
    meta = CheckpointMeta(variant="shapes", config=network.config.to_dict(), attention=attention)
    save_checkpoint(folder, network.state_dict(), meta)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The shipped matrix over small clips; every network that is trained is the teacher."""
    matrix = load_matrix(SHIPPED)
    root, asset = tmp_path_factory.mktemp("run"), resolve(f"asset:{matrix.recipe}")
    write_json(root / "given.json", {"teacher": str(asset), "codec": str(asset)})
    folders = Folders(root, matrix)
    for name, attention in {"sla010": SLA, "turbo": SLA, "blocks64": SLA, "rcm_staged": AttentionConfig()}.items():
        save(load_transformer(asset, dtype=torch.float32, attention=attention), folders.checkpoint(matrix.cell(name)))
    config = load_config([f"recipe={matrix.recipe}", *matrix.common, "launch.device=cpu", "data.frames=5"])
    return Bench(folders, config, torch.device("cpu"))


def test_every_kind_of_the_shipped_matrix_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALIBRATION", "HELD_OUT", "FINETUNE", "MASS_CLIPS"):
        monkeypatch.setattr(rows, name, 1)
    monkeypatch.setattr(rows, "DEFAULT_ALPHAS", (0.5,))
    call = next(rows.calibration_calls(bench, 1))
    tried: dict[str, set[str]] = {}
    for cell, row in kinds(bench.folders.matrix):
        if row.quantize.get("finetune"):
            row = dataclasses.replace(row, quantize={**row.quantize, "finetune": 1})
        network, facts = build(bench, cell, row)
        assert bool(torch.isfinite(call(network)).all()), (cell.name, row.name)
        assert network.attention_config.kind == row.attention.get("kind", network.attention_config.kind)
        tried[f"{cell.name}/{row.name}"] = set(facts)
    assert {"sla010/sage", "turbo/int8_4", "untuned/topk100", "schemes/int8_mixed", "schemes/block_tuned", "merge/s4",
            "schemes/weights_fp8", "blocks64/wide"} <= set(tried)  # fmt: skip
    assert tried["untuned/topk100"] == {"attention_mass"}
    assert {"latent_errors", "kept_float", "finetune"} < tried["schemes/block_tuned"]


def test_a_merge_adds_what_sparse_attention_learnt(bench: Bench) -> None:
    """W = W_rcm + W_sla - W_teacher: of three equal networks the same, and with SLA's own projections."""
    matrix = bench.folders.matrix
    cell = matrix.cell("merge")
    folder = bench.folders.checkpoint(matrix.cell("sla010"))
    trained = load_transformer(folder)
    name, projection = "blocks.1.ffn.0.weight", "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"
    with torch.no_grad():
        trained.get_parameter(name).add_(0.5)
        trained.get_parameter(projection).fill_(0.25)
    save(trained, folder)
    merged, _ = build(bench, cell, cell.rows[0])
    teacher = load_transformer(bench.folders.checkpoint(matrix.cells[0]), dtype=torch.float32)
    assert merged.attention_config == SLA
    assert torch.allclose(merged.get_parameter(name), teacher.get_parameter(name) + 0.5, atol=1e-6)
    assert torch.equal(merged.get_parameter(projection), trained.get_parameter(projection))

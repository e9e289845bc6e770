"""tools/merge.py: W = base + w (target - anchor), what becomes of tensors that are not shared, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import merge as tool
import pytest
import torch
from conversions import CONFIG, make, network, quantized, save, stored
from safetensors.torch import save_file

from turbotrain.checkpoint import load_transformer, read_meta
from turbotrain.checkpoint.identify import identify
from turbotrain.checkpoint.layouts import PUBLISHED_SLA
from turbotrain.checkpoint.merge import merge_keys, merge_tensor
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", 0.25, 64, 64)


def arguments(folder: Path, *more: str) -> list[str]:
    roles = [f"--{role}={folder / role}" for role in ("base", "target", "anchor")]
    return [*roles, f"--output={folder / 'merged'}", *more]


def save_three(folder: Path, base: WanTransformer, target: WanTransformer, anchor: WanTransformer) -> None:
    for name, model in (("base", base), ("target", target), ("anchor", anchor)):
        save(folder / name, model, sampler={"sigma_max": 80.0} if name == "base" else None)


def test_the_formula_and_the_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """rCM and SLA trained apart: P comes from SLA, and with it how attention is sparse."""
    base, target, anchor = network(seed=1), network(attention=SLA, seed=2), network(seed=3)
    save_three(tmp_path, base, target, anchor)
    assert tool.main(arguments(tmp_path, "--weight", "0.5", "--verify")) == 0
    said = capsys.readouterr().out
    assert "merged: 69 tensors, weight 0.5" in said
    assert "added: 4 (blocks.0.self_attn.attn_op.local_attn.proj_l.bias" in said
    assert "verified: 73 tensors equal the sum computed again" in said
    merged = load_transformer(tmp_path / "merged")
    assert merged.attention_config == SLA
    one, two, three = (model.state_dict() for model in (base, target, anchor))
    for name, tensor in merged.state_dict().items():
        if ".proj_l." in name:
            assert torch.equal(tensor, two[name])
        else:
            exact = one[name].double() + 0.5 * (two[name].double() - three[name].double())
            # The difference and the sum are rounded to float32, once each.
            bound = 2**-24 * (one[name].double().abs() + two[name].double().abs() + three[name].double().abs())
            assert ((tensor.double() - exact).abs() <= bound).all(), name
    meta = read_meta(tmp_path / "merged")
    assert meta.sampler == {"sigma_max": 80.0}
    files = {role: ["model.safetensors"] for role in ("base", "target", "anchor")}
    assert meta.lineage[-1] == {"stage": "merge", "weight": 0.5, "files": files}


def test_weight_zero_keeps_the_base_and_weight_one_from_the_anchor_gives_the_target(tmp_path: Path) -> None:
    save_three(tmp_path, network(seed=1), network(seed=2), network(seed=3))
    assert tool.main(arguments(tmp_path, "--weight", "0")) == 0
    base, merged = stored(tmp_path / "base"), stored(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


def test_half_precision_is_summed_in_float32() -> None:
    base, target, anchor = (torch.randn(1000).bfloat16() for _ in range(3))
    exact = base.double() + 4.0 * (target.double() - anchor.double())
    merged = merge_tensor(base, target, anchor, 4.0)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())


def test_experts_have_weights_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan 2.2 I2V: the change of a T2V network, whose input is narrower, is added to both experts but for the input."""
    wide = dataclasses.replace(CONFIG, in_channels=9, model_type="i2v")
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        (tmp_path / "base" / name).mkdir(parents=True)
        save_file(dict(network(wide, seed=seed).state_dict()), tmp_path / "base" / name / "model.safetensors")
    save(tmp_path / "target", network(seed=5))
    torch.save({f"net.{n}": t for n, t in network(seed=6).state_dict().items()}, tmp_path / "anchor.pth")
    roles = [f"--base={tmp_path / 'base'}", f"--target={tmp_path / 'target'}", f"--anchor={tmp_path / 'anchor.pth'}"]
    there = [f"--output={tmp_path / 'merged'}", "--weight", "high=4.0", "low=1.0"]
    assert tool.main([*roles, *there]) == 1
    assert "1 tensors differ in shape: patch_embedding.weight" in capsys.readouterr().err
    assert tool.main([*roles, *there, "--keep", r"^patch_embedding\.weight$"]) == 0
    said = capsys.readouterr().out
    assert "high: merged: 68 tensors, weight 4" in said
    assert "low: kept: 1 (patch_embedding.weight)" in said
    assert list(identify(tmp_path / "merged").networks) == ["high", "low"]
    change = {n: t - network(seed=6).state_dict()[n] for n, t in network(seed=5).state_dict().items()}
    for seed, (name, weight) in enumerate((("high", 4.0), ("low", 1.0))):
        merged, base = load_transformer(tmp_path / "merged" / name).state_dict(), network(wide, seed=seed).state_dict()
        assert torch.equal(merged["patch_embedding.weight"], base["patch_embedding.weight"])
        assert torch.equal(
            merged["blocks.1.ffn.2.weight"], base["blocks.1.ffn.2.weight"] + weight * change["blocks.1.ffn.2.weight"]
        )


def test_other_layouts_come_out(tmp_path: Path) -> None:
    save_three(tmp_path, network(seed=1), network(attention=PUBLISHED_SLA, seed=2), network(seed=3))
    there = [*arguments(tmp_path)[:3], f"--output={tmp_path / 'a.pth'}", "--to", "turbodiffusion", "--verify"]
    assert tool.main(there) == 0
    assert identify(tmp_path / "a.pth").first.attention == PUBLISHED_SLA


def test_fates_of_names() -> None:
    p, q = "blocks.0.self_attn.attn_op.local_attn.proj_l.weight", "head.head.bias"
    assert merge_keys({q}, {q, p}, {q}).added == [p]
    assert merge_keys({q, p}, {q}, {q}).kept == [p]
    assert merge_keys({q, p}, {q, p}, {q, p}).merged == sorted([p, q])
    assert merge_keys({q, p}, {q, p}, {q}, keep=["proj_l"]).kept == [p]
    assert merge_keys({q, p}, {q, p}, {q}, add=["proj_l"]).added == [p]
    assert merge_keys({q, p}, {q, p}, {q}, drop=["proj_l"]).dropped == [p]
    with pytest.raises(ValueError, match=r"the base has SLA's projections .*composition=sequential.* keep .* add "):
        merge_keys({q, p}, {q, p}, {q})
    with pytest.raises(ValueError, match="1 in anchor only: x"):
        merge_keys({q}, {q}, {q, "x"})


def other(folder: Path, role: str, model: WanTransformer, scheme: str | None = None) -> None:
    save(folder / role, model, scheme)


def nan(folder: Path) -> None:
    model = network(seed=2)
    with torch.no_grad():
        model.get_parameter("blocks.0.ffn.0.weight")[0, 0] = float("nan")
    other(folder, "target", model)


def pair(folder: Path, role: str) -> None:
    (folder / role / "model.safetensors").unlink()
    for name in ("high", "low"):
        save(folder / role / name, network())


def heads(folder: Path) -> None:
    other(folder, "anchor", network(dataclasses.replace(CONFIG, num_heads=2)))


def incomplete(folder: Path) -> None:
    state = stored(folder / "anchor")
    del state["head.head.bias"]
    save_file(state, folder / "anchor" / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "shape": (
        lambda f: other(f, "anchor", network(dataclasses.replace(CONFIG, ffn_dim=256))),
        [],
        "6 tensors differ in shape",
    ),
    "keys": (lambda f: other(f, "anchor", network(attention=SLA)), [], "4 in anchor only"),
    "layers": (
        lambda f: other(f, "base", network(dataclasses.replace(CONFIG, num_layers=3))),
        [],
        "27 in base only: blocks.2",
    ),
    "dtype": (
        lambda f: other(f, "anchor", network().set_weight_dtype(torch.bfloat16)),
        [],
        "differ in dtype: .*bfloat16",
    ),
    "8 bits": (lambda f: other(f, "base", quantized("int8_channel"), "int8_channel"), [], "base has 8-bit weights"),
    "nan": (nan, [], r"blocks\.0\.ffn\.0\.weight.*not finite"),
    "heads": (heads, [], "differ in heads"),
    "incomplete": (incomplete, [], "1 missing: head.head.bias"),
    "two targets": (lambda f: pair(f, "target"), [], "the target has two experts, the base one network"),
    "weights of experts": (lambda f: None, ["--weight", "high=1", "low=2"], "has one network: one weight"),
    "exists": (lambda f: make("dense", f / "merged"), [], "--force replaces it"),
    "missing": (lambda f: (f / "anchor" / "model.safetensors").unlink(), [], "is it a checkpoint folder"),
    "replaces its base": (lambda f: None, ["--output=base", "--force"], "would replace"),
    "target holds no P": (lambda f: other(f, "target", network(attention=SLA)), ["--to", "official"], "4 tensors of P"),
}
USAGE: dict[str, tuple[list[str], str]] = {
    "no number": (["--weight", "much"], "--weight much: a number"),
    "infinite": (["--weight", "inf"], "must be finite"),
    "one side": (["--weight", "high=1"], "one number, or high=NUMBER low=NUMBER"),
    "pattern": (["--keep", "("], "is no regular expression"),
    "same": (["--anchor=target"], "their difference is nothing"),
    "unknown": (["--fast"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", [*REFUSED, *USAGE])
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_three(tmp_path, network(seed=1), network(seed=2), network(seed=3))
    monkeypatch.chdir(tmp_path)
    prepare, more, expected = REFUSED[case] if case in REFUSED else (lambda folder: None, *USAGE[case])
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        status = tool.main([*arguments(Path()), *more])
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr().err.strip()
    assert status == (1 if case in REFUSED else 2)
    assert re.search(expected, said), said
    assert "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_dtypes_may_differ_where_that_is_said(tmp_path: Path) -> None:
    save_three(tmp_path, network(seed=1), network(seed=2), network(seed=3).set_weight_dtype(torch.bfloat16))
    assert tool.main(arguments(tmp_path, "--any-dtype")) == 0
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {torch.float32}

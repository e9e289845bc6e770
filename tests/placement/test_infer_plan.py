"""infer.py's placement: its keys, the plan at its start, what it says when memory runs out; and tools/plan.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plan as plan_tool
import pytest
import torch
from tiny import write_checkpoint

from turbotrain import inference
from turbotrain.compose import UsageError
from turbotrain.infer_checks import load_request
from turbotrain.infer_config import InferConfig
from turbotrain.infer_plan import choices, gpu_of, job_of, memory_bytes, out_of_memory, plan_run, tile_pixels
from turbotrain.loading import Source, read_source
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.pipeline import TurboPipeline
from turbotrain.placement.budget import CONTEXT, Job, Setting
from turbotrain.placement.gpus import GPUS, MEASURED
from turbotrain.placement.plan import DoesNotFit, available_of, choose, usable

GB = 10**9
LARGE = Job(VARIANTS["wan2.1_t2v_14b"], 81, 720, 1280, AttentionConfig("sage_sla", block_q=128), "int8_channel")
PROMPT = "prompt=a small red circle moves left slowly on a black background"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("placed") / "checkpoint")


def source_of(name: str, **meta: Any) -> Source:
    variant = VARIANTS[name]
    told = {
        "attention": LARGE.attention.to_dict(),
        "quantization": {"scheme": "int8_channel"},
        "config": variant.config.to_dict(),
    }
    return Source(Path(), (), (SimpleNamespace(**{**told, **meta}),), variant, None)  # type: ignore[arg-type]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_sizes_of_memory_say_their_unit() -> None:
    assert memory_bytes("auto") is None
    assert memory_bytes("12GB") == 12 * GB
    assert memory_bytes("11.5 GiB") == 11.5 * 2**30
    assert memory_bytes("6000MB") == 6 * GB
    for value in ("12", "GB", "12 apples", "-1GB", "0GB", ""):
        with pytest.raises(UsageError, match=f"memory={value!r}: say auto, or a size such as 12GB"):
            memory_bytes(value)


def test_tiles_are_cells_of_every_vae() -> None:
    assert tile_pixels("auto") is None
    assert tile_pixels("none") == 0
    assert tile_pixels("512") == 512
    for value in ("100", "64", "-512", "large", "500"):
        with pytest.raises(UsageError, match=f"vae_tiling={value!r}: say auto, none, or a multiple of 16"):
            tile_pixels(value)


def test_only_what_is_said_limits_the_plan() -> None:
    assert choices(InferConfig()) == {}
    config = InferConfig(offload="blocks", vae_tiling="none", text_device="cuda", cuda_graphs=False)
    assert choices(config) == {
        "offload": ("blocks",),
        "vae_tile": (None,),
        "text": ("stay", "visit"),
        "graphs": (False,),
    }
    assert choices(InferConfig(text_device="stream", vae_tiling="256")) == {"text": ("stream",), "vae_tile": (256,)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("offload=disk", "offload='disk': choose one of auto, none, model, blocks"),
        ("memory=12", "memory='12': say auto, or a size such as 12GB"),
        ("vae_tiling=7", "vae_tiling='7': say auto, none, or a multiple of 16"),
        ("text_device=tpu", "text_device='tpu': choose one of auto, stay, visit, stream, cpu, cuda"),
    ],
)
def test_bad_keys_are_usage_errors(checkpoint: Path, argument: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_request([f"checkpoint={checkpoint}", PROMPT, argument])


@pytest.mark.parametrize("place", ["stay", "visit", "stream", "cpu"])
def test_the_text_encoder_may_be_anywhere(checkpoint: Path, place: str) -> None:
    random = [
        "mode=benchmark",
        "weights=random",
        "variant=wan2.1_t2v_14b",
        "memory=12GB",
        "offload=blocks",
        "vae_tiling=512",
    ]
    for arguments in ([f"checkpoint={checkpoint}", PROMPT], random):
        assert load_request([*arguments, f"text_device={place}"]).config.text_device == place


# ---- the job that a command line means -------------------------------------------------------------------------------


def test_a_command_line_is_a_job() -> None:
    job = job_of(InferConfig(resolution="720p", batch_size=4), source_of("wan2.1_t2v_14b"), 3)
    assert job == Job(VARIANTS["wan2.1_t2v_14b"], 81, 720, 1280, LARGE.attention, "int8_channel", batch=3)
    teacher = InferConfig(sampling="teacher", width=640, height=480, frames=49, text_dtype="int8")
    guided = job_of(teacher, source_of("wan2.1_t2v_1.3b", quantization=None), 1)
    assert (guided.calls, guided.height, guided.width, guided.frames, guided.scheme) == (100, 480, 640, 49, None)
    assert guided.text_int8
    assert job_of(InferConfig(dtype="bfloat16"), source_of("wan2.1_t2v_14b"), 1).scheme is None  # dequantised


# ---- planning at the start -------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of 24 GB, as far as torch says; `limit` is what torch was told to use of it."""
    told: dict[str, Any] = {"free": 23 * GB, "total": 24 * GB, "limit": None}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (told["free"], told["total"]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: told.update(limit=fraction))
    return told


def request(**config: Any) -> Any:
    return SimpleNamespace(config=InferConfig(resolution="720p", **config), jobs=[("a cat", 0)])


def test_the_plan_is_for_what_is_free(card: dict[str, Any]) -> None:
    cuda, source = torch.device("cuda", 0), source_of("wan2.1_t2v_14b")
    plan = plan_run(request(), source, cuda)
    assert plan is not None
    assert (plan.gpu, plan.available) == (GPUS["RTX 4090"], usable(23 * GB))
    assert plan.setting.offload == "model"
    assert card["limit"] is None
    card["free"] = 9 * GB
    less = plan_run(request(), source, cuda)
    assert less is not None
    assert less.setting.offload == "blocks"
    assert less.peak <= usable(9 * GB)


def test_memory_that_is_given_is_the_limit(card: dict[str, Any]) -> None:
    plan = plan_run(request(memory="12GB"), source_of("wan2.1_t2v_14b"), torch.device("cuda", 0))
    assert plan is not None
    assert plan.available == available_of(12 * GB)
    assert card["limit"] == pytest.approx((12 * GB - CONTEXT) / (24 * GB))


@pytest.mark.usefixtures("card")
def test_nothing_is_planned_without_a_gpu_or_in_float32() -> None:
    source = source_of("wan2.1_t2v_14b")
    assert plan_run(request(), source, torch.device("cpu")) is None
    assert plan_run(request(dtype="float32"), source, torch.device("cuda", 0)) is None


def test_unknown_gpus_are_taken_for_the_measured_one() -> None:
    gpu = gpu_of("NVIDIA Imaginary 9000", 5e10)
    assert (gpu.name, gpu.memory, gpu.int8) == ("NVIDIA Imaginary 9000", 5e10, MEASURED.int8)


# ---- running out of memory -------------------------------------------------------------------------------------------


def test_what_would_have_fitted_is_named_with_the_key_that_chooses_it() -> None:
    plan = choose(LARGE, 24 * GB)
    text = out_of_memory(plan, 16 * GB)
    assert text.startswith(f"out of GPU memory: offload={plan.setting.offload} ")
    assert "16.0 GB were there" in text
    size = memory_bytes(text.partition("memory=")[2].split()[0])
    assert size is not None
    again = choose(LARGE, available_of(size))
    assert f"would have chosen offload={again.setting.offload} kept_blocks={again.setting.kept_blocks}" in text
    assert again.peak <= usable(16 * GB)
    assert again.peak < plan.peak


def test_a_prediction_that_was_too_low_is_not_repeated() -> None:
    plan = choose(LARGE, 12 * GB)
    size = memory_bytes(out_of_memory(plan, 24 * GB).partition("memory=")[2].split()[0])
    assert size is not None
    assert choose(LARGE, available_of(size)).peak < 0.96 * plan.peak


def test_when_nothing_would_have_fitted_that_is_said() -> None:
    assert "needs at least" in out_of_memory(choose(LARGE, 12 * GB), 3 * GB)


def test_infer_reports_it_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "_plan", lambda *_: choose(LARGE, 24 * GB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2 * GB)
    monkeypatch.setattr(TurboPipeline, "__call__", full)
    status = inference.main([f"checkpoint={checkpoint}", PROMPT, f"output={tmp_path / 'a.gif'}", "device=cpu"])
    said = capsys.readouterr().err
    assert status == inference.FAILED
    assert said.startswith("failed: out of GPU memory: offload=")
    assert "12.0 GB were there; memory=" in said
    assert len(said.splitlines()) == 1


# ---- a placed pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["none", "model", "blocks"])
def test_a_placed_pipeline_gives_the_same_video(checkpoint: Path, offload: str) -> None:
    prompt = PROMPT.partition("=")[2]
    plain = TurboPipeline.from_checkpoint(checkpoint, device="cpu")
    expected = plain(prompt, steps=2, seed=3)
    setting = Setting(offload, kept_blocks=1, text="cpu", vae_chunk=1)
    placed = TurboPipeline.from_checkpoint(checkpoint, device="cpu", setting=setting)
    for _ in range(2):
        result = placed(prompt, steps=2, seed=3)
        assert torch.equal(result.latents, expected.latents)
        assert (result.frames == expected.frames).all()
    other = placed.with_networks(plain.experts)
    assert torch.equal(other(prompt, steps=2, seed=3).latents, expected.latents)


# ---- tools/plan.py ---------------------------------------------------------------------------------------------------


def run_tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = plan_tool.main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_tool_prints_phases_reasons_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_tool(capsys, "wan2.1_t2v_14b", "--resolution", "720p", "--gpu", "RTX 4090", "--memory", "12GB")
    assert status == 0
    plan = choose(replace(LARGE, conv_kernel=False), available_of(12 * GB), GPUS["RTX 4090"])
    for told in ("text", "dit", "vae", "infer.py: offload=blocks", "computed from datasheets", *plan.reasons):
        assert told in out
    assert f"{plan.peak / GB:.1f} GB of {plan.available / GB:.1f} GB" in out


def test_the_tool_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_tool(capsys, "wan2.1_t2v_14b", "--resolution", "720p", "--memory", "6GB")
    assert status == 1
    assert err.startswith("failed: wan2.1_t2v_14b at 1280x720, 81 frames, needs at least")
    assert "what would fit: 832x480" in err


def test_the_tool_compares_models_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_tool(capsys, "--json", "--gpu", "RTX 3060", "--gpu", "H200")
    assert status == 0
    entries = json.loads(out)
    assert {(entry["model"], entry["gpu"]) for entry in entries} == {
        (name, gpu) for name in VARIANTS if name != "shapes" for gpu in ("RTX 3060", "H200")
    }
    fastest = {entry["model"]: entry["seconds"]["total"] for entry in entries if entry["gpu"] == "H200"}
    assert all(
        entry["seconds"]["total"] > fastest[entry["model"]]
        for entry in entries
        if entry["gpu"] == "RTX 3060" and entry["fits"]
    )


def test_a_teacher_stays_in_16_bits_while_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_tool(
        capsys, "wan2.1_t2v_14b", "--sampling", "teacher", "--json", "--gpu", "H200", "--gpu", "RTX 3060"
    )
    large, small = json.loads(out)
    assert (large["weights"], large["attention"]) == ("bfloat16", "dense")
    assert large["seconds"]["step"] * 100 <= large["seconds"]["dit"]
    assert small["weights"] in ("bfloat16", "int8_channel")


def test_the_tool_reads_checkpoints(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    status, out, _ = run_tool(capsys, str(checkpoint), "--json", "--gpu", "L4")
    assert status == 0
    assert json.loads(out)[0]["model"] == "shapes"
    assert json.loads(out)[0]["attention"] == "sla"


def test_the_tool_plans_other_attention_for_a_top_k_by_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = VARIANTS["wan2.1_t2v_1.3b"]
    layered = AttentionConfig("sla", layer_topk=(0.1,) * variant.config.num_layers)
    monkeypatch.setattr(plan_tool, "_model", lambda _: plan_tool.Model(variant, layered, "int8_channel", True))
    for kind in ("dense", "sage_sla"):
        status, out, err = run_tool(capsys, "checkpoint", "--attention", kind, "--json", "--gpu", "L4")
        assert status == 0, err
        assert json.loads(out)[0]["attention"] == kind


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["wan9"], 1, "failed: model='wan9': neither a checkpoint nor a variant"),
        (["wan2.1_t2v_14b", "--gpu", "banana"], 2, "usage: gpu='banana': choose one of H200"),
        (["wan2.1_t2v_14b", "--memory", "12"], 2, "usage: memory='12': say auto"),
        (["wan2.1_t2v_14b", "--vae-tiling", "3"], 2, "usage: vae_tiling='3'"),
        (["wan2.1_t2v_14b", "--gpu", "L4", "--frames", "80"], 1, "failed: frames=80: wan2.1_t2v_14b needs 4 n + 1"),
        (["wan2.1_t2v_14b", "--gpu", "L4", "--resolution", "4k"], 1, "failed: resolution='4k': choose one of 480p"),
        (["wan2.1_t2v_14b", "--gpu", "L4", "--resolution", "axb"], 1, "failed: --resolution axb: say 480p"),
        (["wan2.1_t2v_14b", "--steps", "0"], 2, "usage: --steps 0: must be at least 1"),
    ],
)
def test_the_tool_refuses_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    got, _, err = run_tool(capsys, *arguments)
    assert got == status
    assert err.startswith(message)


def test_a_refusal_at_the_start_is_one_line(card: dict[str, Any]) -> None:
    card["free"] = 4 * GB
    with pytest.raises(DoesNotFit, match=r"wan2\.1_t2v_14b at 1280x720, 81 frames, needs at least"):
        plan_run(request(), source_of("wan2.1_t2v_14b"), torch.device("cuda", 0))


def test_metadata_is_read_before_the_weights(checkpoint: Path) -> None:
    job = job_of(InferConfig(), read_source(checkpoint), 1)
    assert (job.variant.name, job.attention.kind, job.scheme) == ("shapes", "sla", None)

"""Exported folders: diffusers' WanPipeline with TurboScheduler gives the latents that our pipeline gives; what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import export as tool
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from tiny import SHAPES, random_network, write_checkpoint, write_components
from torch import Tensor, nn

from turbotrain import TurboPipeline, TurboScheduler, load_transformer
from turbotrain.checkpoint import CheckpointMeta, CheckpointProblem, read_meta, save_checkpoint
from turbotrain.diffusers_folder import export_pipeline, model_index
from turbotrain.diffusion.samplers import seeded_generators
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import VARIANTS

TEACHER = Path(__file__).parents[2] / "recipes" / "assets" / "shapes_teacher"
SAMPLER = {"sigma_max": 80.0, "times": [1.5, 1.4, 1.0], "ode": False}
SIZE = {"height": 64, "width": 64, "num_frames": 13}
PROMPTS = [
    "a small red circle moves left slowly on a black background",
    "a large blue square moves up fast on a white background",
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, with random weights."""
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "student", "dense")


@pytest.fixture(scope="module")
def exported(student: Path) -> Path:
    result = export_pipeline(student, student.with_name("diffusers"))
    assert (result.pipeline, result.losses) == ("WanPipeline", [])
    return result.folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher as if it were a student: real weights, and the structure of the shapes world."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    parts = {name: TEACHER / name for name in ("vae", "text_encoder", "tokenizer")}
    save_checkpoint(folder, load_transformer(TEACHER).state_dict(), replace(read_meta(TEACHER), sampler=SAMPLER), parts)
    return folder


def load(folder: Path) -> Any:
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(student: Path) -> TurboPipeline:
    return TurboPipeline.from_checkpoint(student, "cpu")


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    return load(exported)


def call(pipe: Any, prompts: Sequence[str], steps: int, **options: Any) -> Any:
    given = {**SIZE, "max_sequence_length": SHAPES.config.text_len, "output_type": "latent", **options}
    return pipe(list(prompts), num_inference_steps=steps, guidance_scale=1.0, **given).frames


def their_latents(pipe: Any, prompts: Sequence[str], seeds: list[int], steps: int, **options: Any) -> Any:
    generators = seeded_generators(seeds, "cpu")
    latents = pipe.scheduler.initial_latents(pipe, generators, batch_size=len(prompts), **SIZE)
    return call(pipe, prompts, steps, latents=latents, **options)


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_equal_latents_for_equal_seeds(ours: TurboPipeline, theirs: Any, steps: int, ode: bool) -> None:
    theirs.scheduler = TurboScheduler.from_config(theirs.scheduler.config, ode=ode)
    expected = ours(PROMPTS, steps=steps, seeds=[3, 9], ode=ode).latents
    torch.testing.assert_close(their_latents(theirs, PROMPTS, [3, 9], steps), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ode", [False, True])
def test_equal_latents_of_a_trained_network(trained: Path, tmp_path: Path, ode: bool) -> None:
    pipe = load(export_pipeline(trained, tmp_path / "diffusers").folder)
    pipe.scheduler = TurboScheduler.from_config(pipe.scheduler.config, ode=ode)
    ours = TurboPipeline.from_checkpoint(trained, "cpu")(PROMPTS, steps=4, seed=1, ode=ode)
    torch.testing.assert_close(their_latents(pipe, PROMPTS, [1, 2], 4), ours.latents, atol=1e-4, rtol=0)
    frames = their_latents(pipe, PROMPTS, [1, 2], 4, output_type="np")
    assert np.abs(255 * frames - np.stack(ours.frames)).max() < 1.5


def test_in_bfloat16_both_are_as_near_to_float32(trained: Path, tmp_path: Path) -> None:
    """The usual precision of a student. Measured: ours 0.009, theirs 0.014, which keeps fewer parts in float32."""
    folder = export_pipeline(trained, tmp_path / "diffusers", dtype="bfloat16").folder
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    exact, ours = (
        TurboPipeline.from_checkpoint(trained, "cpu", dtype)(PROMPTS, steps=4, seed=1).latents
        for dtype in (torch.float32, torch.bfloat16)
    )
    theirs = their_latents(pipe, PROMPTS, [1, 2], 4)
    assert theirs.dtype == torch.float32
    our_error, their_error = ((latents - exact).norm() / exact.norm() for latents in (ours, theirs))
    assert their_error < 2 * our_error


def test_a_plain_call_begins_at_unit_noise(trained: Path, tmp_path: Path) -> None:
    """Without initial_latents the first state is 1.2% larger: a video of its own, 3% from ours for the same noise."""
    pipe = load(export_pipeline(trained, tmp_path / "diffusers").folder)
    pipe.scheduler = TurboScheduler.from_config(pipe.scheduler.config, ode=True)
    ours = TurboPipeline.from_checkpoint(trained, "cpu")(PROMPTS[:1], steps=4, seed=1, ode=True).latents
    plain = call(pipe, PROMPTS[:1], 4, generator=torch.Generator().manual_seed(1))
    assert 1e-3 < (plain - ours).norm() / ours.norm() < 0.1


def test_two_experts_share_the_work_at_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = replace(SHAPES, experts=("high", "low"), boundary=0.9)
    monkeypatch.setitem(VARIANTS, "shapes", variant)
    dense = AttentionConfig()
    parts = write_components(tmp_path / "two")
    meta = CheckpointMeta(
        variant="shapes",
        config=variant.config.to_dict(),
        attention=dense.to_dict(),
        sampler=SAMPLER,
        components={name: name for name in parts},
    )
    for seed, name in enumerate(("high", "low")):
        save_checkpoint(tmp_path / "two" / name, random_network(variant.config, dense, seed).state_dict(), meta)
    pipe = load(export_pipeline(tmp_path / "two", tmp_path / "diffusers").folder)
    assert pipe.config.boundary_ratio == 0.9
    ran: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    ours = TurboPipeline.from_checkpoint(tmp_path / "two", "cpu")(PROMPTS, steps=4, seeds=[3, 9]).latents
    torch.testing.assert_close(their_latents(pipe, PROMPTS, [3, 9], 4), ours, atol=1e-4, rtol=0)
    assert ran == ["transformer", "transformer", "transformer_2", "transformer_2"]
    with pytest.raises(CheckpointProblem, match=r"holds 1 network\(s\), but a pipeline of shapes has 2"):
        export_pipeline(tmp_path / "two" / "high", tmp_path / "half")


def test_diffusers_own_copy_of_the_folder_loads_again(exported: Path, tmp_path: Path) -> None:
    pipe = load(exported)
    pipe.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert isinstance(again.scheduler, TurboScheduler)
    latents = [their_latents(each, PROMPTS[:1], [0], 2) for each in (again, pipe)]
    # Not equal bit for bit: the weights lie elsewhere in memory, and sums are taken in another order.
    torch.testing.assert_close(*latents, atol=1e-5, rtol=0)
    index = [json.loads((folder / "model_index.json").read_text()) for folder in (exported, tmp_path / "copy")]
    entries = [{name: tuple(value) for name, value in each.items() if isinstance(value, list)} for each in index]
    assert entries[0]["scheduler"] == entries[1]["scheduler"]
    assert entries[0].keys() == entries[1].keys()


def test_a_scheduler_that_is_passed_needs_no_name_in_the_folder(exported: Path) -> None:
    scheduler = TurboScheduler.from_pretrained(exported, subfolder="scheduler", ode=True)
    assert WanPipeline.from_pretrained(exported, scheduler=scheduler).scheduler is scheduler


def test_settings_of_the_checkpoint_reach_the_scheduler(student: Path, tmp_path: Path) -> None:
    sampler = {"sigma_max": 120.0, "times": [1.4, 1.0], "ode": True}
    save_checkpoint(
        tmp_path / "student",
        load_transformer(student).state_dict(),
        replace(read_meta(student), sampler=sampler),
        {name: student / name for name in ("vae", "text_encoder", "tokenizer")},
    )
    export_pipeline(tmp_path / "student", tmp_path / "diffusers", dtype="bfloat16")
    scheduler = TurboScheduler.from_pretrained(tmp_path / "diffusers", subfolder="scheduler")
    assert {name: scheduler.config[name] for name in sampler} == sampler
    dtypes = set(_dtypes(tmp_path / "diffusers" / "transformer").values())
    assert dtypes == {torch.bfloat16, torch.float32}  # the islands stay wide


@pytest.mark.parametrize(
    ("name", "pipeline", "parts"),
    [
        ("wan2.1_t2v_1.3b", "WanPipeline", {"transformer": True, "transformer_2": False}),
        ("wan2.2_t2v_a14b", "WanPipeline", {"transformer": True, "transformer_2": True}),
        ("wan2.2_i2v_a14b", "WanImageToVideoPipeline", {"transformer_2": True, "image_encoder": False}),
        ("wan2.1_i2v_14b", "WanImageToVideoPipeline", {"transformer_2": False, "image_encoder": True}),
    ],
)
def test_the_index_names_what_each_variant_needs(name: str, pipeline: str, parts: dict[str, bool]) -> None:
    variant = VARIANTS[name]
    clip = ["image_encoder", "image_processor"] if variant.config.image_dim else []
    given = {part: TEACHER / part for part in ("vae", "text_encoder", "tokenizer", *clip)}
    index = model_index(variant, given, len(variant.experts))
    assert index["_class_name"] == pipeline
    assert index["boundary_ratio"] == variant.boundary
    assert {part: index[part] != [None, None] for part in parts} == parts
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]


# -- what diffusers cannot compute --------------------------------------------------------------------


def test_sparse_students_are_refused_or_said_to_lose(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match=r"attention is sla, which diffusers computes densely.*--lossy exports"):
        export_pipeline(checkpoint, tmp_path / "diffusers")
    assert list(tmp_path.iterdir()) == []
    result = export_pipeline(checkpoint, tmp_path / "diffusers", lossy=True)
    assert len(result.losses) == 1
    assert "not trained for that" in result.losses[0]
    assert not any("proj_l" in name for name in _dtypes(result.folder / "transformer"))
    assert read_meta(result.folder).attention["kind"] == "dense"
    pipe = load(result.folder)
    ours = TurboPipeline.from_checkpoint(checkpoint, "cpu")
    ours = ours.with_networks([load_transformer(checkpoint).set_attention(AttentionConfig())])
    expected = ours(PROMPTS[:1], steps=2, seed=4).latents
    torch.testing.assert_close(their_latents(pipe, PROMPTS[:1], [4], 2), expected, atol=1e-4, rtol=0)


def test_quantized_students_are_refused_or_multiplied_out(student: Path, tmp_path: Path) -> None:
    network = load_transformer(student)
    for block in network.blocks:
        for name in [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
            linear: Any = block.get_submodule(name)
            block.set_submodule(name, QuantLinear.from_linear(linear, "int8_channel", None))
    parts = {name: student / name for name in ("vae", "text_encoder", "tokenizer")}
    meta = replace(read_meta(student), quantization={"scheme": "int8_channel"})
    save_checkpoint(tmp_path / "int8", network.state_dict(), meta, parts)
    with pytest.raises(CheckpointProblem, match=r"its layers are int8_channel.*--dequantize multiplies them out"):
        export_pipeline(tmp_path / "int8", tmp_path / "diffusers", lossy=True)
    result = export_pipeline(tmp_path / "int8", tmp_path / "diffusers", dequantize=True)
    assert result.losses == ["40 8-bit layers are multiplied out to float32"]
    ours = TurboPipeline.from_checkpoint(tmp_path / "int8", "cpu", torch.float32)
    expected = ours(PROMPTS[:1], steps=2, seed=4).latents
    torch.testing.assert_close(their_latents(load(result.folder), PROMPTS[:1], [4], 2), expected, atol=1e-4, rtol=0)


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def command(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = tool.main([str(student), "--output", str(tmp_path / "out"), *arguments])
        except SystemExit as stop:
            status = int(str(stop.code))
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command_says_what_it_wrote(command: Any, tmp_path: Path) -> None:
    status, out, err = command()
    assert (status, out, err) == (0, f"written: {tmp_path / 'out'} (WanPipeline)\n", "")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model_index.json", "scheduler", "transformer", "vae", "text_encoder", "tokenizer"}
    status, _, err = command()
    assert status == 1
    assert "exists; --force replaces it" in err
    assert command("--force", "--dtype", "bfloat16")[:2] == (
        0,
        f"written: {tmp_path / 'out'} (WanPipeline)\nlost: float32 weights are rounded to bfloat16\n",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--dtype", "int4"), 2, "usage: .*invalid choice: 'int4'"),
        (("--vae", "Wan-AI/Wan2.1-VAE"), 1, "vae='Wan-AI/Wan2.1-VAE': no folder here.*say --vae FOLDER"),
        (("--vae", str(TEACHER / "tokenizer")), 1, "holds no AutoencoderKLWan"),
        (("--text-encoder", str(TEACHER / "vae")), 1, "holds no UMT5EncoderModel.*say --text-encoder FOLDER"),
        (("--tokenizer", "./gone"), 1, r"tokenizer = './gone': not found"),
        (("--variant", "wan2.1_t2v_1.3b"), 1, "variant='wan2.1_t2v_1.3b': .* holds .*; leave it out"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: Any, tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    got, out, err = command(*arguments)
    assert (got, out) == (status, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_networks_that_were_not_distilled_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match=r"name no Turbo sampler, so it was not distilled"):
        export_pipeline(TEACHER, tmp_path / "out")


def test_a_vae_of_other_channels_is_refused(student: Path, tmp_path: Path) -> None:
    parts = write_components(tmp_path / "parts", channels=4)
    with pytest.raises(ValueError, match="its z_dim is 4, the network's is 24; say --vae FOLDER"):
        export_pipeline(student, tmp_path / "out", components={"vae": parts["vae"]})
    assert not (tmp_path / "out").exists()


def _dtypes(folder: Path) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names: list[str] = list(tensors.keys())
            stored: dict[str, Tensor] = {name: tensors.get_tensor(name) for name in names}
        found.update({name: tensor.dtype for name, tensor in stored.items()})
    return found

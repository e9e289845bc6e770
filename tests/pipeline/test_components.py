"""The parts beside a network: found by their published names, checked before anything heavy is imported, used end to end."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from official_files import official_umt5, official_vae, tiny_umt5, tiny_vae, write
from safetensors.torch import load_file, save_file
from tiny import random_network, write_components
from transformers import AutoTokenizer

from turbotrain.checkpoint import CheckpointProblem, read_meta
from turbotrain.checkpoint.components import PUBLISHED_NAMES, check_component, find_component
from turbotrain.checkpoint.meta import METADATA_KEY
from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.compose import UsageError
from turbotrain.infer_checks import _cuda_devices, load_request
from turbotrain.inference import main
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant, WanConfig
from turbotrain.pipeline import TurboPipeline

T5, CLIP = PUBLISHED_NAMES["text_encoder"][0], PUBLISHED_NAMES["image_encoder"][0]
PROMPT = "a small red circle moves left slowly on a black background"
CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=1, text_dim=64, text_len=24)
TINY = Variant("tiny_wan", CONFIG, frames=5, width=32, height=32)
TINY_5B = Variant(
    "tiny_5b",
    WanConfig(**{**CONFIG.to_dict(), "in_channels": 48, "out_channels": 48, "model_type": "ti2v"}),
    vae="wan2.2",
    vae_stride=(4, 16, 16),
    frames=5,
    width=64,
    height=64,
)


@pytest.fixture(autouse=True)
def variants(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in (TINY, TINY_5B):
        monkeypatch.setitem(VARIANTS, variant.name, variant)


def write_official(folder: Path, variant: Variant, vae: str) -> Path:
    """A folder as Wan is published, at tiny size."""
    folder.mkdir(parents=True)
    network = random_network(variant.config, AttentionConfig())
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    write(official_vae(tiny_vae(vae, 4)), folder / f"Wan{vae}_VAE.pth")
    parts = write_components(folder.parent / f"{folder.name}-parts")
    (folder / "google").mkdir()
    os.rename(parts["tokenizer"], folder / "google" / "umt5-xxl")
    vocabulary = len(AutoTokenizer.from_pretrained(str(folder / "google" / "umt5-xxl")))
    write(
        {name: tensor.bfloat16() for name, tensor in official_umt5(tiny_umt5(vocabulary)).items()},
        folder / T5,
    )
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("wan") / "Wan-tiny", TINY, "2.1")


# ---- found ------------------------------------------------------------------------------------------------------------------


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_an_official_folder_names_its_parts(tmp_path: Path) -> None:
    for name in ("Wan2.2_VAE.pth", T5, CLIP, "google/umt5-xxl/tokenizer.json"):
        touch(tmp_path / name)
    expected = {"vae": "Wan2.2_VAE.pth", "text_encoder": T5, "image_encoder": CLIP, "tokenizer": "google/umt5-xxl"}
    network = touch(tmp_path / "diffusion_pytorch_model.safetensors")
    expert = touch(tmp_path / "high_noise_model" / "diffusion_pytorch_model.safetensors").parent
    elsewhere = touch(tmp_path.parent / "elsewhere" / "TurboWan.pth")
    for name, place in expected.items():
        for checkpoint in (tmp_path, network, expert):
            assert find_component(name, {}, checkpoint) == str(tmp_path / place)
        # One part that is named leads to the others; the folder may stand for the part.
        assert find_component(name, {"vae": str(tmp_path)}, elsewhere) == str(tmp_path / place)
        assert find_component(name, {"vae": str(tmp_path / "Wan2.2_VAE.pth")}, elsewhere) == str(tmp_path / place)


def test_a_diffusers_pipeline_names_its_parts(tmp_path: Path) -> None:
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "image_encoder"):
        (tmp_path / name).mkdir()
    for name in ("vae", "text_encoder", "tokenizer", "image_encoder"):
        for checkpoint in (tmp_path, tmp_path / "transformer"):
            assert find_component(name, {}, checkpoint) == str(tmp_path / name)


def test_a_name_wins_over_what_lies_beside(tmp_path: Path) -> None:
    other = touch(tmp_path / "other" / "my_vae.pth")
    touch(tmp_path / "Wan2.1_VAE.pth")
    assert find_component("vae", {"vae": "other/my_vae.pth"}, tmp_path) == str(other)
    with pytest.raises(ValueError, match=r"vae = 'other/gone.pth': not found beside .*; say vae=PATH"):
        find_component("vae", {"vae": "other/gone.pth"}, tmp_path)
    with pytest.raises(ValueError, match=r"names no image_encoder: say image_encoder=PATH"):
        find_component("image_encoder", {}, tmp_path)


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch exploded",))


def test_files_are_looked_at_before_they_are_loaded(tmp_path: Path) -> None:
    bomb, cut, text = tmp_path / "bomb.pth", tmp_path / "cut.safetensors", touch(tmp_path / "vae.txt")
    bomb.write_bytes(pickle.dumps(Bomb(), protocol=2))
    cut.write_bytes(b"\x10\x00\x00")
    cases = (
        (bomb, "text_encoder: .*would run"),
        (cut, "text_encoder: .*truncated"),
        (text, "text_encoder: .*no weights file"),
    )
    for file, reason in cases:
        with pytest.raises(CheckpointProblem, match=reason):
            check_component("text_encoder", str(file))
    check_component("text_encoder", str(tmp_path))
    check_component("text_encoder", "google/umt5-xxl")


# ---- used ---------------------------------------------------------------------------------------------------------------------


def test_an_official_folder_needs_no_other_argument(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [f"checkpoint={wan}", f"prompt={PROMPT}", "device=cpu", "steps=1"]
    assert main([*arguments, "output=a.webp"]) == 0, capfd.readouterr().err
    assert "loaded tiny_wan" in capfd.readouterr().out
    entries = list((tmp_path / "cache" / "turbotrain" / "text").iterdir())
    assert [path.suffix for path in entries] == [".safetensors"]

    def never(*_args: object, **_kwargs: object) -> TextEncoder:
        raise AssertionError("the encoder was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "from_pretrained", never)
        assert main([*arguments, "output=b.webp"]) == 0
        assert main([*arguments, "output=c.webp", "text_cache=false"]) == 1
    assert main([*arguments, "output=c.webp", "text_cache=false"]) == 0
    videos = [(tmp_path / f"{name}.webp").read_bytes() for name in "abc"]
    assert videos[0] == videos[1] == videos[2]
    assert list((tmp_path / "cache" / "turbotrain" / "text").iterdir()) == entries


def test_the_parts_of_an_official_folder_are_what_it_holds(wan: Path) -> None:
    pipe = TurboPipeline.from_checkpoint(wan, device="cpu")
    codec = VideoCodec.from_pretrained(wan / "Wan2.1_VAE.pth")
    assert pipe.variant.name == "tiny_wan"
    assert pipe.text_encoder.encoder.dtype == torch.bfloat16  # as published, on the CPU too
    result = pipe(PROMPT, steps=1)
    assert result.frames.shape == (5, 32, 32, 3)
    assert (codec.decode(result.latents)[0].numpy() == result.frames).all()
    small = TurboPipeline.from_checkpoint(wan, device="cpu", text_dtype="int8")
    exact_BLD, embeds_BLD = pipe.encode_prompts([PROMPT]), small.encode_prompts([PROMPT])
    assert 0 < (embeds_BLD - exact_BLD).norm() / exact_BLD.norm() < 0.05


def test_the_vae_of_another_variant_is_refused(wan: Path, tmp_path: Path) -> None:
    other = write_official(tmp_path / "Wan-5B", TINY_5B, "2.2")
    assert TurboPipeline.from_checkpoint(other, device="cpu")(PROMPT, steps=1).frames.shape == (5, 64, 64, 3)
    with pytest.raises(
        ValueError, match=r"gives 16 latent channels, but .* was trained on 48; use the VAE of variant tiny_5b"
    ):
        TurboPipeline.from_checkpoint(other, device="cpu", components={"vae": str(wan)})
    with pytest.raises(ValueError, match=r"gives 48 latent channels, but .* was trained on 16"):
        TurboPipeline.from_checkpoint(wan, device="cpu", components={"vae": str(other / "Wan2.2_VAE.pth")})


def test_a_bad_part_is_refused_before_anything_is_loaded(wan: Path, tmp_path: Path) -> None:
    good = [f"checkpoint={wan}", f"prompt={PROMPT}"]
    assert load_request(good).variant is TINY
    (tmp_path / "t5.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(
        CheckpointProblem, match=r"text_encoder: .*t5.pth: refused, because loading this pickle would run"
    ):
        load_request([*good, f"text_encoder={tmp_path / 't5.pth'}"])
    (tmp_path / "vae.pth").write_bytes((wan / "Wan2.1_VAE.pth").read_bytes()[:4_000])
    with pytest.raises(CheckpointProblem, match=r"vae: .*vae.pth: truncated"):
        load_request([*good, f"vae={tmp_path / 'vae.pth'}"])
    with pytest.raises(ValueError, match=r"vae = '/gone, really.pth': not found beside"):
        load_request([*good, "vae=/gone, really.pth"])
    with pytest.raises(
        UsageError, match=r"image_encoder='clip.pth': variant tiny_wan reads no CLIP tokens; leave it out"
    ):
        load_request([*good, "image_encoder=clip.pth"])


def test_the_wrong_text_encoder_is_refused(wan: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match=r"text_encoder=.*not a umT5 encoder in the official layout"):
        TurboPipeline.from_checkpoint(wan, device="cpu", components={"text_encoder": str(wan / "Wan2.1_VAE.pth")})
    parts = write_components(tmp_path, text_dim=32)
    with pytest.raises(ValueError, match=r"gives embeddings of width 32, but the network reads 64"):
        TurboPipeline.from_checkpoint(checkpoint, device="cpu", components={"text_encoder": parts["text_encoder"]})


# ---- negative prompts -------------------------------------------------------------------------------------------------------


def test_a_turbo_model_says_that_a_negative_prompt_has_no_effect(
    pipe: TurboPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    plain = pipe(PROMPT, steps=1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        told = pipe(PROMPT, steps=1, negative_prompt="blurry")
    assert [record.getMessage() for record in caplog.records if record.name == "turbotrain.pipeline"] == [
        "negative_prompt has no effect: the Turbo sampler has no guidance, only the teacher's sampler has"
    ]
    assert torch.equal(told.latents, plain.latents)


def test_infer_says_so_once_and_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"checkpoint={checkpoint}", f"prompt={PROMPT}", "steps=1", "seeds=[1,2]", "output=a.webp"]
    assert main([*arguments, "negative_prompt=blurry, dark"]) == 0
    said = capfd.readouterr().err
    assert said == (
        "warning: negative_prompt has no effect: the Turbo sampler has no guidance, only the teacher's sampler has\n"
    )
    assert main([*arguments, "sampling=teacher", "negative_prompt=blurry, dark"]) == 0
    assert capfd.readouterr().err == ""


def test_infer_says_that_a_teacher_is_not_made_for_the_turbo_sampler(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = checkpoint / "model.safetensors"
    said = read_meta(checkpoint)
    for name, lineage, sampler, warned in (
        ("teacher", [{"stage": "teacher"}], None, True),
        ("student", [{"stage": "rcm"}], {"sigma_max": 80.0}, False),
        ("converted", [{"stage": "convert"}], None, False),  # another project's Turbo network, for one
    ):
        shutil.copytree(checkpoint, tmp_path / name)
        meta = dataclasses.replace(said, lineage=lineage, sampler=sampler)
        save_file(load_file(file), tmp_path / name / file.name, metadata={METADATA_KEY: meta.to_json(), "format": "pt"})
        arguments = [f"checkpoint={tmp_path / name}", f"prompt={PROMPT}", "output=a.webp", "steps=1"]
        assert main(arguments) == 0
        assert ("warning: the checkpoint is not distilled" in capfd.readouterr().err) is warned
        if warned:
            assert main([*arguments, "sampling=teacher"]) == 0
            assert "distilled" not in capfd.readouterr().err


def test_the_text_device_is_checked(checkpoint: Path) -> None:
    good = [f"checkpoint={checkpoint}", "prompt=x"]
    with pytest.raises(UsageError, match="text_device='gpu': choose one of auto, stay, visit, stream, cpu, cuda"):
        load_request([*good, "text_device=gpu"])
    with pytest.raises(UsageError, match="text_dtype='int4': choose one of auto, float32, bfloat16, int8"):
        load_request([*good, "text_dtype=int4"])
    if _cuda_devices() == 0:
        with pytest.raises(
            UsageError, match="text_device='cuda': this machine shows no CUDA device; use text_device=cpu"
        ):
            load_request([*good, "text_device=cuda"])

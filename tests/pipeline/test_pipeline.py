"""Prompt to frames with real parts at tiny size."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LATENT, random_network, write_checkpoint, write_components

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.checkpoint.components import find_component
from turbotrain.diffusion.guidance import guided, switch_experts
from turbotrain.diffusion.samplers import draw_noise, sample_teacher, sample_turbo, seeded_generators
from turbotrain.diffusion.velocity import bind
from turbotrain.loading import resolve_device
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.pipeline import TurboPipeline
from turbotrain.quant.export import quantize_transformer

PROMPTS = [
    "a small red circle moves left slowly on a black background",
    "a large blue square moves up fast on a white background",
    "a small green cross slides down fast on a gray background",
]


def test_a_string_gives_a_video_and_a_list_gives_a_list(pipe: TurboPipeline) -> None:
    one = pipe(PROMPTS[0], steps=1)
    assert one.frames.shape == (13, 64, 64, 3)
    assert one.frames.dtype == np.uint8
    assert one.latents.shape == (1, *LATENT)
    assert set(one.timings) == {"text", "dit", "vae", "dit_steps"}
    assert len(pipe(PROMPTS[:2], steps=2).timings["dit_steps"]) == 2
    assert isinstance(pipe(PROMPTS[:1], steps=1).frames, list)


@pytest.mark.parametrize("mode", ["turbo", "teacher"])
def test_a_batch_equals_single_videos(pipe: TurboPipeline, mode: str) -> None:
    """Batched matrix products round differently; everything else is the same. Measured difference: below 2e-6."""
    together = pipe(PROMPTS, steps=3, seed=5, mode=mode)
    chunked = pipe(PROMPTS, steps=3, seed=5, mode=mode, batch_size=2)
    assert together.seeds == [5, 6, 7]
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, steps=3, seed=5 + index, mode=mode)
        for result in (together, chunked):
            assert torch.allclose(result.latents[index], alone.latents[0], atol=1e-4, rtol=0)
            assert np.abs(result.frames[index].astype(int) - alone.frames.astype(int)).max() <= 1


def test_attention_in_8_bits_samples_nearly_the_same(checkpoint: Path, pipe: TurboPipeline, tmp_path: Path) -> None:
    in_8_bits = TurboPipeline.from_checkpoint(checkpoint, device="cpu", attention_kind="sage_sla")
    assert [getattr(expert.attention_config, "kind", None) for expert in in_8_bits.experts] == ["sage_sla"]
    exact, got = (which(PROMPTS[0], steps=1).latents for which in (pipe, in_8_bits))
    assert 0 < (got - exact).norm() < 0.1 * exact.norm()
    dense = write_checkpoint(tmp_path / "dense", "dense")
    with pytest.raises(
        ValueError, match=r"attention_kind='sage_sla': .* was trained with dense attention; leave it out"
    ):
        TurboPipeline.from_checkpoint(dense, device="cpu", attention_kind="sage_sla")


def test_videos_depend_on_seed_and_prompt(pipe: TurboPipeline) -> None:
    first = pipe(PROMPTS[0], steps=2, seed=1)
    assert np.array_equal(first.frames, pipe(PROMPTS[0], steps=2, seed=1).frames)
    assert not np.array_equal(first.frames, pipe(PROMPTS[0], steps=2, seed=2).frames)
    assert not torch.equal(first.latents, pipe(PROMPTS[1], steps=2, seed=1).latents)


def test_turbo_mode_is_the_turbo_sampler_with_the_checkpoints_settings(pipe: TurboPipeline) -> None:
    context_BLD = pipe.text_encoder.encode(PROMPTS[:1])
    generators = seeded_generators([3], "cpu")
    noise_BCTHW = draw_noise((1, *LATENT), generators)
    velocity = bind(pipe.experts[0], context_BLD)
    times = [math.atan(80.0), 1.5, 1.4, 1.0]
    expected = sample_turbo(velocity, noise_BCTHW, steps=4, times=times, generators=generators)
    assert torch.equal(pipe(PROMPTS[0], seed=3).latents, expected)
    assert not torch.equal(pipe(PROMPTS[0], seed=3, ode=True).latents, expected)
    assert not torch.equal(pipe(PROMPTS[0], seed=3, sigma_max=20.0).latents, expected)


def test_teacher_mode_is_guided_with_the_variants_settings(pipe: TurboPipeline) -> None:
    context_BLD, negative_BLD = pipe.text_encoder.encode(PROMPTS[:1]), pipe.text_encoder.encode([""])
    noise_BCTHW = draw_noise((1, *LATENT), seeded_generators([3], "cpu"))
    velocity = guided(bind(pipe.experts[0], context_BLD), bind(pipe.experts[0], negative_BLD), 3.0)
    expected = sample_teacher(velocity, noise_BCTHW, steps=3, shift=3.0, solver="unipc", grid="wan")
    assert torch.equal(pipe(PROMPTS[0], seed=3, mode="teacher", steps=3).latents, expected)


def test_each_distinct_prompt_is_encoded_once(pipe: TurboPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda prompts: seen.extend(prompts) or encode(prompts))
    pipe(["a b", "a b", "c"], steps=1)
    pipe("c", steps=1)
    assert seen == ["a b", "c"]


def test_text_is_not_read_ahead_where_weights_come_for_a_call(
    pipe: TurboPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded networks, sampled while they train, have no weights between two calls."""
    (network,) = pipe.experts
    expected = pipe(PROMPTS[0], steps=1, seed=1).frames
    handle = network.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: None)
    try:
        monkeypatch.setattr(network, "encode_context", lambda *_: pytest.fail("read outside of a call"))
        hooked = pipe(PROMPTS[0], steps=1, seed=1).frames
    finally:
        handle.remove()
    assert np.abs(hooked.astype(int) - expected.astype(int)).max() <= 1


def test_progress_is_told_after_each_step(pipe: TurboPipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe(PROMPTS[0], steps=3, callback=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_frames_are_told_as_they_are_decoded(pipe: TurboPipeline) -> None:
    """In order and all of them, for videos of several batches; the codec works a latent frame at a time here."""
    told: dict[int, list[np.ndarray]] = {}
    pipe.codec.chunk = 1
    try:
        result = pipe(
            PROMPTS,
            steps=1,
            frames=5,
            batch_size=2,
            on_frames=lambda *frames: told.setdefault(frames[0], []).append(frames[1]),
        )
    finally:
        pipe.codec.chunk = None
    assert sorted(told) == list(range(len(PROMPTS)))
    for index, video_THWC in enumerate(result.videos):
        assert [len(frames_THWC) for frames_THWC in told[index]] == [1, 4]
        assert np.array_equal(np.concatenate(told[index]), video_THWC)


def test_previews_are_the_clean_predictions_of_all_steps_but_the_last(pipe: TurboPipeline) -> None:
    seen: dict[tuple[int, int], np.ndarray] = {}
    arguments = {"seeds": [4, 5, 6], "steps": 3, "ode": True, "frames": 5}
    result = pipe(PROMPTS, batch_size=2, preview=lambda *where: seen.update({where[:2]: where[2]}), **arguments)
    assert sorted(seen) == [(video, step) for video in range(3) for step in (1, 2)]
    assert np.array_equal(np.stack(result.frames), np.stack(pipe(PROMPTS, batch_size=2, **arguments).frames))
    for video in range(3):  # each step's prediction is nearer to the result, for random weights too
        far, near = (np.abs(seen[video, step].astype(float) - result.frames[video]).mean() for step in (1, 2))
        assert 0 < near < far


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "prompt = .*empty"),
        ({"prompt": []}, "prompt = .*empty"),
        ({"prompt": "\0"}, "prompt = .*empty"),
        ({"steps": 0}, "steps = 0: the Turbo sampler of this checkpoint takes 1 to 4"),
        ({"steps": 5}, "steps = 5: the Turbo sampler"),
        ({"steps": 0, "mode": "teacher"}, "steps = 0: the teacher sampler takes 1 to 1000"),
        ({"mode": "magic"}, "mode = 'magic': choose turbo or teacher"),
        ({"sigma_max": 10.0}, "sigma_max = 10: must be above 14.1"),
        ({"frames": 12}, r"frames=12: shapes needs 4 n \+ 1 frames; nearest are 9 and 13"),
        ({"width": 60}, "width=60: shapes needs a multiple of 8; nearest are 56 and 64"),
        ({"height": 0}, "height=0: shapes needs a multiple of 8"),
        ({"resolution": "480p"}, "resolution='480p': variant shapes makes 64x64 pixels"),
        ({"aspect": "1:1", "width": 64}, "aspect='1:1': width and height say the size already"),
        ({"seeds": [1, 2]}, r"seeds = \[1, 2\]: 2 seeds for 1 prompts"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image input needs an i2v variant; this checkpoint is shapes"),
    ],
)
def test_bad_arguments_say_what_is_allowed(pipe: TurboPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPTS[0], **arguments})


def test_other_sizes_and_lengths(pipe: TurboPipeline) -> None:
    assert pipe(PROMPTS[0], steps=1, width=48, height=32, frames=5).frames.shape == (5, 32, 48, 3)


def test_two_experts_share_the_work_at_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARIANTS["shapes"].config
    variant = replace(VARIANTS["shapes"], experts=("high", "low"), boundary=0.9, cfg=(2.0, 4.0))
    monkeypatch.setitem(VARIANTS, "shapes", variant)
    parts = write_components(tmp_path / "parts")
    dense = AttentionConfig()
    meta = CheckpointMeta(variant="shapes", config=config.to_dict(), attention=dense.to_dict())
    networks = [random_network(config, dense, seed) for seed in (1, 2)]
    for name, network in zip(("high", "low"), networks):
        save_checkpoint(tmp_path / "two" / name, network.state_dict(), meta)
    shutil.copytree(tmp_path / "parts", tmp_path / "two", dirs_exist_ok=True)
    pipe = TurboPipeline.from_checkpoint(tmp_path / "two", "cpu", components={name: name for name in parts})

    context_BLD, negative_BLD = pipe.encode_prompts(PROMPTS[:1]), pipe.encode_prompts([""])
    noise = draw_noise((1, *LATENT), seeded_generators([0], "cpu"))
    high, low = (network.eval() for network in networks)
    turbo = switch_experts(bind(high, context_BLD), bind(low, context_BLD), 0.9)
    assert torch.equal(
        pipe(PROMPTS[0], ode=True).latents, sample_turbo(turbo, noise, steps=4, ode=True, sigma_max=variant.sigma_max)
    )
    # cfg is (low noise, high noise): each expert has its own scale.
    teacher = switch_experts(
        guided(bind(high, context_BLD), bind(high, negative_BLD), 4.0),
        guided(bind(low, context_BLD), bind(low, negative_BLD), 2.0),
        0.9,
    )
    assert torch.equal(
        pipe(PROMPTS[0], mode="teacher", steps=4).latents, sample_teacher(teacher, noise, 4, variant.shift)
    )


def test_networks_are_swapped_and_the_rest_is_shared(pipe: TurboPipeline) -> None:
    other = pipe.with_networks([random_network(VARIANTS["shapes"].config, AttentionConfig(), seed=9)])
    assert other.codec is pipe.codec
    assert not torch.equal(other(PROMPTS[0], steps=1).latents, pipe(PROMPTS[0], steps=1).latents)
    with pytest.raises(ValueError, match=r"2 network\(s\) given: variant shapes has 1"):
        pipe.with_networks([pipe.experts[0], pipe.experts[0]])


def test_damaged_weights_make_no_video(pipe: TurboPipeline) -> None:
    network = random_network(VARIANTS["shapes"].config, AttentionConfig())
    with torch.no_grad():
        network.head.head.weight[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="latents that are not finite"):
        pipe.with_networks([network])(PROMPTS[0], steps=1)


def test_int8_layers_stay_int8_and_read_back(pipe: TurboPipeline, checkpoint: Path, tmp_path: Path) -> None:
    network = random_network(VARIANTS["shapes"].config, AttentionConfig(kind="sla", topk=0.25, block_q=32, block_k=32))
    other = pipe.with_networks([network])
    float_latents = other(PROMPTS[0], steps=2).latents
    context_BLD = pipe.encode_prompts(PROMPTS[:1])
    quantize_transformer(network, [lambda model: other.sample(context_BLD, [0], LATENT, steps=2)], alphas=())
    expected = other(PROMPTS[0], steps=2).latents
    assert 0 < (expected - float_latents).norm() / float_latents.norm() < 0.2
    assert pipe.meta is not None
    meta = replace(pipe.meta, quantization={"scheme": "int8_channel"}, components={})
    parts = {name: checkpoint / name for name in ("vae", "text_encoder", "tokenizer")}
    save_checkpoint(tmp_path / "int8", network.state_dict(), meta, parts)
    again = TurboPipeline.from_checkpoint(tmp_path / "int8", "cpu")
    assert any(parameter.dtype == torch.int8 for parameter in again.experts[0].state_dict().values())
    assert torch.equal(again(PROMPTS[0], steps=2).latents, expected)


def test_a_vae_of_other_channels_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_components(tmp_path, channels=4)
    with pytest.raises(ValueError, match=r"gives 4 latent channels, but .* was trained on 24"):
        TurboPipeline.from_checkpoint(checkpoint, "cpu", components={"vae": str(tmp_path / "vae")})


def test_components_are_found_beside_the_checkpoint_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "vae").mkdir(parents=True)
    (tmp_path / "elsewhere" / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_component("vae", {"vae": "vae"}, tmp_path / "here") == str(tmp_path / "here" / "vae")
    assert find_component("vae", {"vae": "Wan-AI/some-vae"}, tmp_path / "here") == "Wan-AI/some-vae"
    with pytest.raises(ValueError, match="names no tokenizer: say tokenizer=PATH"):
        find_component("tokenizer", {}, tmp_path / "here")
    with pytest.raises(ValueError, match=r"vae = './gone': not found beside"):
        find_component("vae", {"vae": "./gone"}, tmp_path / "here")


def test_devices() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"torch sees 0 CUDA device\(s\); use device=cpu"):
            resolve_device("cuda")

"""The codec stage: its tokenizer, what the probes ask, and that the folders it writes are whole or not there.

Legend: B batch, L tokens, D embedding width.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.codecs.vae import frames_to_pixels
from turbotrain.data.shapes import (
    ATTRIBUTES,
    VERBS,
    ObjectSpec,
    Scene,
    render_batch,
    sample_clips,
    vocabulary,
)
from turbotrain.data.shapes_render import BACKGROUNDS
from turbotrain.model.variants import VARIANTS
from turbotrain.stages import codec as stage
from turbotrain.stages.codec import (
    END,
    UNKNOWN,
    _labels,
    _phrases,
    _warm_cosine,
    make_tokenizer,
    object_weight,
    reconstruction_metrics,
    tiny_text_encoder,
    tiny_vae,
    train_codec,
    train_decoder,
    train_text,
    train_vae,
)

CPU = torch.device("cpu")
VARIANT = VARIANTS["shapes"]
RED = ObjectSpec("circle", "red", "small", "left", "slowly")
BLUE = ObjectSpec("cross", "blue", "large", "up", "fast")
PAIR = Scene((RED, BLUE), "gray")


@pytest.fixture
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "JUDGED", 2)


def train_briefly(folder: Path) -> dict[str, object]:
    return train_codec(
        folder, device=CPU, seed=0, steps=2, decoder_steps=1, batch_size=1, text_steps=1, say=lambda line: None
    )


# ---- the parts fit the variant -------------------------------------------------------------------------------------


def test_the_tiny_codec_is_what_the_shapes_network_expects() -> None:
    codec, text = VideoCodec(tiny_vae()), tiny_text_encoder()
    assert codec.stride == VARIANT.vae_stride
    assert codec.latent_channels == VARIANT.config.out_channels
    assert codec.latent_shape(VARIANT.frames, VARIANT.height, VARIANT.width) == (24, 4, 8, 8)
    assert text.text_len == VARIANT.config.text_len
    assert text.encode(["a red circle"]).shape == (1, VARIANT.config.text_len, VARIANT.config.text_dim)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (codec.vae, text.encoder)]
    assert 2 * sizes[0] + 4 * sizes[1] < 6e6  # bytes: the teacher ships with them in 12 MB


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_reads_back_and_knows_every_caption(tmp_path: Path) -> None:
    made = make_tokenizer(32)
    made.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    captions: list[str] = []
    for values in itertools.product(*ATTRIBUTES.values()):
        spec = ObjectSpec(**dict(zip(ATTRIBUTES, values)))
        captions.append(Scene((spec,), "black").caption())
    for verb, background, first in itertools.product(VERBS, BACKGROUNDS, (False, True)):
        captions.append(Scene((RED, BLUE), background).caption(verb, first))
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    ids = tokenizer(captions)["input_ids"]
    assert ids == made(captions)["input_ids"]
    assert not any(unknown in row for row in ids)
    assert max(len(row) for row in ids) <= tokenizer.model_max_length == 32
    assert len(tokenizer) == len(vocabulary()) + 3
    for caption, row in zip(captions, ids):
        words = tokenizer.convert_ids_to_tokens(row)
        assert words == [*caption.replace(",", " ,").split(), END]


def test_the_tokenizer_ends_the_empty_prompt_folds_case_and_marks_strangers() -> None:
    tokenizer = make_tokenizer(8)
    assert tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]) == [END]
    assert tokenizer("A Red CIRCLE")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a pink circle")["input_ids"]) == ["a", UNKNOWN, "circle", END]
    padded = tokenizer("a", padding="max_length", max_length=8)
    assert padded["input_ids"][2:] == [0] * 6
    assert padded["attention_mask"] == [1, 1, 0, 0, 0, 0, 0, 0]
    cut = tokenizer("a red circle and a blue cross moves", truncation=True, max_length=8)["input_ids"]
    assert (len(cut), cut[-1]) == (8, tokenizer.convert_tokens_to_ids(END))


# ---- what the probes ask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_phrases_are_found_wherever_the_ground_is_named(first: bool) -> None:
    words = [*PAIR.caption(background_first=first).replace(",", " ,").split(), END]
    assert [words[span] for span in _phrases(words)] == [spec.phrase().split()[1:] for spec in (RED, BLUE)]


def test_every_word_of_a_phrase_is_asked_for_its_object_and_all_for_the_ground() -> None:
    text = tiny_text_encoder()
    single = Scene((BLUE,), "white")
    tokens = text.tokenizer(
        [PAIR.caption(), single.caption()], padding="max_length", max_length=32, return_tensors="pt"
    )
    labels = _labels(text, tokens["input_ids"], [PAIR, single])
    # "a [small red circle moves left slowly] and a [large blue cross moves up fast] on a gray background"
    spans = {"slot": {}, **{name: {} for name in ATTRIBUTES}}
    for row, scene, starts in ((0, PAIR, (1, 9)), (1, single, (1,))):
        assert (labels["background"][row] == list(BACKGROUNDS).index(scene.background)).all()
        for name in spans:
            expected_L = torch.full((32,), -1)
            for slot, (spec, start) in enumerate(zip(scene.objects, starts)):
                value = slot if name == "slot" else ATTRIBUTES[name].index(getattr(spec, name))
                expected_L[start : start + 6] = value
            assert torch.equal(labels[name][row], expected_L), name


def test_objects_and_three_pixels_around_them_weigh_more_than_the_ground() -> None:
    clip = sample_clips(1, seed=1)[0]
    frames_BTHWC = torch.from_numpy(render_batch([clip]))
    pixels_BCTHW = frames_to_pixels(frames_BTHWC, torch.float32)
    weight_B1THW = object_weight(pixels_BCTHW)
    assert set(weight_B1THW.unique().tolist()) == {1.0, 6.0}
    ground_C = torch.tensor(BACKGROUNDS[clip.scene.background], dtype=torch.uint8)
    painted_BTHW = (frames_BTHWC.int() - ground_C.int()).abs().amax(-1) >= 13  # 0.1 of the range of 2 is 12.75 levels
    near_BTHW = torch.zeros_like(painted_BTHW)
    for b, t, y, x in painted_BTHW.nonzero().tolist():
        near_BTHW[b, t, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = True
    assert near_BTHW.sum() > painted_BTHW.sum()
    assert torch.equal(weight_B1THW[:, 0] > 1, near_BTHW)


@pytest.mark.usefixtures("few_clips")
def test_the_decoder_alone_learns_and_latents_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POOL", 1)
    torch.manual_seed(0)
    vae, _ = train_vae(CPU, 0, 1, 0, 1, lambda line: None)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    said: list[str] = []
    pool = torch.from_numpy(render_batch(sample_clips(1, 0)))
    train_decoder(vae.train(), pool, 0, 8, 1, said.append)
    losses = [float(line.split()[-1]) for line in said]
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}


def test_the_learning_rate_warms_up_and_ends_at_nothing() -> None:
    factor = _warm_cosine(1_000)
    assert factor(0) == pytest.approx(0.01)
    assert max(map(factor, range(1_000))) == factor(99) > 0.97
    assert factor(999) < 1e-5
    assert [_warm_cosine(20)(step) for step in (0, 1)] == pytest.approx([0.5, 0.994], abs=1e-3)
    assert _warm_cosine(1)(0) == 1.0


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_text_encoder_learns_what_its_probes_ask() -> None:
    torch.manual_seed(0)
    said: list[str] = []
    text, metrics = train_text(CPU, 0, 120, said.append, batch_size=24)
    assert float(said[0].split()[-1]) < 0.5  # where guessing gets 0.38
    assert metrics["text_probe_accuracy"] > 0.65  # 0.78 measured
    # What leaves is scaled to unit mean square and frozen.
    captions = [clip.caption for clip in sample_clips(64, seed=9, split="test")]
    embeds_BLD = text.encode(captions)
    real_MD = embeds_BLD[embeds_BLD.abs().sum(-1) > 0]
    assert real_MD.square().mean() == pytest.approx(1.0, rel=0.1)
    assert not any(parameter.requires_grad for parameter in text.encoder.parameters())


@pytest.mark.usefixtures("few_clips")
def test_the_vae_learns_ships_in_half_precision_and_knows_its_latents_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "POOL", 1)  # one clip, so that a few steps show
    torch.manual_seed(0)
    said: list[str] = []
    vae, metrics = train_vae(CPU, 0, 8, 0, 1, said.append)
    losses = [float(line.split()[-1]) for line in said]
    assert len(losses) == 8
    assert losses[-1] < 0.6 * losses[0]
    assert set(metrics) == {"psnr_db", "judged_accuracy"}
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in vae.state_dict().values())
    latents_BCTHW = VideoCodec(vae).encode(torch.from_numpy(render_batch(sample_clips(1, 0))))
    by_channel = latents_BCTHW.transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-3
    assert torch.allclose(by_channel.std(1), torch.ones(24), atol=1e-3)


@pytest.mark.usefixtures("few_clips")
def testreconstruction_metrics_is_measured_on_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.from_numpy(render_batch(sample_clips(2, 0, "test")))

    class Perfect:
        def encode(self, part: torch.Tensor) -> torch.Tensor:
            return part

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.where(latents < 255, latents + 1, latents)  # one level off, the judge does not mind

    assert not (frames == 255).any()
    found = reconstruction_metrics(Perfect(), 0)  # type: ignore[arg-type]  # what the function uses of a codec
    assert found["judged_accuracy"] == 1.0
    assert found["psnr_db"] == pytest.approx(48.13, abs=0.01)  # 20 log10(255)


@pytest.mark.usefixtures("few_clips")
def test_a_few_steps_write_folders_that_load(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint"
    metrics = train_briefly(folder)
    assert set(metrics) == {"psnr_db", "judged_accuracy", "text_probe_accuracy"}
    assert sorted(path.name for path in folder.iterdir()) == ["text_encoder", "tokenizer", "vae"]
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    codec = VideoCodec.from_pretrained(folder / "vae")
    text = TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer", text_len=32)
    clip = sample_clips(1, seed=4)[0]
    latents_BCTHW = codec.encode(torch.from_numpy(clip.frames_THWC)[None])
    assert latents_BCTHW.shape == (1, 24, 4, 8, 8)
    assert codec.decode(latents_BCTHW).shape == (1, 13, 64, 64, 3)
    assert any(codec.vae.config.latents_mean)  # measured, not the zeros it began with
    embeds_BLD = text.encode([clip.caption, ""])
    assert (embeds_BLD.abs().sum(-1) > 0).sum(1).tolist() == [len(clip.caption.replace(",", " ,").split()) + 1, 1]
    stored = load_file(next((folder / "vae").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}

    # The same seed writes the same bytes.
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train_briefly(folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "train_vae", lambda *arguments: (tiny_vae(), {"psnr_db": 1.0}))
    monkeypatch.setattr(stage, "train_text", lambda *arguments: (tiny_text_encoder(), {"text_probe_accuracy": 1.0}))


@pytest.mark.usefixtures("untrained")
def test_a_failure_midway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            train_briefly(folder)
        assert list(tmp_path.iterdir()) == []
        folder.mkdir()
        (folder / "earlier").touch()  # no part of a codec: whatever it is, it is not thrown away
        with pytest.raises(OSError, match="No space left"):
            train_briefly(folder)
        assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint", "earlier"]
    train_briefly(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["text_encoder", "tokenizer", "vae"]
    assert [path.parent.name.startswith("checkpoint.replaced.") for path in tmp_path.rglob("earlier")] == [True]


@pytest.mark.usefixtures("few_clips")
def test_training_goes_on_from_another_codec_for_longer_clips(tmp_path: Path) -> None:
    start = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "shapes_teacher"
    folder = tmp_path / "checkpoint"
    given = {"device": CPU, "seed": 0, "steps": 1, "decoder_steps": 0, "batch_size": 1, "text_steps": 1}
    metrics = train_codec(folder, **given, frames=17, start=start, say=lambda line: None)
    assert set(metrics) == {"psnr_db", "judged_accuracy"}  # no text encoder was trained
    for name in ("text_encoder", "tokenizer"):
        for file in (start / name).iterdir():
            assert (folder / name / file.name).read_bytes() == file.read_bytes()
    weights = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(root / "vae" / weights) for root in (start, folder))
    changed = [(after[name].float() - before[name].float()).abs().max().item() for name in before]
    assert 0 < max(changed) < 2e-3  # one step of a rate that warms up
    assert "_name_or_path" not in (folder / "vae" / "config.json").read_text()

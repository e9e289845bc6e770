"""TextEncoder: prompts cleaned, padded with zero rows, cut at text_len; each prompt on its own.

Legend: B batch, L tokens, D embedding width.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from codec_folders import TEXT_LEN
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from turbotrain.codecs import TextEncoder
from turbotrain.codecs.text import clean

PROMPT = "a small red circle moves left slowly"
TOKENS = 8  # of that prompt, with its end


@pytest.fixture(scope="module")
def text(text_folders: tuple[Path, Path]) -> TextEncoder:
    return TextEncoder.from_pretrained(*text_folders, text_len=TEXT_LEN)


def test_embeddings_are_the_encoders_and_zero_past_the_prompt(
    text: TextEncoder, text_folders: tuple[Path, Path]
) -> None:
    embeds_BLD = text.encode([PROMPT])
    assert embeds_BLD.shape == (1, TEXT_LEN, 64)
    assert embeds_BLD.dtype == torch.float32
    assert not embeds_BLD.requires_grad
    assert torch.equal(embeds_BLD[:, TOKENS:], torch.zeros(1, TEXT_LEN - TOKENS, 64))
    assert (embeds_BLD[:, :TOKENS].abs().sum(-1) > 0).all()
    # Padding changes nothing in front of it: the encoder alone, without any, agrees.
    encoder = UMT5EncoderModel.from_pretrained(text_folders[0]).eval()
    ids_BL = text.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    assert ids_BL.shape == (1, TOKENS)
    with torch.no_grad():
        alone_BLD = encoder(input_ids=ids_BL).last_hidden_state
    assert torch.allclose(embeds_BLD[:, :TOKENS], alone_BLD, atol=1e-6)


def test_the_empty_prompt_is_its_end_token_alone(text: TextEncoder) -> None:
    embeds_BLD = text.encode([""])
    assert embeds_BLD[0, 0].abs().sum() > 0
    assert torch.equal(embeds_BLD[0, 1:], torch.zeros(TEXT_LEN - 1, 64))
    assert torch.equal(text.encode(["  \n "]), embeds_BLD)


def test_long_prompts_are_cut(text: TextEncoder) -> None:
    long = " and ".join([PROMPT] * 5)
    embeds_BLD = text.encode([long])
    assert embeds_BLD.shape == (1, TEXT_LEN, 64)
    assert (embeds_BLD.abs().sum(-1) > 0).all()
    assert torch.equal(embeds_BLD, text.encode([long + " on a black background"]))


def test_prompts_of_a_batch_do_not_see_each_other(text: TextEncoder) -> None:
    prompts = [PROMPT, "", "a large blue cross", PROMPT + " and a large blue square moves up fast"]
    together = text.encode(prompts)
    assert torch.allclose(text.encode(prompts[::-1]).flip(0), together, atol=1e-6)
    for prompt, embeds_LD in zip(prompts, together):
        assert torch.allclose(text.encode([prompt])[0], embeds_LD, atol=1e-6)


def test_order_of_words_matters(text: TextEncoder) -> None:
    one, other = text.encode(["a red circle and a blue cross", "a blue circle and a red cross"])
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a\t red \n\n circle  ", "a red circle"),
        ("fish &amp; chips", "fish & chips"),
        ("fish &amp;amp; chips", "fish & chips"),  # escaped twice
        ("&lt;b&gt;", "<b>"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1: ftfy
        ("a&nbsp;red circle", "a red circle"),
        ("色调艳丽,静态", "色调艳丽,静态"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(raw: str, expected: str) -> None:
    assert clean(raw) == expected


def test_cleaning_happens_before_encoding(text: TextEncoder) -> None:
    assert torch.equal(text.encode([f"  {PROMPT.replace(' ', '&amp;nbsp;  ')}\n"]), text.encode([PROMPT]))


def test_the_encoder_is_frozen(text: TextEncoder) -> None:
    assert not text.encoder.training
    assert not any(parameter.requires_grad for parameter in text.encoder.parameters())


def test_half_precision_gives_float32_embeddings(text: TextEncoder, text_folders: tuple[Path, Path]) -> None:
    half = TextEncoder.from_pretrained(*text_folders, dtype=torch.bfloat16, text_len=TEXT_LEN)
    embeds_BLD, exact_BLD = half.encode([PROMPT]), text.encode([PROMPT])
    assert embeds_BLD.dtype == torch.float32
    assert 0 < (embeds_BLD - exact_BLD).norm() / exact_BLD.norm() < 0.05


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3_000])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "no readable"),
        (drop_weight, r"1 weights are missing, the first is encoder\.block\.1"),
        (truncate, "deserializing header"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    ],
    ids=["gone", "incomplete", "truncated", "bad config"],
)
def test_unreadable_encoders_say_so_and_what_to_do(
    text_folders: tuple[Path, Path], tmp_path: Path, damage, reason: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(text_folders[0], broken)
    damage(broken)
    with pytest.raises(ValueError, match=reason) as raised:
        TextEncoder.from_pretrained(broken, text_folders[1])
    assert str(raised.value).startswith(f"text_encoder={str(broken)!r}: no readable umT5 folder (")
    assert "say text_encoder=FOLDER" in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [shutil.rmtree, lambda folder: (folder / "tokenizer.json").write_text("{")],
    ids=["gone", "bad json"],
)
def test_unreadable_tokenizers_say_so_and_what_to_do(text_folders: tuple[Path, Path], tmp_path: Path, damage) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(text_folders[1], broken)
    damage(broken)
    with pytest.raises(ValueError, match="say tokenizer=FOLDER") as raised:
        TextEncoder.from_pretrained(text_folders[0], broken)
    assert str(raised.value).startswith(f"tokenizer={str(broken)!r}: no readable tokenizer folder (")

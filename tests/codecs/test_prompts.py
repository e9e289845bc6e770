"""PromptEncoder: what is encoded, what is remembered, where the encoder is; embeddings on disk; weights in 8 bits.

Legend: B prompts, L tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from codec_folders import TEXT_LEN
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbotrain.codecs import PromptEncoder, TextEncoder
from turbotrain.codecs.cache import EmbeddingCache, default_folder, files_identity
from turbotrain.codecs.prompts import WORKING_BYTES, encoding_place, prompt_encoder
from turbotrain.codecs.text import Int8WeightLinear, lent, quantize_linears, streamed
from turbotrain.model.variants import WanConfig

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PROMPT = "a small red circle moves left slowly"
CONFIG = WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=64, text_len=TEXT_LEN)


@pytest.fixture(scope="module")
def text(text_folders: tuple[Path, Path]) -> TextEncoder:
    return TextEncoder.from_pretrained(*text_folders, text_len=TEXT_LEN)


@pytest.fixture
def places(text_folders: tuple[Path, Path]) -> dict[str, str]:
    return {"text_encoder": str(text_folders[0]), "tokenizer": str(text_folders[1])}


def never() -> TextEncoder:
    raise AssertionError("the encoder was loaded")


# ---- memory and disk --------------------------------------------------------------------------------------------------------


def test_the_second_run_reads_the_disk_and_loads_no_encoder(
    places: dict[str, str], text: TextEncoder, tmp_path: Path
) -> None:
    prompts = [PROMPT, "", "a large blue cross", PROMPT]
    first = prompt_encoder(places, CONFIG, CPU, None, cache_folder=tmp_path)
    expected_BLD = first(prompts)
    assert torch.equal(expected_BLD, text.encode(list(dict.fromkeys(prompts)))[[0, 1, 2, 0]])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3
    again = PromptEncoder(never, CPU, cache=first.cache)
    assert torch.equal(again(prompts), expected_BLD)
    assert torch.equal(again([f"  {PROMPT}\n"]), expected_BLD[:1])  # equal once cleaned


def test_only_the_prompts_own_rows_take_room(text: TextEncoder, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, [], TEXT_LEN, {})
    embeds_LD = text.encode([PROMPT])[0]
    cache.put(PROMPT, embeds_LD)
    assert load_file(cache.path(PROMPT))["embedding"].shape == (8, 64)
    found_LD = cache.get(PROMPT)
    assert found_LD is not None
    assert torch.equal(found_LD, embeds_LD)
    cache.put("nothing", torch.zeros(TEXT_LEN, 64))
    found_LD = cache.get("nothing")
    assert found_LD is not None
    assert torch.equal(found_LD, torch.zeros(TEXT_LEN, 64))


def test_whatever_changes_the_numbers_changes_the_entry(places: dict[str, str], tmp_path: Path) -> None:
    files = files_identity(list(places.values()))
    assert files is not None
    assert len(files) > 3
    paths = {
        EmbeddingCache(tmp_path, some, length, settings).path(prompt)
        for some in (files, files[1:], [(files[0][0], files[0][1], files[0][2] + 1), *files[1:]])
        for length in (TEXT_LEN, TEXT_LEN + 1)
        for settings in ({"dtype": "auto"}, {"dtype": "int8"})
        for prompt in (PROMPT, "another")
    }
    assert len(paths) == 24


def test_files_that_change_are_other_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    before = files_identity([str(tmp_path)])
    assert before == files_identity([str(tmp_path / "weights")])
    os.utime(tmp_path / "weights", ns=(1, 1))
    assert files_identity([str(tmp_path)]) != before
    assert files_identity([str(tmp_path), "google/umt5-xxl"]) is None  # a hub id


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "another tensor": lambda path: save_file({"other": torch.zeros(1, 64)}, path),
    "too long": lambda path: save_file({"embedding": torch.zeros(TEXT_LEN + 1, 64)}, path),
    "half": lambda path: save_file({"embedding": torch.zeros(2, 64).half()}, path),
    "not finite": lambda path: save_file({"embedding": torch.full((2, 64), float("nan"))}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_entries_are_said_and_made_anew(
    text: TextEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = EmbeddingCache(tmp_path, [], TEXT_LEN, {})
    cache.put(PROMPT, text.encode([PROMPT])[0])
    DAMAGES[damage](cache.path(PROMPT))
    embeds_BLD = PromptEncoder(lambda: text, CPU, cache=cache)([PROMPT])
    assert torch.equal(embeds_BLD, text.encode([PROMPT]))
    assert "encoded anew" in caplog.text
    if damage != "a folder":
        assert torch.equal(PromptEncoder(never, CPU, cache=cache)([PROMPT]), embeds_BLD)
    assert not list(tmp_path.glob(".*"))


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(
    text: TextEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "text", [], TEXT_LEN, {})
    assert torch.equal(PromptEncoder(lambda: text, CPU, cache=cache)([PROMPT]), text.encode([PROMPT]))
    assert "not cached" in caplog.text
    assert "text_cache=false" in caplog.text


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "turbotrain" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "turbotrain" / "text"


def test_without_a_cache_a_bad_encoder_is_told_of_at_once(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives embeddings of width 64, but the network reads 4096"):
        prompt_encoder(places, WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=1), CPU, None)
    with pytest.raises(ValueError, match="text_device='tpu': choose one of auto, stay, visit, stream, cpu, cuda"):
        prompt_encoder(places, CONFIG, CPU, None, wanted="tpu")
    with pytest.raises(ValueError, match="text_dtype='int4': choose one of auto, float32, bfloat16, int8"):
        prompt_encoder(places, CONFIG, CPU, None, dtype="int4")
    assert prompt_encoder(places, CONFIG, CPU, torch.bfloat16).text_encoder.encoder.dtype == torch.bfloat16
    assert prompt_encoder(places, CONFIG, CPU, None, dtype="bfloat16").text_encoder.encoder.dtype == torch.bfloat16


def test_encoding_anew_remembers_nothing(text: TextEncoder) -> None:
    prompts = PromptEncoder(lambda: text, CPU)
    assert torch.equal(prompts.encode([PROMPT, PROMPT]), text.encode([PROMPT, PROMPT]))
    assert not prompts._embeddings


def test_weights_that_a_call_loads_outlive_it(places: dict[str, str], tmp_path: Path) -> None:
    prompts = prompt_encoder(places, CONFIG, CPU, None, cache_folder=tmp_path)
    with torch.inference_mode():
        prompts([PROMPT])
    assert not any(parameter.is_inference() for parameter in prompts.text_encoder.encoder.parameters())


# ---- where the encoder is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "free", "expected"),
    [
        ("auto", CPU, 0, ("cpu", CPU)),
        ("auto", CUDA, 51 * 2**30 + 1, ("stay", CUDA)),  # half of the GPU is free beside it
        ("auto", CUDA, 51 * 2**30, ("visit", CUDA)),
        ("auto", CUDA, 11 * 2**30 + WORKING_BYTES + 1, ("visit", CUDA)),
        ("auto", CUDA, 11 * 2**30 + WORKING_BYTES, ("stream", CUDA)),
        ("stay", CUDA, 0, ("stay", CUDA)),
        ("visit", CUDA, 10**12, ("visit", CUDA)),
        ("stream", CUDA, 10**12, ("stream", CUDA)),
        ("stream", CPU, 0, ("cpu", CPU)),
        ("cpu", CUDA, 10**12, ("cpu", CPU)),
        ("cuda", CUDA, 0, ("visit", CUDA)),
        ("cuda", CPU, 0, ("visit", torch.device("cuda"))),
        ("cuda", CUDA, 10**12, ("stay", CUDA)),
    ],
)
def test_the_encoder_computes_on_the_gpu_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: torch.device, free: int, expected: tuple[str, torch.device]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 2**30))
    assert encoding_place(wanted, device, 11 * 2**30) == expected


def test_a_streamed_encoder_gives_the_same_embeddings(text: TextEncoder) -> None:
    before = {name: tensor.clone() for name, tensor in text.encoder.state_dict().items()}
    expected_BLD = text.encode([PROMPT, ""])
    with torch.inference_mode(), streamed(text.encoder, CPU):
        assert torch.equal(text.encode([PROMPT, ""]), expected_BLD)
    assert torch.equal(text.encode([PROMPT, ""]), expected_BLD)
    after = text.encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and not after[name].is_inference() for name in before)


def test_a_lent_module_gets_its_own_tensors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    copies: list[Tensor] = []

    def elsewhere(tensor: Tensor, _device: torch.device) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "to", elsewhere)
    with torch.inference_mode(), contextlib.suppress(KeyboardInterrupt), lent(module, CUDA):
        assert {tensor.data_ptr() for tensor in module.state_dict().values()}.isdisjoint(own.values())
        raise KeyboardInterrupt
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == own
    assert len(copies) == len(own)


# ---- weights in 8 bits ---------------------------------------------------------------------------------------------------------


def test_weights_in_8_bits_give_nearly_the_same_embeddings(text_folders: tuple[Path, Path], text: TextEncoder) -> None:
    small = TextEncoder.from_pretrained(*text_folders, text_len=TEXT_LEN, int8=True)
    linears = [layer for layer in small.encoder.modules() if isinstance(layer, Int8WeightLinear)]
    assert len(linears) == 7 * small.encoder.config.num_layers
    assert not any(isinstance(layer, nn.Linear) for layer in small.encoder.modules())
    assert {layer.weight.dtype for layer in linears} == {torch.int8}
    prompts = [PROMPT, "", "a large blue cross"]
    exact_BLD, embeds_BLD = text.encode(prompts), small.encode(prompts)
    assert 0 < (embeds_BLD - exact_BLD).norm() / exact_BLD.norm() < 0.02
    assert torch.equal(small.encode(prompts), embeds_BLD)
    table = small.encoder.shared.weight.nbytes
    assert small.nbytes - table < 0.3 * (text.nbytes - table)  # one byte and a scale a row, instead of four


def test_8_bits_multiply_in_the_dtype_that_is_asked_for(text_folders: tuple[Path, Path], text: TextEncoder) -> None:
    half = TextEncoder.from_pretrained(*text_folders, dtype=torch.bfloat16, text_len=TEXT_LEN, int8=True)
    exact_BLD = text.encode([PROMPT])
    assert 0 < (half.encode([PROMPT]) - exact_BLD).norm() / exact_BLD.norm() < 0.05
    with pytest.raises(ValueError, match=r"0 has a bias"):
        quantize_linears(nn.Sequential(nn.Linear(8, 4)))


# ---- prompts that nobody expects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \t\n",
        "🐈‍⬛ 🎬 émoji 猫",
        "a\x00b\x07",
        "\ud800 lone surrogate",
        "&amp;" * 1000,
        "\u202eright to left",
        "x" * 20_000,
    ],
    ids=["empty", "blank", "emoji", "null byte", "surrogate", "entities", "direction", "one long word"],
)
def test_any_text_is_encoded(text: TextEncoder, tmp_path: Path, prompt: str) -> None:
    cache = EmbeddingCache(tmp_path, [], TEXT_LEN, {})
    embeds_BLD = PromptEncoder(lambda: text, CPU, cache=cache)([prompt])
    assert embeds_BLD.shape == (1, TEXT_LEN, 64)
    assert torch.isfinite(embeds_BLD).all()
    assert torch.equal(PromptEncoder(never, CPU, cache=cache)([prompt]), embeds_BLD)


def test_null_bytes_are_no_part_of_a_prompt(text: TextEncoder) -> None:
    assert torch.equal(text.encode(["a red\x00 circle"]), text.encode(["a red circle"]))


def test_ten_thousand_words_are_cut_with_a_warning(text: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        embeds_BLD = text.encode(["red " * 10_000, PROMPT])
    assert torch.allclose(embeds_BLD[:1], text.encode(["red " * TEXT_LEN]), atol=1e-6)
    ours = [record for record in caplog.records if record.name == "turbotrain.codecs.text"]
    assert "has 10001 tokens: only the first 12 are read" in ours[0].getMessage()
    caplog.clear()
    text.encode([" ".join(["red"] * (TEXT_LEN - 1)), PROMPT])  # exactly as long as there is room
    assert not caplog.records

"""`infer.py` with what people bring: any prompt, any picture, any place for the result."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from tiny import LATENT, write_checkpoint

from turbotrain import inference
from turbotrain.evaluation.video import read_video
from turbotrain.infer_checks import load_request
from turbotrain.inference import main
from turbotrain.model.variants import VARIANTS

PROMPT = "prompt=a small red circle moves left slowly on a black background"
QUICK = ["steps=1", "frames=5", "text_cache=false"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that starts from an image, under the name of the small world."""
    with pytest.MonkeyPatch.context() as patch:
        base = VARIANTS["shapes"]
        config = replace(base.config, model_type="i2v", in_channels=2 * LATENT[0] + 4)
        patch.setitem(VARIANTS, "shapes", replace(base, config=config))
        return write_checkpoint(tmp_path_factory.mktemp("i2v") / "checkpoint")


@pytest.fixture
def from_image(i2v: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    base = VARIANTS["shapes"]
    config = replace(base.config, model_type="i2v", in_channels=2 * LATENT[0] + 4)
    monkeypatch.setitem(VARIANTS, "shapes", replace(base, config=config))
    return [f"checkpoint={i2v}", PROMPT, *QUICK]


# -- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " ", "\t\n", "\0", "\u200b \x07"])
def test_a_prompt_of_nothing_is_refused_before_anything_is_read(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt=.*: empty; say what the video shows"):
        load_request(["checkpoint=gone", f"prompt={prompt}"])


def test_odd_prompts_make_videos(
    checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A file in which every line is odd: a byte-order mark, a null byte, emoji, 10,000 words, half a surrogate pair's escape."""
    lines = ["a red\0 circle", "\0", "🔴 👩\u200d👧 赤い円 ⟲", " ".join(["circle"] * 10_000), "a\u2028b\x0cc \x1b[31m"]
    (here / "p.txt").write_text("\ufeff" + "\n".join(lines) + "\r\n", encoding="utf-8")
    assert main([f"checkpoint={checkpoint}", "prompts=p.txt", "batch_size=4", "output=v.png", *QUICK]) == 0
    said = capfd.readouterr()
    assert (
        len([line for line in said.out.splitlines() if line.startswith("v-")]) == 4
    )  # the null byte alone is no prompt
    assert "🔴 👩\u200d👧 赤い円".replace("\u200d", " ") in said.out
    assert max(map(len, said.out.splitlines())) < 200
    assert "\x1b" not in said.out
    assert "has 10001 tokens: only the first 32 are read" in caplog.text
    assert len(list(here.glob("v-*.png"))) == 4 * 5


def test_ten_thousand_words_on_the_command_line(checkpoint: Path, here: Path) -> None:
    words = " ".join(["circle, 'left'"] * 5_000)
    assert load_request([f"checkpoint={checkpoint}", f"prompt={words}"]).prompts == [words]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\xff\xfea\0", "not UTF-8 text"), (b"\0\n\0", "the file holds no prompt"), (b"", "the file holds no prompt")],
)
def test_files_without_prompts(checkpoint: Path, here: Path, data: bytes, message: str) -> None:
    (here / "p.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"prompts='p.txt': {message}"):
        load_request([f"checkpoint={checkpoint}", "prompts=p.txt"])


def test_a_terminal_without_unicode_is_no_reason_to_fail(
    checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    assert main([f"checkpoint={checkpoint}", "prompt=a 🔴 circle", *QUICK]) == 0
    assert b"a \\U0001f534 circle" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]


# -- pictures -----------------------------------------------------------------------------------------


def test_every_kind_of_picture_starts_a_video(from_image: list[str], here: Path) -> None:
    """In its own aspect by default, upright, whatever its mode."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 40), "red").save(here / "turned.jpg", exif=exif)
    Image.new("RGBA", (80, 40), (255, 0, 0, 30)).save(here / "rgba.png")
    Image.new("L", (80, 40), 99).save(here / "grey.png")
    Image.new("RGB", (1, 1), "red").save(here / "pixel.png")
    sizes = {"turned.jpg": (88, 40), "rgba.png": (40, 88), "grey.png": (40, 88), "pixel.png": (64, 64)}
    for name, size in sizes.items():
        assert main([*from_image, f"image={name}", f"output={name}.webp"]) == 0
        assert read_video(here / f"{name}.webp")[0].shape == (5, *size, 3)
    assert main([*from_image, "image=grey.png", "aspect=9:16", "output=tall.webp"]) == 0
    assert read_video(here / "tall.webp")[0].shape == (5, 80, 48, 3)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n broken"), "image = 'a.png': not a readable image file"),
        (lambda path: Image.new("RGB", (900, 1)).save(path), "image=900x1 pixels: more extreme than 4:1; crop it"),
        (lambda path: path.mkdir(), "image='a.png': no such file"),
    ],
)
def test_a_bad_picture_is_told_of_before_the_weights_are_read(
    from_image: list[str],
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write: object,
    message: str,
) -> None:
    monkeypatch.setattr(inference, "_load", lambda _: pytest.fail("weights were read"))
    write(here / "a.png")  # type: ignore[operator]
    assert main([*from_image, "image=a.png"]) in (1, 2)
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# -- results ------------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_whole_and_only_at_the_end(
    checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [f"checkpoint={checkpoint}", PROMPT, *QUICK, "output=v.mp4"]
    (here / "v.mp4").write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr("turbotrain.pipeline.TurboPipeline.decode", lambda *_: 1 / 0)
        assert main(good) == 1
    assert (here / "v.mp4").read_text() == "precious"
    assert main(good) == 0
    assert read_video(here / "v.mp4")[0].shape == (5, 64, 64, 3)
    assert [path.name for path in here.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=folder.mp4"], "output='folder.mp4': cannot write in .: Is a directory; choose another output"),
        (["output=file/v.mp4"], "output='file/v.mp4': cannot write in file: Not a directory"),
        ([f"output={'x' * 300}.mp4"], "File name too long; choose another output"),
        (["output=/proc/self/v.mp4"], "output='/proc/self/v.mp4': cannot write in /proc/self: "),
        (["seeds=[1,2]", "output=v.mp4"], "output='v-01-seed2.mp4': cannot write in .: Is a directory"),
        (["seeds=[1,2]", f"output={'x' * 248}.mp4"], "File name too long"),
        (["previews=file"], "previews='file': is a file; name a folder"),
        (["previews=/proc/self/p"], "cannot write in /proc/self"),
    ],
)
def test_results_that_cannot_be_written(checkpoint: Path, here: Path, arguments: list[str], message: str) -> None:
    (here / "file").write_text("")
    (here / "folder.mp4").mkdir()
    (here / "v-01-seed2.mp4").mkdir()
    with pytest.raises((OSError, ValueError)) as caught:
        load_request([f"checkpoint={checkpoint}", PROMPT, *arguments])
    assert message in str(caught.value)


def test_a_read_only_file_is_not_replaced(checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "v.mp4").write_text("precious")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(
        OSError, match=r"output='v.mp4': cannot write in .: the file there is read-only; choose another"
    ):
        load_request([f"checkpoint={checkpoint}", PROMPT, "output=v.mp4"])


# -- while it runs ------------------------------------------------------------------------------------


def test_previews_show_what_each_step_would_give(checkpoint: Path, here: Path) -> None:
    arguments = ["steps=3", "frames=5", "seeds=[1,2]", "batch_size=2", "previews=p", "output=v.webp"]
    assert main([f"checkpoint={checkpoint}", PROMPT, *arguments]) == 0
    names = sorted(path.name for path in (here / "p").iterdir())
    assert names == [f"v-0{index}-seed{index + 1}-step{step}.webp" for index in (0, 1) for step in (1, 2)]
    # The first step's prediction is what a single step gives.
    assert main([f"checkpoint={checkpoint}", PROMPT, "steps=1", "frames=5", "seed=1", "output=one.webp"]) == 0
    first, one = (read_video(here / name)[0].astype(int) for name in (f"p/{names[0]}", "one.webp"))
    assert np.abs(first - one).max() <= 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_people(
    checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={checkpoint}", PROMPT, "steps=2", "frames=5"]
    assert main(arguments) == 0
    assert capfd.readouterr().err == ""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    assert main(arguments) == 0
    assert "video 1: decoding" in shown.getvalue()
    assert "2/2" in shown.getvalue()


# -- benchmark ----------------------------------------------------------------------------------------


def test_a_benchmark_sees_the_image(from_image: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = [*from_image, "mode=benchmark", "repeats=1", "warmup=0"]
    assert main(run) == 2
    assert "starts from an image: say image=PATH" in capfd.readouterr().err
    Image.new("RGB", (64, 64), "red").save(here / "red.png")
    assert main([*run, "image=red.png", "json=b.json"]) == 0
    assert json.loads((here / "b.json").read_text())["phases"]["image"]["median_s"] > 0

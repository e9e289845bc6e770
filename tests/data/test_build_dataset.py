"""tools/build_dataset.py: what it makes, that kills and the number of workers change nothing, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import build_dataset as tool
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan import CHANNELS, HEIGHT, IMAGE_WIDTH, KINDS, TEXT, WIDTH, write_picture

from turbotrain.conditioning import condition_on_image
from turbotrain.data.build import SETTINGS_FILE, Plan, build
from turbotrain.data.latents import LatentDataset
from turbotrain.data.shards import INDEX_FILE, LATENT, Needs, image_parts
from turbotrain.data.sources import Item, read_items
from turbotrain.data.writing import Sample, ShardFile
from turbotrain.evaluation.video import write_video
from turbotrain.model.variants import VARIANTS, default_negative_prompt
from turbotrain.pipeline import TurboPipeline

SHAPE = (CHANNELS, 2, HEIGHT // 8, WIDTH // 8)
PROMPTS = [f"a {word} thing" for word in ("red", "green", "blue", "small", "large", "slow", "fast")]


class Killed(BaseException):
    """As sudden as a signal: nothing handles it."""


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    return path


def listed(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def arguments(mode: str, source: Path, model: Path, kind: str, output: Path, *more: str) -> list[str]:
    given = [mode, str(source), "--model", str(model), "--variant", KINDS[kind], "-o", str(output), "--device", "cpu"]
    return [*given, *(["--steps", "2"] if mode == "teacher" else []), "--samples-per-shard", "3", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), folder / INDEX_FILE]}


# ---- by the teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_draws_each_sample_from_its_own_seed(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tool.main(arguments("teacher", prompts_file(tmp_path), models["t2v"], "t2v", out, "--seed", "11")) == 0
    dataset = LatentDataset(out, Needs(SHAPE, (LATENT,)))
    assert [dataset.prompt(i) for i in range(len(dataset))] == PROMPTS
    assert [path.name for path in sorted(out.glob("*.tar"))] == [f"00000{n}-48x32x5.tar" for n in range(3)]
    pipe = TurboPipeline.from_checkpoint(models["t2v"], device="cpu")
    for index in (0, 5):
        alone = pipe(PROMPTS[index], mode="teacher", steps=2, seed=11 + index).latents
        row = dataset.batch([index])
        assert torch.equal(row.latent_BCTHW, alone.half().float())
        assert torch.equal(row.embed_BLD, pipe.encode_prompts([PROMPTS[index]]).half().float())
    negative = default_negative_prompt(pipe.variant)
    assert torch.equal(dataset.negative_LD, pipe.encode_prompts([negative])[0].half())
    assert dataset.facts["kind"] == "teacher"
    assert dataset.facts["seed"] == 11


def test_workers_and_kills_change_no_byte(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = prompts_file(tmp_path), tmp_path / "out"
    assert tool.main(arguments("teacher", source, models["t2v"], "t2v", tmp_path / "one")) == 0
    calls = 0
    write = ShardFile.write

    def killed_now_and_then(self: ShardFile, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise Killed
        write(self, *given)

    finish = ShardFile.finish

    def killed_after_naming(self: ShardFile) -> None:
        finish(self)
        raise Killed

    overrides = arguments("teacher", source, models["t2v"], "t2v", out)
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "write", killed_now_and_then)
        for _ in range(2):
            with pytest.raises(Killed):
                tool.main([*overrides, "--worker", "1/2"])
        patch.setattr(ShardFile, "write", write)
        patch.setattr(ShardFile, "finish", killed_after_naming)
        with pytest.raises(Killed):
            tool.main([*overrides, "--worker", "1/2"])
    assert tool.main([*overrides, "--worker", "1/2"]) == 0
    assert not (out / INDEX_FILE).exists(), "the other worker's ranges are not there yet"
    # The number of workers may change: what is there is kept.
    for worker in range(3):
        assert tool.main([*overrides, "--worker", f"{worker}/3"]) == 0
    assert contents(out) == contents(tmp_path / "one")
    assert not list(out.glob(".*.partial"))


class SlowMaker:
    """Instead of a network; float16 holds its numbers."""

    parts, together = ("latent.pt", "embed.pt", "prompt.txt"), 1

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def negative(self) -> torch.Tensor:
        return torch.zeros(2, 3)

    def make(self, indices: Sequence[int], items: Sequence[Item]) -> Iterator[tuple[str, Sample | Exception]]:
        for index, item in zip(indices, items):
            time.sleep(self.delay)
            yield "a", Sample(torch.full((4, 30, 30, 30), float(index)), torch.zeros(2, 3), item.prompt)


def build_slowly(output: Path, delay: float) -> None:
    build(Plan(output, 7), [Item(f"p{i}") for i in range(40)], SlowMaker(delay), {}, say=lambda text: None)


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    build_slowly(tmp_path / "whole", 0)
    out = tmp_path / "killed"
    draw = random.Random(0)
    for kill in range(4):
        process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(out, 0.002))
        process.start()
        while len(list(out.glob("*.tar"))) <= kill:  # so that every attempt gets further
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.01 * draw.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (out / INDEX_FILE).exists()
    build_slowly(out, 0)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["i2v", "two experts", "ti2v"])
def test_images_condition_the_teacher(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    pictures = [write_picture(tmp_path / f"{n}.png", seed=n) for n in range(2)]
    rows = [{"prompt": PROMPTS[n], "image": picture.name} for n, picture in enumerate(pictures)]
    if kind == "ti2v":
        rows.append({"prompt": PROMPTS[2]})  # text alone is as good
    out = tmp_path / "out"
    source = listed(tmp_path, rows)
    assert tool.main(arguments("teacher", source, models[kind], kind, out, "--batch-size", "3")) == 0
    variant = VARIANTS[KINDS[kind]]
    dataset = LatentDataset(out, Needs(SHAPE, (LATENT, *image_parts(variant.config))))
    pipe = TurboPipeline.from_checkpoint(models[kind], device="cpu")
    batch = dataset.batch(range(len(rows)))
    for row, said in enumerate(rows):
        image = tmp_path / said["image"] if "image" in said else None
        given = condition_on_image(variant, pipe.codec, image, SHAPE, pipe.components)
        for name, tensor in given.arguments.items():
            if name in ("y_BCTHW", "clip_BLD"):
                assert torch.equal(batch.conditioning.arguments[name][row], tensor[0].half().float())
        # As the sampler gives it alone; in a batch products are rounded otherwise.
        alone = pipe(said["prompt"], image, mode="teacher", steps=2, seed=row, width=WIDTH, height=HEIGHT).latents[0]
        error = (batch.latent_BCTHW[row] - alone).norm() / alone.norm()
        assert error < 1e-3  # float16, 5e-4
        if given.clean_BCTHW is not None:
            assert torch.equal(batch.latent_BCTHW[row, :, 0], given.clean_BCTHW[0, :, 0].half().float())
    if kind == "i2v":
        assert batch.conditioning.clip_BLD.shape == (2, 5, IMAGE_WIDTH)  # type: ignore[union-attr]


# ---- from videos ----------------------------------------------------------------------------------------------------


def clip(path: Path, frames: int = 12, width: int = 60, height: int = 40, fps: float = 16) -> Path:
    """Frame k is grey 10 k."""
    still = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
    write_video(path, np.broadcast_to(still, (frames, height, width, 3)), fps)
    return path


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_videos_in_buckets(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for name, (width, height, frames) in {"a": (60, 40, 12), "b": (40, 60, 12), "c": (60, 40, 6)}.items():
        clip(videos / f"{name}.mp4", frames, width, height)
        (videos / f"{name}.txt").write_text(f"caption {name}\n")
    out = tmp_path / "out"
    buckets = ("--buckets", "48x32x9", "48x32x5", "32x48x5")
    assert tool.main(arguments("videos", videos, models[kind], kind, out, *buckets)) == 0
    parts = image_parts(VARIANTS[KINDS[kind]].config)
    dataset = LatentDataset(out, Needs((CHANNELS, 3, 4, 6), (LATENT, *parts), mixed=True))
    found = {dataset.prompt(i): dataset.sample(i).latent_CTHW.shape for i in range(3)}  # type: ignore[union-attr]
    assert found == {"caption a": (4, 3, 4, 6), "caption b": (4, 2, 6, 4), "caption c": (4, 2, 4, 6)}
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "000000-32x48x5.tar",
        "000000-48x32x5.tar",
        "000000-48x32x9.tar",
    ]
    if kind == "i2v":
        index = next(i for i in range(3) if dataset.prompt(i) == "caption a")
        y = dataset.batch([index]).conditioning.y_BCTHW
        assert y is not None
        assert y.shape == (1, 4 + CHANNELS, 3, 4, 6)
        assert bool((y[0, :4, 0] == 1).all())
        assert not bool(y[0, :4, 1:].any())
        # The VAE is causal: the first latent frame of clip and image are the same frame's.
        latent = dataset.batch([index]).latent_BCTHW
        assert (y[0, 4:, 0] - latent[0, :, 0]).abs().max() < 2e-3  # float16, values about 1


def test_bad_videos_are_skipped_up_to_the_limit(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip(tmp_path / "good.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    Image.new("RGB", (60, 40)).save(tmp_path / "one.gif")
    rows = [{"caption": "x", "video": name} for name in ("good.mp4", "text.mp4", "one.gif", "gone.mp4", "good.mp4")]
    overrides = arguments("videos", listed(tmp_path, [*rows, {"caption": "y"}]), models["t2v"], "t2v", tmp_path / "out")
    assert tool.main(overrides) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    for word in ("failed: item 1", "text.mp4", "not a readable video", "--max-bad is 0"):
        assert word in error
    assert tool.main([*overrides, "--max-bad", "3"]) == 1
    printed = capsys.readouterr()
    assert "failed: item 5" in printed.err
    assert "one.gif: 1 frames at 16 a second from second 0 on, the shortest bucket of 48x32 takes 5" in printed.out
    assert "range 0: 0 made" in printed.out, "the first attempt made the only good one"
    assert tool.main([*overrides, "--max-bad", "4"]) == 0
    assert "made 0, kept 1, skipped 2" in capsys.readouterr().out
    dataset = LatentDataset(tmp_path / "out")
    assert len(dataset) == 2
    assert {int(item) for item in dataset.facts["skipped"]} == {1, 2, 3, 5}


# ---- prompts alone, and shards that came from elsewhere -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_prompts_alone(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    rows = [{"prompt": prompt, **({"image": "a.png"} if kind == "i2v" else {})} for prompt in PROMPTS[:4]]
    out = tmp_path / "out"
    assert tool.main(arguments("prompts", listed(tmp_path, rows), models[kind], kind, out)) == 0
    parts = image_parts(VARIANTS[KINDS[kind]].config)
    batch = LatentDataset(out, Needs(SHAPE, parts)).batch([1, 2])
    assert batch.latents_BCTHW is None
    assert batch.embed_BLD.shape == (2, *TEXT)
    assert len(batch.conditioning.arguments) == len(parts)


def test_an_index_for_shards_from_elsewhere(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = arguments("teacher", prompts_file(tmp_path), models["t2v"], "t2v", out)
    assert tool.main(overrides) == 0
    before = LatentDataset(out).negative_LD
    for path in [out / INDEX_FILE, out / SETTINGS_FILE, *(out / ".ranges").iterdir()]:
        path.unlink()
    index = ["index", "--model", str(models["t2v"]), "--variant", KINDS["t2v"], "-o", str(out), "--device", "cpu"]
    assert tool.main(index) == 0
    assert len(LatentDataset(out)) == len(PROMPTS)
    assert torch.equal(LatentDataset(out).negative_LD, before)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_other_settings_are_not_mixed_in(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    overrides = arguments("teacher", prompts_file(tmp_path), models["t2v"], "t2v", out)
    assert tool.main(overrides) == 0
    assert tool.main([*overrides, "--seed", "1"]) == 1
    assert "was begun with seed=0, now it is 1" in capsys.readouterr().err
    prompts_file(tmp_path).write_text("another\n")
    assert tool.main(overrides) == 1
    assert "was begun with items=7, now it is 1" in capsys.readouterr().err


USAGE = {
    "worker": (["--worker", "2/2"], "--worker 2/2: say I/N"),
    "no worker": (["--worker", "all"], "--worker all: say I/N"),
    "shard": (["--samples-per-shard", "0"], "--samples-per-shard 0: at least 1"),
    "batch": (["--batch-size", "0"], "--batch-size 0: at least 1"),
    "unknown": (["--sed", "1"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, words = USAGE[case]
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments("teacher", prompts_file(tmp_path), tmp_path, "t2v", tmp_path / "out", *more))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_source_that_is_not_there_is_said_before_a_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments("prompts", tmp_path / "none.txt", tmp_path, "t2v", tmp_path / "out"))
    assert stopped.value.code == 2
    assert f"{tmp_path / 'none.txt'}: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n \n", "no prompts in it"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1: expected an object"),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "line 2: unknown field 'promt'"),
        ("a.jsonl", '{"prompt": 3}', "prompt=3 is of the wrong type"),
        ("a.jsonl", '{"image": "a.png"}', "line 1: no prompt"),
        ("a.mp4", "", "no caption"),
    ],
)
def test_lists_that_are_none(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_items(tmp_path if name.endswith("mp4") else tmp_path / name)


def test_launchers_say_which_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, count, _ in tool.LAUNCHERS:
        assert tool._worker(None, {number: "3", count: "8"}) == (3, 8)
    assert tool._worker(None, {}) == (0, 1)
    assert tool._worker("0/2", {"RANK": "1", "WORLD_SIZE": "2"}) == (0, 2)

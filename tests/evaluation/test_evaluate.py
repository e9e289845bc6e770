"""Rows sampled and judged alike, compared with the teacher, saved as contract 8 says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_network, write_checkpoint

from turbotrain.checkpoint import CheckpointMeta
from turbotrain.data.shapes import ATTRIBUTES, render_batch, sample_clips
from turbotrain.evaluation import judge as shapes_judge
from turbotrain.evaluation.evaluate import Evaluation, Row, _judged, attribute_kind, evaluate
from turbotrain.evaluation.video import read_video
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.pipeline import TurboPipeline

PROMPTS = [f"a small {colour} circle" for colour in ("red", "blue", "green", "cyan")]


@dataclass
class Verdict:
    accuracy: float
    attributes: dict[str, bool]


class FakeJudge:
    """Right where the caption is the clip's own, which it knows by brightness; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def judge(self, frames_THWC: np.ndarray, caption: str) -> Verdict:
        self.asked.append((float(frames_THWC.mean()), caption))
        right = "red" in caption
        return Verdict(1.0 if right else 0.5, {"shape_1": True, "colour_1": right})

    def coverage(self, judgements: list[Any]) -> float:
        return len(judgements) / 16


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> TurboPipeline:
    return TurboPipeline.from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint"), "cpu")


@pytest.fixture(scope="module")
def result(pipe: TurboPipeline) -> Evaluation:
    dense = random_network(VARIANTS["shapes"].config, AttentionConfig(), seed=4)
    quantized = CheckpointMeta(quantization={"scheme": "int8_channel"}, attention={"kind": "sla"})
    rows = [
        Row("turbo", "turbo", 2, pipe.experts, quantized),
        Row("teacher", "teacher", 3, [dense], settings={"guidance": 2.0, "shift": 5.0}),
        Row("teacher", "turbo", 2, [dense]),
    ]
    return evaluate(pipe, rows, PROMPTS, [3, 4, 5, 6], judge=FakeJudge(), batch_size=3, clips=2, latency_repeats=1)


def test_rows_keep_their_order_and_name_what_they_are(result: Evaluation) -> None:
    assert [(row["model"], row["sampler"], row["steps"]) for row in result.rows] == [
        ("turbo", "turbo", 2),
        ("teacher", "teacher", 3),
        ("teacher", "turbo", 2),
    ]
    assert result.rows[0]["quantization"] == "int8_channel"
    assert all(row["latency_s"] > 0 for row in result.rows)


def test_scores(result: Evaluation) -> None:
    row = result.rows[0]
    assert row["accuracy"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert row["accuracy_interval"][0] <= row["accuracy"] <= row["accuracy_interval"][1]
    assert row["coverage"] == 4 / 16
    assert row["attributes"]["shape"]["accuracy"] == 1
    assert row["attributes"]["colour"]["accuracy"] == 0.25
    # One prompt on, one of four clips meets the red caption; 1, 2 and 3 on, every clip but red's own does once.
    assert row["accuracy_shuffled"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert result.rows[1]["accuracy_shuffled"] == pytest.approx((0.5 + 3 * 2 / 3) / 4)


def test_everything_is_compared_with_the_teacher(result: Evaluation) -> None:
    turbo, teacher, undistilled = result.rows
    assert "psnr" not in teacher
    assert teacher["relative_accuracy"] == teacher["speedup"] == 1
    assert 0 < turbo["psnr"] < 60
    assert -1 <= turbo["ssim"] < 1
    assert turbo["undistilled"] == "teacher-turbo-2"
    assert "undistilled" not in undistilled
    assert turbo["speedup"] == pytest.approx(teacher["latency_s"] / turbo["latency_s"])


def test_clips_are_what_the_pipeline_makes(pipe: TurboPipeline, result: Evaluation) -> None:
    clips = result.clips["turbo-turbo-2"]
    assert len(clips) == 2
    for index, frames_THWC in enumerate(clips):
        alone_THWC = pipe(PROMPTS[index], steps=2, seed=3 + index).frames
        assert np.abs(frames_THWC.astype(int) - alone_THWC.astype(int)).max() <= 1


def test_what_is_saved_is_contract_8(result: Evaluation, tmp_path: Path) -> None:
    report = json.loads(result.save(tmp_path).read_text())
    assert set(report) >= {"rows", "environment"}
    for row in report["rows"]:
        assert {"model", "steps", "accuracy", "coverage", "latency_s"} <= set(row)
    assert report["environment"]["torch"]
    names = report["clips"]["files"]["teacher-teacher-3"]
    frames_THWC, fps = read_video(tmp_path / names[1])
    assert np.array_equal(frames_THWC, result.clips["teacher-teacher-3"][1])
    assert fps == 8


def test_worlds_without_a_judge_still_have_speed_and_likeness(pipe: TurboPipeline) -> None:
    rows = [Row("teacher", "teacher", 1), Row("turbo", "turbo", 1)]
    found = evaluate(pipe, rows, PROMPTS[:2], [0, 1], latency_repeats=1).rows
    assert found[1]["accuracy"] is None
    assert found[1]["psnr"] > 0


def test_rows_and_prompts_must_make_sense(pipe: TurboPipeline) -> None:
    twice = [Row("turbo", "turbo", 1), Row("turbo", "turbo", 1)]
    with pytest.raises(ValueError, match="once"):
        evaluate(pipe, twice, PROMPTS, [0] * 4)
    with pytest.raises(ValueError, match="4 prompts and 1 seeds"):
        evaluate(pipe, twice[:1], PROMPTS, [0])


def test_attributes_of_both_objects_count_together() -> None:
    for name in ("colour", "colour_1", "colour 2", "1.colour"):
        assert attribute_kind(name) == "colour"


def test_the_shapes_judge_is_told_by_attribute_whatever_the_number_of_objects() -> None:
    clips = sample_clips(12, seed=3, split="test")
    objects = sum(len(clip.scene.objects) for clip in clips)
    assert (
        len(clips) < objects < 2 * len(clips)
    )  # so that some shifted captions ask for more objects than there are, or fewer
    prompts = [clip.caption for clip in clips]
    frames = list(render_batch(clips))
    frames[0] = np.zeros_like(frames[0])  # nothing to see: nothing right but perhaps the ground
    scores: list[float] = []
    told = _judged(shapes_judge, frames, prompts, (1, 2, 3), scores)
    ground_is_black = clips[0].scene.background == "black"
    lost = len(clips[0].scene.objects)
    counts = {name: part["count"] for name, part in told["attributes"].items()}
    assert counts == {**dict.fromkeys(ATTRIBUTES, objects), "background": len(clips)}
    for name in ATTRIBUTES:
        assert told["attributes"][name]["accuracy"] == pytest.approx(1 - lost / objects)
    assert told["attributes"]["background"]["accuracy"] == pytest.approx(1 - (not ground_is_black) / len(clips))
    assert scores[1:] == [1.0] * (len(clips) - 1)
    assert scores[0] == pytest.approx(ground_is_black / clips[0].scene.attribute_count)
    assert 0.1 < told["accuracy_shuffled"] < 0.6
    assert told["coverage_interval"][0] <= told["coverage"] <= told["coverage_interval"][1]

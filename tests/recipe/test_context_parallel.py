"""Processes that share each sample train what one does: SLA and rCM with tangents, critic, averages, under every engine."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipe_world import World, read_metrics, train_here, train_on
from test_ranks import assert_same_run
from tiny_world import tiny_arguments
from torch.multiprocessing import ProcessExitedException

from turbotrain.training.interrupt import Interruption

ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SHARDED = ["fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)]
TOGETHER = "launch.context_parallel=2"


@pytest.mark.parametrize("engine", SHARDED)
def test_two_processes_on_each_sample(engine: str, tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    train_on(2, *tiny_arguments(tiny, tmp_path, TOGETHER, f"launch.engine={engine}"))
    assert_same_run(tmp_path / "run", tiny_whole, tiny)


def test_two_groups_of_two_share_the_batch(tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    more = ["launch.micro_batches=2", "launch.activation_checkpointing=true"]
    train_on(4, *tiny_arguments(tiny, tmp_path, TOGETHER, *more))
    assert_same_run(tmp_path / "run", tiny_whole, tiny)
    for line, other in zip(read_metrics(tmp_path / "run" / "rcm"), read_metrics(tiny_whole / "rcm"), strict=True):
        tokens, expected = (found["tokens_per_s"] * found["seconds"] for found in (line, other))
        assert tokens == pytest.approx(expected), "a shared sample's tokens count once"


def test_the_other_losses(tiny: World, tmp_path: Path) -> None:
    """Flow matching (from scratch, and as SLA's black box), discrete consistency, tangents by finite difference."""
    more = [
        "stages=[teacher,sla,rcm]",
        "teacher.steps=2",
        "teacher.batch_size=2",
        "sla.objective=black_box",
        "rcm.tangent=finite_difference",
        "rcm.phases=[{cm: dcm, dmd: false, steps: 2}, {cm: scm, dmd: false, steps: 1}]",
    ]
    train_on(2, *tiny_arguments(tiny, tmp_path / "shared", TOGETHER, *more))
    assert train_here(*tiny_arguments(tiny, tmp_path / "alone", *more)) == 0
    assert_same_run(tmp_path / "shared" / "run", tmp_path / "alone" / "run", tiny)
    shared, alone = (read_metrics(tmp_path / name / "run" / "teacher") for name in ("shared", "alone"))
    assert [line["loss"] for line in shared] == pytest.approx([line["loss"] for line in alone], rel=1e-4)


def test_low_rank_changes(tiny: World, tmp_path: Path) -> None:
    """Of weights that student, critic and teacher share."""
    more = ["stages=[rcm]", "lora.rank=4", "launch.activation_checkpointing=true"]
    train_on(2, *tiny_arguments(tiny, tmp_path / "shared", TOGETHER, *more))
    assert train_here(*tiny_arguments(tiny, tmp_path / "alone", *more)) == 0
    assert_same_run(tmp_path / "shared" / "run", tmp_path / "alone" / "run", tiny, stages=("rcm",))


def test_a_teacher_with_a_scale_for_every_token(tiny: World, tmp_path: Path) -> None:
    """Its 8-bit activations are the same however tokens are dealt; tiles of tokens, int8_block128, are refused."""
    more = ["stages=[sla]", "model.teacher_scheme=int8_channel"]
    train_on(2, *tiny_arguments(tiny, tmp_path / "shared", TOGETHER, *more))
    assert train_here(*tiny_arguments(tiny, tmp_path / "alone", *more)) == 0
    assert_same_run(tmp_path / "shared" / "run", tmp_path / "alone" / "run", tiny, stages=("sla",))


def test_one_process_continues_what_two_shared(tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(Interruption, "asks_to_stop", lambda self: next(asked) == 4)
        with pytest.raises(ProcessExitedException, match="exit code 1"):
            train_on(2, *tiny_arguments(tiny, tmp_path, TOGETHER))
    assert train_here(*tiny_arguments(tiny, tmp_path)) == 0
    assert_same_run(tmp_path / "run", tiny_whole, tiny)


REFUSED = [
    (["launch.context_parallel=3"], "launch.context_parallel=3: must divide the 2 heads of tiny", "1, 2"),
    (["launch.context_parallel=0"], "launch.context_parallel=0: must be at least 1", ""),
    ([TOGETHER], "launch.context_parallel=2: that many processes share a sample, and this launch has 1", "_node 2"),
    ([TOGETHER, "model.teacher_scheme=int8_block128"], "model.teacher_scheme='int8_block128'", "use int8_channel"),
    ([TOGETHER, "launch.cuda_graph=true"], "launch.cuda_graph=True", "launch.context_parallel=1"),
]


@pytest.mark.parametrize(("more", "error", "remedy"), REFUSED)
def test_what_cannot_be_shared_is_refused(
    more: list[str], error: str, remedy: str, tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny_arguments(tiny, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert error in said
    assert remedy in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_fall_into_groups(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train_here(*tiny_arguments(tiny, tmp_path / "out", TOGETHER)) == 2
    assert "this launch has 3; start a multiple, for example torchrun --nproc_per_node 4" in capsys.readouterr().err

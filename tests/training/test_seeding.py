"""Randomness derives from (seed, stream, step, row): the same whatever the number of processes, different otherwise."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from turbotrain.config import Config, LaunchSection, OptimSection, TimeSection
from turbotrain.data.latents import LatentDataset
from turbotrain.data.writing import Sample, write_shards
from turbotrain.stages.context import BatchSource, StageContext, draw_times, drop_captions
from turbotrain.training.optim import learning_rate
from turbotrain.training.seeding import StepRandom, derive_seed, epoch_order

CPU = torch.device("cpu")


def draws(step: int, rows: range, batch: int = 6, seed: int = 1) -> StepRandom:
    return StepRandom(seed, step, batch, rows, CPU)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_the_rows_that_one_process_would(ranks: int) -> None:
    whole = draws(4, range(6))
    share = 6 // ranks
    parts = [draws(4, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    assert torch.equal(whole.normal("noise", (2, 3)), torch.cat([part.normal("noise", (2, 3)) for part in parts]))
    assert torch.equal(whole.uniform("times"), torch.cat([part.uniform("times") for part in parts]))


def test_every_step_stream_seed_and_row_has_numbers_of_its_own() -> None:
    seen = [
        draws(step, range(6), seed=seed).normal(stream, (4,))
        for step, stream, seed in itertools.product((0, 1), ("a", "b"), (0, 1))
    ]
    rows = torch.cat(seen)
    assert len(rows.unique(dim=0)) == len(rows)
    # The order of use does not matter: nothing is carried from one draw to the next.
    random = draws(0, range(6), seed=0)
    random.uniform("b")
    assert torch.equal(random.normal("a", (4,)), seen[0])


def test_seeds_depend_on_every_argument() -> None:
    seeds = [
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 0),
        derive_seed(0, "a", 1),
    ]
    seeds += [derive_seed(0, "a", 1, 1), derive_seed(0, "a", 11)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_epoch_is_a_permutation() -> None:
    assert sorted(epoch_order(0, 0, 50)) == list(range(50))
    assert epoch_order(0, 0, 50) == epoch_order(0, 0, 50)
    assert epoch_order(0, 0, 50) != epoch_order(0, 1, 50) != epoch_order(1, 1, 50)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("seeding") / "data"
    rows = [Sample(torch.full((1, 1, 1, 1), float(i)), torch.full((1, 1), float(i)), str(i)) for i in range(7)]
    write_shards(folder, rows, torch.full((1, 1), -1.0), 3, {})
    return LatentDataset(folder)


def source(
    dataset: LatentDataset, batch: int, processes: int = 1, rank: int = 0, micro_batches: int = 1, together: int = 1
) -> BatchSource:
    accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device=CPU)
    config = Config(launch=LaunchSection(micro_batches=micro_batches, context_parallel=together))
    context = StageContext("sla", config, Path("unused"), {}, cast(Any, accelerator))
    return BatchSource(context, dataset, batch)


def prompts(batches: BatchSource, steps: int) -> list[str]:
    return [prompt for step in range(steps) for prompt in batches.at(step)[0][0].prompts]


def test_every_epoch_draws_every_sample_once(dataset: LatentDataset) -> None:
    drawn = prompts(source(dataset, 3), 7)
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list("0123456")
    assert drawn[:7] != drawn[7:14]


def test_a_batch_larger_than_the_data_spans_epochs(dataset: LatentDataset) -> None:
    drawn = prompts(source(dataset, 17), 2)
    assert sorted(drawn[:28]) == sorted("0123456" * 4)
    assert prompts(source(dataset, 1), 34) == drawn, "the order does not depend on the batch size"


def test_any_step_can_come_first(dataset: LatentDataset) -> None:
    batches = source(dataset, 3)
    later = batches.at(9)[0][0].prompts
    assert source(dataset, 3).at(9)[0][0].prompts == later
    assert batches.at(0)[0][0].prompts == source(dataset, 3).at(0)[0][0].prompts


def test_ranks_share_the_global_batch(dataset: LatentDataset) -> None:
    whole = source(dataset, 4).at(5)[0]
    parts = [source(dataset, 4, 2, rank).at(5)[0] for rank in range(2)]
    assert [p for batch, _ in parts for p in batch.prompts] == whole[0].prompts
    assert torch.equal(torch.cat([batch.latent_BCTHW for batch, _ in parts]), whole[0].latent_BCTHW)
    assert torch.equal(torch.cat([random.uniform("t") for _, random in parts]), whole[1].uniform("t"))


def test_ranks_that_share_samples_have_the_same_ones(dataset: LatentDataset) -> None:
    halves = [source(dataset, 4, 2, rank).at(5)[0] for rank in (0, 0, 1, 1)]
    shared = [source(dataset, 4, 4, rank, together=2).at(5)[0] for rank in range(4)]
    for (batch, random), (expected, draws) in zip(shared, halves, strict=True):
        assert batch.prompts == expected.prompts
        assert torch.equal(random.normal("n", (3,)), draws.normal("n", (3,)))
    with pytest.raises(ValueError, match=r"number of processes, 4, over launch\.context_parallel=2; for example 4"):
        source(dataset, 5, 4, together=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_are_consecutive_parts_of_a_ranks_share(dataset: LatentDataset, ranks: int) -> None:
    whole = source(dataset, 8).at(5)[0]
    parts = [part for rank in range(ranks) for part in source(dataset, 8, ranks, rank, micro_batches=4 // ranks).at(5)]
    assert [len(batch.prompts) for batch, _ in parts] == [2] * 4
    assert torch.equal(torch.cat([batch.latent_BCTHW for batch, _ in parts]), whole[0].latent_BCTHW)
    assert torch.equal(torch.cat([random.normal("n", (3,)) for _, random in parts]), whole[1].normal("n", (3,)))


def test_a_batch_that_does_not_divide_is_refused(dataset: LatentDataset) -> None:
    with pytest.raises(
        ValueError, match=r"sla\.batch_size=5: must divide by the number of processes, 2; for example 4"
    ):
        source(dataset, 5, processes=2)
    with pytest.raises(ValueError, match=r"number of processes, 2, times launch\.micro_batches=2; for example 4"):
        source(dataset, 6, processes=2, micro_batches=2)


def test_captions_are_dropped_as_often_as_said(dataset: LatentDataset) -> None:
    batches = source(dataset, 2000)
    batch, random = batches.at(0)[0]
    text = drop_captions(batch, dataset.negative_LD, 0.25, random)
    dropped = (text == -1).flatten()
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert torch.equal(text[~dropped], batch.embed_BLD[~dropped])
    assert drop_captions(batch, dataset.negative_LD, 0.0, random) is batch.embed_BLD
    assert (drop_captions(batch, dataset.negative_LD, 1.0, random) == -1).all()


def test_times_follow_their_distribution() -> None:
    random = draws(0, range(4000), batch=4000)
    s = draw_times(TimeSection(mean=0.7, std=1.6), random, "times")
    log_sigma = torch.logit(s)
    assert s.dtype == torch.float64
    assert abs(log_sigma.mean() - 0.7) < 5 * 1.6 / math.sqrt(4000)
    assert abs(log_sigma.std() - 1.6) < 5 * 1.6 / math.sqrt(8000)
    u = draw_times(TimeSection(kind="uniform_shift", shift=5.0), random, "times")
    back = u / (5 - 4 * u)
    assert abs(back.mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    assert u.mean() > 0.6


# ---- learning rates -------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_stays() -> None:
    rate = learning_rate(OptimSection(lr=0.5, warmup_steps=4), 100)
    assert [rate(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert learning_rate(OptimSection(lr=0.5), 100)(0) == 0.5


def test_cosine_falls_to_zero() -> None:
    rate = learning_rate(OptimSection(lr=2.0, decay="cosine"), 8)
    assert [rate(step) for step in (0, 4, 8)] == pytest.approx([2.0, 1.0, 0.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(rate(step) for step in range(9)))

"""rCM on a 2-D mixture with two rare, remote modes: what each of its terms does alone, and what both do together.

Nine small networks start from a teacher each and become 1-step generators: three by the consistency term
alone (scm), three by the score term alone (DMD), three by both (rCM, staged: consistency first, as the authors advise).
The times of the score term lie at low noise (shift 0.1), where a score knows only the modes nearby: that is where DMD
sharpens, and where on its own it forgets.

Loss scales: the consistency gradient has unit length over a whole sample, the score gradient about one per element,
so the published 100 : 1 for a video's 10^6 elements is about 1 : 1 here.

Shapes: M networks; N samples each; K modes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from worlds import MixtureWorld, TinyVelocity

from turbotrain.diffusion import samplers, times
from turbotrain.losses import backward_simulation, critic, dmd, scm, sla_alignment
from turbotrain.training.ema import PowerEMA

pytestmark = pytest.mark.slow

WORLD = MixtureWorld(
    centres_KD=torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.8], [0.0, -1.8]]),
    std=0.12,
    weights_K=torch.tensor([0.42, 0.42, 0.08, 0.08]),
)
KINDS, SEEDS = ("scm", "dmd", "rcm"), 3
MEMBERS, BATCH = len(KINDS) * SEEDS, 128
PRETRAIN, CONSISTENCY_ONLY, STEPS, CRITIC_EVERY = 1000, 800, 3000, 3


@dataclass(frozen=True)
class Quality:
    """Of one generator. distance: sliced Wasserstein-1 to data; precision: samples within 4 std of a mode; recall:
    modes that get at least 0.3 of their share of samples, counting those samples only."""

    distance: float
    precision: float
    recall: float


def _quality(samples_ND: Tensor) -> Quality:
    g = torch.Generator().manual_seed(5)
    angles_DP = torch.nn.functional.normalize(torch.randn(2, 128, generator=g), dim=0)
    data_ND = WORLD.data(len(samples_ND), g)
    gap = (samples_ND @ angles_DP).sort(dim=0).values - (data_ND @ angles_DP).sort(dim=0).values
    distance_N, mode_N = torch.cdist(samples_ND, WORLD.centres_KD).min(dim=1)
    near = distance_N < 4 * WORLD.std
    share_K = torch.bincount(mode_N[near], minlength=len(WORLD.weights_K)) / len(samples_ND)
    recall = (share_K > 0.3 * WORLD.weights_K).float().mean()
    return Quality(gap.abs().mean().item(), near.float().mean().item(), recall.item())


def _pretrained(g: torch.Generator) -> TinyVelocity:
    network = TinyVelocity(2, width=48, layers=3, members=MEMBERS)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, PRETRAIN)
    n = MEMBERS * BATCH
    for _ in range(PRETRAIN):
        s = torch.rand(n, generator=g)
        loss = sla_alignment(network, WORLD.teacher(), WORLD.data(n, g), torch.randn(n, 2, generator=g), s).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


def _distilled(start: TinyVelocity, g: torch.Generator) -> TinyVelocity:
    """The averaged students after the schedule of method.md, section 4d, at this size."""
    student, fake, teacher = start, copy.deepcopy(start), WORLD.teacher()
    weights = dict(student.named_parameters())
    average = PowerEMA(weights, rate=0.1)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.0, 0.999))
    fake_optimiser = torch.optim.Adam(fake.parameters(), lr=4e-3, betas=(0.0, 0.999))
    kind = torch.arange(MEMBERS).div(SEEDS, rounding_mode="floor").repeat_interleave(BATCH)[:, None]
    with_consistency, with_score = kind != KINDS.index("dmd"), kind != KINDS.index("scm")
    n = MEMBERS * BATCH

    def noise() -> Tensor:
        return torch.randn(n, 2, generator=g)

    def score_times() -> Tensor:
        return times.rf_to_trig(times.sample_uniform_shift(torch.rand(n, generator=g), 0.1))

    updates = 0
    for step in range(STEPS):
        staged = step >= CONSISTENCY_ONLY
        if staged and (step + 1) % CRITIC_EVERY:
            with torch.no_grad():
                generated = backward_simulation(student, noise())
            loss, turn = critic(fake, generated, noise(), score_times()).loss, fake_optimiser
        else:
            t = times.rf_to_trig(times.sample_lognormal(torch.randn(n, generator=g), 0.7, 1.6))
            loss = scm(student, teacher, WORLD.data(n, g), noise(), t, loss_scale=0.6, mask=with_consistency).loss
            if staged:
                generated = backward_simulation(student, noise())
                loss = loss + dmd(generated, teacher, fake, noise(), score_times(), mask=with_score).loss
            turn = optimiser
        turn.zero_grad()
        (MEMBERS * loss).backward()
        turn.step()
        if turn is optimiser:
            updates += 1
            average.update(weights, updates)
    student.load_state_dict(average.shadow)
    return student


@pytest.fixture(scope="module")
def results() -> dict[str, list[Quality]]:
    """Qualities of 4,000 samples: of each student's single step, of the teacher's 20 steps, of the teacher's single
    step."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    noise_ND = torch.randn(4000, 2, generator=torch.Generator().manual_seed(99))
    students = _distilled(_pretrained(g), g)
    samples_MND = samplers.sample_turbo(students, noise_ND.repeat(MEMBERS, 1), steps=1).unflatten(0, (MEMBERS, -1))
    teacher = samplers.sample_teacher(WORLD.teacher(), noise_ND, 20, 1.0, "unipc", "rcm")
    qualities = [_quality(x) for x in samples_MND]
    by_kind = {kind: qualities[i * SEEDS : (i + 1) * SEEDS] for i, kind in enumerate(KINDS)}
    one_step = samplers.sample_turbo(WORLD.teacher(), noise_ND, steps=1)
    return {**by_kind, "teacher": [_quality(teacher)], "undistilled": [_quality(one_step)]}


def _mean(qualities: list[Quality], field: str) -> float:
    return sum(getattr(q, field) for q in qualities) / len(qualities)


def test_plain_dmd_loses_modes(results: dict[str, list[Quality]]) -> None:
    assert all(q.recall < 1 for q in results["dmd"]), results["dmd"]


def test_plain_scm_keeps_every_mode_and_blurs(results: dict[str, list[Quality]]) -> None:
    assert all(q.recall == 1 for q in results["scm"]), results["scm"]
    assert results["teacher"][0].precision > 0.99
    assert all(q.precision < 0.85 for q in results["scm"]), results["scm"]


def test_rcm_keeps_the_modes_and_is_sharper(results: dict[str, list[Quality]]) -> None:
    assert _mean(results["rcm"], "recall") > 0.9, results["rcm"]
    assert _mean(results["rcm"], "precision") > _mean(results["scm"], "precision") + 0.03, results


def test_rcm_is_nearest_to_the_data(results: dict[str, list[Quality]]) -> None:
    """And its one step makes up nearly all that the teacher's one step lacks."""
    rcm, scm, dmd = (_mean(results[kind], "distance") for kind in ("rcm", "scm", "dmd"))
    assert rcm < scm, results
    assert rcm < 0.6 * dmd, results
    teacher, undistilled = results["teacher"][0].distance, results["undistilled"][0].distance
    assert (undistilled - rcm) / (undistilled - teacher) > 0.9, results

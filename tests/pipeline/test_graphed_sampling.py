"""A pipeline samples the same latents with and without recorded networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_checkpoint
from torch import Tensor

from turbotrain.model.graphs import GraphCache, Recording
from turbotrain.pipeline import TurboPipeline


def recorder(counts: dict[str, int]) -> Callable[[Callable[[], Tensor]], Recording]:
    def record(call: Callable[[], Tensor]) -> Recording:
        counts["recorded"] += 1
        result = call()

        def replay() -> None:
            counts["replayed"] += 1
            result.copy_(call())

        return Recording(result, replay)

    return record


@pytest.mark.parametrize(("mode", "steps"), [("turbo", 4), ("teacher", 3)])
def test_recorded_networks_give_the_same_latents(mode: str, steps: int, tmp_path: Path) -> None:
    pipe = TurboPipeline.from_checkpoint(write_checkpoint(tmp_path / "turbo"), device="cpu")
    assert pipe.graphs is None  # there is nothing to gain without a GPU
    shape, counts = pipe.latent_shape(5), {"recorded": 0, "replayed": 0}

    def sample(prompt: str) -> Tensor:
        embeds_BLD, negative_BLD = pipe.encode_prompts([prompt]), pipe.encode_prompts([""])
        return pipe.sample(embeds_BLD, [3], shape, steps=steps, negative_BLD=negative_BLD, mode=mode)

    prompts = ("a red circle", "a small blue square")
    expected = [sample(prompt) for prompt in prompts]
    pipe.graphs = GraphCache(recorder(counts))
    for prompt, latents_BCTHW in zip(prompts, expected):
        assert torch.equal(sample(prompt), latents_BCTHW)
    # The first step of all runs eagerly, the second is recorded; the second video begins with replays.
    assert counts == {"recorded": 1, "replayed": 2 * steps - 1}

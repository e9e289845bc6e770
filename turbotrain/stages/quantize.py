"""Quantize stage: the distilled network to W8A8, calibrated on the very steps that the Turbo sampler takes (method: W8A8).

Prompts come from the training shards: the first calibrate, the last measure the error that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from turbotrain.checkpoint import load_transformer
from turbotrain.data.latents import Batch, LatentDataset
from turbotrain.diffusion.samplers import draw_noise, sample_turbo, seeded_generators
from turbotrain.diffusion.velocity import bind
from turbotrain.quant import quantize_transformer
from turbotrain.records import write_json
from turbotrain.stages.artifacts import sampler_settings, write_model
from turbotrain.stages.context import StageContext
from turbotrain.training.seeding import derive_seed


def run(context: StageContext) -> dict[str, object]:
    section = context.config.quantize
    dataset = context.dataset()
    wanted = section.prompts + section.held_out_prompts
    if len(dataset) < wanted:
        raise ValueError(
            f"quantize.prompts={section.prompts} with held_out_prompts={section.held_out_prompts}: the data set holds only "
            f"{len(dataset)} prompts; lower them, or raise data.count"
        )
    network = load_transformer(context.inputs["student"], device=context.device).eval()
    held_out = range(len(dataset) - section.held_out_prompts, len(dataset))
    report = quantize_transformer(
        network,
        list(_calls(context, dataset, range(section.prompts))),
        list(_calls(context, dataset, held_out)),
        scheme=section.scheme,
        alphas=tuple(section.alphas) if section.smooth else (),
        min_sqnr_db=section.min_sqnr_db,
        seed=derive_seed(context.seed, "calibration"),
    )
    write_json(context.folder / "report.json", report.to_dict())
    write_model(
        context,
        network.state_dict(),
        network,
        sampler=sampler_settings(context.config),
        quantization=report.metadata(),
    )
    context.say(f"latent error {report.mean_latent_error:.4f} (relative), report in {context.folder / 'report.json'}")
    return {"latent_error": report.mean_latent_error, "scheme": section.scheme}


def _calls(context: StageContext, dataset: LatentDataset, indices: range) -> Iterator[Callable[[nn.Module], Tensor]]:
    """One call per prompt: the whole Turbo sampler through the network it is given, always from the same noise."""
    sampler, steps = context.config.sampler, context.config.quantize.steps
    times = [math.atan(sampler.sigma_max), *sampler.times][:steps]
    for index in indices:
        batch = dataset.batch([index])

        def call(model: nn.Module, batch: Batch = batch, index: int = index) -> Tensor:
            generators = seeded_generators([derive_seed(context.seed, "noise", index)], context.device)
            with torch.no_grad():
                return sample_turbo(
                    bind(model, batch.embed_BLD, **batch.conditioning.arguments),
                    draw_noise((1, *batch.latent_shape), generators),
                    steps=steps,
                    sigma_max=sampler.sigma_max,
                    ode=sampler.ode,
                    generators=generators,
                    times=times,
                )

        yield call

"""Quantize stage: the distilled network to W8A8, calibrated on the very steps that the Turbo sampler takes (method: W8A8).

Prompts come from the training shards: the first calibrate (and fine-tune), the last measure the error that is left. Of two
experts (`model.expert=both`) each sees the steps on its own side of the boundary: the high-noise one first, then the low-noise
one with what the quantised other hands over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turbotrain.checkpoint import load_transformer
from turbotrain.config import BOTH
from turbotrain.data.latents import Batch, LatentDataset
from turbotrain.diffusion.samplers import draw_noise, sample_turbo, seeded_generators
from turbotrain.quant import Finetune, QuantizationReport, latent_error, quantize_transformer
from turbotrain.records import write_json
from turbotrain.sampling import network_velocity
from turbotrain.stages.artifacts import sampler_settings, write_model
from turbotrain.stages.context import StageContext
from turbotrain.stages.experts import time_range, times_within
from turbotrain.training.seeding import derive_seed

# A prompt sampled by the networks that it is given (high noise first), always from the same noise.
SampleCall = Callable[[Sequence[nn.Module]], Tensor]


def run(context: StageContext) -> dict[str, object]:
    section, launch = context.config.quantize, context.config.launch
    dataset = context.dataset
    tuning = section.finetune if section.finetune.steps else None
    experts = context.variant.experts if context.config.model.expert == BOTH else ("",)
    _check_counts(context, tuning.prompts if tuning else 0, experts)
    # What will be sampled in bf16 is calibrated in bf16; two experts of 14B then lie on one GPU of 80 GB together.
    dtype = torch.bfloat16 if launch.mixed_precision == "bf16" else None
    networks = [
        load_transformer(context.inputs[expert or "student"], device=context.device, dtype=dtype)
        .enable_activation_checkpointing(launch.activation_checkpointing, launch.checkpoint_every)
        .eval()
        for expert in experts
    ]
    calls = list(_calls(context, dataset, range(section.prompts)))
    tuning_calls = list(_calls(context, dataset, range(tuning.prompts))) if tuning else []
    held_out = list(_calls(context, dataset, range(len(dataset) - section.held_out_prompts, len(dataset))))
    floating = [call(networks) for call in held_out] if len(experts) > 1 else []
    reports: dict[str, QuantizationReport] = {}
    for place, expert in enumerate(experts):
        finetune = None
        if tuning:
            learnt = [_of_one(call, networks, place) for call in tuning_calls]
            finetune = Finetune(learnt, tuning.steps, tuning.lr, tuning.batch_size)
        reports[expert] = quantize_transformer(
            networks[place],
            [_of_one(call, networks, place) for call in calls],
            [_of_one(call, networks, place) for call in held_out],
            scheme=section.scheme,
            alphas=tuple(section.alphas) if section.smooth else (),
            min_sqnr_db=section.min_sqnr_db,
            target_error=section.target_error,
            target_latency=section.target_latency,
            seed=derive_seed(context.seed, "calibration", *([place] if expert else [])),
            finetune=finetune,
        )
    errors = [latent_error(call(networks), before) for call, before in zip(held_out, floating)]
    said = _summary(reports, errors)
    write_json(context.folder / "report.json", said)
    for network, (expert, report) in zip(networks, reports.items()):
        write_model(
            context,
            network.state_dict(),
            network,
            sampler=sampler_settings(context.config),
            quantization=report.metadata(),
            expert=expert,
        )
    for expert, report in reports.items():
        if report.latency is not None:
            context.say(latency_line(expert, report))
        if (said_of := report.finetune) is not None:
            context.say(tuning_line(expert, said_of))
    context.say(f"latent error {said['latent_error']:.4f} (relative), report in {context.folder / 'report.json'}")
    return {"latent_error": said["latent_error"], "scheme": section.scheme}


def _check_counts(context: StageContext, tuning_prompts: int, experts: Sequence[str]) -> None:
    """Raises ValueError: fewer prompts than are asked for, or steps of which an expert takes none."""
    section, there = context.config.quantize, len(context.dataset)
    for name, count in (("prompts", section.prompts), ("finetune.prompts", tuning_prompts)):
        if there < count + section.held_out_prompts:
            raise ValueError(
                f"quantize.{name}={count} with held_out_prompts={section.held_out_prompts}: the data set holds only "
                f"{there} prompts; lower them, or raise data.count"
            )
    for expert in filter(None, experts):
        if not times_within(time_range(context.variant, expert), _times(context)):
            raise ValueError(
                f"quantize.steps={section.steps}: none of them is the {expert}-noise expert's; calibrate with more"
            )


def latency_line(expert: str, report: QuantizationReport) -> str:
    latency, kept = report.latency, sum(layer.kept_float is not None for layer in report.layers)
    assert latency is not None
    name = f"{expert}-noise expert: block linears" if expert else "block linears"
    return (
        f"{name}: {kept} of {len(report.layers)} stay in float; foretold on {latency.times.device}: {latency.predicted:.3f} of "
        f"their time in {latency.times.dtype} (wanted {latency.target:g}; all in 8 bits {latency.all_quantised:.3f}), latent "
        f"error {latency.predicted_error:.4f}"
    )


def tuning_line(expert: str, said: dict[str, Any]) -> str:
    name = f"{expert}-noise expert: fine-tuning" if expert else "fine-tuning"
    errors = (said["latent_error_before"], said["latent_error_after"])
    before, after = ("not finite" if error is None else f"{error:.5f}" for error in errors)
    outcome = "kept" if said["kept"] else "NOT kept: the untuned weights stay"
    return f"{name}, {said['steps']} steps: median latent error {before} -> {after}; {outcome}"


def _summary(reports: dict[str, QuantizationReport], errors: list[float]) -> dict[str, Any]:
    """What report.json says: of one network its report; of two both, and the error of the videos that they make together."""
    if not errors:
        (report,) = reports.values()
        return report.to_dict()
    of_each: dict[str, Any] = {expert: report.to_dict() for expert, report in reports.items()}
    return {**of_each, "latent_errors": errors, "latent_error": sum(errors) / len(errors)}


def _of_one(call: SampleCall, networks: Sequence[nn.Module], place: int) -> Callable[[nn.Module], Tensor]:
    """The call as a function of the network at `place`; the others are as they are when it is made."""
    return lambda network: call([*networks[:place], network, *networks[place + 1 :]])


def _calls(context: StageContext, dataset: LatentDataset, indices: range) -> Iterator[SampleCall]:
    """One call per prompt: the whole Turbo sampler."""
    sampler, times = context.config.sampler, _times(context)
    for index in indices:
        batch = dataset.batch([index])

        def call(networks: Sequence[nn.Module], batch: Batch = batch, index: int = index) -> Tensor:
            generators = seeded_generators([derive_seed(context.seed, "noise", index)], context.device)
            with torch.no_grad():
                return sample_turbo(
                    network_velocity(networks, batch.embed_BLD, batch.conditioning, context.variant.boundary),
                    draw_noise((1, *batch.latent_shape), generators),
                    steps=len(times),
                    sigma_max=sampler.sigma_max,
                    ode=sampler.ode,
                    generators=generators,
                    times=times,
                )

        yield call


def _times(context: StageContext) -> list[float]:
    """TrigFlow times of the steps that calibrate."""
    sampler = context.config.sampler
    return [math.atan(sampler.sigma_max), *sampler.times][: context.config.quantize.steps]

"""Measuring the rows of one cell: its network as each row runs it, on the prompts and noise of all others.

Shapes: N clips, C latent channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbotrain.checkpoint import CheckpointMeta, load_transformer
from turbotrain.checkpoint.atomic import new_file
from turbotrain.checkpoint.merge import merge_keys, merge_tensor
from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.config import Config
from turbotrain.data.shapes import sample_clips
from turbotrain.data.shapes_gpu import render_on
from turbotrain.diffusion.samplers import draw_noise, sample_turbo, seeded_generators
from turbotrain.diffusion.velocity import bind
from turbotrain.evaluation.attention_mass import Masses, attention_mass, share_out
from turbotrain.evaluation.benchmark import environment
from turbotrain.evaluation.evaluate import finite
from turbotrain.evaluation.frechet import clip_features
from turbotrain.evaluation.quality import prompt_values, summarise
from turbotrain.evaluation.trial import JUDGED_TOGETHER, Trial, measure_trial, reference_frames, sample_trial
from turbotrain.evidence.films import filmstrips
from turbotrain.evidence.folders import Folders
from turbotrain.evidence.matrix import TEACHER, Cell, Row
from turbotrain.model.attention_config import LAYER_TOPKS, AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline
from turbotrain.quant import DEFAULT_ALPHAS, Finetune, quantize_transformer
from turbotrain.quant.sites import block_linears
from turbotrain.records import write_json
from turbotrain.stages.artifacts import attention_config

# Prompts of the training split: to calibrate, to measure the error that is left (and sensitive layers), to fine-tune, to see
# attention.
CALIBRATION, HELD_OUT, FINETUNE, MASS_CLIPS = 16, 32, 64, 2
CALIBRATION_SEED = 10**6  # no clip of a trial draws this noise


class Bench:
    """What the rows of a process share: codec, text, prompts, and the reference that they are compared with."""

    def __init__(self, folders: Folders, config: Config, device: torch.device) -> None:
        self.folders, self.config, self.device = folders, config, device
        self.on_gpu = device.type == "cuda"
        # As they ship and as inference runs them; the CPU computes in float32.
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        torch.set_float32_matmul_precision("high")
        self.variant = VARIANTS[config.model.variant]
        matrix, data = folders.matrix, config.data
        codec = VideoCodec.from_pretrained(
            folders.codec / "vae", device=str(device), dtype=torch.float16 if self.on_gpu else torch.float32
        )
        text = TextEncoder.from_pretrained(
            str(folders.codec / "text_encoder"),
            str(folders.codec / "tokenizer"),
            device=str(device),
            dtype=torch.float32,
            text_len=self.variant.config.text_len,
        )
        clips = sample_clips(matrix.prompts, config.seed, split="test", pairs=data.pairs)
        self.trial = Trial(clips, matrix.seeds, data.frames)
        self.codec, self.text = codec, text
        self._reference: Tensor | None = None

    def pipeline(self, network: WanTransformer) -> TurboPipeline:
        sampler = self.config.sampler
        recorded = {"sigma_max": sampler.sigma_max, "times": list(sampler.times), "ode": sampler.ode}
        meta = CheckpointMeta(sampler=recorded)
        return TurboPipeline([network], self.codec, self.text, self.variant, meta, self.device)

    def reference(self, pipe: TurboPipeline) -> Tensor:
        """The teacher's frames, decoded once."""
        if self._reference is None:
            latents_NCTHW = load_file(self.folders.reference_latents)["latents"]
            self._reference = reference_frames(pipe, latents_NCTHW)
        return self._reference

    def sampler(self, row: Row) -> dict[str, Any]:
        """Arguments of `TurboPipeline.sample`."""
        if row.sampler != TEACHER:
            return {"mode": "turbo", "steps": row.steps, **row.settings}
        teacher = self.config.sampler.teacher
        own = {"guidance": teacher.guidance, "shift": teacher.shift, "solver": teacher.solver, "grid": teacher.grid}
        return {"mode": TEACHER, "steps": row.steps, **own, **row.settings}


def measure_cell(bench: Bench, cell: Cell, only: str | None = None, say: Callable[[str], None] = print) -> None:
    """Measure and write every row of `cell` that is missing, or the one of this name. The first cell also writes what all others
    are compared with.

    Raises:
        ValueError: names the rows that failed, after all have been tried; `only` is none of them.
    """
    folders = bench.folders
    if only is not None and only not in (names := [row.name for row in cell.rows]):
        raise ValueError(f"--row {only}: {cell.name} has {', '.join(names)}")
    is_reference = cell is folders.matrix.cells[0]
    real = _real_features(bench) if is_reference else load_file(folders.real_features)["features"]
    failed: list[str] = []
    for row in folders.missing(cell):
        if only not in (None, row.name):
            continue
        try:
            _measure_row(bench, cell, row, real.numpy(), say)
        except Exception:  # one row that cannot run must not cost the others
            # Its words alone: an exception that is kept holds its frames, and with them the row's network and clips.
            failed.append(row.name)
            say(f"{cell.name}/{row.name}: failed\n{traceback.format_exc()}")
    if failed:
        raise ValueError(f"{cell.name}: rows {', '.join(failed)} failed: what each said is above")


def _measure_row(bench: Bench, cell: Cell, row: Row, real_ND: np.ndarray, say: Callable[[str], None]) -> None:
    folders = bench.folders
    began = time.perf_counter()
    network, facts = build(bench, cell, row)
    pipe = bench.pipeline(network)
    latents_NCTHW = sample_trial(pipe, bench.trial, bench.sampler(row), folders.matrix.batch_size)
    pipe.synchronize()
    sampled = time.perf_counter()
    if cell is folders.matrix.cells[0] and row is cell.rows[0]:
        _save(folders.reference_latents, {"latents": latents_NCTHW.cpu()})
        reference = None
    else:
        reference = bench.reference(pipe)
    measured = measure_trial(pipe, bench.trial, latents_NCTHW, reference)
    metrics = summarise(measured, bench.trial.seeds, real_ND)
    by_prompt = prompt_values(measured.judged, bench.trial.seeds)
    result = {
        "cell": cell.name,
        "row": row.name,
        "title": row.label or cell.title,
        "group": cell.group,
        "sampler": row.sampler,
        "steps": row.steps,
        "evaluations": row.evaluations,
        "attention": network.attention_config.to_dict(),
        "quantize": row.quantize,
        "train": list(cell.train),
        "metrics": metrics,
        **{f"{name}_by_prompt": values_P.round(4).tolist() for name, values_P in by_prompt.items()},
        "facts": facts,
        "film": filmstrips(pipe.codec.decode_here(latents_NCTHW[:1])),
        "film_prompt": bench.trial.captions[0],
        "clips": bench.trial.count,
        "seconds": {"sampling": sampled - began, "measuring": time.perf_counter() - sampled},
        "environment": environment(bench.device),
    }
    target = folders.result(cell, row)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, finite(result))
    accuracy, low, high = metrics["accuracy"]
    say(
        f"{cell.name}/{row.name}: accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}]  coverage {metrics['coverage'][0]:.3f}"
    )


def build(bench: Bench, cell: Cell, row: Row) -> tuple[WanTransformer, dict[str, Any]]:
    """The network as the row runs it, on the bench's device, and what there is to tell of it."""
    folders, facts = bench.folders, {}
    if cell.network == "merge":
        network = _merged(folders, folders.matrix.cell(cell.merge_rcm), folders.matrix.cell(cell.merge_sla))
    else:
        network = load_transformer(folders.checkpoint(cell), dtype=torch.float32)
    network = network.to(bench.device).eval()
    if row.attention:
        network.set_attention(AttentionConfig.from_dict(row.attention, network.attention_config))
    if row.mass or row.layer_budget:
        mass = _mass(bench, network)
        facts["attention_mass"] = {"topk": list(LAYER_TOPKS), "layers": mass}
        if row.layer_budget:
            chosen = share_out(mass, LAYER_TOPKS, row.layer_budget)
            network.set_attention(AttentionConfig.from_dict({"layer_topk": chosen}, network.attention_config))
    if row.quantize:
        facts.update(_quantize(bench, network, row))
    network.set_weight_dtype(bench.dtype)
    return network, facts


def _merged(folders: Folders, rcm: Cell, sla: Cell) -> WanTransformer:
    """W = W_rcm + (W_sla - W_teacher), with the projections of SLA's linear branch from SLA (method: composing)."""
    teacher = load_transformer(folders.checkpoint(folders.matrix.cells[0]), dtype=torch.float32)
    distilled = load_transformer(folders.checkpoint(rcm), dtype=torch.float32)
    trained = load_transformer(folders.checkpoint(sla), dtype=torch.float32)
    base, target, anchor = distilled.state_dict(), trained.state_dict(), teacher.state_dict()
    keys = merge_keys(base, target, anchor)
    merged = {key: merge_tensor(base[key], target[key], anchor[key], 1.0) for key in keys.merged}
    merged.update({key: target[key] for key in keys.added})
    merged.update({key: base[key] for key in keys.kept})
    trained.load_state_dict(merged)
    return trained


def _mass(bench: Bench, network: WanTransformer) -> Masses:
    """Of the network's own blocks, over the passes of the 4-step Turbo sampler; dense ones are asked for the recipe's blocks."""
    own = network.attention_config
    blocks = own if own.is_sparse else attention_config(bench.config)
    return attention_mass(network, calibration_calls(bench, MASS_CLIPS), LAYER_TOPKS, blocks)


def _quantize(bench: Bench, network: WanTransformer, row: Row) -> dict[str, Any]:
    options = dict(row.quantize)
    scheme = options.get("scheme", "int8_channel")
    if options.get("weights_only"):
        _round_weights(network, scheme)
        return {"scheme": scheme, "weights_only": True}
    steps = options.get("finetune", 0)
    # All of them for every row: what the text encoder rounds depends on the size of its batch.
    calls = list(calibration_calls(bench, CALIBRATION + HELD_OUT + FINETUNE))
    report = quantize_transformer(
        network,
        calls[:CALIBRATION],
        calls[CALIBRATION : CALIBRATION + HELD_OUT],
        scheme=scheme,
        alphas=DEFAULT_ALPHAS if options.get("smooth", True) else (),
        target_error=options.get("target_error", 0.0),
        seed=bench.config.seed,
        finetune=Finetune(calls[CALIBRATION + HELD_OUT :], steps) if steps else None,
    )
    return {
        "scheme": scheme,
        "latent_errors": report.latent_errors,
        "finetune": report.finetune,
        "kept_float": [layer.name for layer in report.layers if layer.kept_float is not None],
        "sensitivity": report.sensitivity,
        "sqnr_db": {
            layer.name: [round(layer.sqnr_db, 2), round(layer.unsmoothed_sqnr_db, 2)] for layer in report.layers
        },
        "input_absmax": {layer.name: round(layer.input_absmax, 3) for layer in report.layers},
    }


def _round_weights(network: WanTransformer, scheme: str) -> None:
    """Every block linear keeps its float arithmetic; its weight takes the values that 8 bits can hold."""
    from turbotrain.model.quant_linear import QuantLinear

    with torch.no_grad():
        for block in network.blocks:
            for linear in block_linears(block).values():
                linear.weight.copy_(QuantLinear.from_linear(linear, scheme).dequantize())


def calibration_calls(bench: Bench, count: int) -> Iterator[Callable[[nn.Module], Tensor]]:
    """One call for each of `count` captions of the training split: the Turbo sampler, 4 steps, always from the same noise."""
    sampler, data = bench.config.sampler, bench.config.data
    clips = sample_clips(count, bench.config.seed, pairs=data.pairs)
    context_BLD = bench.text.encode([clip.caption for clip in clips]).to(bench.device)
    shape = bench.variant.latent_shape(bench.trial.frames, data.height, data.width)

    def call(model: nn.Module, index: int) -> Tensor:
        generators = seeded_generators([CALIBRATION_SEED + index], bench.device)
        with torch.no_grad():
            velocity = bind(model, context_BLD[index : index + 1])
            noise_BCTHW = draw_noise((1, *shape), generators)
            times = [math.atan(sampler.sigma_max), *sampler.times]
            return sample_turbo(velocity, noise_BCTHW, 4, sampler.sigma_max, sampler.ode, generators, times=times)

    for index in range(count):
        yield partial(call, index=index)


def _real_features(bench: Bench) -> Tensor:
    """Features of rendered clips that no prompt of the trial shows."""
    path, matrix = bench.folders.real_features, bench.folders.matrix
    if not path.is_file():
        data, seed = bench.config.data, bench.config.seed
        clips = sample_clips(matrix.real, seed, "test", matrix.prompts, data.pairs)
        parts = [clips[at : at + JUDGED_TOGETHER] for at in range(0, len(clips), JUDGED_TOGETHER)]
        features = [clip_features(render_on(bench.device, part, data.frames)).cpu() for part in parts]
        _save(path, {"features": torch.cat(features)})
    return load_file(path)["features"]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with new_file(path) as new:
        save_file(tensors, new)

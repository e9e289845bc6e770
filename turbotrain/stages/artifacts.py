"""What stages read and write: checkpoints with their lineage, the codec beside them, sample strips while training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbotrain.checkpoint import CheckpointMeta, read_meta, save_checkpoint
from turbotrain.checkpoint.components import COPIED_UP_TO, find_component, folder_bytes, published_part
from turbotrain.checkpoint.lora import LORA_FILE, save_lora
from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.codecs.folders import quiet_libraries
from turbotrain.config import Config
from turbotrain.evaluation.video import contact_sheet, png_bytes, write_bytes
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.lora import has_lora, lora_change, merged_state
from turbotrain.model.variants import Variant
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline
from turbotrain.records import environment, hash_path
from turbotrain.stages.context import StageContext
from turbotrain.training.state import best_state, saved_steps, saved_tensors

COMPONENTS = ("vae", "text_encoder", "tokenizer")
SAMPLES = 4


def attention_config(config: Config) -> AttentionConfig:
    section = config.attention
    return AttentionConfig(
        section.kind, section.topk, section.block_q, section.block_k, section.order, section.feature_map
    )


def sampler_settings(config: Config) -> dict[str, Any]:
    """What a Turbo checkpoint records of its sampler."""
    return {"sigma_max": config.sampler.sigma_max, "times": list(config.sampler.times), "ode": config.sampler.ode}


def codec_parts(context: StageContext) -> dict[str, Path]:
    """Where the VAE, the text encoder and the tokenizer lie; empty where the recipe names no codec."""
    folder = context.inputs.get("codec")
    if folder is None:
        return {}
    wanted = (*COMPONENTS, *(("image_encoder",) if context.variant.config.image_dim is not None else ()))
    beside = {name: path for name in wanted if (path := published_part(name, folder)) is not None}
    if len(beside) == len(wanted):
        return beside
    named = read_meta(folder).components
    return {name: Path(find_component(name, named, folder)) for name in wanted}


def load_codec(parts: Mapping[str, Path], device: torch.device, variant: Variant) -> tuple[VideoCodec, TextEncoder]:
    quiet_libraries()
    codec = VideoCodec.from_pretrained(str(parts["vae"]), device=str(device), dtype=torch.float32)
    # Wan's umT5 is 11 GB in bf16, as it is published; a pipeline takes it to the device while it encodes.
    small = variant.vae == "shapes"
    text = TextEncoder.from_pretrained(
        str(parts["text_encoder"]),
        str(parts["tokenizer"]),
        device=str(device) if small else "cpu",
        dtype=torch.float32 if small else torch.bfloat16,
        text_len=variant.config.text_len,
    )
    return codec, text


def make_pipeline(context: StageContext, network: WanTransformer, meta: CheckpointMeta | None = None) -> TurboPipeline:
    codec, text = load_codec(codec_parts(context), context.device, context.variant)
    return TurboPipeline([network], codec, text, context.variant, meta, context.device)


def write_model(
    context: StageContext,
    state_dict: Mapping[str, Tensor],
    network: WanTransformer,
    *,
    sampler: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    expert: str = "",
    best: Mapping[str, Any] | None = None,
) -> CheckpointMeta:
    """Write the stage's checkpoint: weights, everything that inference needs to know, and where it came from.

    best: with `launch.keep_best`, what made this state the best; it then lies in `best/`, as the last does in the stage's folder.
    expert: which one this is, of a stage that makes both. state_dict: of a network with LoRA, what was trained of it; the
    checkpoint has it merged, and `lora/` beside it alone.
    """
    lineage: list[dict[str, Any]] = []
    base_license = ""
    for role in ("teacher", "sla", "rcm", "merge", "student", expert):
        if role in context.inputs:
            before = read_meta(context.inputs[role])
            lineage, base_license = before.lineage, before.license
    inputs = {role: hash_path(path) for role, path in context.inputs.items() if role not in ("data", "codec")}
    made = environment()
    entry = {"stage": context.name, "inputs": inputs, "commit": made["commit"], "torch": made["torch"]}
    entry |= {"best": dict(best)} if best else {}
    folder = context.folder / "best" if best else context.folder
    parts = codec_parts(context)
    size = sum(folder_bytes(path) for path in parts.values())
    copied = parts if size <= COPIED_UP_TO and all(path.is_dir() for path in parts.values()) else {}
    meta = CheckpointMeta(
        variant=context.variant.name,
        config=network.config.to_dict(),
        attention=network.attention_config.to_dict(),
        quantization=None if quantization is None else dict(quantization),
        sampler=None if sampler is None else dict(sampler),
        lineage=[*lineage, entry],
        license=base_license or ("Apache-2.0" if context.variant.vae == "shapes" else ""),
        components={} if copied else {name: str(path.absolute()) for name, path in parts.items()},
        dtype=str(network.dtype).removeprefix("torch."),
    )
    if has_lora(network):
        save_lora(folder / "lora" / LORA_FILE, lora_change(state_dict, network), meta)
        state_dict = merged_state(network, state_dict)
        meta = dataclasses.replace(meta, dtype="float32")
    save_checkpoint(folder / context.checkpoint.name / expert, state_dict, meta, copied)
    return meta


def write_trained(
    context: StageContext, prefix: str, network: WanTransformer, sampler: Mapping[str, Any] | None = None
) -> None:
    """Write the stage's checkpoint from `prefix` of its last training state and, with `launch.keep_best`, that of the best.
    A best state that cannot be read is reported and left out: what the stage passes on is the last."""
    states = context.folder / "state"
    write_model(context, saved_tensors(states, prefix), network, sampler=sampler)
    wanted, best = context.config.launch.keep_best, best_state(states)
    if not wanted:
        return
    if not best:
        context.say(f"best state: none, the last phase has no {wanted} over as many steps as lie between two saves")
        return
    context.say(f"best state: after step {best['step']}, {wanted} {best['value']:.4g}")
    if best["step"] == saved_steps(states)[-1]:
        return
    try:
        tensors = saved_tensors(states, prefix, best["step"])
    except OSError as error:
        context.say(f"best state: {error}; only the last one becomes a checkpoint")
        return
    best = {key: best[key] for key in ("metric", "step", "value")}
    write_model(context, tensors, network, sampler=sampler, best=best)


def sample_strips(context: StageContext, network: WanTransformer, mode: str) -> Callable[[int], None] | None:
    """A function that writes `samples/step_00000100.png`: the same prompts and seeds each time, as filmstrips.

    None where nothing is to be sampled, or the recipe has no codec to decode with.
    """
    section = getattr(context.config, context.name)
    # A pass of a sharded network or sample takes every process; otherwise the first samples while the others wait.
    together = context.engine in ("fsdp2", "zero3") or context.config.launch.context_parallel > 1
    takes_part = context.accelerator.is_main_process or together
    if not section.sample_every or "codec" not in context.inputs or not takes_part:
        return None
    if context.config.model.expert:
        context.say("no samples while one expert of two is trained: its sampler needs both")
        return None
    meta = CheckpointMeta(sampler=sampler_settings(context.config))
    pipe = make_pipeline(context, network, meta)
    dataset = context.dataset
    batch = dataset.batch(dataset.buckets[0][:SAMPLES])
    negative_BLD = dataset.negative_LD.to(batch.embed_BLD).expand_as(batch.embed_BLD)
    teacher = context.config.sampler.teacher
    settings: dict[str, Any] = {"steps": teacher.steps, "guidance": teacher.guidance, "shift": teacher.shift}

    def sample(done: int) -> None:
        was_training = network.training
        how: dict[str, Any] = settings if mode == "teacher" else {"steps": 4}
        network.eval()
        with torch.inference_mode():
            latents_BCTHW = pipe.sample(
                batch.embed_BLD,
                range(len(batch.prompts)),
                batch.latent_shape,
                negative_BLD=negative_BLD,
                conditioning=batch.conditioning,
                mode=mode,
                **how,
            )
            videos = pipe.decode(latents_BCTHW)
        network.train(was_training)
        if not context.accelerator.is_main_process:
            return
        folder = context.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"step_{done:08d}.png", png_bytes(contact_sheet(videos)))

    return sample

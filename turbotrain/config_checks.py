"""Every check of a recipe that needs no network, before torch is imported: each says what, which value, and what is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from turbotrain.compose import reject
from turbotrain.config import (
    BOTH,
    NO_SHARDED_LORA,
    STAGES,
    AttentionSection,
    Config,
    EvaluateSection,
    GuardSection,
    LoopSection,
    OptimSection,
    QuantizeSection,
    RcmSection,
    SamplerSection,
    SlaSection,
    TeacherSection,
    TimeSection,
)
from turbotrain.model.attention_config import LAYER_TOPKS
from turbotrain.model.variants import VARIANTS

SCHEMES = ("int8_channel", "int8_block128", "fp8_channel")
ENGINES = ("auto", "ddp", "fsdp2", "zero2", "zero3")
OF_BOTH_ROLES = ("loss", "grad_norm")  # metrics that every trained network has
BEST_METRICS = ("loss", "grad_norm", "scm", "dcm", "tangent_norm", "boundary", "dmd", "score_gap", "critic")


def validate(config: Config) -> None:
    """Check every range and choice, and that the selected stages can follow one another.

    Raises:
        UsageError: the first problem found.
    """
    _check_stages(config)
    _choice("model.variant", config.model.variant, tuple(VARIANTS))
    _check_expert(config)
    _check_attention(config.attention)
    _check_data(config)
    for name in ("teacher", "sla"):
        _check_loop(name, getattr(config, name))
    _choice("model.teacher_scheme", config.model.teacher_scheme, ("", *SCHEMES))
    _choice("sla.objective", config.sla.objective, ("white_box", "black_box"))
    _check_layer_budget(config)
    _check_rcm(config.rcm)
    _check_lora(config)
    _check_sampler(config.sampler)
    _check_quantize(config.quantize)
    _check_evaluate(config.evaluate)
    _between("merge.weight", config.merge.weight, -10, 10)
    _at_least("codec.steps", config.codec.steps, 1)
    _at_least("codec.decoder_steps", config.codec.decoder_steps, 0)
    _at_least("codec.text_steps", config.codec.text_steps, 1)
    _at_least("codec.batch_size", config.codec.batch_size, 1)
    _choice("launch.device", config.launch.device, ("auto", "cpu", "cuda"))
    _choice("launch.mixed_precision", config.launch.mixed_precision, ("no", "bf16"))
    if config.launch.mixed_precision == "bf16" and config.rcm.tangent == "finite_difference":
        reject(
            "rcm.tangent",
            "finite_difference",
            "bf16 cannot resolve any step h; use rcm.tangent=jvp or mixed_precision=no",
        )
    _choice("launch.matmul_precision", config.launch.matmul_precision, ("highest", "high"))
    _check_launch(config)
    _at_least("logging.log_every", config.logging.log_every, 1)
    _at_least("seed", config.seed, 0)
    for tracker in config.logging.trackers:
        _choice("logging.trackers", tracker, ("wandb", "tensorboard"))
        if find_spec(tracker) is None:
            reject("logging.trackers", tracker, f"{tracker} is not installed: pip install turbotrain[{tracker}]")


def _check_launch(config: Config) -> None:
    launch = config.launch
    _choice("launch.engine", launch.engine, ENGINES)
    for name in ("keep_last", "micro_batches", "checkpoint_every", "context_parallel"):
        _at_least(f"launch.{name}", getattr(launch, name), 1)
    _check_micro_batches(config)
    heads = VARIANTS[config.model.variant].config.num_heads
    if heads % launch.context_parallel:
        options = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        reject(
            "launch.context_parallel",
            launch.context_parallel,
            f"must divide the {heads} heads of {config.model.variant}, which it deals to processes: {options}",
        )
    if launch.context_parallel > 1 and config.model.teacher_scheme == "int8_block128":
        reject(
            "model.teacher_scheme",
            config.model.teacher_scheme,
            "its activations share scales in tiles of 128 tokens, whose borders move where processes share a sample: use "
            "int8_channel or fp8_channel, whose scales are of a token each, or launch.context_parallel=1",
        )
    _choice("launch.keep_best", launch.keep_best, ("", *BEST_METRICS))
    if launch.keep_best in OF_BOTH_ROLES and "rcm" in config.stages:
        reject(
            "launch.keep_best",
            launch.keep_best,
            "in rcm this is the student's in some steps and the critic's in others: use scm, dcm, dmd, score_gap or critic",
        )
    if launch.cuda_graph:
        _check_cuda_graph(config)
    _at_least("launch.walltime_minutes", launch.walltime_minutes, 0)
    steps = config.logging.profile_steps
    if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1]):
        reject("logging.profile_steps", steps, "two step numbers [first, end), for example [10,13]")


def _check_micro_batches(config: Config) -> None:
    """What no number of processes can mend; the stages ask whether a share of theirs divides."""
    parts = config.launch.micro_batches
    for stage in ("teacher", "sla", "rcm"):
        batch = getattr(config, stage).batch_size
        if stage in config.stages and batch % parts:
            nearest = max(1, batch // parts) * parts
            reject(f"{stage}.batch_size", batch, f"must divide by launch.micro_batches={parts}; for example {nearest}")


def _check_cuda_graph(config: Config) -> None:
    launch, variant = config.launch, VARIANTS[config.model.variant]
    reasons = {
        "a graph holds its activations: set launch.activation_checkpointing=false": launch.activation_checkpointing,
        "a graph holds no exchange between GPUs: set launch.context_parallel=1": launch.context_parallel > 1,
        "a graph records passes as they are: set launch.compile=false": launch.compile,
        "a graph trains all weights: set lora.rank=0": config.lora.rank > 0,
        f"a graph takes text alone, and one network; {variant.name} has more: set launch.cuda_graph=false": (
            variant.config.model_type != "t2v" or variant.boundary is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            reject("launch.cuda_graph", True, reason)


def _check_guard(name: str, guard: GuardSection) -> None:
    for limit in ("max_loss", "max_grad_norm"):
        value = getattr(guard, limit)
        if value and not value > 1:
            reject(f"{name}.{limit}", value, "a factor above 1 of the usual value, or 0 for no limit")
    _at_least(f"{name}.rollbacks", guard.rollbacks, 0)


def _check_stages(config: Config) -> None:
    if not config.stages:
        reject("stages", config.stages, f"select at least one of {', '.join(STAGES)}")
    for stage in config.stages:
        _choice("stages", stage, STAGES)
    if len(set(config.stages)) != len(config.stages):
        reject("stages", config.stages, "each stage once")
    if "/" in config.name or not config.name:
        reject("name", config.name, "one folder name, without '/'")
    if config.rcm.composition == "merge" and "rcm" in config.stages and not {"merge", "sla"} & set(config.stages):
        reject("rcm.composition", "merge", "needs the stages sla and merge: stages=[sla,rcm,merge,...]")


def _check_expert(config: Config) -> None:
    experts, expert = VARIANTS[config.model.variant].experts, config.model.expert
    if len(experts) == 1 and expert:
        reject("model.expert", expert, f"{config.model.variant} has one network; leave it empty")
    if len(experts) > 1:
        _choice("model.expert", expert, (*experts, BOTH))
        for stage in config.stages:
            if stage == "evaluate":
                reject("stages", stage, "its judge knows the shapes world only; leave it out")
            if stage == "quantize" and expert != BOTH:
                reject(
                    "stages", stage, "samples with both experts: run it with model.expert=both when both are trained"
                )
            if stage != "quantize" and expert == BOTH:
                reject("stages", stage, "is of one expert: model.expert=low, then high")


def _check_attention(attention: AttentionSection) -> None:
    _choice("attention.kind", attention.kind, ("dense", "sla"))
    if not 0 < attention.topk <= 1:
        reject(
            "attention.topk",
            attention.topk,
            "the kept fraction of key blocks, in (0, 1]; published: 0.1, quality: 0.15",
        )
    for name in ("block_q", "block_k"):
        _choice(f"attention.{name}", getattr(attention, name), (16, 32, 64, 128))
    _choice("attention.order", attention.order, ("raster", "cube"))
    _choice("attention.feature_map", attention.feature_map, ("softmax", "elu", "relu"))


def _check_layer_budget(config: Config) -> None:
    budget = config.sla.layer_budget
    if budget == 0:
        return
    if not LAYER_TOPKS[0] <= budget <= 1:
        reject(
            "sla.layer_budget",
            budget,
            f"a mean top-k from {LAYER_TOPKS[0]} to 1, or 0 for attention.topk in every layer",
        )
    if "sla" in config.stages and config.attention.kind == "dense":
        reject("sla.layer_budget", budget, "dense attention has no top-k: attention.kind=sla, or 0")
    if "rcm" in config.stages and config.rcm.composition == "joint":
        reject("sla.layer_budget", budget, "the sla stage chooses, and rcm.composition=joint goes without it: 0")


def _check_data(config: Config) -> None:
    data = config.data
    _choice("data.kind", data.kind, ("shapes", "shards"))
    _between("data.pairs", data.pairs, 0, 1)
    if data.kind == "shards" and not data.path and "data" in config.stages:
        reject("data.path", data.path, "data.kind=shards needs the folder that holds the *.tar shards")
    variant = VARIANTS[config.model.variant]
    stride_t = variant.vae_stride[0]
    if data.frames < 1 or (data.frames - 1) % stride_t:
        below = max(0, (data.frames - 1) // stride_t) * stride_t + 1
        reject("data.frames", data.frames, f"must be {stride_t}n+1, for example {below} or {below + stride_t}")
    for name, stride in zip(("height", "width"), variant.size_multiple, strict=True):
        value = getattr(data, name)
        if value < stride or value % stride:
            below = max(1, value // stride) * stride
            reject(
                f"data.{name}",
                value,
                f"must divide by {stride} (VAE stride x patch), for example {below} or {below + stride}",
            )
    for name in ("count", "samples_per_shard", "batch_size", "fps"):
        _at_least(f"data.{name}", getattr(data, name), 1)
    for name in ("max_bad_samples", "memory_gb"):
        _at_least(f"data.{name}", getattr(data, name), 0)
    _between("data.first_frame", data.first_frame, 0, 1)
    if data.first_frame and variant.config.model_type != "ti2v":
        reject(
            "data.first_frame", data.first_frame, f"{config.model.variant} cannot be given a clean frame: only ti2v can"
        )


def _check_loop(name: str, loop: LoopSection) -> None:
    _at_least(f"{name}.steps", loop.steps, 1)
    _at_least(f"{name}.batch_size", loop.batch_size, 1)
    _at_least(f"{name}.save_every", loop.save_every, 1)
    _at_least(f"{name}.sample_every", loop.sample_every, 0)
    _at_least(f"{name}.max_bad_steps", loop.max_bad_steps, 1)
    _check_optim(f"{name}.optim", loop.optim)
    _check_guard(f"{name}.guard", loop.guard)
    if isinstance(loop, TeacherSection | SlaSection):
        _check_times(f"{name}.times", loop.times)
        _between(f"{name}.caption_dropout", loop.caption_dropout, 0, 1)
    if isinstance(loop, TeacherSection):
        _between(f"{name}.ema_rate", loop.ema_rate, 0.01, 0.25)


def _check_optim(name: str, optim: OptimSection) -> None:
    if not 0 < optim.lr < 1:
        reject(f"{name}.lr", optim.lr, "a learning rate in (0, 1)")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        reject(f"{name}.betas", optim.betas, "two numbers in [0, 1)")
    _at_least(f"{name}.weight_decay", optim.weight_decay, 0)
    _at_least(f"{name}.warmup_steps", optim.warmup_steps, 0)
    if not optim.grad_clip > 0:
        reject(f"{name}.grad_clip", optim.grad_clip, "a positive norm; a large one, such as 1e9, never clips")
    _choice(f"{name}.decay", optim.decay, ("constant", "cosine"))
    _choice(f"{name}.kind", optim.kind, ("adamw", "adamw_8bit"))
    if optim.kind == "adamw_8bit" and find_spec("torchao") is None:
        reject(f"{name}.kind", optim.kind, "torchao is not installed: pip install turbotrain[optim8]")


def _check_times(name: str, times: TimeSection) -> None:
    _choice(f"{name}.kind", times.kind, ("lognormal", "uniform_shift"))
    if not times.std > 0:
        reject(f"{name}.std", times.std, "a positive standard deviation of log sigma")
    if not times.shift > 0:
        reject(f"{name}.shift", times.shift, "a positive shift; 1 leaves the times uniform")


def _check_rcm(rcm: RcmSection) -> None:
    if not rcm.phases:
        reject("rcm.phases", rcm.phases, "at least one phase, for example [{cm: scm, dmd: true, steps: 1000}]")
    for index, phase in enumerate(rcm.phases):
        _choice(f"rcm.phases[{index}].cm", phase.cm, ("scm", "dcm", "none"))
        _at_least(f"rcm.phases[{index}].steps", phase.steps, 1)
        if phase.cm == "none" and not phase.dmd:
            reject(f"rcm.phases[{index}]", phase, "nothing to train: cm or dmd must be on")
    _choice("rcm.composition", rcm.composition, ("sequential", "merge", "joint"))
    _choice("rcm.tangent", rcm.tangent, ("jvp", "finite_difference"))
    _choice("rcm.tangent_form", rcm.tangent_form, ("rcm", "scm"))
    _choice("rcm.simulation_times", rcm.simulation_times, ("random", "fixed"))
    _choice("rcm.teacher_attention", rcm.teacher_attention, ("dense", "sla", "sage_sla"))
    if rcm.teacher_attention != "dense" and rcm.composition != "sequential":
        reject(
            "rcm.teacher_attention",
            rcm.teacher_attention,
            "the sla stage's network answers: rcm.composition=sequential",
        )
    for name in ("batch_size", "student_update_freq", "save_every", "max_bad_steps"):
        _at_least(f"rcm.{name}", getattr(rcm, name), 1)
    for name in ("tangent_warmup", "sample_every"):
        _at_least(f"rcm.{name}", getattr(rcm, name), 0)
    _at_least("rcm.guidance", 0 if rcm.guidance is None else rcm.guidance, 0)
    if any(phase.dmd for phase in rcm.phases) and rcm.student_update_freq < 2:
        reject(
            "rcm.student_update_freq",
            rcm.student_update_freq,
            "at least 2 with dmd: the critic trains on the other iterations",
        )
    for name in ("loss_scale", "dmd_loss_scale"):
        if not getattr(rcm, name) > 0:
            reject(f"rcm.{name}", getattr(rcm, name), "a positive factor")
    _at_least("rcm.dcm_grid", rcm.dcm_grid, 2)
    _between("rcm.ema_rate", rcm.ema_rate, 0.01, 0.25)
    _check_guard("rcm.guard", rcm.guard)
    _check_optim("rcm.optim", rcm.optim)
    _check_optim("rcm.critic_optim", rcm.critic_optim)
    _check_times("rcm.times_cm", rcm.times_cm)
    _check_times("rcm.times_dmd", rcm.times_dmd)


def _check_lora(config: Config) -> None:
    lora = config.lora
    _at_least("lora.rank", lora.rank, 0)
    if lora.alpha is not None and not lora.alpha > 0:
        reject("lora.alpha", lora.alpha, "a positive factor, or null for the rank")
    if lora.rank and not lora.targets:
        reject("lora.targets", lora.targets, "at least one pattern of a block's linears, for example [self_attn.*]")
    shared = "with lora.rank student and teacher share their weights"
    if lora.rank and config.model.teacher_scheme:
        reject("model.teacher_scheme", config.model.teacher_scheme, f"{shared}: leave it empty")
    if lora.rank and config.rcm.teacher_attention != "dense":
        reject("rcm.teacher_attention", config.rcm.teacher_attention, f"{shared}: dense")
    if lora.rank and config.launch.engine not in ("auto", "ddp"):
        reject("launch.engine", config.launch.engine, NO_SHARDED_LORA)


def _check_sampler(sampler: SamplerSection) -> None:
    if not sampler.sigma_max > 0 or not math.isfinite(sampler.sigma_max):
        reject("sampler.sigma_max", sampler.sigma_max, "a positive noise level; published: 80 (480p), 120, 200, 1600")
    times = [math.atan(sampler.sigma_max), *sampler.times]
    if any(later >= earlier for earlier, later in itertools.pairwise(times)) or not times[-1] > 0:
        reject(
            "sampler.times",
            sampler.times,
            f"decreasing TrigFlow times below atan(sigma_max) = {times[0]:.4f} and above 0",
        )
    teacher = sampler.teacher
    _between("sampler.teacher.steps", teacher.steps, 1, 1000)
    _choice("sampler.teacher.solver", teacher.solver, ("unipc", "euler"))
    _choice("sampler.teacher.grid", teacher.grid, ("wan", "diffusers", "rcm"))
    _at_least("sampler.teacher.guidance", teacher.guidance, 0)
    if not teacher.shift > 0:
        reject("sampler.teacher.shift", teacher.shift, "a positive shift")


def _check_quantize(quantize: QuantizeSection) -> None:
    _choice("quantize.scheme", quantize.scheme, SCHEMES)
    for alpha in quantize.alphas:
        _between("quantize.alphas", alpha, 0, 1)
    if quantize.smooth and not quantize.alphas:
        reject("quantize.alphas", quantize.alphas, "at least one exponent in [0, 1], or quantize.smooth=false")
    _at_least("quantize.prompts", quantize.prompts, 1)
    _at_least("quantize.held_out_prompts", quantize.held_out_prompts, 1)
    _between("quantize.steps", quantize.steps, 1, 4)
    _at_least("quantize.target_error", quantize.target_error, 0)
    share, error = quantize.target_latency, quantize.target_error
    if not 0 <= share < 1:
        allowed = "a share of the linears' time in float, below 1 (which keeps all in float: leave the stage out); 0: no target"
        reject("quantize.target_latency", share, allowed)
    if share and error:
        reject(
            "quantize.target_latency", share, f"not beside quantize.target_error={error}: give one, and 0 for the other"
        )
    finetune = quantize.finetune
    _at_least("quantize.finetune.steps", finetune.steps, 0)
    for name in ("batch_size", "prompts"):
        _at_least(f"quantize.finetune.{name}", getattr(finetune, name), 1)
    if not 0 < finetune.lr < 1:
        reject("quantize.finetune.lr", finetune.lr, "a learning rate in (0, 1)")


def _check_evaluate(evaluate: EvaluateSection) -> None:
    for steps in evaluate.turbo_steps:
        if not 1 <= steps <= 4:
            reject("evaluate.turbo_steps", steps, "the Turbo sampler takes 1 to 4 steps")
    for name in ("prompts", "batch_size", "latency_repeats"):
        _at_least(f"evaluate.{name}", getattr(evaluate, name), 1)
    _at_least("evaluate.strips", evaluate.strips, 0)


def _choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        reject(name, value, f"choose one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        reject(name, value, f"must be at least {least}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        reject(name, value, f"must lie in [{low}, {high}]")

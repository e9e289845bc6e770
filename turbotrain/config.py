"""The schema of a recipe: one dataclass per configuration group, ranges checked before any model is built.

Importing this module imports neither torch nor diffusers: a typing mistake must be answered within a second. The numbers that
stand here as defaults are the published ones of rCM and SLA for Wan2.1-T2V-1.3B (shared facts in README, section Sources); the
YAML groups under `configs/` and the recipes override them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turbotrain.compose import UsageError, compose, recipe_names, recipes_folder, reject
from turbotrain.model.variants import VARIANTS

STAGES = ("codec", "data", "teacher", "sla", "rcm", "merge", "quantize", "evaluate")
SCHEMES = ("int8_channel", "int8_block128", "fp8_channel")
BOTH = "both"  # of model.expert
ENGINES = ("auto", "ddp", "fsdp2", "zero2", "zero3")
BEST_METRICS = ("loss", "grad_norm", "scm", "dcm", "tangent_norm", "boundary", "dmd", "score_gap", "critic")
ASSET_PREFIX = "asset:"
NO_SHARDED_LORA = (
    "with lora.rank the frozen weights lie whole on every GPU, and the trained ones are too small to be worth sharding: "
    "use launch.engine=ddp, or lora.rank=0"
)


@dataclass
class ModelSection:
    variant: str = "wan2.1_t2v_1.3b"
    teacher: str = ""  # checkpoint to start from; empty: the recipe's own teacher stage
    sla: str = ""  # checkpoint of an SLA stage that rcm and merge start from; empty: the run's own
    codec: str = ""  # folder with vae/, text_encoder/, tokenizer/; empty: the recipe's codec stage, else the teacher's components
    # Of a two-expert variant: high | low, which one this run trains, on its own range of times; both: what samples with the two.
    expert: str = ""
    teacher_scheme: str = ""  # 8-bit linears of the teacher of sla and rcm (a scheme of quantize.scheme); empty: floats


@dataclass
class AttentionSection:
    kind: str = "sla"
    topk: float = 0.1
    block_q: int = 64
    block_k: int = 64
    order: str = "raster"
    feature_map: str = "softmax"


@dataclass
class OptimSection:
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    eps: float = 1e-8
    grad_clip: float = 1.0
    warmup_steps: int = 0
    kind: str = "adamw"  # or adamw_8bit: both moments in 8 bits with a scale for every 256 (torchao)
    fused: bool = True  # adamw: on a GPU, one kernel for the whole update
    decay: str = "constant"  # or cosine: to zero at the stage's last step


@dataclass
class TimeSection:
    """A distribution of training times in RF s (method: two clocks)."""

    kind: str = "lognormal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0


@dataclass
class DataSection:
    kind: str = "shapes"  # shapes: rendered and encoded by the data stage; shards: ready-made latents
    path: str = ""  # shards: folder of *.tar
    count: int = 1024
    samples_per_shard: int = 256
    batch_size: int = 16  # clips encoded together
    pairs: float = 0.5  # shapes: share of clips with two objects
    max_bad_samples: int = 0  # shards: so many lost or damaged samples are counted and skipped, one more is refused
    memory_gb: float = 4.0  # a larger data set is read as it is needed instead of kept in memory
    mixed_shapes: bool = False  # shards of several sizes and lengths; every batch holds one of them
    first_frame: float = 0.0  # ti2v: share of samples that are given their first latent frame
    width: int = 832
    height: int = 480
    frames: int = 81
    fps: int = 16


@dataclass
class CodecSection:
    steps: int = 3000
    decoder_steps: int = 0  # more steps for the VAE's decoder alone, after `steps`
    batch_size: int = 64
    text_steps: int = 1500
    start: str = ""  # folder with a codec: its VAE is trained on, its text encoder is taken as it is


@dataclass
class GuardSection:
    """When a step is bad besides loss or gradient not being finite. A bad step is not taken."""

    max_loss: float = 0.0  # times the median of the last 100 good steps; 0: no limit
    max_grad_norm: float = 0.0
    rollbacks: int = (
        0  # how often `max_bad_steps` in a row lead back to the last state and to other data, before training stops
    )


@dataclass
class LoopSection:
    """What every training stage shares."""

    steps: int = 1000
    batch_size: int = 16  # over all processes; every sample's noise derives from (seed, step, its index)
    optim: OptimSection = field(default_factory=OptimSection)
    save_every: int = 50
    sample_every: int = 0  # 0: no sample strips while training
    max_bad_steps: int = 10  # consecutive bad steps before training stops
    guard: GuardSection = field(default_factory=GuardSection)


@dataclass
class TeacherSection(LoopSection):
    times: TimeSection = field(default_factory=TimeSection)
    caption_dropout: float = 0.1
    ema_rate: float = 0.05
    cuda_graph: bool = False  # on a GPU, replay the network's passes from a CUDA graph: for networks bound by launches


@dataclass
class SlaSection(LoopSection):
    objective: str = "white_box"  # or black_box: the flow-matching loss instead of the teacher's velocity
    times: TimeSection = field(default_factory=lambda: TimeSection(mean=1.5, std=1.6))
    caption_dropout: float = 0.0
    linear_branch: bool = True  # false: sparse attention alone, for comparison; the branch's projection stays at zero


@dataclass
class PhaseSection:
    cm: str = "scm"  # scm | dcm | none
    dmd: bool = True
    steps: int = 1000


@dataclass
class RcmSection:
    phases: list[PhaseSection] = field(default_factory=lambda: [PhaseSection()])
    composition: str = "sequential"  # sequential | merge | joint
    batch_size: int = 16
    optim: OptimSection = field(default_factory=OptimSection)
    critic_optim: OptimSection = field(default_factory=OptimSection)
    student_update_freq: int = 5
    tangent_warmup: int = 1000
    tangent: str = "jvp"
    tangent_form: str = "rcm"
    guidance: float | None = None  # of the teacher; null: the variant's own, of the expert that is trained
    # dense: the teacher as it is. sla, sage_sla: the sla stage's network in its place, for it answers faster.
    teacher_attention: str = "dense"
    loss_scale: float = 100.0
    dmd_loss_scale: float = 1.0
    times_cm: TimeSection = field(default_factory=lambda: TimeSection(mean=0.7, std=1.6))
    times_dmd: TimeSection = field(default_factory=lambda: TimeSection(kind="uniform_shift", shift=5.0))
    simulation_times: str = "random"  # random: draws from times_dmd; fixed: the Turbo sampler's own
    dcm_grid: int = 48
    dcm_shift: float = 5.0
    ema_rate: float = 0.1
    save_every: int = 50
    sample_every: int = 0
    max_bad_steps: int = 10
    guard: GuardSection = field(default_factory=GuardSection)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


@dataclass
class LoraSection:
    """Turbo-LoRA, of the stages sla and rcm: one set of frozen weights for student, teacher and critic; what is trained, and
    averaged, is low-rank changes of them and SLA's P."""

    rank: int = 0  # 0: every weight is trained
    alpha: float | None = None  # changes are scaled by alpha / rank; null: by 1
    targets: list[str] = field(default_factory=lambda: ["self_attn.*", "cross_attn.*", "ffn.*"])  # linears of a block


@dataclass
class MergeSection:
    weight: float = 1.0


@dataclass
class QuantizeSection:
    scheme: str = "int8_channel"
    smooth: bool = True
    alphas: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    prompts: int = 16
    held_out_prompts: int = 8
    steps: int = 4
    min_sqnr_db: float = 0.0
    target_error: float = (
        0.0  # of the latents: the linears that cause most of it stay in float until the rest is foretold less
    )


@dataclass
class EvaluateSection:
    prompts: int = 64
    turbo_steps: list[int] = field(default_factory=lambda: [4, 2, 1])
    undistilled: bool = True
    batch_size: int = 16
    strips: int = 6
    latency_repeats: int = 5


@dataclass
class TeacherSamplerSection:
    steps: int = 50
    solver: str = "unipc"
    shift: float = 5.0
    guidance: float = 5.0
    grid: str = "wan"


@dataclass
class SamplerSection:
    sigma_max: float = 80.0
    times: list[float] = field(default_factory=lambda: [1.5, 1.4, 1.0])  # TrigFlow times after the first
    ode: bool = False
    teacher: TeacherSamplerSection = field(default_factory=TeacherSamplerSection)


@dataclass
class LaunchSection:
    device: str = "auto"  # auto | cpu | cuda
    matmul_precision: str = "highest"  # of float32 products on a GPU: high lets tensor cores round to TF32
    mixed_precision: str = "no"  # bf16: trained networks run under autocast, weights stay float32
    engine: str = "auto"  # auto: what `accelerate launch` says, else ddp; ddp | fsdp2 | zero2 | zero3
    offload: bool = False  # sharded engines: optimiser states (and FSDP2's weights) rest in host memory
    micro_batches: int = (
        1  # each process's share of a batch in so many parts, one after the other: gradient accumulation
    )
    context_parallel: int = 1  # processes that share each sample: its tokens, and the heads of self-attention
    activation_checkpointing: bool = False
    checkpoint_every: int = 1  # with activation_checkpointing: every n-th block; the others keep their activations
    compile: bool = False  # on a GPU, what stands between the linears of a trained network's blocks is compiled
    walltime_minutes: float = 0.0  # save and stop when this process is so old; 0: no limit
    keep_last: int = 2  # training states kept while a stage runs
    # Besides these the state with the lowest mean of a metric since the one before it, written to <stage>/best/ at the end.
    keep_best: str = ""


@dataclass
class LoggingSection:
    log_every: int = 10
    trackers: list[str] = field(default_factory=list)  # wandb, tensorboard: through accelerate
    project: str = "turbotrain"
    profile_steps: list[int] = field(
        default_factory=list
    )  # [first, end): torch.profiler's trace of these steps of a launch


@dataclass
class Config:
    name: str = "run"
    output_dir: str = "outputs"
    stages: list[str] = field(default_factory=lambda: ["sla", "rcm", "quantize", "evaluate"])
    seed: int = 0
    debug: bool = False
    dry_run: bool = False
    model: ModelSection = field(default_factory=ModelSection)
    attention: AttentionSection = field(default_factory=AttentionSection)
    data: DataSection = field(default_factory=DataSection)
    codec: CodecSection = field(default_factory=CodecSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    sla: SlaSection = field(default_factory=SlaSection)
    rcm: RcmSection = field(default_factory=RcmSection)
    lora: LoraSection = field(default_factory=LoraSection)
    merge: MergeSection = field(default_factory=MergeSection)
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    sampler: SamplerSection = field(default_factory=SamplerSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @property
    def run_folder(self) -> Path:
        """Of two experts each has a folder of its own, and what they make together lies above."""
        return Path(self.output_dir) / self.name / self.model.expert.replace(BOTH, "")


def load_config(overrides: Sequence[str]) -> Config:
    """Compose `configs/train.yaml` with a recipe and overrides, and check it.

    Raises:
        UsageError: anything that cannot run, with the field, the value and what is allowed.
    """
    if not any(item.startswith("recipe=") for item in overrides):
        raise UsageError(f"recipe: missing; say recipe=NAME with one of {', '.join(recipe_names())}")
    config = compose("train", overrides, Config)
    validate(config)
    return config


def resolve(path: str) -> Path:
    """A path from a configuration; `asset:NAME` is what ships with the recipes."""
    if path.startswith(ASSET_PREFIX):
        return recipes_folder() / "assets" / path.removeprefix(ASSET_PREFIX)
    return Path(path).expanduser()


# ---- checks: each says what, which value, and what is allowed ------------------------------------------------------


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
    if config.teacher.cuda_graph and config.launch.activation_checkpointing:
        reject("teacher.cuda_graph", True, "a graph holds its activations: set launch.activation_checkpointing=false")
    _choice("model.teacher_scheme", config.model.teacher_scheme, ("", *SCHEMES))
    _choice("sla.objective", config.sla.objective, ("white_box", "black_box"))
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
    heads = VARIANTS[config.model.variant].config.num_heads
    if heads % launch.context_parallel:
        options = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        reject(
            "launch.context_parallel",
            launch.context_parallel,
            f"must divide the {heads} heads of {config.model.variant}, which it deals to processes: {options}",
        )
    if launch.context_parallel > 1 and config.teacher.cuda_graph:
        reject("teacher.cuda_graph", True, "a graph is of one process: set launch.context_parallel=1")
    _choice("launch.keep_best", launch.keep_best, ("", *BEST_METRICS))
    _at_least("launch.walltime_minutes", launch.walltime_minutes, 0)
    steps = config.logging.profile_steps
    if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1]):
        reject("logging.profile_steps", steps, "two step numbers [first, end), for example [10,13]")


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

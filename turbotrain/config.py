"""The schema of a recipe: one dataclass per configuration group. `config_checks.py` checks what its types cannot say.

Importing this module imports neither torch nor diffusers: a typing mistake must be answered within a second. The numbers that
stand here as defaults are the published ones of rCM and SLA for Wan2.1-T2V-1.3B (shared facts in README, section Sources); the
YAML groups under `configs/` and the recipes override them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbotrain.compose import UsageError, compose, recipe_names, recipes_folder

STAGES = ("codec", "data", "teacher", "sla", "rcm", "merge", "quantize", "evaluate")
BOTH = "both"  # of model.expert
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
    decay: str = "constant"  # or cosine: to zero after as many updates as the stage has steps (in rCM roles take turns)


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


@dataclass
class SlaSection(LoopSection):
    objective: str = "white_box"  # or black_box: the flow-matching loss instead of the teacher's velocity
    times: TimeSection = field(default_factory=lambda: TimeSection(mean=1.5, std=1.6))
    caption_dropout: float = 0.0
    linear_branch: bool = True  # false: sparse attention alone, for comparison; the branch's projection stays at zero
    # Mean top-k that is shared out over the layers by the attention mass which the teacher's keep; 0: attention.topk in all.
    layer_budget: float = 0.0


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
class QuantTuneSection:
    """Quantisation-aware fine-tuning: the quantised network learns the float one's velocities on the Turbo sampler's steps."""

    steps: int = 0  # 0: weights are quantised as they are
    lr: float = 1e-6  # of AdamW; a cosine takes it to 0
    batch_size: int = 8  # sampling steps
    prompts: int = 64  # of the training split, from its start


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
    # Of the block linears in a pass, as a share of their time in float, measured here: as many stay in float as fit. 0: none.
    target_latency: float = 0.0
    finetune: QuantTuneSection = field(default_factory=QuantTuneSection)


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
    cuda_graph: bool = False  # on GPUs, replay steps from CUDA graphs: for small networks, bound by launches
    compile: bool = False  # on a GPU, what stands between the linears of a trained network's blocks is compiled
    walltime_minutes: float = 0.0  # save and stop when this process is so old; 0: no limit
    keep_last: int = 2  # training states kept while a stage runs
    # Besides these the last phase's state with the lowest mean of a metric over the `save_every` steps before it, written to
    # <stage>/best/ at the end.
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
    from turbotrain.config_checks import validate  # here, since the checks read the schema

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

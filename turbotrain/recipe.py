"""A recipe's stages in order: what is done is skipped, what was interrupted continues, what is stale says why and runs again.

A stage's folder holds `stage.json`: its status and its fingerprint, that is every setting that shapes its result and the hash
of every input. A finished stage with another fingerprint is stale; its folder is kept under another name, never overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.atomic import UNFINISHED, clear_unfinished, new_file
from turbotrain.compose import UsageError, reject
from turbotrain.config import BOTH, NO_SHARDED_LORA, STAGES, Config, resolve
from turbotrain.model.variants import VARIANTS
from turbotrain.records import Plan, begin, finish, flatten, make_fingerprint, plan_stage, set_aside, status


@dataclass(frozen=True)
class StageSpec:
    """sections: the groups of the configuration that shape the result. inputs: the roles it reads, resolved by `find_inputs`.
    every_rank: runs on all processes (training); the others run on the first while the rest wait."""

    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    every_rank: bool = False


SPECS: dict[str, StageSpec] = {
    "codec": StageSpec(("codec", "data"), (), optional=("start",)),
    "data": StageSpec(("data",), ("codec",)),
    "teacher": StageSpec(("teacher",), ("data",), optional=("teacher", "codec"), every_rank=True),
    "sla": StageSpec(("sla", "attention", "lora"), ("teacher", "data"), optional=("codec",), every_rank=True),
    "rcm": StageSpec(
        ("rcm", "attention", "sampler", "lora"), ("teacher", "data"), optional=("sla", "codec"), every_rank=True
    ),
    "merge": StageSpec(("merge",), ("teacher", "sla", "rcm"), optional=("codec",)),
    "quantize": StageSpec(("quantize", "sampler"), ("student", "data"), optional=("codec",)),
    "evaluate": StageSpec(
        ("evaluate", "sampler", "data"), ("teacher", "codec"), optional=("sla", "rcm", "merge", "quantize")
    ),
}


def run_recipe(config: Config) -> None:
    """Run the selected stages in pipeline order.

    Raises:
        UsageError: an input that no selected or finished stage provides, a run folder that cannot be written or is in use.
    """
    selected = [stage for stage in STAGES if stage in config.stages]
    if config.data.kind == "shards" and "data" in selected:
        selected.remove("data")  # ready-made: nothing to render
    check_inputs(config, selected)
    if config.dry_run:
        _dry_run(config, selected)
        return
    _check_processes(config, os.environ)
    _check_device(config)
    root = config.run_folder
    _check_writable(root)

    from turbotrain.training.parallel import choose_engine, make_accelerator

    engine = choose_engine(config.launch, os.environ)
    if config.lora.rank and engine != "ddp":
        reject("launch.engine", engine, NO_SHARDED_LORA)
    accelerator = make_accelerator(config)
    with _owned(root, accelerator.is_main_process):
        if accelerator.is_main_process:
            clear_unfinished(root)
            _write_config(config, root)
            if config.logging.trackers:
                flat = {key: str(value) for key, value in flatten(config)}
                in_run_folder = {"wandb": {"dir": str(root), "name": config.name}}
                accelerator.init_trackers(config.logging.project, config=flat, init_kwargs=in_run_folder)
            _warn_of_stale_inputs(config, selected)
        for stage in selected:
            _run_stage(config, stage, accelerator, engine)
            accelerator.free_memory()  # it remembers the networks that it wrapped; the next stage needs their room
        if accelerator.is_main_process and status(root / "evaluate") == "done":
            from turbotrain.evaluation.report import write_report

            print(f"report: {write_report(root)}", flush=True)
    if config.logging.trackers:
        accelerator.end_training()


# ---- inputs --------------------------------------------------------------------------------------------------------


def find_inputs(config: Config, stage: str, selected: list[str]) -> dict[str, Path]:
    """Where each of a stage's inputs lies: the run's own stage if it is selected or finished, else what the recipe names.

    Raises:
        UsageError: a required input that nothing provides.
    """
    found, missing = _locate(config, stage, selected)
    for role in missing:
        raise UsageError(f"stages: {stage} needs {_remedy(role)}")
    return found


def _locate(config: Config, stage: str, selected: list[str]) -> tuple[dict[str, Path], list[str]]:
    """(inputs by role, required roles that nothing provides)."""
    spec = SPECS[stage]
    required = spec.inputs
    if stage == "rcm" and config.model.expert == "high":
        required = (*required, "low")
    if stage == "rcm" and config.rcm.teacher_attention != "dense":
        required = (*required, "sla")
    if stage == "quantize" and config.model.expert == BOTH:
        required = ("high", "low", *(role for role in required if role != "student"))
    found, missing = {}, []
    for role in (*required, *spec.optional):
        path = _find(config, stage, role, selected)
        if path is not None:
            found[role] = path
        elif role in required:
            missing.append(role)
    return found, missing


def _find(config: Config, stage: str, role: str, selected: list[str]) -> Path | None:
    def own(name: str) -> Path | None:
        before = STAGES.index(name) < STAGES.index(stage)
        available = name in selected or status(config.run_folder / name) == "done"
        return config.run_folder / name / "checkpoint" if before and available else None

    if role == "codec":
        if (trained := own("codec")) is not None:
            return trained
        if config.model.codec:
            return resolve(config.model.codec)
        teacher = resolve(config.model.teacher)
        if config.model.expert and not _holds_codec_beside(teacher):
            teacher = _named_teacher(config)
        # A teacher may be bare weights: training needs no codec.
        return teacher if config.model.teacher and (not teacher.exists() or _holds_codec(teacher)) else None
    if role == "data":
        if config.data.kind == "shards":
            return resolve(config.data.path) if config.data.path else None
        return own("data")
    if role == "start":
        return resolve(config.codec.start) if config.codec.start else None
    if role == "teacher":
        return own("teacher") or (_named_teacher(config) if config.model.teacher else None)
    if role in ("high", "low"):
        both = config.run_folder if config.model.expert == BOTH else config.run_folder.parent
        folder = both / role / ("merge" if stage == "quantize" and config.rcm.composition == "merge" else "rcm")
        return folder / "checkpoint" if status(folder) == "done" else None
    if role == "sla" and stage == "rcm" and config.rcm.composition != "sequential":
        return None
    if role == "sla" and stage in ("rcm", "merge"):
        return own("sla") or (resolve(config.model.sla) if config.model.sla else None)
    if role == "student":
        order = ("merge",) if config.rcm.composition == "merge" else ()
        return next((path for name in (*order, "rcm", "sla") if (path := own(name)) is not None), None)
    return own(role)


def _named_teacher(config: Config) -> Path:
    """`model.teacher`, of a two-expert folder the expert that is trained (for both the high-noise one: its codec serves)."""
    from turbotrain.checkpoint.header import expert_folders

    path = resolve(config.model.teacher)
    pair = expert_folders(path) if config.model.expert else None
    return path if pair is None else pair[config.model.expert == "low"]


def _remedy(role: str) -> str:
    return {
        "codec": "a VAE and a text encoder: set model.codec or model.teacher to a folder with them, or select the stage codec",
        "data": "shards of latents: select the stage data, or set data.kind=shards and data.path",
        "teacher": "a teacher: set model.teacher to its checkpoint, or select the stage teacher",
        "low": "the low-noise expert's student: train that one first, with model.expert=low and the same name",
        "high": "the high-noise expert's student: train that one too, with model.expert=high and the same name",
        "student": "a trained student: select or finish the stage rcm (or sla) first",
    }.get(role, f"the finished stage {role}: select it too, for example stages=[{role},...]")


def check_inputs(config: Config, selected: list[str]) -> None:
    """Everything that a run reads from outside is looked at before anything is written or torch is imported.

    Raises:
        UsageError: an input that is not there (a dry run says so in its plan instead), a codec folder without a codec.
        CheckpointProblem, DatasetError: a teacher or shards that cannot be used.
    """
    from turbotrain.checkpoint.header import check_checkpoint
    from turbotrain.data.shards import check_shards, needs_of

    variant = VARIANTS[config.model.variant]
    named: dict[str, Path] = {}
    for stage in selected:
        inputs = _locate(config, stage, selected)[0] if config.dry_run else find_inputs(config, stage, selected)
        named.update({role: path for role, path in inputs.items() if config.run_folder not in path.parents})
    for role, path in named.items():
        if not path.exists():
            if config.dry_run:
                continue
            raise UsageError(f"{_field(config, role)}={str(path)!r}: no such file or folder")
        if role == "teacher":
            check_checkpoint(path, variant=variant.name)
        if role == "data":
            check_shards(path, needs_of(config))
        # What training goes on from is read, and its text encoder copied, as our codec stage writes them.
        whole = all((path / part).is_dir() for part in ("vae", "text_encoder", "tokenizer"))
        if (role == "codec" and not _holds_codec(path)) or (role == "start" and not whole):
            raise UsageError(
                f"{_field(config, role)}={str(path)!r}: no codec in it; a codec folder holds vae/, text_encoder/, tokenizer/"
            )


def _holds_codec_beside(path: Path) -> bool:
    from turbotrain.checkpoint.components import published_part

    return published_part("vae", path) is not None


def _holds_codec(path: Path) -> bool:
    """A folder with a VAE in it (an official Wan folder too), or a checkpoint that says where its components lie."""
    from turbotrain.checkpoint.header import inspect_checkpoint

    if _holds_codec_beside(path):
        return True
    return bool((inspect_checkpoint(path).metadata or {}).get("components"))


def _field(config: Config, role: str) -> str:
    codec = "model.codec" if config.model.codec else "model.teacher"
    return {"data": "data.path", "codec": codec, "start": "codec.start", "sla": "model.sla"}.get(role, "model.teacher")


# ---- one stage -----------------------------------------------------------------------------------------------------


def _run_stage(config: Config, stage: str, accelerator: Any, engine: str) -> None:
    from accelerate.utils import broadcast_object_list

    from turbotrain.stages.context import StageContext

    folder = config.run_folder / stage
    spec = SPECS[stage]
    # The first process decides for all: the others could read a record while it is being written.
    decided: list[Any] = [None, None]
    if accelerator.is_main_process:
        inputs = find_inputs(config, stage, [])
        fingerprint = make_fingerprint(config, spec.sections, inputs)
        plan = plan_stage(stage, folder, fingerprint)
        _announce(plan)
        if plan.action == "stale":
            set_aside(folder)
        if plan.action != "skip":
            begin(folder, fingerprint)
        decided = [plan, inputs]
    broadcast_object_list(decided)
    plan, inputs = decided
    if plan.action == "skip":
        return
    started = time.perf_counter()
    module = importlib.import_module(f"turbotrain.stages.{stage}")
    context = StageContext(stage, config, folder, inputs, accelerator, engine)
    results: dict[str, object] = {}
    if spec.every_rank or accelerator.is_main_process:
        with _full_disk_explained(folder):
            results = module.run(context)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(folder, results, time.perf_counter() - started)


def _warn_of_stale_inputs(config: Config, selected: list[str]) -> None:
    """A finished stage that was not selected is used as it is, but not in silence if the settings have moved on."""
    for stage in STAGES:
        folder = config.run_folder / stage
        if stage in selected or status(folder) != "done":
            continue
        inputs, _ = _locate(config, stage, [])
        plan = plan_stage(stage, folder, make_fingerprint(config, SPECS[stage].sections, inputs))
        if plan.action == "stale":
            print(f"{stage}: stale ({plan.reason}), used as it is; add it to stages to run it again", flush=True)


def _announce(plan: Plan) -> None:
    text = {
        "run": "starting",
        "skip": "done already, skipped",
        "resume": "was interrupted, continuing",
        "stale": f"stale ({plan.reason}), running again",
    }[plan.action]
    print(f"{plan.stage}: {text}", flush=True)


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """The system's own message names neither place nor remedy when a line of metrics finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{folder}: {error.strerror}; free some space, then the same command continues where this one stopped"
        ) from error


# ---- the run folder ------------------------------------------------------------------------------------------------


def _check_processes(config: Config, environ: Mapping[str, str]) -> None:
    """Whether they fall into groups of `launch.context_parallel`."""
    processes, size = int(environ.get("WORLD_SIZE", "1")), config.launch.context_parallel
    if processes % size:
        raise UsageError(
            f"launch.context_parallel={size}: that many processes share a sample, and this launch has {processes}; start a "
            f"multiple, for example torchrun --nproc_per_node {-(-processes // size) * size} train.py ..."
        )


def _check_device(config: Config) -> None:
    if config.launch.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError("launch.device='cuda': torch sees no CUDA device here; use launch.device=cpu or auto")


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{UNFINISHED}probe-{os.getpid()}"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"output_dir={str(root.parent)!r}: cannot write there ({error.strerror}); choose another output_dir"
        ) from error


@contextmanager
def _owned(root: Path, main: bool) -> Iterator[None]:
    """Two recipes in one folder would mix their results: the second is refused."""
    if not main:
        yield
        return
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"name={root.name!r}: another process is running in {root}; wait for it, or choose another name"
            ) from error
        yield


def _write_config(config: Config, root: Path) -> None:
    from omegaconf import OmegaConf

    with new_file(root / "config.yaml") as new:
        OmegaConf.save(OmegaConf.structured(config), new)


def _dry_run(config: Config, selected: list[str], show: Callable[[str], None] = print) -> None:
    """What would run, be skipped or be made again, on which inputs, with which network; nothing is written."""
    import torch

    from turbotrain.model.attention_config import AttentionConfig
    from turbotrain.model.wan import WanTransformer

    variant = VARIANTS[config.model.variant]
    section = config.attention
    attention = AttentionConfig(
        section.kind, section.topk, section.block_q, section.block_k, section.order, section.feature_map
    )
    with torch.device("meta"):
        network = WanTransformer(variant.config, attention)
    shape = variant.latent_shape(config.data.frames, config.data.height, config.data.width)
    patch = variant.config.patch_size
    tokens = (shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2])
    parameters = sum(p.numel() for p in network.parameters())
    show(f"{config.name}: {variant.name}, {parameters / 1e6:.2f}M parameters, latent {shape}, {tokens} tokens")
    anew: list[str] = []
    for stage in selected:
        found, missing = _locate(config, stage, selected)
        state = _foretold(config, stage, found, anew)
        lines = [f"{role} <- {path}{_absence(config, path)}" for role, path in found.items()]
        lines += [f"{role} <- needs {_remedy(role)}" for role in missing]
        show(f"  {stage}: {state}" + (", ".join(lines) or "no inputs"))


def _foretold(config: Config, stage: str, inputs: Mapping[str, Path], anew: list[str]) -> str:
    """What a run would do about a stage that has begun already, else nothing; `anew` gathers the stages that would run."""
    folder = config.run_folder / stage
    if status(folder) == "absent":
        anew.append(stage)
        return ""
    plan = plan_stage(stage, folder, make_fingerprint(config, SPECS[stage].sections, inputs))
    if plan.action != "skip":
        anew.append(stage)
        return f"[stale ({plan.reason}): runs again] " if plan.action == "stale" else "[was interrupted: continues] "
    sources = [name for name in anew if any(config.run_folder / name in path.parents for path in inputs.values())]
    return f"[done; runs again if {' or '.join(sources)} comes out different] " if sources else "[done: skipped] "


def _absence(config: Config, path: Path) -> str:
    return "" if config.run_folder in path.parents or path.exists() else " (not there)"

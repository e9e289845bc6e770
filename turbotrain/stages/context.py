"""What a stage is given, and the few steps that several stages share.

Legend: B batch, C channels, T latent frames, H, W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from turbotrain.checkpoint.io import map_transformer
from turbotrain.checkpoint.layouts import describe
from turbotrain.config import Config, LoopSection, OptimSection, RcmSection, TimeSection
from turbotrain.data.latents import Batch, LatentDataset
from turbotrain.data.shards import needs_of
from turbotrain.diffusion.times import sample_lognormal, sample_uniform_shift
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.experts import HIGH, Range, time_range
from turbotrain.stages.loading import BatchReader, FixedPart
from turbotrain.training.flops import backward_flops, forward_flops, tangent_flops
from turbotrain.training.graphs import StepGraph, StepGraphs
from turbotrain.training.loop import LoopSettings, Plan, Term
from turbotrain.training.meter import Work
from turbotrain.training.parallel import data_share, make_frozen, make_role, replays_steps
from turbotrain.training.roles import Role
from turbotrain.training.seeding import StepRandom, derive_seed


@dataclass(frozen=True)
class Passes:
    """How often a step asks one network: forward passes, of which so many with tangents, and backward passes. trained: the
    network is a trained one (with `lora.rank` it has an adapter)."""

    attention: AttentionConfig
    forward: float
    backward: float = 0.0
    tangents: float = 0.0
    trained: bool = True


@dataclass(frozen=True)
class StageContext:
    """One stage of one run: its folder, and where its inputs lie (by role: codec, data, teacher, sla, rcm, merge, quantize;
    student: what is quantised; high, low: an expert's student; start: a codec to train on)."""

    name: str
    config: Config
    folder: Path
    inputs: Mapping[str, Path]
    accelerator: Accelerator
    engine: str = "ddp"

    @property
    def checkpoint(self) -> Path:
        """Where the stage's result goes."""
        return self.folder / "checkpoint"

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.config.model.variant]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        data = self.config.data
        return self.variant.latent_shape(data.frames, data.height, data.width)

    @property
    def time_range(self) -> Range:
        """RF times that the trained network answers for."""
        return time_range(self.variant, self.config.model.expert)

    @property
    def guidance(self) -> float:
        """Of the teacher that is distilled."""
        low, high = self.variant.cfg
        own = high if self.config.model.expert == HIGH else low
        return own if self.config.rcm.guidance is None else self.config.rcm.guidance

    @property
    def seed(self) -> int:
        """The stage's own root of randomness: two stages of a run do not share noise."""
        return derive_seed(self.config.seed, self.name)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(f"{self.name}: {text}", flush=True)

    @cached_property
    def dataset(self) -> LatentDataset:
        memory = self.config.data.memory_gb * 1e9
        return LatentDataset(self.inputs["data"], needs_of(self.config), memory).to(self.device)

    def load(self, role: str) -> WanTransformer:
        """The network of one input, its weights still in the file: `role` and `frozen` take them to where they are used.

        Raises:
            CheckpointProblem: not a checkpoint that loads.
            ValueError: of other dimensions than the variant's (a pickle shows its own only now).
        """
        network = map_transformer(self.inputs[role])
        if network.config != self.variant.config:
            raise ValueError(
                f"{self.inputs[role]} holds {describe(network.config)}, but model.variant={self.variant.name} expects "
                f"{describe(self.variant.config)}; name another checkpoint or the variant that fits"
            )
        return network

    def role(self, name: str, network: WanTransformer, optim: OptimSection, updates: int) -> Role:
        """`network` as this launch trains it, with `updates` updates to come."""
        return make_role(self.accelerator, self.config.launch, self.engine, name, network, optim, updates)

    def frozen(self, role: str) -> WanTransformer:
        """The network of one input as this launch asks it: never trained. With LoRA everybody who asks gets the same one, over
        whose weights the trained ones lie."""
        if role in self._frozen:
            return self._frozen[role]
        network = self._freeze(self.load(role))
        if self.config.lora.rank:
            self._frozen[role] = network
        return network

    @cached_property
    def _frozen(self) -> dict[str, WanTransformer]:
        return {}

    def _freeze(self, network: WanTransformer, scheme: str = "") -> WanTransformer:
        return make_frozen(self.accelerator, self.config.launch, self.engine, network, scheme)

    def teacher(self, attention: str = "dense") -> WanTransformer:
        """The network that answers as teacher, with the recipe's 8-bit linears: the sla stage's for `sla` and `sage_sla`."""
        scheme = self.config.model.teacher_scheme
        if attention == "dense" and not scheme:
            return self.frozen("teacher")
        network = self.load("teacher" if attention == "dense" else "sla")
        if attention == "sage_sla":
            network.set_attention(dataclasses.replace(network.attention_config, kind=attention))
        return self._freeze(network, scheme)

    def work(self, batch_size: int, *passes: Passes) -> Work:
        """What a step has to do that asks networks for `passes` of every sample."""
        config, grid = self.variant.config, self.latent_shape[1:]
        per_sample = 0.0
        for ask in passes:
            lora = self.config.lora if ask.trained and self.config.lora.rank else None
            per_sample += ask.forward * forward_flops(config, ask.attention, grid, lora)
            per_sample += ask.backward * backward_flops(config, ask.attention, grid, lora)
            per_sample += ask.tangents * tangent_flops(config, ask.attention, grid, lora)
        tokens = math.prod(n // p for n, p in zip(grid, self.variant.config.patch_size))
        return Work(tokens * batch_size, per_sample * batch_size)

    def loop_settings(self, section: LoopSection | RcmSection) -> LoopSettings:
        return LoopSettings(
            title=self.name,
            steps=section.steps,
            save_every=section.save_every,
            sample_every=section.sample_every,
            max_bad_steps=section.max_bad_steps,
            log_every=self.config.logging.log_every,
            keep_last=self.config.launch.keep_last,
            keep_best=self.config.launch.keep_best,
            guard=section.guard,
            walltime_minutes=self.config.launch.walltime_minutes,
            profile_steps=self.config.logging.profile_steps,
        )


class BatchSource:
    """This rank's share of the global batch of any step: data in `BatchOrder`, randomness by (seed, step, position). With
    `launch.cuda_graph`, on GPUs, in tensors that stay where they are."""

    def __init__(self, context: StageContext, dataset: LatentDataset, batch_size: int) -> None:
        launch = context.config.launch
        share, shares = data_share(context.accelerator, launch)
        self.micro_batches = launch.micro_batches
        parts = shares * self.micro_batches
        if batch_size % parts:
            what = f"the number of processes, {context.accelerator.num_processes}"
            if launch.context_parallel > 1:
                what += f", over launch.context_parallel={launch.context_parallel}"
            if self.micro_batches > 1:
                what += f", times launch.micro_batches={self.micro_batches}"
            raise ValueError(
                f"{context.name}.batch_size={batch_size}: must divide by {what}; for example "
                f"{max(1, batch_size // parts) * parts}"
            )
        self.dataset = dataset
        self.seed = context.seed
        self.device = context.device
        self.batch_size = batch_size
        self.first_frame = context.config.data.first_frame
        size = batch_size // parts
        first = share * self.micro_batches
        self.positions = [range(part * size, (part + 1) * size) for part in range(first, first + self.micro_batches)]
        self.reader = BatchReader(dataset, self.seed, batch_size, self.positions)
        self._fixed: list[FixedPart] = []
        if replays_steps(context.accelerator, launch, context.engine):
            _need_one_shape(dataset)
            self._fixed = [FixedPart() for _ in self.positions]
        self._graphs = StepGraphs([part.random for part in self._fixed], self.device) if self._fixed else None

    def at(self, draw: int) -> list[tuple[Batch, StepRandom]]:
        """The micro-batches of this rank at one step, each with its randomness."""
        parts = [self._with_random(draw, *part) for part in zip(self.reader.at(draw), self.positions)]
        return [fixed.take(*part) for fixed, part in zip(self._fixed, parts)] or parts

    def plan(self, draw: int, role: str, loss: Callable[[Batch, StepRandom], Term], work: Work) -> Plan:
        """A step that updates `role` by one loss of every micro-batch."""
        parts = self.at(draw)
        terms = [partial(loss, *part) for part in parts]
        return Plan(role, terms, len(parts), self.reader.metrics, work, cuda_graph=self.cuda_graph())

    def cuda_graph(self, *kind: Hashable) -> StepGraph | None:
        """What records and replays steps of one kind, which differ in this source's batches and draws alone; None without
        `launch.cuda_graph`."""
        return None if self._graphs is None else self._graphs.of(kind)

    def _with_random(self, draw: int, batch: Batch, positions: range) -> tuple[Batch, StepRandom]:
        random = StepRandom(self.seed, draw, self.batch_size, positions, self.device)
        if self.first_frame:
            batch = batch.with_first_frame(random.uniform("first_frame") < self.first_frame)
        return batch, random


def _need_one_shape(dataset: LatentDataset) -> None:
    """Raises ValueError where a graph could not serve every batch."""
    if len(dataset.buckets) > 1:
        raise ValueError(
            f"launch.cuda_graph=True: a graph is of one shape, the data has {len(dataset.buckets)}; set launch.cuda_graph=false"
        )


def draw_times(times: TimeSection, random: StepRandom, stream: str, within: Range = (0.0, 1.0)) -> Tensor:
    """RF times s (B,) float64 from the distribution that the recipe names, truncated to `within`."""
    if times.kind == "uniform_shift":
        return sample_uniform_shift(random.uniform(stream), times.shift, *within)
    return sample_lognormal(random.normal(stream, ()), times.mean, times.std, *within)


def drop_captions(batch: Batch, negative_LD: Tensor, probability: float, random: StepRandom) -> Tensor:
    """Text embeddings (B, L, D) with each caption replaced by the empty prompt's with `probability`."""
    if probability == 0:
        return batch.embed_BLD
    dropped_B = random.uniform("caption_dropout") < probability
    return torch.where(dropped_B[:, None, None], negative_LD.to(batch.embed_BLD), batch.embed_BLD)

"""How long the forms of a matrix take on a network of true size with random weights, run as infer.py runs it.

One pass of each form is timed, and whole samplings of two of them, which say how far `passes x time of a pass` may be trusted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turbotrain.conditioning import Conditioning
from turbotrain.diffusion.samplers import draw_noise, seeded_generators
from turbotrain.evaluation.benchmark import environment
from turbotrain.evaluation.forward import default_dtype, network_call, timed
from turbotrain.evaluation.random_weights import random_inputs, random_network
from turbotrain.evidence.forms import WAN_BLOCKS, Form
from turbotrain.evidence.matrix import TEACHER
from turbotrain.model.graphs import GraphCache
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import Variant
from turbotrain.model.wan import WanTransformer
from turbotrain.sampling import TeacherSettings, network_velocity, sampler_settings

SAMPLED_STEPS = 4
# The mode in which a whole sampling is timed, and how often: eight dense passes take 4 s.
SAMPLINGS = {TEACHER: 1, "turbo": 3}


@torch.inference_mode()
def measure_forms(
    forms: Sequence[Form],
    variant: Variant,
    latent_shape: tuple[int, int, int, int],
    device: torch.device,
    write: Callable[[dict[str, Any]], None],
    *,
    repeats: int = 5,
    warmup: int = 1,
    minutes: float = 0.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times one pass of a video of `latent_shape`, (C, T, H, W), through every form, in this order.

    Args:
        write: called with the document after every form, so that a run that is ended early keeps what it has.
        minutes: no form is begun later than that; 0: no limit.

    Returns:
        {"forms": {name: {"form", "graph", "median_s", "min_s", "max_s", "repeats"}, or {"form", "error"}}, "samplings": [{"form",
        "mode", "steps", "passes", "median_s", "arithmetic_s", "ratio"}], "left": names, "settings", "environment"}.

    Raises:
        ValueError: a network that reads an image.
    """
    if variant.config.model_type != "t2v":
        raise ValueError(f"model={variant.name}: reads an image; forms are timed of text-to-video networks")
    began = time.monotonic()
    bench = _Bench(variant, latent_shape, device, repeats, warmup)
    document = bench.describe()
    # Whole samplings of the form that everything is compared with, and of the first that has it all.
    everything = next((form for form in forms if form.scheme and form.attention.is_sparse), forms[-1])
    sampled = {TEACHER: forms[0], "turbo": everything}
    document["left"] = [form.name for form in forms]
    for form in forms:
        if minutes and time.monotonic() - began > 60 * minutes:
            break
        row: dict[str, Any] = {"form": dataclasses.asdict(form)}
        document["forms"][form.name] = row
        try:
            row.update(bench.time_pass(form))
            for mode, one in sampled.items():
                if one == form:
                    document["samplings"].append({"form": form.name, **bench.time_sampling(mode, row["median_s"])})
        except Exception as error:  # one form that cannot run here must not cost the others
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        document["left"].remove(form.name)
        write(document)
        say(f"{form.name}: {row.get('error') or format(row['median_s'] * 1e3, '.1f') + ' ms'}")
    return document


class _Bench:
    """The network at hand, of the kind that the form before this one had, and what its calls are given."""

    def __init__(
        self, variant: Variant, latent_shape: tuple[int, int, int, int], device: torch.device, repeats: int, warmup: int
    ) -> None:
        self.variant, self.shape, self.device = variant, latent_shape, device
        self.repeats, self.warmup = repeats, warmup
        self.dtype = default_dtype(device)
        torch.manual_seed(0)
        with torch.device(device):
            self.given = random_inputs(variant.config, latent_shape, 1)
        self.graphs = GraphCache() if device.type == "cuda" else None
        self._made: tuple[bool, str, bool] | None = None
        self._network: WanTransformer | None = None

    def describe(self) -> dict[str, Any]:
        settings = {
            "variant": self.variant.name,
            "latent_shape": list(self.shape),
            "blocks": f"{WAN_BLOCKS[0]}x{WAN_BLOCKS[1]} where a form names none",
            "dtype": str(self.dtype).removeprefix("torch."),
            "cuda_graphs": self.graphs is not None,
            "repeats": self.repeats,
            "warmup": self.warmup,
        }
        return {
            "forms": {},
            "samplings": [],
            "left": [],
            "settings": settings,
            "environment": environment(self.device),
        }

    def time_pass(self, form: Form) -> dict[str, Any]:
        """One call of the network, as every step of a sampler makes it."""
        network = self._network_of(form)
        call = network_call(network, self.given)
        if not bool(torch.isfinite(call()).all()):
            raise ValueError("the network gave values that are not finite")
        result = timed(call, self.device, self.repeats, self.warmup)
        return {"graph": bool(self.graphs), **result}

    def time_sampling(self, mode: str, pass_s: float) -> dict[str, Any]:
        """A whole sampling with the network of the last pass, beside what its passes alone should take."""
        _, stride_h, stride_w = self.variant.vae_stride
        size = self.shape[2] * stride_h, self.shape[3] * stride_w
        settings = sampler_settings(self.variant, None, SAMPLED_STEPS, size, mode=mode)
        cfg = settings.cfg if isinstance(settings, TeacherSettings) else None
        network = self._as_run()
        text_BLD = self.given["context_BLD"]

        def sample() -> Tensor:
            velocity = network_velocity(
                [network] * len(self.variant.experts),
                text_BLD,
                Conditioning(),
                self.variant.boundary,
                None if cfg is None else text_BLD.roll(1, dims=1),
                cfg or (1.0, 1.0),
                encode_once=True,
            )
            generators = seeded_generators([0], self.device)
            return settings.sample(velocity, draw_noise((1, *self.shape), generators), generators)

        took = timed(sample, self.device, SAMPLINGS[mode], 0)
        passes = SAMPLED_STEPS * (1 if cfg is None else 2)
        arithmetic_s = passes * pass_s
        counted = {"mode": mode, "steps": SAMPLED_STEPS, "passes": passes}
        return {**counted, **took, "arithmetic_s": arithmetic_s, "ratio": took["median_s"] / arithmetic_s}

    def _network_of(self, form: Form) -> nn.Module:
        kind = (form.attention.is_sparse, form.scheme, form.smooth)
        if self.graphs is not None:
            self.graphs.clear()  # a recording of the form before
        if self._network is None or kind != self._made:
            self._network = None  # the next takes its memory
            self._network = random_network(
                self.variant.config, form.attention, form.scheme or None, self.device, self.dtype
            )
            if form.smooth:
                _smooth(self._network)
            self._made = kind
        self._network.set_attention(form.attention)
        return self._as_run()

    def _as_run(self) -> nn.Module:
        assert self._network is not None
        return self._network if self.graphs is None else self.graphs.network(self._network)


def _smooth(network: WanTransformer) -> None:
    """The smoothing vectors that a calibrated network still divides by while it runs (quant/sites.py), all ones."""
    for block in network.blocks:
        block.smooth_attn = torch.ones(network.config.dim, device=network.device)  # type: ignore[assignment]
        block.smooth_ffn = torch.ones(network.config.dim, device=network.device)  # type: ignore[assignment]
        last = block.get_submodule("ffn.2")
        assert isinstance(last, QuantLinear)
        last.smooth = torch.ones(last.in_features, device=network.device)

"""Times Wan's VAE with random weights on this GPU: `python tools/bench_vae.py --version 2.1 --size 832x480 --json vae.json`.

Correctness first: on a short clip, the error of decoder and encoder to float64 beside diffusers' own in the same precision;
more than twice as much gets no speed. Then, per chunk of latent frames, medians of whole calls and the peak of GPU memory
beside the weights; one video from latents to a finished mp4 file, which is written while frames are decoded; and diffusers'
own calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.wan_forward import decode_chunks, encode_chunks
from turbotrain.evaluation.benchmark import environment
from turbotrain.evaluation.random_weights import WAN_22_VAE
from turbotrain.evaluation.video import VideoSink

CONFIGS: dict[str, dict[str, Any]] = {"2.1": {}, "2.2": WAN_22_VAE}  # 2.1 is diffusers' default
BUDGET = 2.0  # times the error of diffusers' own


def posterior(vae: AutoencoderKLWan, pixels_BCTHW: Tensor) -> DiagonalGaussianDistribution:
    """diffusers' own encoding of pixels in [-1, 1]."""
    return vae.encode(pixels_BCTHW, return_dict=False)[0]


def reconstruct(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """diffusers' own decoding to pixels (B, 3, T, H, W) in [-1, 1]."""
    return cast(tuple[Tensor], vae.decode(latents_BCTHW, return_dict=False))[0]  # the annotation forgets this tuple


def build(version: str, device: torch.device) -> AutoencoderKLWan:
    """The published layout in bfloat16, with random weights."""
    torch.manual_seed(0)
    with device:
        vae = AutoencoderKLWan(**CONFIGS[version])
    return vae.eval().requires_grad_(False).bfloat16()


def errors(vae: AutoencoderKLWan) -> dict[str, list[float]]:
    """Relative errors to float64 on a short clip: [ours, diffusers']."""
    wide, side, device = copy.deepcopy(vae).double(), 8 * (vae.config.patch_size or 1), vae.device
    latents_BCTHW = torch.randn(1, vae.config.z_dim, 3, 8, 8, device=device).bfloat16()
    frames_BTHWC = torch.randint(0, 256, (1, 9, 8 * side, 8 * side, 3), dtype=torch.uint8, device=device)
    pixels_BCTHW = (frames_BTHWC.float() / 127.5 - 1).bfloat16().movedim(-1, 1)

    def beside(exact: Tensor, *found: Tensor) -> list[float]:
        return [((value.double() - exact).norm() / exact.norm()).item() for value in found]

    video = torch.cat(list(decode_chunks(vae, latents_BCTHW, 2)), 1).movedim(-1, 1).clamp(-1, 1)
    moments = torch.cat(list(encode_chunks(vae, frames_BTHWC, 2)), 1).movedim(-1, 1)
    plain = posterior(vae, pixels_BCTHW).parameters
    return {
        "decode": beside(reconstruct(wide, latents_BCTHW.double()), video, reconstruct(vae, latents_BCTHW)),
        "encode": beside(posterior(wide, pixels_BCTHW.double()).parameters, moments, plain),
    }


def measure(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of a call after one that warms up, and the largest memory beyond what was allocated before."""
    seconds = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"seconds": round(statistics.median(seconds[1:]), 4), "first_s": round(seconds[0], 3), "gib": round(peak, 2)}


def to_mp4(codec: VideoCodec, latents_BCTHW: Tensor) -> dict[str, float]:
    """Seconds until all frames are on the host, and until the file is there; after a first video that warms up."""
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("warm.mp4", "video.mp4"):
            marks = [time.perf_counter()]
            with VideoSink(Path(folder) / name) as sink:
                for _, frames_BTHWC in codec.decode_stream(latents_BCTHW):
                    sink.write(frames_BTHWC[0].numpy())
                marks.append(time.perf_counter())
            marks.append(time.perf_counter())
    return {"frames_s": round(marks[1] - marks[0], 4), "file_s": round(marks[2] - marks[0], 4)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one layout and size."""
    device = torch.device("cuda")
    vae = build(options.version, device)
    codec = VideoCodec(vae)
    width, height = map(int, options.size.split("x"))
    shape = codec.latent_shape(options.frames, height, width)
    result: dict[str, Any] = {"version": options.version, "size": options.size, "frames": options.frames}
    result["errors"] = errors(vae)
    for what, (ours, plain) in result["errors"].items():
        print(f"{what}: error to float64 {ours:.4f}, diffusers' {plain:.4f}", flush=True)
        if not ours <= BUDGET * plain:
            raise SystemExit(f"{what}: the error is more than {BUDGET:g} times diffusers'; no speed is worth that")
    latents_BCTHW = torch.randn(1, *shape, device=device)
    frames_BTHWC = torch.randint(0, 256, (1, options.frames, height, width, 3), dtype=torch.uint8, device=device)

    def note(name: str, found: dict[str, float]) -> None:
        result[name] = found
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)

    with torch.inference_mode():
        for chunk in options.chunks:
            codec.chunk = chunk
            note(f"decode chunk {chunk}", measure(lambda: codec.decode(latents_BCTHW), options.repeats))
            note(f"encode chunk {chunk}", measure(lambda: codec.encode(frames_BTHWC), options.repeats))
        codec.chunk = None
        note("latents to mp4", to_mp4(codec, latents_BCTHW))
        if options.beside:
            pixels_BCTHW = (frames_BTHWC.float() / 127.5 - 1).bfloat16().movedim(-1, 1)
            note("diffusers decode", measure(lambda: reconstruct(vae, latents_BCTHW.bfloat16()), 1))
            note("diffusers encode", measure(lambda: posterior(vae, pixels_BCTHW), 1))
    result["environment"] = environment(device)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; exit status 1 without a GPU."""
    parser = argparse.ArgumentParser(description="Times Wan's VAE, random weights, beside diffusers' own.")
    parser.add_argument("--version", choices=CONFIGS, default="2.1")
    parser.add_argument("--size", default="832x480", help="width x height in pixels")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="latent frames computed at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-diffusers", dest="beside", action="store_false", help="leave diffusers' times out")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: there is nothing to time here", file=sys.stderr)
        return 1
    result = run(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

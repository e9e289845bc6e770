"""Says what is in a folder of shards: counts, shapes, numbers, prompts, damage; and shows some of it:

    python tools/inspect_dataset.py SHARDS [--samples 64] [--json report.json]
    python tools/inspect_dataset.py SHARDS --vae WAN_FOLDER/vae --sheet sheet.png

A sheet is one image for each size of clip: a row a clip, its frames from left to right. Exit status: 0 whole, 1 failed or
damaged (the report says what), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import DONE, FAILED, Parser, run

if TYPE_CHECKING:
    from turbotrain.data.latents import LatentDataset

SHOWN = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Counts, statistics and a contact sheet of a data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--samples", type=int, metavar="N", help="look at the numbers of so many of each size; default: all"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="decode some clips into an image; needs --vae")
    parser.add_argument("--rows", type=int, default=SHOWN, metavar="N", help=f"clips on a sheet (default {SHOWN})")
    parser.add_argument("--vae", metavar="PATH", help="a VAE folder or official file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if (options.sheet is None) != (options.vae is None):
        parser.error("--sheet and --vae belong together")
    for name in ("samples", "rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_inspect, parse(arguments))


def _inspect(options: argparse.Namespace) -> int:
    # here: it imports torch, which a usage error should not wait for
    from turbotrain.data.inspect import inspect

    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # first: looking at all samples takes a while
    report, dataset = inspect(options.folder, options.samples)
    print(f"{report.folder}: {report.samples} samples in {report.shards} shards, {report.nbytes / 1e9:.3g} GB")
    print(f"parts: {', '.join(report.parts)}")
    for key, value in report.source.items():
        if key not in ("count", "parts"):
            print(f"{key}: {value}")
    for bucket in report.buckets:
        print(_line(bucket))
    if report.prompts:
        tokens = report.prompts["tokens"]
        print(
            f"prompts: {report.prompts['distinct']} distinct of {report.prompts['looked_at']} looked at, tokens "
            f"{tokens['min']} to {tokens['max']}, mean {tokens['mean']:.1f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    if options.sheet is not None:
        _show(options, dataset)
    for problem in report.problems:
        print(f"damaged: {problem}")
    if report.lost:
        print(f"lost: {report.lost} samples")
    return FAILED if report.lost else DONE


def _line(bucket: dict[str, Any]) -> str:
    text = f"latents {tuple(bucket['latent_shape'] or ())}: {bucket['samples']} samples"
    if "mean" not in bucket:
        return text
    means, stds = bucket["mean"], bucket["std"]
    return (
        f"{text}, channel means {min(means):.3f} to {max(means):.3f}, deviations {min(stds):.3f} to {max(stds):.3f}, "
        f"all in [{bucket['min']:.3f}, {bucket['max']:.3f}]"
    )


def _show(options: argparse.Namespace, dataset: LatentDataset) -> None:
    from turbotrain.codecs import VideoCodec
    from turbotrain.evaluation.video import contact_sheet, png_bytes, write_bytes
    from turbotrain.loading import resolve_device

    codec = VideoCodec.from_pretrained(options.vae, device=str(resolve_device(options.device)))
    for number, members in enumerate(dataset.buckets):
        latents = [dataset.batch([index]).latent_BCTHW for index in members[: options.rows]]
        clips = [codec.decode(latent_BCTHW)[0].cpu().numpy() for latent_BCTHW in latents]
        path = options.sheet if len(dataset.buckets) == 1 else options.sheet.with_stem(f"{options.sheet.stem}-{number}")
        print(f"written: {write_bytes(path, png_bytes(contact_sheet(clips)))}")
        for index in members[: options.rows]:
            print(f"  {dataset.prompt(index)[:100]}")


if __name__ == "__main__":
    sys.exit(main())

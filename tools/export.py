"""Exports a distilled checkpoint as a diffusers pipeline: `python tools/export.py CHECKPOINT --output FOLDER`.

`WanPipeline.from_pretrained(FOLDER)` then samples it in 1 to 4 steps, with turbotrain's TurboScheduler. What diffusers cannot
compute is refused unless `--lossy` (sparse-linear attention) or `--dequantize` (8-bit layers) gives it up. Exit status: 0 done,
1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command import DONE, Parser, run

from turbotrain.model.variants import VARIANTS

PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Write a distilled checkpoint as a folder that diffusers' Wan pipelines load.")
    parser.add_argument("source", type=Path, help="a checkpoint of any layout (two experts: the folder above them)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the pipeline's folder")
    for part in PARTS:
        parser.add_argument(f"--{part.replace('_', '-')}", metavar="FOLDER", help="instead of the checkpoint's own")
    parser.add_argument("--variant", choices=list(VARIANTS), help="for files whose metadata does not say")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--dequantize", action="store_true", help="multiply 8-bit layers out")
    parser.add_argument(
        "--lossy", action="store_true", help="write an SLA student although its attention will be dense"
    )
    parser.add_argument("--force", action="store_true", help="replace what is at the output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_export, parse(arguments))


def _export(options: argparse.Namespace) -> int:
    # here: it imports torch and diffusers, which a usage error should not wait for
    from turbotrain.diffusers_folder import export_pipeline

    result = export_pipeline(
        options.source,
        options.output,
        components={part: getattr(options, part) for part in PARTS},
        variant=options.variant,
        dtype=options.dtype,
        dequantize=options.dequantize,
        lossy=options.lossy,
        force=options.force,
    )
    print(f"written: {result.folder} ({result.pipeline})")
    for loss in result.losses:
        print(f"lost: {loss}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())

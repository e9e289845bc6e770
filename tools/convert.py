"""Converts checkpoints: `python tools/convert.py SOURCE --to diffusers --output FOLDER --verify`, or says what one is:
`python tools/convert.py SOURCE --inspect`.

Any layout in; out: a turbotrain folder, official Wan, diffusers, TurboDiffusion, rCM or ComfyUI. Nothing is lost unless
`--lossy` allows it, and then it is said. Exit status: 0 done, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from command import DONE, FAILED, Parser, run

from turbotrain.checkpoint import header, targets
from turbotrain.checkpoint.identify import identify, report, summary
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.model.variants import VARIANTS

DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Say what a checkpoint is, or convert it into another layout.")
    parser.add_argument(
        "source", type=Path, help="a weights file, a shard index, or a folder (two experts: the one above)"
    )
    parser.add_argument("--inspect", action="store_true", help="say what it is and what it lacks; write nothing")
    parser.add_argument("--json", action="store_true", help="with --inspect: as JSON")
    parser.add_argument("--to", choices=list(TARGETS), help="the layout to write")
    parser.add_argument("-o", "--output", type=Path, help="folder; .pth (turbodiffusion, rcm), .safetensors (comfyui)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights outside the float32 islands; dequantizes 8-bit layers"
    )
    parser.add_argument(
        "--variant", choices=list(VARIANTS), help="what to record, where names and dimensions do not tell"
    )
    parser.add_argument("--lossy", action="store_true", help="go on where the target cannot hold everything")
    parser.add_argument("--force", action="store_true", help="replace what is at the output")
    parser.add_argument("--verify", action="store_true", help="read the result back: same tensors, same outputs")
    parser.add_argument("--max-shard-gb", type=float, default=10.0, help="GiB a file of a folder (default %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.inspect == (options.to is not None):
        parser.error("say either --inspect or --to LAYOUT --output PATH")
    if options.to and options.output is None:
        parser.error("--output: missing; where shall the result go?")
    if options.json and not options.inspect:
        parser.error("--json goes with --inspect")
    if not options.max_shard_gb > 0:
        parser.error(f"--max-shard-gb {options.max_shard_gb}: must be above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Identify, then inspect or convert. An incomplete network is reported by --inspect with status 1."""
    options = parse(arguments)
    return run(_inspect if options.inspect else _convert, options)


def _inspect(options: argparse.Namespace) -> int:
    identity = identify(options.source)
    print(json.dumps(summary(identity), indent=1) if options.json else report(identity))
    return FAILED if any(network.problems for network in identity.networks.values()) else DONE


def _convert(options: argparse.Namespace) -> int:
    experts = 1 if header.expert_folders(options.source) is None else 2
    targets.check_output([options.source], options.output, TARGETS[options.to], experts, options.force)
    identity = identify(options.source)
    for network in identity.networks.values():
        network.require_complete()
    from turbotrain.checkpoint.convert import convert  # imports torch: what is wrong by then is known

    result = convert(
        identity,
        options.output,
        options.to,
        dtype=options.dtype,
        variant=options.variant,
        lossy=options.lossy,
        force=options.force,
        verified=options.verify,
        max_shard_bytes=int(options.max_shard_gb * 2**30),
    )
    said = {"written": map(str, result.files), "lost": result.losses, "note": result.notes, "verified": result.verified}
    for label, lines in said.items():
        for line in lines:
            print(f"{label}: {line}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())

"""Adds what a training changed to another network, W = base + w (target - anchor):

    python tools/merge.py --base rcm/ --target sla/ --anchor teacher/ --weight 1.0 --output merged/
    python tools/merge.py --base Wan2.2-I2V-A14B/ --target rCM.pth --anchor Wan2.1-T2V-14B/ --weight high=4.0 low=1.0 \\
        --keep '^patch_embedding' --output merged/

or a LoRA, W = base + w (B A), with P of SLA moved by w of its way from the base's (zero where it has none) to the adapter's:

    python tools/merge.py --base Wan2.1-T2V-14B/ --lora outputs/run/rcm/lora/pytorch_lora_weights.safetensors -o student/

Any layout that tools/convert.py reads. Strict: tensors that the three do not share need a pattern, except P of SLA. Exit
status: 0 done, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from command import DONE, Parser, run

from turbotrain.checkpoint import header, targets
from turbotrain.checkpoint.keymaps.targets import TARGETS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="W = base + w (target - anchor), tensor by tensor.")
    parser.add_argument("--base", type=Path, required=True, help="what is added to (two experts: the folder above)")
    parser.add_argument("--target", type=Path, help="what training made")
    parser.add_argument("--anchor", type=Path, help="what that training began with")
    parser.add_argument("--lora", type=Path, help="a LoRA's file, in place of target and anchor")
    parser.add_argument(
        "--weight", nargs="+", default=["1.0"], metavar="W", help="w; for two experts high=W low=W, or one"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--to", choices=list(TARGETS), default="turbotrain", help="layout of the result")
    for option, what in (("keep", "the base's"), ("add", "the target's"), ("drop", "none")):
        parser.add_argument(
            f"--{option}", nargs="+", default=[], metavar="PATTERN", help=f"tensors of which {what} is taken as it is"
        )
    parser.add_argument("--any-dtype", action="store_true", help="the three may differ in dtype; the base's stays")
    parser.add_argument("--force", action="store_true", help="replace what is at the output")
    parser.add_argument("--verify", action="store_true", help="read the result back and compute it again")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    options.weights = {}
    for value in options.weight:
        expert, _, number = value.rpartition("=")
        try:
            options.weights[expert] = float(number)
        except ValueError:
            parser.error(f"--weight {value}: a number, or high=NUMBER low=NUMBER")
        if not math.isfinite(options.weights[expert]):
            parser.error(f"--weight {value}: must be finite")
    if len(options.weights) != len(options.weight) or set(options.weights) not in ({""}, {"high", "low"}):
        parser.error(f"--weight {' '.join(options.weight)}: one number, or high=NUMBER low=NUMBER")
    for pattern in [*options.keep, *options.add, *options.drop]:
        try:
            re.compile(pattern)
        except re.error as error:
            parser.error(f"{pattern!r} is no regular expression: {error}")
    if options.lora is not None:
        of_three = ("target", "anchor", "keep", "add", "drop", "any_dtype", "verify")
        given = [f"--{name.replace('_', '-')}" for name in of_three if getattr(options, name)]
        if given or set(options.weights) != {""}:
            parser.error(f"--lora goes with --base and one --weight, not with {', '.join(given) or 'two weights'}")
    elif options.target is None or options.anchor is None:
        parser.error("name --target and --anchor, or a --lora")
    elif options.target.resolve() == options.anchor.resolve():
        parser.error("--target and --anchor are the same: their difference is nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run(_merge if options.lora is None else _merge_lora, options)


def _merge_lora(options: argparse.Namespace) -> int:
    from turbotrain.checkpoint.lora import merge_lora  # imports torch

    weight = options.weights[""]
    files = merge_lora(options.base, options.lora, options.output, weight, to=options.to, force=options.force)
    for file in files:
        print(f"written: {file}")
    return DONE


def _merge(options: argparse.Namespace) -> int:
    sources = [options.base, options.target, options.anchor]
    for source in sources:
        header.inspect_checkpoint(source)
    experts = 1 if header.expert_folders(options.base) is None else 2
    targets.check_output(sources, options.output, TARGETS[options.to], experts, options.force)
    from turbotrain.checkpoint.merge import merge  # imports torch: what is wrong by then is known

    result = merge(
        *(options.base, options.target, options.anchor, options.output, options.weights),
        to=options.to,
        keep=options.keep,
        add=options.add,
        drop=options.drop,
        any_dtype=options.any_dtype,
        force=options.force,
        verified=options.verify,
    )
    for expert, keys in result.keys.items():
        prefix = f"{expert}: " if expert else ""
        print(f"{prefix}merged: {len(keys.merged)} tensors, weight {result.weights[expert]:g}")
        for fate in ("added", "kept", "dropped"):
            names = getattr(keys, fate)
            print(
                f"{prefix}{fate}: {len(names)}"
                + (f" ({', '.join(names[:8])}{', ...' * (len(names) > 8)})" if names else "")
            )
    for file in result.files:
        print(f"written: {file}")
    for line in result.verified:
        print(f"verified: {line}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())

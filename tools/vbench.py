"""Samples the videos that VBench's scripts look for, and goes on where it was stopped:

    python tools/vbench.py --prompts VBench_full_info.json --output videos/ checkpoint=turbo/ batch_size=4
    python tools/vbench.py --prompts prompts.txt --output videos/ --samples 1 checkpoint=teacher/ sampling=teacher

Everything after the options is as infer.py takes it, but for prompt, prompts, seeds and output. Sample i of every prompt draws
its noise from seed + i. Exit status: 0 done, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command import DONE, Parser, run

from turbotrain.evaluation.vbench import FLICKERING_SAMPLES, SAMPLES, missing_videos, read_prompts

TAKEN = ("prompt", "prompts", "seeds", "output", "mode")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Videos by VBench's protocol.")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="VBench_full_info.json, or text with a prompt a line"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for {prompt}-{index}.mp4")
    parser.add_argument("--dimensions", nargs="+", default=[], metavar="NAME", help="only prompts of these dimensions")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"videos a prompt (default {SAMPLES})")
    parser.add_argument(
        "--flickering-samples",
        type=int,
        default=FLICKERING_SAMPLES,
        help="of the prompts of temporal_flickering (default 25)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options, given = parser.parse_known_args(arguments)
    strange = [item for item in given if "=" not in item or item.startswith("-")]
    if strange:
        parser.error(f"{strange[0]}: expected key=value, as infer.py takes it")
    taken = [item for item in given if item.partition("=")[0] in TAKEN]
    if taken:
        parser.error(f"{taken[0]}: --prompts, --output and --samples say this")
    if options.samples < 1 or options.flickering_samples < 1:
        parser.error(f"--samples {options.samples} --flickering-samples {options.flickering_samples}: at least 1")
    options.given = given
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_sample, parse(arguments))


def _sample(options: argparse.Namespace) -> int:
    prompts = read_prompts(options.prompts, options.dimensions)
    wanted = sum(prompt.samples(options.samples, options.flickering_samples) for prompt in prompts)
    left = missing_videos(prompts, options.output, options.samples, options.flickering_samples)
    print(f"{len(prompts)} prompts, {wanted} videos, {len(left)} of them to be sampled in {options.output}", flush=True)
    if not left:
        return DONE
    options.output.mkdir(parents=True, exist_ok=True)
    from turbotrain import inference
    from turbotrain.infer_checks import load_request
    from turbotrain.infer_config import ListedRequest

    # The checks of one video are those of all: sizes, checkpoint, device, room for the output.
    first = load_request([*options.given, f"prompt={left[0][0]}", f"output={options.output / 'probe.mp4'}"])
    inference.run(
        ListedRequest(
            first.config,
            list(dict.fromkeys(prompt for prompt, _, _ in left)),
            first.glimpse,
            first.variant,
            tuple((prompt, first.config.seed + index, path) for prompt, index, path in left),
        )
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())

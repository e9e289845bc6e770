"""Builds the shards that training reads, in one of three ways, and goes on where it stopped when it is started again:

    python tools/build_dataset.py teacher prompts.txt --model WAN_FOLDER --variant wan2.1_t2v_1.3b -o SHARDS
    python tools/build_dataset.py videos clips/ --model WAN_FOLDER --variant wan2.1_t2v_1.3b -o SHARDS
    python tools/build_dataset.py prompts prompts.txt --model WAN_FOLDER --variant wan2.1_t2v_1.3b -o SHARDS

teacher: latents drawn from the teacher, each with a seed of its own. videos: clips decoded, resampled, scaled, cropped, encoded.
prompts: embeddings alone, for distillation from noise. index: only the index, for shards that came from elsewhere. Image-to-video
variants read images from a .jsonl list ({"prompt": "...", "image": "a.jpg"} a line); of a clip the first frame is the image.

Any number of workers may share a folder: say --worker I/N, or start them by torchrun or srun. Exit status: 0 done, 1 failed (one
line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import DONE, Parser, run

from turbotrain.model.variants import VARIANTS

if TYPE_CHECKING:
    import torch

    from turbotrain.data.build import Maker
    from turbotrain.data.videos import Bucket

PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder")
# (number, of how many, number on this machine), as launchers say it.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Shards of latents and text embeddings from prompts or videos.")
    modes = parser.add_subparsers(dest="mode", required=True, parser_class=Parser)
    teacher = modes.add_parser("teacher", help="latents drawn from the teacher")
    videos = modes.add_parser("videos", help="latents of clips")
    prompts = modes.add_parser("prompts", help="text embeddings alone")
    index = modes.add_parser("index", help="the index of shards that lie in the output folder")
    for mode in (teacher, videos, prompts):
        mode.add_argument("source", type=Path, help="a text file (a prompt a line), a .jsonl, or a folder of videos")
        mode.add_argument("--samples-per-shard", type=int, default=256, metavar="N")
        mode.add_argument(
            "--worker", metavar="I/N", help="this is worker I of N, from 0; default: what the launcher says"
        )
        mode.add_argument(
            "--max-bad", type=int, default=0, metavar="N", help="items a worker may skip before it gives up"
        )
    for mode in (teacher, videos, prompts, index):
        mode.add_argument(
            "--model", type=Path, required=True, help="a Wan folder or checkpoint, or a folder of its parts"
        )
        mode.add_argument("--variant", choices=list(VARIANTS), required=True)
        mode.add_argument("-o", "--output", type=Path, required=True, help="the folder of shards")
        for part in PARTS:
            mode.add_argument(f"--{part.replace('_', '-')}", metavar="PATH", help="instead of the model's own")
        mode.add_argument("--device", default="auto")
        mode.add_argument(
            "--dtype", choices=("float32", "bfloat16"), help="of teacher and VAE; default: bfloat16 on a GPU"
        )
        mode.add_argument("--debug", action="store_true", help="show tracebacks")
    for mode in (teacher, videos, prompts):
        mode.add_argument(
            "--buckets", nargs="+", default=[], metavar="WxHxF", help="sizes and lengths; default: the variant's own"
        )
    videos.add_argument("--fps", type=float, help="frames a second of the clips; default: the variant's")
    teacher.add_argument("--seed", type=int, default=0, help="item i is drawn with seed + i")
    teacher.add_argument("--batch-size", type=int, default=1)
    teacher.add_argument("--steps", type=int)
    teacher.add_argument("--guidance", type=float)
    teacher.add_argument("--shift", type=float)
    teacher.add_argument("--solver", choices=("unipc", "euler"), default="unipc")
    teacher.add_argument("--grid", choices=("wan", "diffusers", "rcm"), default="wan")
    options = parser.parse_args(arguments)
    for name in ("samples_per_shard", "batch_size"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if getattr(options, "fps", None) is not None and not options.fps > 0:
        parser.error(f"--fps {options.fps}: above 0")
    try:
        options.worker = _worker(getattr(options, "worker", None), os.environ)
    except ValueError as error:
        parser.error(str(error))
    source = getattr(options, "source", None)
    if source is not None and not source.exists():
        parser.error(f"{source}: no such file or folder")
    return options


def _worker(said: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    if said is None:
        number, count = next(
            ((environment[i], environment[n]) for i, n, _ in LAUNCHERS if i in environment and n in environment),
            ("0", "1"),
        )
        said = f"{number}/{count}"
    found = re.fullmatch(r"(\d+)/(\d+)", said)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--worker {said}: say I/N with I from 0 to N - 1, for example 0/8")
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_index if (options := parse(arguments)).mode == "index" else _build, options)


def _quiet(options: argparse.Namespace) -> None:
    from turbotrain.codecs.folders import quiet_libraries

    if not options.debug:
        quiet_libraries()


def _build(options: argparse.Namespace) -> int:
    # here: they import torch and diffusers, which a usage error should not wait for
    from turbotrain.data.build import Plan, build
    from turbotrain.data.sources import read_items
    from turbotrain.data.videos import Bucket

    _quiet(options)
    variant = VARIANTS[options.variant]
    own = Bucket(variant.width, variant.height, variant.frames)
    buckets = [Bucket.parse(text, variant) for text in options.buckets] or [own]
    items = read_items(options.source)
    maker, sampled = _maker(options, buckets)
    settings = {
        "kind": options.mode,
        "variant": variant.name,
        "buckets": [str(bucket) for bucket in buckets],
        **sampled,
    }
    worker, workers = options.worker
    plan = Plan(options.output, options.samples_per_shard, worker, workers, options.max_bad)
    progress = build(plan, items, maker, settings)
    print(f"made {progress.made}, kept {progress.kept}, skipped {len(progress.skipped)}")
    if progress.facts is not None:
        print(
            f"written: {options.output} ({progress.facts['count']} samples in {len(progress.facts['shards'])} shards)"
        )
    return DONE


def _maker(options: argparse.Namespace, buckets: Sequence[Bucket]) -> tuple[Maker, dict[str, Any]]:
    """What makes the samples, and what of the options shapes them."""
    from turbotrain.data.makers import PromptMaker, TeacherMaker, VideoMaker
    from turbotrain.data.shards import image_parts
    from turbotrain.pipeline import TurboPipeline

    device, dtype = _device(options)
    if options.mode == "teacher":
        sampler = {name: getattr(options, name) for name in ("steps", "guidance", "shift", "solver", "grid")}
        given = {part: place for part in PARTS if (place := getattr(options, part))}
        pipe = TurboPipeline.from_checkpoint(
            options.model, str(device), dtype, variant=_untold(options), components=given
        )
        if pipe.variant.name != options.variant:
            raise ValueError(f"--variant {options.variant}: {options.model} says it is {pipe.variant.name}")
        maker = TeacherMaker(pipe, buckets, options.seed, sampler, options.batch_size)
        return maker, {"seed": options.seed, **sampler}
    reads_images = options.mode == "videos" or bool(image_parts(VARIANTS[options.variant].config))
    parts = _parts(options, pixels=reads_images)
    if options.mode == "prompts":
        return PromptMaker(parts, buckets[0]), {}
    fps = options.fps or float(VARIANTS[options.variant].fps)
    return VideoMaker(parts, buckets, fps), {"fps": fps}


def _index(options: argparse.Namespace) -> int:
    from turbotrain.data.build import finish

    _quiet(options)
    if not any(options.output.glob("*.tar")):
        raise ValueError(f"{options.output}: no *.tar shards in it")
    facts = finish(options.output, _parts(options, pixels=False).negative())
    print(f"written: {options.output} ({facts['count']} samples in {len(facts['shards'])} shards)")
    return DONE


def _parts(options: argparse.Namespace, pixels: bool) -> Any:
    from turbotrain.data.makers import Parts

    given = {part: place for part in PARTS if (place := getattr(options, part))}
    return Parts.load(VARIANTS[options.variant], options.model, *_device(options), given, pixels)


def _untold(options: argparse.Namespace) -> str | None:
    """The variant, for files of other projects; a checkpoint of ours says its own."""
    from turbotrain.checkpoint.header import inspect_checkpoint

    return None if (inspect_checkpoint(options.model).metadata or {}).get("variant") else options.variant


def _device(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    from turbotrain.loading import resolve_device

    local = next((os.environ[name] for *_, name in LAUNCHERS if name in os.environ), None)
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is None and local is not None:
        device = torch.device("cuda", int(local) % torch.cuda.device_count())
    on_gpu = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, options.dtype) if options.dtype else on_gpu


if __name__ == "__main__":
    sys.exit(main())

"""Runs a matrix of trainings and measurements, and renders what came of it:

    python tools/evidence.py run configs/evidence/shapes_h200.yaml              # goes on where it was stopped
    python tools/evidence.py run MATRIX --gpus 0,1,2,3 --per-gpu 5 --minutes 9  # most important rows first
    python tools/evidence.py latency MATRIX --json docs/measurements/h200_evidence_latency.json  # a Wan network's pass, by form
    python tools/evidence.py render docs/measurements/h200_evidence.json        # docs/evidence.md and its figures, from JSON only

Exit status: 0 everything that was asked for is there, 1 something failed or is left for another call, 2 usage.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from command import DONE, FAILED, Parser, run

ROOT = Path(__file__).resolve().parents[1]
_GPU = r"(\d+|(GPU|MIG)-[\w/-]+)"  # what CUDA_VISIBLE_DEVICES knows; it takes anything else for no GPU, and a CPU trains for days
GPUS = rf"{_GPU}(,{_GPU})*"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Evidence that accelerations keep quality.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    start = commands.add_parser("run", help="train and measure what is missing")
    start.add_argument("matrix", type=Path)
    start.add_argument("overrides", nargs="*", help="of every training, as train.py takes them (before the options)")
    start.add_argument("-o", "--output", type=Path, help="folder (default: outputs/evidence/NAME)")
    start.add_argument("--only", nargs="+", default=[], metavar="CELL", help="these cells, and what they need")
    start.add_argument("--teacher", help="a finished teacher (a path or asset:NAME) instead of the recipe's stage")
    start.add_argument("--codec", help="a finished codec, likewise")
    start.add_argument("--gpus", default="", help="for example 0,1 (default: the machine as it is)")
    start.add_argument("--per-gpu", type=int, default=1, help="runs at once on each (default 1)")
    start.add_argument("--minutes", type=float, default=0, help="stop after so long (default: no limit)")
    start.add_argument("--json", type=Path, help="also write all results to this one file")
    one = commands.add_parser("measure", help="measure the missing rows of one cell (run does this)")
    one.add_argument("matrix", type=Path)
    one.add_argument("output", type=Path)
    one.add_argument("cell")
    one.add_argument("--row", help="this one alone")
    clock = commands.add_parser(
        "latency", help="time a pass of a Wan network with random weights in every form of the rows"
    )
    clock.add_argument("matrix", type=Path)
    clock.add_argument("--model", default="wan2.1_t2v_1.3b", help="default: %(default)s")
    clock.add_argument("--resolution", help="for example 480p (default: the model's own)")
    clock.add_argument("--frames", type=int, help="default: the model's own")
    clock.add_argument("--minutes", type=float, default=0, help="begin no form after so long (default: no limit)")
    clock.add_argument("--json", type=Path, required=True, help="written anew after every form")
    show = commands.add_parser(
        "render", help="write the page, its figures, and the table in README.md if that has its markers"
    )
    show.add_argument("results", type=Path)
    show.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "evidence.md")
    for command in (start, one, clock, show):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.command == "run" and options.per_gpu < 1:
        parser.error(f"--per-gpu {options.per_gpu}: at least 1")
    if options.command == "run" and options.gpus and not re.fullmatch(GPUS, options.gpus):
        parser.error(f"--gpus {options.gpus}: numbers or UUIDs with commas between them, for example 0,1")
    if options.command in ("run", "latency") and not options.minutes >= 0:
        parser.error(f"--minutes {options.minutes:g}: not negative")
    return options


def _say(line: str) -> None:
    """In one write: several threads speak."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    commands = {"run": _run, "measure": _measure, "latency": _latency, "render": _render}
    return run(commands[options.command], options)


def _run(options: argparse.Namespace) -> int:
    from turbotrain.compose import UsageError
    from turbotrain.config import resolve
    from turbotrain.evidence.collect import check_keeps, collect, write_results
    from turbotrain.evidence.folders import Folders
    from turbotrain.evidence.matrix import load_matrix
    from turbotrain.evidence.schedule import plan, run_tasks
    from turbotrain.records import write_json

    matrix = load_matrix(options.matrix)
    root = (options.output or Path("outputs/evidence") / matrix.name).absolute()
    root.mkdir(parents=True, exist_ok=True)
    folders = Folders(root, matrix)
    results_file = options.json or root / "evidence.json"
    check_keeps(results_file, folders)
    given = {name: resolve(path).absolute() for name in ("teacher", "codec") if (path := getattr(options, name))}
    for name, path in given.items():
        if not path.exists():
            raise UsageError(f"--{name} {path}: no such file or folder")
    if given:
        write_json(root / "given.json", {name: str(path) for name, path in given.items()})
    folders.declare(options.overrides)
    write_json(root / "overrides.json", {"overrides": options.overrides})
    train = [sys.executable, str(ROOT / "train.py")]
    measure = [sys.executable, str(Path(__file__).resolve()), "measure", str(options.matrix.absolute()), str(root)]
    tasks = plan(folders, train, measure, options.overrides, options.only)
    total = len(matrix.rows)
    print(f"{matrix.name}: {len(tasks)} tasks for {total} rows in {root}", flush=True)
    outcome = run_tasks(tasks, options.gpus.split(","), options.per_gpu, options.minutes, _say)
    results = collect(folders)
    write_results(results_file, results)
    print(f"{len(results['rows'])} of {total} rows: {results_file}")
    for name, log in outcome.failed.items():
        print(f"failed: {name}: see {log}", file=sys.stderr)
    if outcome.left:
        print(f"left: {len(outcome.left)} tasks; the same command goes on", file=sys.stderr)
    return FAILED if outcome.failed or outcome.left else DONE


def _measure(options: argparse.Namespace) -> int:
    import torch

    from turbotrain.config import load_config
    from turbotrain.evidence.folders import Folders
    from turbotrain.evidence.matrix import load_matrix
    from turbotrain.evidence.rows import Bench, measure_cell

    matrix = load_matrix(options.matrix)
    folders = Folders(options.output, matrix)
    config = load_config([f"recipe={matrix.recipe}", *matrix.common, *folders.overrides()])
    on_gpu = torch.cuda.is_available() and config.launch.device != "cpu"
    bench = Bench(folders, config, torch.device("cuda" if on_gpu else "cpu"))
    measure_cell(bench, matrix.cell(options.cell), options.row, _say)
    return DONE


def _latency(options: argparse.Namespace) -> int:
    import datetime
    import shlex

    import torch

    from turbotrain.compose import UsageError
    from turbotrain.evidence.forms import matrix_forms
    from turbotrain.evidence.latency import measure_forms
    from turbotrain.evidence.matrix import load_matrix
    from turbotrain.model.variants import VARIANTS
    from turbotrain.records import environment, write_json
    from turbotrain.sizes import video_size

    if options.model not in VARIANTS:
        raise UsageError(f"--model {options.model}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[options.model]
    frames = variant.frames if options.frames is None else options.frames
    height, width = video_size(variant, options.resolution)
    said = ("model", "resolution", "frames")
    shown = [
        part for name in said if (value := getattr(options, name)) is not None for part in (f"--{name}", str(value))
    ]
    about = {
        "command": shlex.join(
            ["python", "tools/evidence.py", "latency", str(options.matrix), *shown, "--json", "FILE"]
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": environment()["commit"],
        "video": f"{frames} frames of {width}x{height}",
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = measure_forms(
        matrix_forms(load_matrix(options.matrix)),
        variant,
        variant.latent_shape(frames, height, width),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        lambda document: write_json(options.json, {**about, **document}),
        minutes=options.minutes,
        say=_say,
    )
    for sampling in document["samplings"]:
        print("{mode}, {steps} steps of {form}: {ratio:.3f} of passes x time of one".format(**sampling))
    print(f"written: {options.json}")
    failed = [name for name, form in document["forms"].items() if "error" in form]
    for name in (*failed, *document["left"]):
        print(f"not timed: {name}", file=sys.stderr)
    return FAILED if failed or document["left"] else DONE


def _render(options: argparse.Namespace) -> int:
    from turbotrain.evidence.page import write_page

    for path in write_page(options.results, options.output):
        print(f"written: {path}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())

"""Times the kernels on this machine's GPU: `python tools/bench.py --shapes s1 --ops sla w8a8 --seconds 0.3`.

Correctness first: `turbokernels.check` runs for every op that is timed, and a red check gets no speed. Then medians of
CUDA events over rotating operands, from a CUDA graph where the op allows it (so that Python does not show), beside dense
attention, bf16 linears and the reference. An op that raises costs its row and no other. Writes a table, and JSON with
what one needs to repeat it. TURBOKERNELS_AUTOTUNE=1 tunes on the way.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_rows import SHAPES, Row, Rows
from rich.console import Console
from rich.table import Table
from turbokernels import check, tuning
from turbokernels.timing import Call, measure

OPS = ("sdpa", "linear", "sla", "select_blocks", "sparse", "jvp", "sage", "linear_attention", "w8a8", "element_wise")
OPERAND_SETS = 2  # rotated, so that no call finds its operands in the cache


@dataclass
class Timing:
    """A line of the result. check: what was found before, against its limit. graphed: replayed from a CUDA graph. error: why
    there is no time."""

    shape: str
    name: str
    op: str
    ms: float | None = None
    tflops: float | None = None
    tb_per_s: float | None = None
    target_ms: float | None = None
    reference_ms: float | None = None
    beside: str | None = None
    speedup: float | None = None
    check: str = ""
    graphed: bool = False
    error: str = ""


Measure = Callable[[Sequence[Call], float, bool], tuple[float, bool]]


def time_row(row: Row, shape: str, results: Mapping[str, check.Result], seconds: float, measure: Measure) -> Timing:
    """One line. A red or missing check, or an exception, gives a line without a time."""
    timing = Timing(shape, row.name, row.op, target_ms=row.target_ms, beside=row.beside)
    failed = [name for name in row.checks if name not in results or not results[name].is_ok]
    if failed:
        timing.error = f"no speed: the check of {', '.join(failed)} is red"
        return timing
    timing.check = "; ".join(check.worst(results[name]) for name in row.checks)
    try:
        timing.ms, timing.graphed = measure([row.make() for _ in range(OPERAND_SETS)], seconds, row.graphed)
        timing.tflops = row.flops / timing.ms / 1e9 if row.flops else None
        timing.tb_per_s = row.bytes / timing.ms / 1e9 if row.bytes else None
        if row.reference is not None:
            timing.reference_ms = measure([row.reference()], 0.0, False)[0]
    except Exception as error:
        timing.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return timing


def time_rows(
    rows: Sequence[Row], shape: str, results: Mapping[str, check.Result], seconds: float, measure: Measure
) -> list[Timing]:
    """All lines of a shape, with speed-ups over the lines they stand beside."""
    timings: dict[str, Timing] = {}
    for row in rows:
        timing = timings[row.name] = time_row(row, shape, results, seconds, measure)
        peer = timings.get(row.beside or "")
        if timing.ms and peer and peer.ms:
            timing.speedup = peer.ms / timing.ms
    return list(timings.values())


COLUMNS = ("shape", "op", "ms", "TFLOP/s", "TB/s", "target", "reference", "beside", "check")


def cells(timing: Timing) -> list[str]:
    """A line of the table, as text."""
    if timing.ms is None:
        return [timing.shape, timing.name, timing.error]
    speeds = ("" if x is None else f"{x:.{digits}f}" for x, digits in ((timing.tflops, 0), (timing.tb_per_s, 2)))
    times = ("" if x is None else f"{x:.3g}" for x in (timing.target_ms, timing.reference_ms))
    beside = "" if timing.speedup is None else f"{timing.speedup:.2f}x {timing.beside}"
    return [timing.shape, timing.name, f"{timing.ms:.3f}", *speeds, *times, beside, timing.check + timing.error]


def table_of(timings: Sequence[Timing]) -> Table:
    """The result for the eye."""
    table = Table(title="medians; a target that is met is green; check: largest relative error against the reference")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("shape", "op", "beside", "check") else "right")
    for timing in timings:
        row = cells(timing)
        if timing.error:
            row[-1] = f"[red]{row[-1]}"
        if timing.ms is not None and timing.target_ms is not None:
            row[5] = f"[{'green' if timing.ms <= timing.target_ms else 'yellow'}]{row[5]}"
        table.add_row(*row)
    return table


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a written result, for a README."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in report["rows"]:
        timing = Timing(**row)
        line = cells(timing)
        if timing.ms is not None and timing.target_ms is not None:
            line[5] += " (met)" if timing.ms <= timing.target_ms else " (missed)"
        lines.append(" | ".join(line))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{report['gpu']}, {versions}, {report['date'][:10]}."


def environment() -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    import triton

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit.stdout.strip() or None,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the kernels, after checking them.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["s1"], help="Wan 1.3B 480p, 14B 720p")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--seconds", type=float, default=0.2, help="GPU time of each line (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default outputs/bench/<gpu>-<time>.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="time nothing: print this result as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print, write. Exit status: 0; 1 if a check is red, a line has no time, or there is no GPU."""
    options = parse(arguments)
    console = Console()
    if options.show:
        try:
            print(markdown(json.loads(options.show.read_text())))
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"failed: --show {options.show}: no result of this benchmark ({error!r})", file=sys.stderr)
            return 1
        return 0
    if not torch.cuda.is_available():
        console.print("torch sees no CUDA device: there is nothing to time")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    rows = {name: [row for row in Rows(SHAPES[name], device).all() if row.op in options.ops] for name in options.shapes}
    wanted = {name for shape in rows.values() for row in shape for name in row.checks}
    results: dict[str, check.Result] = {}
    for op in (op for op in check.ops_for(device) if op in wanted):  # what this GPU cannot run has no speed either
        results[op] = check.run_check(op, check.Case(device))
        console.print(check.describe(results[op]), markup=False, highlight=False)

    timings: list[Timing] = []
    for name, shape_rows in rows.items():
        timings += time_rows(shape_rows, name, results, options.seconds, measure)
        torch.cuda.empty_cache()
    console.print(table_of(timings))

    about = environment()
    stamp = about["date"].replace(":", "").replace("+0000", "Z")
    file = f"{tuning.table_name(about['gpu']).removesuffix('.json')}-{stamp}.json"
    path = options.output or Path("outputs") / "bench" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        **about,
        "checks": [asdict(result) for result in results.values()],
        "rows": [asdict(timing) for timing in timings],
    }
    report["launches"] = {", ".join(key): launch.to_json() for key, launch in tuning.choices().items()}
    path.write_text(json.dumps(report, indent=1))
    console.print(f"written: {path}")
    return 1 if any(timing.error for timing in timings) else 0


if __name__ == "__main__":
    sys.exit(main())

"""report.html of a run: one file, nothing fetched from anywhere, built from what the stages left in the run folder.

`run_data` gathers the files of `outputs/<run>/`, `report_sections` and `report_details` turn them into HTML; a section whose
files are missing is left out, so that a report can be written at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from turbotrain.evaluation.report_html import duration, number
from turbotrain.evaluation.report_sections import page
from turbotrain.evaluation.run_data import read_run
from turbotrain.evaluation.video import write_bytes

REPORT = "report.html"


def write_report(run_folder: str | Path) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Raises:
        ValueError: no stage of a run is in the folder. OSError: it cannot be written.
    """
    run = read_run(run_folder)
    return write_bytes(Path(run_folder) / REPORT, page(run).encode("utf-8"))


def print_rows(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """The quality table on the terminal."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model, sampler", no_wrap=True)
    for name in ("steps", "accuracy", "shuffled", "coverage", "PSNR", "SSIM", "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.get("accuracy_interval") or (None, None)
        spread = f" \N{PLUS-MINUS SIGN}{(high - low) / 2:.2f}" if low is not None and high is not None else ""
        table.add_row(
            f"{row['model']}, {row.get('sampler', 'turbo')}",
            str(row["steps"]),
            number(row.get("accuracy"), 3) + spread,
            number(row.get("accuracy_shuffled"), 2),
            number(row.get("coverage"), 2),
            number(row.get("psnr"), 1),
            number(row.get("ssim"), 2),
            duration(row.get("latency_s")),
        )
    (console or Console()).print(table)

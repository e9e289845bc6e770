"""The result's sections of report.html: headline, quality, films, attributes; each empty where the run has nothing to show.

Every string from outside (prompts, layer names, paths) is escaped; images and clips are embedded as base64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from turbotrain.evaluation.charts import Bar, Series, bar_chart, steps_chart
from turbotrain.evaluation.report_details import lineage, quantization, terms, training
from turbotrain.evaluation.report_html import (
    cell,
    describe,
    duration,
    esc,
    family,
    family_name,
    find,
    headline_row,
    key_cell,
    number,
    percent,
    percent_interval,
    size,
    steps_text,
    table,
)
from turbotrain.evaluation.report_style import CSS
from turbotrain.evaluation.run_data import RunData
from turbotrain.evaluation.video import data_uri, png_bytes, read_video, sample_frames

STRIP_FRAMES = 6
STRIP_SHARE = STRIP_FRAMES + (STRIP_FRAMES - 1) / 32  # width of a strip in clips, such that both are of one height
SMALL_PIXELS = 200  # clips narrower than this are magnified without smoothing
MOST_FILM_ROWS = 8


def page(run: RunData) -> str:
    """The whole document."""
    sections = [quality(run), films(run), attributes(run), training(run), quantization(run), lineage(run), terms(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(run.name)} · turbotrain report</title><style>{CSS}</style></head>"
        f"<body><main>{header(run)}{''.join(sections)}</main></body></html>\n"
    )


def header(run: RunData) -> str:
    """Title with the result in one line, what was compared, and where."""
    teacher, best = find(run.rows, "teacher", "teacher"), headline_row(run.rows)
    title, lead = f"Run {esc(run.name)}", ""
    if teacher and best and best.get("speedup"):
        kept = percent(best.get("relative_accuracy"))
        title = f"{best['speedup']:.0f}× faster in {steps_text(best)}" + (
            f", {kept} of the teacher’s accuracy" if kept else ""
        )
        lead = (
            f'<p class="lead">The {esc(family_name(best))} student of <b>{esc(run.variant)}</b> needs {steps_text(best)} and '
            f"{duration(best['latency_s'])} for a video where its teacher needs {teacher['steps']} guided steps and "
            f"{duration(teacher['latency_s'])}. All rows sample the same {esc(run.evaluation.get('prompts', ''))} held-out "
            "prompts with the same seeds; brackets are 95% intervals over prompts.</p>"
        )
    environment = run.evaluation.get("environment") or {}
    record = run.stages[-1].record if run.stages else {}
    recorded = record.get("environment") or {}
    facts = {
        "Run": run.name,
        "Variant": run.variant,
        "Device": environment.get("device", recorded.get("device", "")),
        "torch": environment.get("torch", ""),
        "Commit": recorded.get("commit", ""),
        "Finished": str(record.get("finished", "")).replace("T", " ").rstrip("Z"),
    }
    items = "".join(f"<li>{name} <b>{esc(value)}</b></li>" for name, value in facts.items() if value)
    start = '<header><p class="overline">turbotrain run report</p>'
    return f'{start}<h1>{title}</h1>{lead}<ul class="facts">{items}</ul></header>{tiles(run)}'


def tiles(run: RunData) -> str:
    """The five numbers to remember."""
    best, teacher = headline_row(run.rows), find(run.rows, "teacher", "teacher")
    if best is None or teacher is None:
        return ""
    before = next((stage.size for name in ("merge", "rcm", "sla") if (stage := run.stage(name)) and stage.size), 0)
    after = quantized.size if (quantized := run.stage("quantize")) else 0
    entries = [
        (
            percent(best.get("relative_accuracy")),
            "of the teacher’s accuracy",
            f"{number(best.get('accuracy'), 3)} of {number(teacher.get('accuracy'), 3)}<br>"
            f"{percent_interval(best.get('relative_accuracy_interval'))}",
        ),
        (
            f"{best['speedup']:.1f}<small>×</small>" if best.get("speedup") else "",
            "faster, noise to frames",
            f"{duration(best.get('latency_s'))} after {duration(teacher.get('latency_s'))}",
        ),
        (
            percent(best.get("gap_closed")),
            "of the gap to the teacher closed",
            percent_interval(best.get("gap_closed_interval")),
        ),
        (
            percent(best.get("relative_coverage")),
            "of the teacher’s diversity",
            f"coverage {number(best.get('coverage'), 3)} of {number(teacher.get('coverage'), 3)}",
        ),
        (
            f"{before / after:.1f}<small>×</small>" if before and after else "",
            "smaller weights on disk",
            f"{size(before)} to {size(after)}",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><div class="value">{value}</div><div class="name">{name}</div>'
        f'<div class="detail">{detail}</div></div>'
        for value, name, detail in entries
        if value
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def quality(run: RunData) -> str:
    if not run.rows:
        return ""
    figures = f'<div class="pair">{accuracy_figure(run.rows)}{latency_figure(run.rows)}</div>'
    return f"<h2>Quality and speed</h2>{figures}{quality_table(run.rows)}"


def accuracy_figure(rows: Sequence[dict[str, Any]]) -> str:
    members: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if family(row)[1] == "turbo" and row.get("accuracy") is not None:
            members.setdefault(family(row), []).append(row)
    series: list[Series] = []
    for group in members.values():
        group.sort(key=lambda row: row["steps"])
        name, css, dashed = describe(group[0])
        spans = [_span(row.get("accuracy_interval")) for row in group]
        series.append(
            Series(name, css, [row["steps"] for row in group], [row["accuracy"] for row in group], spans, dashed)
        )
    if not series:
        return ""
    teacher = find(rows, "teacher", "teacher") or {}
    reference = (
        (f"Teacher, {teacher['steps']} steps", teacher["accuracy"]) if teacher.get("accuracy") is not None else None
    )
    chance = teacher.get("accuracy_shuffled")
    chart = steps_chart(series, reference, "accuracy", None if chance is None else ("Shuffled captions", chance))
    return (
        f"<figure>{chart}<figcaption><b>Accuracy in the Turbo sampler.</b> Fraction of captioned attributes that the judge reads "
        "back from the frames. Dashed: the same sampler without distillation. Whiskers: 95% intervals.</figcaption></figure>"
    )


def latency_figure(rows: Sequence[dict[str, Any]]) -> str:
    # Undistilled rows cost what their distilled twins cost.
    timed = [row for row in rows if row.get("latency_s") and not describe(row)[2]]
    if not timed:
        return ""
    bars = [
        Bar(
            f"{family_name(row)}, {steps_text(row)}",
            row["latency_s"],
            describe(row)[1],
            duration(row["latency_s"]),
            f"{row['speedup']:.1f}×" if row.get("speedup") and row["model"] != "teacher" else "",
        )
        for row in timed
    ]
    log = max(bar.value for bar in bars) > 12 * min(bar.value for bar in bars)
    chart = bar_chart(bars, log=log, title="latency of one video")
    return (
        f"<figure>{chart}<figcaption><b>Time for one video,</b> text embedding to frames, batch 1, median of warm repeats."
        f"{' Logarithmic scale.' if log else ''}</figcaption></figure>"
    )


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    best, previous = headline_row(rows), None
    lines: list[str] = []
    for row in rows:
        css = ("group " if previous not in (None, family(row)) else "") + ("main" if row is best else "")
        previous = family(row)
        cells = [
            key_cell(row, str(row.get("quantization") or "")),
            f"<td>{row['steps']}</td>",
            cell(row.get("accuracy"), 3, row.get("accuracy_interval")),
            f"<td>{percent(row.get('relative_accuracy'))}</td><td>{percent(row.get('gap_closed'))}</td>",
            cell(row.get("accuracy_shuffled"), 3),
            cell(row.get("coverage"), 3, row.get("coverage_interval")),
            cell(row.get("psnr"), 1),
            cell(row.get("ssim"), 3),
            f"<td>{duration(row.get('latency_s'))}</td>",
            f"<td>{row['speedup']:.1f}×</td>" if row.get("speedup") else "<td></td>",
        ]
        lines.append(f'<tr class="{css.strip()}">{"".join(cells)}</tr>')
    heads = [
        "Model",
        "Steps",
        "Accuracy",
        "Of teacher",
        "Gap<br>closed",
        "Shuffled<br>captions",
        "Coverage",
        "PSNR<br>dB",
    ]
    heads += ["SSIM", "Latency", "Speed-up"]
    return table(heads, lines) + (
        '<p class="note">Undistilled rows run the Turbo sampler on networks that were never trained for it. Gap closed: from the '
        "better undistilled row of equal steps to the teacher. PSNR and SSIM compare with the teacher’s video of the same prompt "
        "and seed: a student that draws another valid video scores low.</p>"
    )


def films(run: RunData) -> str:
    shown = run.evaluation.get("clips") or {}
    prompts, seeds = shown.get("prompts", []), shown.get("seeds", [])
    complete = [row for row in run.rows if _has_clips(run, row, len(prompts))]
    rows = film_rows(complete)
    if not rows or not prompts:
        return ""
    cards: list[str] = []
    for index, prompt in enumerate(prompts):
        lines = "".join(_film_line(run, row, index) for row in rows)
        seed = f" <span>seed {esc(seeds[index])}</span>" if index < len(seeds) else ""
        caption = esc(prompt[:1].upper() + prompt[1:])
        cards.append(f'<figure class="film"><figcaption>{caption}{seed}</figcaption>{lines}</figure>')
    return (
        "<h2>Same prompt, same seed</h2><p>Held-out prompts, the first of the list and not picked. Left: the video; right: "
        f'{STRIP_FRAMES} of its frames in order of time.</p><div class="films">{"".join(cards)}</div>'
    )


def film_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Few enough rows to compare: of undistilled and intermediate students only those of the most steps."""
    if len(rows) <= MOST_FILM_ROWS:
        return rows
    most = max((row["steps"] for row in rows if family(row)[1] == "turbo"), default=0)
    best = headline_row(rows)
    final = best["model"] if best else ""
    return [row for row in rows if family(row)[1] == "teacher" or row["model"] == final or row["steps"] == most]


def attributes(run: RunData) -> str:
    rows = [row for row in run.rows if row.get("attributes")]
    names = list(dict.fromkeys(name for row in rows for name in row["attributes"]))
    if not names:
        return ""
    lines: list[str] = []
    for row in rows:
        cells = "".join(_heat(row["attributes"].get(name, {}).get("accuracy")) for name in names)
        lines.append(f"<tr>{key_cell(row)}<td>{row['steps']}</td>{cells}</tr>")
    heads = ["Model", "Steps", *(f'<span class="centre">{esc(name)}</span>' for name in names)]
    return (
        "<h2>What is kept, attribute by attribute</h2><p>The accuracy above, taken apart. Appearance can be read from one frame; "
        f"direction and speed only from several that agree.</p>{table(heads, lines)}"
    )


def transparent_strip(frames_THWC: np.ndarray) -> np.ndarray:
    """Frames side by side as (H, W', 4), with gaps that show the page, light or dark."""
    frames = sample_frames(frames_THWC, STRIP_FRAMES)
    gap = max(1, frames.shape[2] // 32)
    opaque = np.concatenate([frames, np.full((*frames.shape[:3], 1), 255, np.uint8)], axis=-1)
    padded = np.pad(opaque, ((0, 0), (0, 0), (0, gap), (0, 0)))
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def reduced(frames_THWC: np.ndarray, most: int = 320) -> np.ndarray:
    """Every n-th pixel of wide clips: a strip is a thumbnail, the clip beside it has all pixels."""
    step = max(1, math.ceil(frames_THWC.shape[2] / most))
    return frames_THWC[:, ::step, ::step]


def _film_line(run: RunData, row: dict[str, Any], index: int) -> str:
    path = run.clips[row["key"]][index]
    frames_THWC, _ = read_video(path)
    css = "small" if frames_THWC.shape[2] < SMALL_PIXELS else ""
    moving = data_uri(path.read_bytes(), path.suffix)
    strip = data_uri(png_bytes(transparent_strip(reduced(frames_THWC))), ".png")
    name, steps = esc(family_name(row)), steps_text(row)
    return (
        f'<div class="row" style="--strip:{STRIP_SHARE:.2f}fr"><span><b>{name}</b>{steps}</span>'
        f'<img class="{css}" src="{moving}" alt="{name}, {steps}, moving">'
        f'<img class="{css}" src="{strip}" alt="{name}, {steps}, {STRIP_FRAMES} frames"></div>'
    )


def _has_clips(run: RunData, row: dict[str, Any], count: int) -> bool:
    files = run.clips.get(row.get("key", ""), [])
    return len(files) == count and all(path.is_file() for path in files)


def _heat(value: float | None) -> str:
    if value is None:
        return '<td class="heat"></td>'
    return f'<td class="heat" style="background:rgba(var(--heat),{0.62 * max(0.0, value) ** 2:.3f})">{value:.2f}</td>'


def _span(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    low, high = interval or (None, None)
    return None if low is None or high is None else (low, high)

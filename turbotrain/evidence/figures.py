"""The page's figures as SVG, from the results' JSON alone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from turbotrain.evaluation.charts import Series, dot_grid, scatter_chart, standalone
from turbotrain.evaluation.report_style import FIGURE_CSS
from turbotrain.evidence.claims import SPARSE_ALONE, Key, Rows

STEPS = ("s1", "s2", "s4")
LINES = (
    ("teacher", ("s4", "s8", "s20", "s50"), "teacher, guided", "teacher"),
    ("rcm_staged", STEPS, "rCM, staged", "rcm"),
    ("scm", STEPS, "sCM", "sla-u"),
    ("dmd", STEPS, "DMD", "critic"),
    ("turbo", ("int8_1", "int8_2", "int8_4"), "Turbo (SLA 0.1, int8)", "turbo"),
)
# Of the plots against latency: the same, and what the same passes cost in other forms.
PARETO = (
    *LINES,
    ("turbo", STEPS, "SLA 0.1 + rCM", "teacher-u"),
    ("merge", STEPS, "merge", "merge"),
)
TOPK = (
    ("SLA, fine-tuned", "sla", ("sla0025", "sla005", "sla010", "sla015", "sla020", "sla030", "sla050", "sla100")),
    ("sparse alone, fine-tuned", "critic", tuple(sparse for _, _, sparse in SPARSE_ALONE)),
    ("SLA by layer, fine-tuned", "turbo", ("sla010_layers",)),
)
STRIPS: tuple[tuple[Key, str], ...] = (
    (("teacher", "s50"), "teacher, 100 evaluations"),
    (("teacher", "s4"), "teacher, 8 evaluations"),
    (("rcm_staged", "s4"), "rCM, 4"),
    (("rcm_staged", "s1"), "rCM, 1"),
    (("dmd", "s4"), "DMD, 4"),
    (("scm", "s4"), "sCM, 4"),
    (("turbo", "s4"), "SLA 0.1 + rCM, 4"),
    (("turbo", "int8_4"), "Turbo with int8, 4"),
    (("turbo", "int8_1"), "Turbo with int8, 1"),
)


CAPTIONS = {
    "evidence_pareto_accuracy.svg": "Accuracy by latency; whiskers: 95%. Latency: the row's passes times one pass of a Wan "
    "network in the row's form, as under the table. Dashed: the Pareto front of these points; none as fast is better.",
    "evidence_pareto_coverage.svg": "Coverage of start positions by the same latency; dashed: the Pareto front of these points.",
    "evidence_accuracy.svg": "Accuracy by passes through the network; whiskers: 95%, over prompts.",
    "evidence_coverage.svg": "Coverage of start positions by passes through the network.",
    "evidence_topk.svg": "Accuracy in 20 guided steps by the share of key blocks that is kept; whiskers: 95%.",
    "evidence_sqnr.svg": "Signal to quantisation noise of every linear of the Turbo student in int8; hollow: not smoothed.",
    "evidence_outliers.svg": "Largest input of every linear of the Turbo student: where outliers are.",
    "evidence_sensitivity.svg": "Relative error of the Turbo student's latents when one linear alone is in int8, not smoothed.",
    "evidence_mass.svg": "Softmax mass that the kept blocks hold in the network that is not fine-tuned, in 4 steps of the "
    "Turbo sampler, by top-k: a line a layer, the mean over its heads.",
    "evidence_films.svg": "One prompt from the same noise, six of the frames.",
}


def caption(name: str, rows: Rows) -> str:
    """Of a figure; under films also what they were to show."""
    prompt = next((row["film_prompt"] for row in rows.values() if row.get("film_prompt")), None)
    return f"{CAPTIONS[name]} Prompt: {prompt}." if name == "evidence_films.svg" and prompt else CAPTIONS[name]


def figures(rows: Rows) -> dict[str, str]:
    """{file name: SVG} of every figure for which there are rows. Quality is drawn by `latency_s`, or, where no row has one, by
    passes."""
    by_cost = {f"evidence_pareto_{metric}.svg": _by_latency(rows, metric) for metric in ("accuracy", "coverage")}
    if not any(by_cost.values()):
        by_cost = {f"evidence_{metric}.svg": _by_passes(rows, metric) for metric in ("accuracy", "coverage")}
    made = {
        **by_cost,
        "evidence_topk.svg": _topk(rows),
        "evidence_sqnr.svg": _sqnr(rows),
        "evidence_outliers.svg": _outliers(rows),
        "evidence_sensitivity.svg": _sensitivity(rows),
        "evidence_mass.svg": _mass(rows),
        "evidence_films.svg": _films(rows),
    }
    return {name: standalone(svg, FIGURE_CSS) for name, svg in made.items() if svg}


def _series(rows: Rows, lines: Sequence[tuple[str, Sequence[str], str, str]], cost: str, metric: str) -> list[Series]:
    """The lines of which there are points, rows without that cost or metric left out."""
    series = []
    for cell, names, label, css in lines:
        found = [rows[cell, name] for name in names if (cell, name) in rows]
        found = [row for row in found if row.get(cost) is not None and metric in row["metrics"]]
        if found:
            values = [row["metrics"][metric] for row in found]
            xs, intervals = [float(row[cost]) for row in found], [(v[1], v[2]) for v in values]
            series.append(Series(label, css, xs, [v[0] for v in values], intervals))
    return series


def _by_passes(rows: Rows, metric: str) -> str:
    series = _series(rows, LINES, "evaluations", metric)
    return scatter_chart(series, "network evaluations", metric, [1, 2, 4, 8, 16, 40, 100]) if len(series) > 1 else ""


def _by_latency(rows: Rows, metric: str) -> str:
    series = _series(rows, PARETO, "latency_s", metric)
    if len(series) < 2:
        return ""
    costs = [x for one in series for x in one.xs]
    front = pareto_front([point for one in series for point in zip(one.xs, one.ys)])
    # A staircase: between two points there is nothing but the cheaper one.
    stairs = [(x, y) for (begin, y), (end, _) in zip(front, [*front[1:], (max(costs), 0.0)]) for x in (begin, end)]
    drawn = Series("Pareto front", "front", [x for x, _ in stairs], [y for _, y in stairs], dashed=True, dotted=False)
    return scatter_chart([*series, drawn], "latency, s", metric, _log_ticks(min(costs), max(costs)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, quality): those than which nothing at most as costly is better, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ..., from the last that is at most `low` to the first that is at least `high`."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    first = max(index for index, tick in enumerate(ticks) if tick <= low)
    last = min(index for index, tick in enumerate(ticks) if tick >= high and index > first)
    return ticks[first : last + 1]


def _topk(rows: Rows) -> str:
    series = []
    for label, css, cells in TOPK:
        found = [rows[cell, "s20"] for cell in cells if (cell, "s20") in rows]
        series.append(_by_topk(label, css, found))
    # Rows whose layers have a top-k each are no point of this curve.
    untuned = [row for (cell, _), row in rows.items() if cell == "untuned" and not row["attention"].get("layer_topk")]
    series.append(_by_topk("SLA, not fine-tuned", "sla-u", untuned))
    series = [one for one in series if one.xs]
    teacher = rows.get(("teacher", "s20"))
    reference = ("teacher, dense", teacher["metrics"]["accuracy"][0]) if teacher else None
    return scatter_chart(series, "top-k", "accuracy", [0.025, 0.05, 0.1, 0.2, 0.5, 1.0], reference) if series else ""


def _by_topk(label: str, css: str, found: Sequence[Mapping[str, Any]]) -> Series:
    values = [row["metrics"]["accuracy"] for row in found]
    xs = [float(row["attention"]["topk"]) for row in found]
    return Series(label, css, xs, [v[0] for v in values], [(v[1], v[2]) for v in values])


def _sqnr(rows: Rows) -> str:
    layers = _fact(rows, ("turbo", "int8_4"), "sqnr_db")
    smoothed = {name: values[0] for name, values in layers.items()}
    return _by_layer(smoothed, "dB", {name: values[1] for name, values in layers.items()})


def _outliers(rows: Rows) -> str:
    return _by_layer(_log10(_fact(rows, ("turbo", "int8_4"), "input_absmax")), "log10 of the largest input")


def _sensitivity(rows: Rows) -> str:
    return _by_layer(_log10(_fact(rows, ("schemes", "int8_mixed"), "sensitivity")), "log10 of the error")


def _fact(rows: Rows, key: Key, name: str) -> Mapping[str, Any]:
    """What a row's network told of itself; {} where it told nothing."""
    return rows.get(key, {}).get("facts", {}).get(name) or {}


def _log10(values: Mapping[str, float]) -> dict[str, float]:
    return {name: math.log10(value) for name, value in values.items() if value > 0}


def _by_layer(values: Mapping[str, float], unit: str, before: Mapping[str, float] | None = None) -> str:
    """A row for every kind of linear, a dot for each block's."""
    blocks = sorted({name.split(".")[1] for name in values}, key=int)
    sites = list(dict.fromkeys(name.split(".", 2)[2] for name in values))

    def placed(numbers: Mapping[str, float]) -> dict[tuple[int, int], float]:
        split = {name: name.split(".", 2) for name in numbers}
        return {(sites.index(parts[2]), blocks.index(parts[1])): numbers[name] for name, parts in split.items()}

    return dot_grid([f"block {block}" for block in blocks], sites, placed(values), unit, placed(before or {}))


def _mass(rows: Rows) -> str:
    mass = _fact(rows, ("untuned", "topk100"), "attention_mass")
    if not mass:
        return ""
    shades = ("teacher", "sla", "rcm", "turbo", "merge", "critic")
    series = [
        Series(
            f"layer {index}",
            shades[index % len(shades)],
            mass["topk"],
            [sum(heads) / len(heads) for heads in zip(*layer)],
        )
        for index, layer in enumerate(mass["layers"])
    ]
    ticks = _log_ticks(min(mass["topk"]), max(mass["topk"]))
    return scatter_chart(series, "top-k", "attention mass kept", ticks)


def _films(rows: Rows) -> str:
    shown = [(rows[key]["film"][0], label) for key, label in STRIPS if key in rows and rows[key].get("film")]
    if not shown:
        return ""
    left, width, height = 190, 576, 96
    parts = []
    for index, (image, label) in enumerate(shown):
        y = index * (height + 6)
        parts.append(f'<text class="barlabel" x="0" y="{y + height / 2 + 4:g}">{html.escape(label)}</text>')
        place = f'x="{left}" y="{y}" width="{width}" height="{height}"'
        parts.append(f'<image {place} href="data:image/webp;base64,{image}"/>')
    total = len(shown) * (height + 6)
    return f'<svg viewBox="0 0 {left + width} {total}" role="img" aria-label="filmstrips">{"".join(parts)}</svg>'

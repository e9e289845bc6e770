"""The supporting sections of report.html: training curves, quantization, lineage, and how things were measured."""

from __future__ import annotations

import statistics
from typing import Any

from turbotrain.evaluation.charts import Series, curve_chart, dot_grid
from turbotrain.evaluation.report_html import duration, esc, is_number, number, size, table
from turbotrain.evaluation.run_data import RunData, StageData

# Terms of the rCM stage are logged under their own names; other stages have one loss.
TERMS = {
    "scm": ("consistency (scm)", "rcm"),
    "dcm": ("consistency (dcm)", "rcm"),
    "dmd": ("score (dmd)", "sla"),
    "critic": ("critic", "critic"),
}
MEASURES = {
    "Accuracy": "Mean over prompts of the fraction of captioned attributes that the judge reads right from the pixels.",
    "Shuffled captions": "The same videos judged against other prompts’ captions: what guessing would score.",
    "Coverage": "exp(entropy of the start positions over a 4×4 grid) / 16, from clips whose shape and colour are right: "
    "what captions leave free stays free.",
    "Latency": "One video, from text embedding to frames, median of warm repeats; encoding the file is not counted.",
    "Interval": "95%, percentile bootstrap over prompts; ratios are bootstrapped in pairs; coverage: jackknife.",
}


def training(run: RunData) -> str:
    figures: list[str] = []
    for stage in run.stages:
        terms_found = [term for term in TERMS if sum(is_number(row.get(term)) for row in stage.metrics) > 1]
        for term in terms_found or ["loss"]:
            rows = [row for row in stage.metrics if is_number(row.get(term))]
            if len(rows) < 2:
                continue
            name, css = TERMS.get(term, (term, "sla" if stage.name == "sla" else "turbo"))
            series = Series(name, css, [row["step"] for row in rows], [row[term] for row in rows])
            chart = curve_chart([series], y_label=name)
            title = stage.name if term == "loss" else f"{stage.name}: {name}"
            figures.append(f"<figure><h3>{esc(title)}</h3>{chart}</figure>")
    if not figures:
        return ""
    return (
        f'<h2>Training</h2><div class="trio">{"".join(figures)}</div><p class="note">Faint: every step; line: moving average. '
        "The consistency loss has a floor by construction (its target is the student itself plus a normalised tangent): "
        "its level says little.</p>"
    )


def quantization(run: RunData) -> str:
    networks = quantized_networks(run.quantization)
    sections = [_quantized_network(expert, report) for expert, report in networks.items() if report.get("layers")]
    if not sections:
        return ""
    error = run.quantization.get("latent_error")
    together = f"<p>both together: {_latents_differ(error)}.</p>" if len(networks) > 1 and is_number(error) else ""
    return f"<h2>Quantization</h2>{together}{''.join(sections)}"


def quantized_networks(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{expert: its report}, or {"": the report} of a network that is alone."""
    return {name: part for name, part in report.items() if isinstance(part, dict) and "layers" in part} or {"": report}


def _quantized_network(expert: str, report: dict[str, Any]) -> str:
    layers = quantized_layers(report)
    kinds = list(dict.fromkeys(kind for _, kind, _ in layers))
    blocks = sorted({block for block, _, _ in layers})
    measured = [(block, kind, entry["sqnr_db"]) for block, kind, entry in layers if is_number(entry["sqnr_db"])]
    values = {(kinds.index(kind), blocks.index(block)): sqnr for block, kind, sqnr in measured}
    before = {
        (kinds.index(kind), blocks.index(block)): entry["unsmoothed_sqnr_db"]
        for block, kind, entry in layers
        if is_number(entry.get("unsmoothed_sqnr_db")) and is_number(entry.get("alpha"))
    }
    chart = dot_grid([f"block {block}" for block in blocks], kinds, values, "dB", before)
    hollow = " Hollow: the same layer without SmoothQuant." if before else ""
    lines = [
        f'<tr><td class="mono">{esc(entry["name"])}</td><td class="left">{esc(entry.get("scheme", ""))}</td>'
        f"<td>{number(entry.get('alpha'), 2)}</td><td>{number(entry['sqnr_db'], 1)}</td></tr>"
        for _, _, entry in layers
    ]
    every = table(["Layer", "Scheme", "SmoothQuant α", "SQNR, dB"], lines, left=[1])
    heading = f"<h3>{esc(expert)}-noise expert</h3>" if expert else ""
    return (
        f"{heading}<p>{quantization_summary(report, layers)}</p>"
        f'<figure class="medium">{chart}<figcaption><b>Output signal to quantization noise,</b> one dot a layer, by kind of '
        f"linear. Higher is better.{hollow}</figcaption></figure><details><summary>Every layer</summary>{every}</details>"
    )


def quantization_summary(report: dict[str, Any], layers: list[tuple[int, str, dict[str, Any]]]) -> str:
    """One sentence: how many layers, how good, how many left alone, what it does to latents."""
    sqnrs = [entry["sqnr_db"] for _, _, entry in layers if is_number(entry["sqnr_db"])]
    kept = sum(entry.get("kept_float") is not None for _, _, entry in layers)
    parts = [f"{len(layers)} linears"]
    if sqnrs:
        parts.append(f"SQNR {statistics.median(sqnrs):.1f} dB in the median, {min(sqnrs):.1f} dB at the lowest")
    if kept:
        parts.append(f"{kept} left unquantized")
    latency = report.get("latency") or {}
    if all(is_number(latency.get(name)) for name in ("predicted", "target")):
        parts.append(
            f"the linears foretold to take {latency['predicted']:.3f} of their time in "
            f"{esc(latency.get('dtype', 'float'))} (wanted {latency['target']:g}) on {esc(latency.get('device', ''))}"
        )
    if is_number(report.get("latent_error")):
        parts.append(_latents_differ(report["latent_error"]))
    return "; ".join(parts) + "."


def _latents_differ(error: float) -> str:
    return f"latents on held-out prompts differ from the unquantized ones by {100 * error:.2f}%"


def quantized_layers(report: dict[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
    """(block, kind, entry) of every layer."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    for entry in report["layers"]:
        _, block, kind = entry["name"].split(".", 2)  # blocks.3.self_attn.q
        found.append((int(block), kind.replace("_attn", ""), entry))
    return found


def lineage(run: RunData) -> str:
    if not run.stages:
        return ""
    chips = [f"<li>{esc(stage.name)}<small>{esc(stage_summary(stage))}</small></li>" for stage in run.stages]
    flow = '<li class="arrow">→</li>'.join(chips)
    heads = ["Stage", "Status", "Steps", "Time", "Peak memory", "Inputs (SHA-256)", "Commit", "torch"]
    rows = table(heads, [lineage_row(stage) for stage in run.stages], left=[1, 5, 6, 7])
    return (
        f'<h2>Lineage</h2><ul class="flow">{flow}</ul>{rows}<p class="note">Each stage records the hash of every input, its '
        "settings, commit and versions; all settings are in config.yaml beside this file.</p>"
    )


def lineage_row(stage: StageData) -> str:
    record = stage.record
    environment = record.get("environment") or {}
    fingerprint = record.get("fingerprint") or {}
    inputs = {key.removeprefix("input/"): str(value) for key, value in fingerprint.items() if key.startswith("input/")}
    hashes = "<br>".join(
        f'{esc(role)} <span class="mono" title="{esc(value)}">{esc(value[:10])}</span>'
        for role, value in inputs.items()
    )
    memory, status = record.get("peak_memory_bytes"), str(record.get("status", ""))
    css = "status" if status == "done" else "status open"
    return (
        f'<tr><td><b>{esc(stage.name)}</b></td><td class="left"><span class="{css}">{esc(status)}</span></td>'
        f"<td>{len(stage.metrics) or ''}</td><td>{duration(record.get('seconds'))}</td><td>{size(memory) if memory else ''}</td>"
        f'<td class="left">{hashes}</td><td class="left mono">{esc(environment.get("commit", ""))}</td>'
        f'<td class="left">{esc(environment.get("torch", ""))}</td></tr>'
    )


def stage_summary(stage: StageData) -> str:
    parts = [
        f"{len(stage.metrics)} steps" if stage.metrics else "",
        duration(stage.record.get("seconds")),
        size(stage.size) if stage.size else "",
    ]
    return " · ".join(part for part in parts if part) or str(stage.record.get("status", ""))


def terms(run: RunData) -> str:
    """How the numbers were made, and on what."""
    if not run.rows:
        return ""
    environment = run.evaluation.get("environment") or {}
    body = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEASURES.items())
    machine = " · ".join(f"{esc(key)} {esc(value)}" for key, value in environment.items() if value not in (None, ""))
    return f'<h2>How it was measured</h2><dl class="terms">{body}</dl><footer>{machine}</footer>'

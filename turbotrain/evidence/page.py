"""docs/evidence.md and its figures, from the results' JSON alone: what is not in the file is not on the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotrain.evaluation.video import write_bytes
from turbotrain.evidence.claims import CLAIMS, Rows, judge_claim
from turbotrain.evidence.figures import CAPTIONS, figures

GROUPS = {
    "teacher": ("The teacher", "In its own sampler (UniPC, guidance: two passes a step), and undistilled in the Turbo sampler."),
    "turbo": ("Turbo", "Everything at once: sparse-linear attention, four steps or fewer, 8 bits."),
    "distillation": ("Distillation", "Dense attention; all methods make the same number of updates of the student."),
    "sla": ("Sparse-linear attention", "In the teacher's sampler at 20 steps, so that nothing but attention differs."),
    "composition": ("Composition", "Three ways to bring SLA and rCM together; sequential is the section Turbo."),
    "quantization": ("Quantisation", "The Turbo student at 4 steps, one float network in every scheme."),
}  # fmt: skip
COLUMNS = (
    ("accuracy", "accuracy"),
    ("motion", "motion"),
    ("steady", "steady"),
    ("coverage", "coverage"),
    ("spread", "spread, px"),
    ("frechet", "Frechet"),
    ("psnr", "PSNR, dB"),
    ("ssim", "SSIM"),
)
ATTRIBUTES = ("shape", "colour", "size", "direction", "speed", "background")
HEADLINE = (("teacher", "s50"), ("rcm_staged", "s4"), ("rcm_staged", "s1"), ("sla010", "s20"), ("turbo", "s4"),
            ("turbo", "int8_4"), ("turbo", "int8_2"), ("turbo", "int8_1"))  # fmt: skip
# Of Wan 2.1 1.3B at 480p on the same GPU: what one pass takes, dense and in Turbo's form.
WAN_TIMES = "h200_video_wan2.1_t2v_1.3b_480p.json"


def write_page(results: Path, page: Path) -> list[Path]:
    """Write the page and its figures (beside it, in figures/); returns the files.

    Raises:
        ValueError: `results` is no file that `run` wrote.
    """
    try:
        document = json.loads(results.read_text(encoding="utf-8"))
        rows: Rows = {(row["cell"], row["row"]): row for row in document["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{results}: not the results of an evidence run ({error!r})") from error
    drawn = figures(rows)
    written = []
    for name, svg in drawn.items():
        written.append(write_bytes(page.parent / "figures" / name, svg.encode()))
    seconds = _wan_seconds(results.parent / WAN_TIMES)
    text = "\n".join(_page(document, rows, list(drawn), seconds, results))
    return [*written, write_bytes(page, (text.rstrip() + "\n").encode())]


def _page(
    document: Mapping[str, Any], rows: Rows, drawn: Sequence[str], seconds: Mapping[str, float], results: Path
) -> list[str]:
    environment = document.get("environment", {})
    videos = document["prompts"] * document["seeds"]
    lines = [
        "# Evidence",
        "",
        "What each acceleration costs in quality, measured on a world that code can judge exactly. Written by",
        f"`python tools/evidence.py render docs/measurements/{results.name}` from that file alone: not edited by hand.",
        "",
        f"{document['prompts']:,} held-out prompts, {document['seeds']} seeds each: {videos:,} videos a row, from the same noise",
        "in every row. Values with 95% intervals over prompts (all seeds of a prompt are resampled together).",
        f"{environment.get('device', 'Unknown device')}, torch {environment.get('torch', '?')}. {len(rows)} of the",
        f"{document['planned_rows']} rows of `configs/evidence/{document['name']}.yaml` are in.",
        "",
        f"The world and the recipe: [{document['recipe']}](../recipes/{document['recipe']}.md). It is small: what holds here",
        "holds in kind, and says nothing about how Wan's own videos look; those take VBench's protocol (`tools/vbench.py`).",
        "",
        *_headline(rows, seconds, document["name"]),
        *_claims(rows),
    ]
    for name in drawn:
        lines += [f"![{CAPTIONS[name]}](figures/{name})", "", f"*{CAPTIONS[name]}*", ""]
    for group, (title, about) in GROUPS.items():
        members = [row for row in rows.values() if row["group"] == group]
        if members:
            lines += [f"## {title}", "", about, "", *_table(members), ""]
    lines += ["## By attribute", "", *_attributes(list(rows.values())), ""]
    return lines + _how(document)


def _headline(rows: Rows, seconds: Mapping[str, float], name: str) -> list[str]:
    shown = [rows[key] for key in HEADLINE if key in rows]
    if not shown:
        return []
    lines = [
        "| method | steps | passes | accuracy | coverage | the same passes through Wan 2.1 1.3B, 480p, H200 | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in shown:
        accuracy, coverage = (_value(row, name) for name in ("accuracy", "coverage"))
        figures = f"{row['steps']} | {row['evaluations']} | {accuracy} | {coverage} | {_latency(row, seconds)}"
        lines.append(f"| {row['title']} | {figures} | `--only {row['cell']}` |")
    command = f"python tools/evidence.py run configs/evidence/{name}.yaml"
    lines += ["", f"Commands are options of `{command}`; the recipe's page has the rest.", ""]
    if seconds:
        lines += [
            "The last column is arithmetic on measured times: passes times",
            f"{seconds['dense']:.3f} s (dense, bf16) or {seconds['turbo']:.3f} s (SageSLA at top-k 0.1, int8, CUDA graph), from",
            f"[`{WAN_TIMES}`](measurements/{WAN_TIMES}); forms that were not timed have none.",
            "",
        ]
    return lines


def _latency(row: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    kind = row["attention"]["kind"]
    if not seconds:
        return ""
    if kind == "dense" and not row["quantize"]:
        return f"{row['evaluations'] * seconds['dense']:.2f} s"
    if kind != "dense" and row["quantize"].get("scheme") == "int8_channel":
        return f"{row['evaluations'] * seconds['turbo']:.2f} s"
    return ""


def _wan_seconds(path: Path) -> dict[str, float]:
    """Seconds of one pass, dense and in Turbo's form; {} where the measurement is not there."""
    if not path.is_file():
        return {}
    times = json.loads(path.read_text(encoding="utf-8"))["forward"]["rows"]
    turbo = "sage_sla int8_channel, CUDA graph"
    return {"dense": times["dense"]["median_s"], "turbo": times[turbo]["median_s"]} if turbo in times else {}


def _claims(rows: Rows) -> list[str]:
    verdicts = [verdict for claim in CLAIMS if (verdict := judge_claim(claim, rows)) is not None]
    if not verdicts:
        return []
    lines = [
        "## Claims",
        "",
        "| claim | measured | by [95%] | verdict |",
        "|---|---|---|---|",
    ]
    for one in verdicts:
        against = f"{one.left:.3f} against {one.right:.3f}"
        by = f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
        lines.append(f"| {one.claim.text} | {against} | {by} | {one.word} |")
    open_ones = len(CLAIMS) - len(verdicts)
    lines += [
        "",
        "Intervals of accuracy are paired, prompt by prompt; those of coverage and spread take the two rows as independent,",
        "which is wider.",
    ]
    if open_ones:
        lines += [f"{open_ones} more claims wait for rows that have not been run."]
    return [*lines, ""]


def _table(members: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = [(name, title) for name, title in COLUMNS if any(name in row["metrics"] for row in members)]
    lines = [
        f"| method | steps | {' | '.join(title for _, title in shown)} |",
        f"|---|---|{'---|' * len(shown)}",
    ]
    for row in members:
        values = " | ".join(_value(row, name) for name, _ in shown)
        lines.append(f"| {row['title']} | {row['steps']} | {values} |")
    return lines


def _attributes(members: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| method | steps | {' | '.join(ATTRIBUTES)} |", f"|---|---|{'---|' * len(ATTRIBUTES)}"]
    for row in members:
        values = " | ".join(_value(row, name) for name in ATTRIBUTES)
        lines.append(f"| {row['title']} | {row['steps']} | {values} |")
    return lines


def _value(row: Mapping[str, Any], name: str) -> str:
    """`0.951 [0.940, 0.962]`."""
    values = row["metrics"].get(name)
    if not values or values[0] is None:
        return ""
    digits = 1 if name in ("psnr", "spread") else 2 if name == "frechet" else 3
    value, low, high = (f"{number:.{digits}f}" if number is not None else "?" for number in values)
    return f"{value} [{low}, {high}]"


def _how(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "## How it was measured",
        "",
        "- accuracy: the share of captioned attributes (shape, colour, size, direction, speed of both objects; background) that",
        "  code reads back from the pixels; motion: objects whose direction and speed are both right.",
        "  About 40 frames of a clip are read, evenly spaced from its first to its last.",
        "- steady (temporal consistency): the share of those frames in which an object lies within a pixel of its straight",
        "  path and covers its usual area within a fifth.",
        "- coverage: exp(entropy) of the 4 x 4 start cells of objects read right, over 16; captions leave the start free.",
        "  spread: mean distance in pixels between the starts of one object in two seeds of a prompt.",
        "- Frechet: between Gaussians fitted to features of a fixed random convolutional network (seeded, untrained, 128 numbers",
        f"  a clip), against {document['real']:,} rendered clips of other captions. PSNR, SSIM: to the teacher at 50 steps,",
        "  every fourth frame.",
        "- Means and ratios: bootstrap over prompts, 1,000 resamples; coverage, Frechet: jackknife over prompts.",
        "",
    ]
    training = {**document.get("base", {}), **document.get("training", {})}
    if training:
        lines += ["| trained | seconds |", "|---|---|"]
        lines += [f"| {name} | {facts.get('seconds', 0):.0f} |" for name, facts in training.items()]
        lines += ["", "Seconds of runs that shared a GPU with others."]
    if document.get("common"):
        lines += ["", "Overrides of every training: " + ", ".join(f"`{item}`" for item in document["common"]) + "."]
    return lines
